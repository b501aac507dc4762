//! What several tests use: a device that does as it is told, and a way to try an access that may raise SIGBUS.
#![allow(dead_code)] // each test uses its part

use peerspace::device::{Descriptor, Device, DeviceError, DevicePages, Load, Store};
use peerspace::{Faults, Region, Space};
use std::collections::HashMap;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) const MIB: usize = 1 << 20;
/// Bytes of a block.
pub(crate) const BLOCK: usize = 2 * MIB;

pub(crate) fn mib(n: usize) -> u64 {
    (n * MIB) as u64
}

/// Where an example is, as a program. Cargo builds them with the tests, unless it is asked for single ones.
pub(crate) fn example(name: &str) -> std::path::PathBuf {
    let test = std::env::current_exe().unwrap();
    let directory = test.parent().and_then(|p| p.parent()).unwrap().join("examples");
    let program = directory.join(name);
    if !program.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--package", env!("CARGO_PKG_NAME"), "--example", name]);
        cargo.args(cfg!(not(debug_assertions)).then_some("--release"));
        assert!(cargo.status().unwrap().success());
    }
    program
}

pub(crate) fn page() -> usize {
    rustix::param::page_size()
}

/// What a device does about a transfer.
#[derive(Clone)]
pub(crate) enum Answer {
    Good,
    /// Says this, and leaves something else in the place of the bytes.
    Fails(DeviceError),
    /// Says nothing.
    Silent,
    /// Says good when it is let through.
    Waits(Arc<Gate>),
    Panics,
}

/// Where a transfer waits.
#[derive(Default)]
pub(crate) struct Gate {
    /// Somebody has arrived; it is open.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, change: impl FnOnce(&mut (bool, bool))) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    fn wait_for(&self, what: &str, is_so: impl Fn(&(bool, bool)) -> bool) {
        let limit = Duration::from_secs(40);
        let guard = lock(&self.state);
        let (_guard, waited) = self.changed.wait_timeout_while(guard, limit, |s| !is_so(s)).unwrap();
        assert!(!waited.timed_out(), "nobody {what}");
    }

    fn pass(&self) {
        self.set(|s| s.0 = true);
        self.wait_for("opens the gate", |s| s.1);
    }

    pub(crate) fn open(&self) {
        self.set(|s| s.1 = true);
    }

    pub(crate) fn await_arrival(&self) {
        self.wait_for("has arrived", |s| s.0);
    }
}

/// A transfer: how many there were before it, the page, and the first word of its content.
pub(crate) struct Asked {
    pub(crate) nth: u64,
    pub(crate) page: u64,
    pub(crate) word: u64,
}

type Rule = Box<dyn FnMut(&Asked) -> Answer + Send>;

/// The pages of a device, which outlives the space, and its orders.
pub(crate) struct Orders {
    pages: Mutex<HashMap<u64, Box<[u8]>>>,
    loads: Mutex<Rule>,
    stores: Mutex<Rule>,
    asked: [AtomicU64; 2],
    /// Does its batches from the last to the first, and leaves them so.
    pub(crate) reversed: AtomicBool,
    /// Panics in calls that cannot fail.
    pub(crate) panics_always: AtomicBool,
    /// What the engine did that it must not.
    wrong: Mutex<Vec<String>>,
}

