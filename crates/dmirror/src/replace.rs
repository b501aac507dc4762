//! Memory that cannot be taken out of its mapping, so that it may migrate all the same: what may only be read, and what the program
//! has written to a private mapping of a file.
//!
//! The kernel moves pages out of anonymous memory that can be written, and out of nothing else. So the pages are copied to new
//! memory of that kind; the copy migrates; then its mapping, protected like the old one, is put in the old one's place, each page in
//! one step. What is there to be read is the same at any moment.
//!
//! What may only be read does not change meanwhile. The pages of a private file do: they are made read-only first, and a thread
//! that writes is held, by a handler of SIGSEGV, until it can. (A system call that writes there meanwhile fails with EFAULT.)
//! From then on that part of the mapping is anonymous memory: what the program discards of it reads as zeros, not as the file.
//!
//! Nobody else changes mappings meanwhile ([`crate::changes`]).

use crate::changes;
use crate::device::PAGE;
use crate::world::{World, world};
use peerspace::{Node, Residence};
use peerspace_core::addr::{Va, VaRange};
use peerspace_os::linux::remap;
use peerspace_os::linux::scan::{Nature, Vma};
use peerspace_os::linux::self_memory::read_self;
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes replaced at once: writers wait for as long as that takes.
const PIECE: u64 = 8 << 20;
/// New memory lies at the same place in a block as what it replaces, so that huge pages stay such.
const BLOCK: u64 = 512 * PAGE;

/// Whether the pages of a mapping that the program may read migrate only by being replaced.
fn is_eligible(vma: &Vma) -> bool {
    let plain = vma.read && !vma.execute && !vma.shared && vma.page_bytes <= PAGE;
    plain && !matches!(vma.nature(), Nature::Stack | Nature::Special) && (vma.file || !vma.write)
}

