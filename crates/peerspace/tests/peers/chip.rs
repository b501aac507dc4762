//! A device that runs code, as small as can be: a table of translations under a lock, and accesses that the test makes itself.
//!
//! An access holds the lock, so an `unmap` that has returned is over; without signals, whose handlers may bring about an
//! `unmap` themselves. It minds the contract: what is mapped, and with which permission, and it can be told to break it.
#![allow(dead_code)] // each test uses its part

use peerspace::device::mmu::{DeviceAccess, FaultError, Mapping, Mmu, MmuDescriptor, Mode, Port, Progress, Target};
use peerspace::device::{Descriptor, Device, DeviceError, DevicePages, Load, PeerCopy, Store};
use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};

pub(crate) const PAGE: u64 = 4096;

/// How a chip writes to memory of the host.
pub(crate) type HostWrite = Box<dyn Fn(&Port, u64, &[u8]) -> Result<(), FaultError> + Send + Sync>;

/// What goes wrong with a chip.
#[derive(Default)]
pub(crate) struct Trouble {
    /// Translations cannot be entered.
    pub(crate) refuse_map: AtomicBool,
    /// Translations are said to be entered, and are not.
    pub(crate) forget_map: AtomicBool,
    /// Nothing is ever unmapped, and no answer comes.
    pub(crate) never_unmap: AtomicBool,
    /// What is being unmapped is not done yet.
    pub(crate) never_done: AtomicBool,
    /// It says that it cannot unmap.
    pub(crate) refuse_unmap: AtomicBool,
    /// Stores fail; one in so many, 0 for none.
    pub(crate) bad_stores: AtomicU64,
    /// Loads fail; one in so many, 0 for none.
    pub(crate) bad_loads: AtomicU64,
    /// Loads return fewer bytes.
    pub(crate) short_loads: AtomicBool,
    /// Stores and loads are returned without a word about what became of them.
    pub(crate) unanswered: AtomicBool,
    /// Each page fails to be loaded the first time, and again after it has been loaded.
    pub(crate) every_other_load: AtomicBool,
    /// Copies from peers fail, after they have left something else in the place of the bytes.
    pub(crate) bad_peers: AtomicBool,
    /// It says when it is attached that it compares.
    pub(crate) compares: AtomicBool,
    /// It is gone.
    pub(crate) gone: AtomicBool,
    /// The function of this name panics.
    panics_in: Mutex<&'static str>,
    /// Nothing is unmapped while an access to the host is under way.
    pub(crate) minds_host: AtomicBool,
    /// Unmapping is done when it has been asked for so many times whether it is.
    pub(crate) late: AtomicU64,
    /// Memory of the host is written to in this way.
    pub(crate) host_write: OnceLock<HostWrite>,
    failed_before: Mutex<BTreeSet<u64>>,
    count: AtomicU64,
}

impl Trouble {
    fn strikes(&self, one_in: &AtomicU64) -> bool {
        let n = one_in.load(SeqCst);
        n > 0 && self.count.fetch_add(1, SeqCst) % n == n - 1
    }

    /// Has the function of this name panic from now on; none for "".
    pub(crate) fn panic_in(&self, function: &'static str) {
        *self.panics_in.lock().unwrap() = function;
    }

    /// All is well from now on, unless it is gone.
    pub(crate) fn mend(&self) {
        for flag in [&self.refuse_map, &self.forget_map, &self.never_unmap, &self.refuse_unmap, &self.short_loads] {
            flag.store(false, SeqCst);
        }
        for flag in [&self.unanswered, &self.every_other_load, &self.bad_peers] {
            flag.store(false, SeqCst);
        }
        [&self.bad_stores, &self.bad_loads, &self.late].iter().for_each(|n| n.store(0, SeqCst));
        self.panic_in("");
    }

    fn enters(&self, function: &str) {
        let panics = *self.panics_in.lock().unwrap() == function;
        assert!(!panics, "on purpose, in {function}");
    }

    fn fails_first(&self, page: u64) -> bool {
        let mut before = self.failed_before.lock().unwrap();
        self.every_other_load.load(SeqCst) && (before.insert(page) || !before.remove(&page))
    }
}

/// Keeps the signals of programs, by which tests bother devices, from this thread.
struct Quiet(libc::sigset_t);