fn lock<T: ?Sized>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Orders {
    pub(crate) fn new() -> Arc<Orders> {
        Arc::new(Orders {
            pages: Mutex::default(),
            loads: Mutex::new(Box::new(|_| Answer::Good)),
            stores: Mutex::new(Box::new(|_| Answer::Good)),
            asked: Default::default(),
            reversed: AtomicBool::new(false),
            panics_always: AtomicBool::new(false),
            wrong: Mutex::default(),
        })
    }

    pub(crate) fn on_load(&self, rule: impl FnMut(&Asked) -> Answer + Send + 'static) {
        *lock(&self.loads) = Box::new(rule);
    }

    pub(crate) fn on_store(&self, rule: impl FnMut(&Asked) -> Answer + Send + 'static) {
        *lock(&self.stores) = Box::new(rule);
    }

    /// Pages held now.
    pub(crate) fn held(&self) -> usize {
        lock(&self.pages).len()
    }

    /// Stores and loads asked for so far.
    pub(crate) fn asked(&self) -> (u64, u64) {
        (self.asked[0].load(SeqCst), self.asked[1].load(SeqCst))
    }

    /// Fails if the engine asked for something that a device need not expect.
    pub(crate) fn check(&self) {
        let wrong = lock(&self.wrong);
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    fn is_wrong(&self, what: String) {
        lock(&self.wrong).push(what);
    }

    /// Finds out what is to be done, and does the part that all transfers have in common.
    fn decide(&self, rule: &Mutex<Rule>, kind: usize, page: u64, word: u64) -> Answer {
        let nth = self.asked[kind].fetch_add(1, SeqCst);
        let answer = lock(rule)(&Asked { nth, page, word });
        match answer {
            Answer::Panics => panic!("on purpose, at page {page}"),
            Answer::Waits(ref gate) => gate.pass(),
            _ => {}
        }
        answer
    }
}

fn result_of(answer: &Answer) -> Result<(), DeviceError> {
    match answer {
        Answer::Fails(e) => Err(e.clone()),
        Answer::Silent => Err(DeviceError::NoAnswer),
        _ => Ok(()),
    }
}

/// Memory of the program's heap, and orders to follow.
pub(crate) struct Obedient {
    pub(crate) orders: Arc<Orders>,
    pub(crate) descriptor: Descriptor,
}

impl Obedient {
    pub(crate) fn new(orders: &Arc<Orders>, bytes: usize) -> Obedient {
        let descriptor = Descriptor::private("obedient", (bytes / page()) as u64);
        Obedient { orders: orders.clone(), descriptor }
    }
}

fn first_word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

impl Device for Obedient {
    fn describe(&self) -> Descriptor {
        self.descriptor.clone()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        if self.orders.reversed.load(SeqCst) {
            batch.reverse();
        }
        // Until it went well nothing good is there: what was there before is gone too.
        for s in batch.iter() {
            for i in 0..(s.bytes.len() / page()) as u64 {
                lock(&self.orders.pages).insert(s.page + i, vec![0xee; page()].into());
            }
        }
        for s in batch {
            let answer = self.orders.decide(&self.orders.stores, 0, s.page, first_word(s.bytes));
            if !matches!(answer, Answer::Silent) {
                s.result = result_of(&answer);
            }
            if s.result.is_ok() {
                for (i, bytes) in s.bytes.chunks_exact(page()).enumerate() {
                    lock(&self.orders.pages).insert(s.page + i as u64, bytes.into());
                }
            }
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        if self.orders.reversed.load(SeqCst) {
            batch.reverse();
        }
        for l in batch {
            let mut word = u64::MAX;
            for (i, to) in l.bytes.chunks_exact_mut(page()).enumerate() {
                match lock(&self.orders.pages).get(&(l.page + i as u64)) {
                    Some(bytes) => to.copy_from_slice(bytes),
                    None => self.orders.is_wrong(format!("page {} is read but holds nothing", l.page + i as u64)),
                }
                let read = first_word(to);
                let answer = self.orders.decide(&self.orders.loads, 1, l.page + i as u64, read);
                if result_of(&answer).is_err() {
                    to.fill(0xdd);
                    word = word.min(i as u64);
                    if !matches!(answer, Answer::Silent) {
                        l.result = result_of(&answer);
                    }
                }
            }
            if word == u64::MAX {
                l.result = Ok(());
            }
        }
    }

    fn freed(&self, pages: DevicePages) {
        for p in pages.first..pages.first + pages.count {
            if lock(&self.orders.pages).remove(&p).is_none() && !self.orders.panics_always.load(SeqCst) {
                self.orders.is_wrong(format!("page {p} is freed but holds nothing"));
            }
        }
        assert!(!self.orders.panics_always.load(SeqCst), "on purpose, in freed");
    }

    fn holds(&self, number: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        assert!(!self.orders.panics_always.load(SeqCst), "on purpose, in holds");
        let pages = lock(&self.orders.pages);
        pages.get(&number).map(|held| **held == *bytes).ok_or(DeviceError::Corrupt)
    }
}

/// A space over one obedient device.
pub(crate) fn space(faults: Faults, host: usize, device: impl Device + 'static) -> Space {
    catch_lost_accesses();
    Space::builder().host(host as u64).device(device).faults(faults).build().expect("a space")
}

/// A space over 64 MiB of plain memory, with memory that the CPU addresses in place beside it.
#[cfg(all(feature = "dax", feature = "soft"))]
pub(crate) fn with_dax(
    faults: Faults,
    host: usize,
    dax: peerspace::device::dax::Dax,
) -> (Space, peerspace::DeviceId) {
    let space = space(faults, host, peerspace::device::soft::Soft::new(mib(64)).unwrap());
    let far = space.attach(dax).unwrap();
    (space, far)
}

/// Sends the blocks in `part` to a device: `want` bytes of them go. What somebody else works with just then stays where it is, on a busy
/// machine for longer than a call waits for it; so it is asked for again.
#[cfg(feature = "devices")]
#[track_caller]
pub(crate) fn assert_sent(region: &Region, part: std::ops::Range<usize>, to: peerspace::DeviceId, want: usize) {
    let begin = Instant::now();
    let mut went = region.migrate_to(part.clone(), to).unwrap();
    while went < want && begin.elapsed() < Duration::from_secs(20) {
        std::thread::yield_now();
        went = region.migrate_to(part.clone(), to).unwrap();
    }
    assert_eq!(went, want, "{part:?}");
}

/// Bytes that the CPU maps in place of a device.
pub(crate) fn in_place(space: &Space, which: usize) -> usize {
    space.statistics().devices[which].in_place_bytes as usize
}

/// What page `i` begins with, and is full of.
pub(crate) fn word(i: usize) -> u64 {
    (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) << 8 | (i as u64 & 0xff)
}

pub(crate) fn words_per_page() -> usize {
    page() / 8
}

/// Fills each page with its word.
pub(crate) fn fill(words: &mut [u64]) {
    for (i, p) in words.chunks_exact_mut(words_per_page()).enumerate() {
        p.fill(word(i));
    }
}

/// A region of `bytes` bytes that is filled so.
pub(crate) fn filled(space: &Space, bytes: usize) -> Region {
    let mut region = space.region(bytes as u64).unwrap();
    fill(region.typed_mut());
    region
}

/// Whether all of it is as it was filled.
pub(crate) fn is_filled(region: &Region) -> bool {
    let pages = region.typed::<u64>().chunks_exact(words_per_page());
    pages.enumerate().all(|(i, page)| page.iter().all(|w| *w == word(i)))
}

/// Makes what is mapped leave, by using as much of another region.
pub(crate) fn push_out(space: &Space, bytes: usize) {
    let mut other = space.region(bytes as u64).unwrap();
    for (i, p) in other.bytes_mut().chunks_exact_mut(page()).enumerate() {
        p[i % 4096] = 1;
    }
}

static CATCHING: AtomicBool = AtomicBool::new(false);

/// Has accesses that are made by [`read_byte`] fail, instead of the process. To be called before the first space.
pub(crate) fn catch_lost_accesses() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is valid, and the handler has the right type.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_lost as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
        }
        CATCHING.store(true, SeqCst);
    });
}