/// Migrates to `to` what can be of a part of a mapping, if it is of such a kind; else does nothing. What another mirror has stays
/// there.
///
/// # Errors
/// When the kernel refuses something; the memory is as it was.
pub(crate) fn send(
    world: &World,
    part: VaRange,
    to: Node,
    on_a_mirror: &dyn Fn(Residence) -> bool,
) -> Result<(), Errno> {
    for piece in pieces(part) {
        changes::alone(|| {
            // As it is now, and stays until this is over.
            let Some(vma) = world.mapping_from(piece.start.0).filter(|vma| vma.range.start <= piece.start) else {
                return Ok(());
            };
            if !is_eligible(&vma) || vma.range.end < piece.end {
                return Ok(());
            }
            let wanted = match vma.file {
                true => world.copied(piece)?,
                false => vec![piece],
            };
            let stays = |range: &VaRange| world.parts(*range, |view| !on_a_mirror(view.residence));
            for run in wanted.iter().flat_map(stays) {
                replace(world, run, &vma, to)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn pieces(part: VaRange) -> impl Iterator<Item = VaRange> {
    let start = part.start.0;
    let cuts = std::iter::successors(Some(start), move |at| Some((at / PIECE + 1) * PIECE))
        .take_while(move |at| *at < part.end.0);
    cuts.map(move |at| VaRange { start: Va(at), end: Va(((at / PIECE + 1) * PIECE).min(part.end.0)) })
}

/// New anonymous memory, unmapped when dropped.
struct Fresh {
    all: VaRange,
    range: VaRange,
    /// So many bytes of what was at `range` are elsewhere, and whatever is there now is somebody else's.
    gone: u64,
}

impl Fresh {
    /// As long as `like`, and at the same place in a block.
    fn new(like: VaRange) -> Result<Fresh, Errno> {
        let len = like.len() + 2 * BLOCK;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: memory that nobody has yet.
        let at = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len as usize, ProtFlags::READ | ProtFlags::WRITE, flags)
        }?;
        let all = VaRange { start: Va(at as u64), end: Va(at as u64 + len) };
        let start = all.start.0.next_multiple_of(BLOCK) + like.start.0 % BLOCK;
        Ok(Fresh { all, range: VaRange { start: Va(start), end: Va(start + like.len()) }, gone: 0 })
    }

    /// Copies what is at `from`.
    fn copy(&self, from: VaRange) -> Result<(), Errno> {
        let mut done = 0;
        while done < from.len() {
            let at = (self.range.start.0 + done) as *mut u8;
            // SAFETY: its own memory, zeros as yet; nobody else knows of it.
            let to = unsafe { std::slice::from_raw_parts_mut(at, (from.len() - done) as usize) };
            match read_self(from.start.0 + done, to)? {
                0 => return Err(Errno::FAULT),
                n => done += n as u64,
            }
        }
        Ok(())
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        let (all, range) = (self.all, self.range);
        let rest = VaRange { start: Va(range.start.0 + self.gone), ..range };
        for part in [VaRange { end: range.start, ..all }, rest, VaRange { start: range.end, ..all }] {
            if !part.is_empty() {
                // It may be managed, and what a coherent device has of it in place.
                let _announced =
                    world().map(|world| world.space.announce(part.start.0 as *const u8, part.len() as usize));
                // SAFETY: mapped by `new`, and nobody refers to it. Refusal leaks addresses.
                let _ = unsafe { rustix::mm::munmap(part.start.0 as *mut c_void, part.len() as usize) };
            }
        }
    }
}

/// Puts a copy of `run` in its place, that migrates before.
fn replace(world: &World, run: VaRange, vma: &Vma, to: Node) -> Result<(), Errno> {
    let protect = |range: VaRange, write: bool| {
        let allowed = if write { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        // SAFETY: of the program's memory, which it may go on to access as before but for the time that writers are held.
        unsafe { rustix::mm::mprotect(range.start.0 as *mut c_void, range.len() as usize, allowed) }
    };
    let mut fresh = Fresh::new(run)?;
    let len = run.len() as usize;
    let _held = vma.write.then(|| Held::new(run));
    if vma.write {
        let _announced = world.space.announce(run.start.0 as *const u8, len);
        protect(run, false)?;
    }
    let replaced = (|| {
        fresh.copy(run)?;
        if let Some((part, e)) = world.adopt_unmanaged(fresh.range) {
            return Err(world.refused(Errno::NOMEM, part, &e));
        }
        let (from, to_start) = (fresh.range.start.0 as *const u8, run.start.0 as *const u8);
        // What does not go is in RAM, and as good.
        if let Err(e) = world.space.migrate(from, len, to) {
            world.refused(Errno::NOENT, run, &e);
        }
        let _announced = world.space.announce_move((from, len), (to_start, len));
        if !vma.write {
            protect(fresh.range, false)?;
        }
        // Of what was migrated, or came home, the kernel may have made several mappings.
        // SAFETY: takes the place of what holds the same, each page in one step.
        let (moved, result) = unsafe { remap::move_to(fresh.range, run.start) };
        // What has not moved stays as it was, with the same in it.
        fresh.gone = moved;
        result
    })();
    if fresh.gone > 0 {
        world.space.settle();
    }
    match replaced {
        Ok(()) => Ok(()),
        Err(e) => {
            if vma.write {
                let _announced = world.space.announce(run.start.0 as *const u8, len);
                protect(run, true)?;
            }
            Err(world.refused(e, run, &"it cannot be put into memory that migrates"))
        }
    }
}

/// The addresses at which writers are held just now; zeros for none. Only one thread [changes](changes::alone) them.
static HELD: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// Writers to a range wait as long as this lives.
struct Held;

impl Held {
    fn new(range: VaRange) -> Held {
        HELD[0].store(range.start.0, Ordering::SeqCst);
        HELD[1].store(range.end.0, Ordering::SeqCst);
        handler::install();
        Held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD[1].store(0, Ordering::SeqCst);
        HELD[0].store(0, Ordering::SeqCst);
    }
}

/// The handler of SIGSEGV.
mod handler {
    use super::*;
    use std::mem::MaybeUninit;
    use std::sync::atomic::AtomicPtr;
    use std::time::Duration;

    /// What was there before ours, in memory that stays: when it was entered last, and the first time.
    static BEFORE: [AtomicPtr<libc::sigaction>; 2] = [const { AtomicPtr::new(std::ptr::null_mut()) }; 2];
    /// In the last word of what is known of a signal, which the kernel leaves zero: this handler has had it, and has had it twice. A
    /// handler that the program has entered since may call the one before it, which is this.
    const HAD: [u64; 2] = [0x6d69_7272_6f72_0001, 0x6d69_7272_6f72_0002];

    /// Sees to it that ours is the handler. It stays: a thread may yet be on its way to it.
    pub(super) fn install() {
        let mut now = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: asks for what is there.
        let now = unsafe {
            libc::sigaction(libc::SIGSEGV, std::ptr::null(), now.as_mut_ptr());
            now.assume_init()
        };
        let ours = on_fault as *const () as usize;
        if now.sa_sigaction == ours {
            return;
        }
        let before = Box::into_raw(Box::new(now));
        BEFORE[0].store(before, Ordering::SeqCst);
        let _ = BEFORE[1].compare_exchange(std::ptr::null_mut(), before, Ordering::SeqCst, Ordering::SeqCst);
        let mut action = now;
        action.sa_sigaction = ours;
        action.sa_flags |= libc::SA_SIGINFO | libc::SA_ONSTACK;
        // Held in the handler, a thread is not to be interrupted by what may fault there, too.
        // SAFETY: a set of our own, and a handler that lives as long as this library.
        unsafe {
            libc::sigfillset(&mut action.sa_mask);
            libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut());
        }
    }

    /// Whether the program may write at `va`, as its mappings are now.
    fn may_write(va: u64) -> bool {
        let vma = world().and_then(|world| world.mapping_from(va));
        vma.is_some_and(|vma| vma.range.contains(Va(va)) && vma.write)
    }

    extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        const NOT_ALLOWED: c_int = 2;
        // SAFETY: what the kernel passes.
        let (va, code) = unsafe { ((*info).si_addr() as u64, (*info).si_code) };
        let held = || {
            let start = HELD[0].load(Ordering::SeqCst);
            start <= va && va < HELD[1].load(Ordering::SeqCst)
        };
        if code == NOT_ALLOWED {
            let errno = peerspace_os::linux::interpose::errno();
            while held() {
                std::thread::sleep(Duration::from_micros(50));
            }
            let again = may_write(va);
            peerspace_os::linux::interpose::set_errno(errno);
            if again {
                // It was held while it was on its way here.
                return;
            }
        }
        // SAFETY: what the kernel passes, or a copy of it, is as long as that.
        let had = unsafe { info.cast::<u64>().byte_add(size_of::<libc::siginfo_t>() - 8) };
        // SAFETY: as above.
        let times = HAD.iter().position(|word| *word == unsafe { had.read_unaligned() }).map_or(0, |n| n + 1);
        let before = BEFORE.get(times).map_or(std::ptr::null_mut(), |before| before.load(Ordering::SeqCst));
        // SAFETY: a zeroed action is the default.
        let default = unsafe { std::mem::zeroed() };
        // SAFETY: entered by `install`, and never freed.
        let before = unsafe { before.as_ref() }.unwrap_or(&default);
        // SAFETY: as the kernel would have called it, or has the default done.
        unsafe {
            had.write_unaligned(HAD[times.min(1)]);
            match before.sa_sigaction {
                libc::SIG_DFL | libc::SIG_IGN => {
                    libc::sigaction(signal, before, std::ptr::null_mut());
                }
                handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
                    type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
                    std::mem::transmute::<usize, Handler>(handler)(signal, info, context);
                }
                handler => std::mem::transmute::<usize, extern "C" fn(c_int)>(handler)(signal),
            }
        }
    }
}