impl Quiet {
    fn new() -> Quiet {
        // SAFETY: zeroed sets are valid, and empty.
        unsafe {
            let (mut users, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigaddset(&mut users, libc::SIGUSR1);
            libc::sigaddset(&mut users, libc::SIGUSR2);
            assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, &users, &mut before), 0);
            Quiet(before)
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // SAFETY: a set that the call has filled in.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

struct Inner {
    name: String,
    info: MmuDescriptor,
    memory: Mutex<Vec<u8>>,
    table: Mutex<BTreeMap<u64, (Target, bool)>>,
    port: OnceLock<Port>,
    fences: AtomicU64,
    /// How often it was given one.
    attached: AtomicU64,
    /// What is being unmapped by its fence, and how often it is asked for yet.
    doing: Mutex<BTreeMap<u64, (Range<u64>, u64)>>,
    trouble: Trouble,
    direct: bool,
    bytes: u64,
    /// Addresses of its own that no region may have.
    taken: Mutex<Vec<Range<u64>>>,
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
    pub(crate) peer_bytes: AtomicU64,
    pub(crate) faults: AtomicU64,
}

/// The device; a handle.
#[derive(Clone)]
pub(crate) struct Chip(Arc<Inner>);

impl Chip {
    pub(crate) fn new(name: &str, bytes: u64, info: MmuDescriptor) -> Chip {
        Chip::with(name, bytes, info, true)
    }

    /// `direct`: it copies from peers.
    pub(crate) fn with(name: &str, bytes: u64, info: MmuDescriptor, direct: bool) -> Chip {
        Chip(Arc::new(Inner {
            name: name.into(),
            info,
            memory: Mutex::new(vec![0xcc; bytes as usize]),
            table: Mutex::default(),
            port: OnceLock::new(),
            fences: AtomicU64::new(0),
            attached: AtomicU64::new(0),
            doing: Mutex::default(),
            trouble: Trouble::default(),
            direct,
            bytes,
            taken: Mutex::default(),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            peer_bytes: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        }))
    }

    pub(crate) fn exclusive(name: &str, bytes: u64) -> Chip {
        Chip::new(name, bytes, MmuDescriptor::new(Mode::Exclusive))
    }

    pub(crate) fn trouble(&self) -> &Trouble {
        &self.0.trouble
    }

    pub(crate) fn port(&self) -> &Port {
        self.0.port.get().expect("attached")
    }

    /// How often it was given a port.
    pub(crate) fn attached(&self) -> u64 {
        self.0.attached.load(SeqCst)
    }

    pub(crate) fn take_addresses(&self, range: Range<u64>) {
        self.0.taken.lock().unwrap().push(range);
    }

    /// Bytes that came to the device, left it, and came from peers.
    pub(crate) fn moved(&self) -> [u64; 3] {
        [&self.0.bytes_in, &self.0.bytes_out, &self.0.peer_bytes].map(|n| n.load(SeqCst))
    }

    pub(crate) fn faults(&self) -> u64 {
        self.0.faults.load(SeqCst)
    }

    /// What the page of `va` is mapped to.
    pub(crate) fn target(&self, va: u64) -> Option<(Target, bool)> {
        self.0.table.lock().unwrap().get(&(va / PAGE * PAGE)).copied()
    }

    /// One access, in one page.
    fn access(
        &self,
        va: u64,
        how: DeviceAccess,
        mut bytes: impl FnMut(&mut [u8]),
        len: usize,
    ) -> Result<(), FaultError> {
        assert!(va % PAGE + len as u64 <= PAGE);
        loop {
            {
                let quiet = Quiet::new();
                let table = self.0.table.lock().unwrap();
                match table.get(&(va / PAGE * PAGE)).copied() {
                    Some((Target::Own(page), writable)) if writable || how == DeviceAccess::Read => {
                        let at = (page * PAGE + va % PAGE) as usize;
                        bytes(&mut self.0.memory.lock().unwrap()[at..at + len]);
                        return Ok(());
                    }
                    Some((Target::Zero, _)) if how == DeviceAccess::Read => {
                        bytes(&mut vec![0; len]);
                        return Ok(());
                    }
                    Some((Target::Host, writable))
                        if how == DeviceAccess::Read || writable && how == DeviceAccess::Write =>
                    {
                        let table = self.0.trouble.minds_host.load(SeqCst).then_some((table, quiet));
                        let mut buffer = vec![0; len];
                        let done = match how {
                            DeviceAccess::Read => self.port().read(va, &mut buffer).map(|()| bytes(&mut buffer)),
                            _ => {
                                bytes(&mut buffer);
                                match self.0.trouble.host_write.get() {
                                    Some(write) => write(self.port(), va, &buffer),
                                    None => self.port().write(va, &buffer),
                                }
                            }
                        };
                        drop(table);
                        match done {
                            Err(FaultError::NotMapped(_)) => {}
                            done => return done,
                        }
                    }
                    _ => {}
                }
            }
            self.0.faults.fetch_add(1, SeqCst);
            self.port().fault(va, how)?;
        }
    }

    pub(crate) fn read(&self, va: u64, to: &mut [u8]) -> Result<(), FaultError> {
        let len = to.len();
        self.access(va, DeviceAccess::Read, |bytes| to.copy_from_slice(bytes), len)
    }

    pub(crate) fn write(&self, va: u64, from: &[u8]) -> Result<(), FaultError> {
        self.access(va, DeviceAccess::Write, |bytes| bytes.copy_from_slice(from), from.len())
    }

    pub(crate) fn load(&self, va: u64) -> Result<u64, FaultError> {
        let mut word = [0; 8];
        self.read(va, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    pub(crate) fn store(&self, va: u64, word: u64) -> Result<(), FaultError> {
        self.write(va, &word.to_le_bytes())
    }

    /// Adds to a word in one step.
    pub(crate) fn add(&self, va: u64, n: u64) -> Result<(), FaultError> {
        let add = |bytes: &mut [u8]| {
            let word = u64::from_le_bytes(bytes.try_into().unwrap()) + n;
            bytes.copy_from_slice(&word.to_le_bytes());
        };
        self.access(va, DeviceAccess::Atomic, add, 8)
    }

    /// Has no translation of these addresses any more.
    fn forget(&self, addresses: Range<u64>) {
        let mut table = self.0.table.lock().unwrap();
        let gone: Vec<u64> = table.range(addresses).map(|(va, _)| *va).collect();
        gone.iter().for_each(|va| assert!(table.remove(va).is_some()));
    }

    fn range(&self, page: u64, len: usize) -> Option<Range<usize>> {
        let at = (page * PAGE) as usize;
        (at as u64 + len as u64 <= self.0.bytes).then(|| at..at + len)
    }
}

impl Device for Chip {
    fn describe(&self) -> Descriptor {
        let mut info = Descriptor::private(self.0.name.clone(), self.0.bytes / PAGE);
        info.takes_evicted = false;
        info.compares = self.0.trouble.compares.load(SeqCst);
        info
    }

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        let range = self.range(page, bytes.len()).ok_or(DeviceError::Unsupported)?;
        Ok(self.0.memory.lock().unwrap()[range] == *bytes)
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        self.0.trouble.enters("store");
        for store in batch {
            let trouble = &self.0.trouble;
            if trouble.unanswered.load(SeqCst) {
                continue;
            }
            store.result = match self.range(store.page, store.bytes.len()) {
                _ if trouble.gone.load(SeqCst) => Err(DeviceError::Gone),
                _ if trouble.strikes(&trouble.bad_stores) => Err(DeviceError::Io(5)),
                None => Err(DeviceError::Unsupported),
                Some(range) => {
                    self.0.memory.lock().unwrap()[range].copy_from_slice(store.bytes);
                    self.0.bytes_in.fetch_add(store.bytes.len() as u64, SeqCst);
                    Ok(())
                }
            };
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        self.0.trouble.enters("load");
        for load in batch {
            let trouble = &self.0.trouble;
            if trouble.unanswered.load(SeqCst) {
                continue;
            }
            load.result = match self.range(load.page, load.bytes.len()) {
                _ if trouble.gone.load(SeqCst) => Err(DeviceError::Gone),
                _ if trouble.strikes(&trouble.bad_loads) => Err(DeviceError::Io(5)),
                _ if trouble.fails_first(load.page) => Err(DeviceError::Io(5)),
                _ if trouble.short_loads.load(SeqCst) => Err(DeviceError::Short { got: 7, wanted: load.bytes.len() }),
                None => Err(DeviceError::Unsupported),
                Some(range) => {
                    load.bytes.copy_from_slice(&self.0.memory.lock().unwrap()[range]);
                    self.0.bytes_out.fetch_add(load.bytes.len() as u64, SeqCst);
                    Ok(())
                }
            };
        }
    }

    fn freed(&self, _: DevicePages) {
        self.0.trouble.enters("freed");
    }

    fn mmu(&self) -> Option<&dyn Mmu> {
        self.0.trouble.enters("mmu");
        Some(self)
    }

    fn clear(&self, pages: DevicePages) -> Result<(), DeviceError> {
        self.0.trouble.enters("clear");
        match self.range(pages.first, (pages.count * PAGE) as usize) {
            _ if self.0.trouble.gone.load(SeqCst) => Err(DeviceError::Gone),
            None => Err(DeviceError::Unsupported),
            Some(range) => {
                self.0.memory.lock().unwrap()[range].fill(0);
                Ok(())
            }
        }
    }

    fn copy_from(&self, peer: &dyn Device, batch: &mut [PeerCopy]) {
        self.0.trouble.enters("copy_from");
        let peer = peer.as_any().and_then(|any| any.downcast_ref::<Chip>());
        for copy in batch {
            if self.0.trouble.bad_peers.load(SeqCst) {
                let to = copy.to as usize..(copy.to + copy.bytes) as usize;
                self.0.memory.lock().unwrap()[to].fill(0xdd);
                copy.result = Err(DeviceError::Io(5));
                continue;
            }
            copy.result = match peer {
                Some(peer) if self.0.direct && peer.0.direct && !peer.0.trouble.gone.load(SeqCst) => {
                    let from = copy.from as usize..(copy.from + copy.bytes) as usize;
                    let bytes = peer.0.memory.lock().unwrap()[from].to_vec();
                    let to = copy.to as usize..(copy.to + copy.bytes) as usize;
                    self.0.memory.lock().unwrap()[to].copy_from_slice(&bytes);
                    self.0.peer_bytes.fetch_add(copy.bytes, SeqCst);
                    Ok(())
                }
                _ => Err(DeviceError::Unsupported),
            };
        }
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

impl Mmu for Chip {
    fn describe(&self) -> MmuDescriptor {
        self.0.info.clone()
    }

    fn attached(&self, port: Port) {
        self.0.trouble.enters("attached");
        let _ = self.0.port.set(port);
        self.0.attached.fetch_add(1, SeqCst);
    }

    fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        self.0.trouble.enters("map");
        if self.0.trouble.refuse_map.load(SeqCst) {
            return Err(DeviceError::Io(12));
        }
        if self.0.trouble.forget_map.load(SeqCst) {
            return Ok(());
        }
        let mut table = self.0.table.lock().unwrap();
        for m in batch {
            for i in 0..m.bytes / PAGE {
                let to = match m.to {
                    Target::Own(page) => Target::Own(page + i),
                    to => to,
                };
                table.insert(m.va + i * PAGE, (to, m.writable));
            }
        }
        Ok(())
    }

    fn unmap(&self, addresses: Range<u64>) -> Result<Progress, DeviceError> {
        self.0.trouble.enters("unmap");
        if self.0.trouble.refuse_unmap.load(SeqCst) {
            return Err(DeviceError::Io(16));
        }
        if self.0.trouble.never_unmap.load(SeqCst) {
            return Ok(Progress::Pending(1));
        }
        let late = self.0.trouble.late.load(SeqCst);
        if late > 0 {
            let fence = self.0.fences.fetch_add(1, SeqCst);
            self.0.doing.lock().unwrap().insert(fence, (addresses, late));
            return Ok(Progress::Pending(fence));
        }
        self.forget(addresses);
        Ok(Progress::Done)
    }

    fn is_done(&self, fence: u64) -> Result<bool, DeviceError> {
        self.0.trouble.enters("is_done");
        let mut doing = self.0.doing.lock().unwrap();
        let Some((addresses, left)) = doing.get_mut(&fence) else { return Ok(false) };
        *left = left.saturating_sub(1);
        if *left > 0 || self.0.trouble.never_unmap.load(SeqCst) || self.0.trouble.never_done.load(SeqCst) {
            return Ok(false);
        }
        self.forget(addresses.clone());
        doing.remove(&fence);
        Ok(true)
    }

    fn release(&self, _: Range<u64>) {
        self.0.trouble.enters("release");
    }

    fn take_accessed(&self, _: Range<u64>) -> bool {
        self.0.trouble.enters("take_accessed");
        false
    }

    fn reserve(&self, addresses: Range<u64>) -> bool {
        self.0.trouble.enters("reserve");
        self.0.taken.lock().unwrap().iter().all(|t| t.end <= addresses.start || addresses.end <= t.start)
    }
}