/// The mark of an access that is prepared for a signal.
const PREPARED: i64 = 0x6c6f_7374_2070_6167;

extern "C" fn on_lost(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the kernel passes a ucontext. An access that is marked says in r11 where to go on without it.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        if registers[libc::REG_R10 as usize] == PREPARED {
            registers[libc::REG_RIP as usize] = registers[libc::REG_R11 as usize];
            return;
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = context;
    // SAFETY: async-signal-safe; the access would only be repeated.
    unsafe { libc::_exit(128 + libc::SIGBUS) }
}

/// Reads a byte by a plain access; `None` if that raises SIGBUS.
#[cfg(target_arch = "x86_64")]
pub(crate) fn read_byte(at: *const u8) -> Option<u8> {
    assert!(CATCHING.load(SeqCst));
    let (value, ok): (u64, u64);
    // SAFETY: the caller's pointer is to memory that is mapped; if the access raises a signal, it is left out.
    unsafe {
        std::arch::asm!(
            "lea r11, [rip + 2f]",
            "movzx rax, byte ptr [rdi]",
            "mov edx, 1",
            "jmp 3f",
            "2:",
            "xor edx, edx",
            "3:",
            in("rdi") at,
            inout("r10") PREPARED => _,
            out("r11") _,
            out("rax") value,
            out("rdx") ok,
        );
    }
    (ok == 1).then_some(value as u8)
}

/// Elsewhere the typed access has to do.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn read_byte(_: *const u8) -> Option<u8> {
    None
}

/// Whether plain accesses can be tried here.
pub(crate) const CAN_TRY: bool = cfg!(target_arch = "x86_64");

/// Runs the ignored test `name` of this program in a process of its own, which must end within a minute.
pub(crate) fn in_process(name: &str, environment: &[(&str, &str)]) -> Output {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]);
    program.envs(environment.iter().copied());
    program.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = program.spawn().unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            panic!("{name} hangs: {}", said(&output));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

/// What a process has said.
pub(crate) fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout))
}
