//! The accelerator as its user and the engine see it: making one, launching kernels, and moving pages to and from its
//! memory.

use super::core::{AcceleratorStatistics, Core, Handle, invalid};
use super::error::{KernelError, LaunchError};
use super::failure::Failure;
use super::lane::Lane;
use super::link::{Way, between};
use super::options::Options;
use super::queue::{Job, Kernel, run_lane};
use crate::device::mmu::Mmu;
use crate::device::{
    Descriptor, Device, DeviceError, DevicePages, ForkSide, Load, MemoryType, PeerCopy, SharedMemory, Store, Usage,
};
use peerspace_os::Trouble;
use peerspace_os::linux::thread::spawn_for_program;
use peerspace_os::own::{Box, Own, Shared};
use std::any::Any;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// A device in software that runs code: memory of its own, an MMU, threads that are its lanes, and a queue of kernels.
///
/// Clones are the same device. It is attached like any other device, by a clone, and kernels are launched with another:
///
/// ```
/// use peerspace::Space;
/// use peerspace::device::soft::{Accelerator, KernelError, Lane, Options};
///
/// let gpu = Accelerator::new(Options::new(64 << 20))?;
/// let space = Space::builder().host(8 << 20).device(gpu.clone()).build()?;
/// let mut region = space.region(1 << 20)?;
/// let numbers: &mut [u64] = region.typed_mut();
/// numbers.iter_mut().enumerate().for_each(|(i, n)| *n = i as u64);
///
/// // The same pointer is valid there.
/// let at = numbers.as_ptr() as u64;
/// // SAFETY: the memory stays, and nobody uses it until the job has ended.
/// let job = unsafe {
///     gpu.launch(numbers.len() as u64, move |lane: &Lane, items| {
///         for i in items {
///             let n: u64 = lane.load(at + 8 * i)?;
///             lane.store(at + 8 * i, n + 1)?;
///         }
///         Ok(())
///     })
/// }?;
/// job.wait()?;
/// assert!(numbers.iter().enumerate().all(|(i, n)| *n == i as u64 + 1));
/// # Ok::<(), std::boxed::Box<dyn std::error::Error>>(())
/// ```
///
/// When the last clone goes, the kernel that runs is run to its end, those behind it end with [`KernelError::Stopped`], and so
/// do the lanes. Nobody waits for them.
///
/// In a forked process there are no lanes. The device still gives back what it holds; launches fail with
/// [`LaunchError::Forked`]. What it takes up there stays taken up until that process ends.
#[derive(Debug, Clone)]
pub struct Accelerator {
    handle: Shared<Handle>,
}

impl Accelerator {
    /// A device like this. Its threads are started by the first launch.
    ///
    /// # Errors
    /// When there is no address space for its memory or its page table.
    pub fn new(options: Options) -> Result<Accelerator, Trouble> {
        Ok(Accelerator { handle: Shared::new(Handle(Shared::new(Core::new(options)?))) })
    }

    /// What the lanes keep as well.
    #[cfg(all(test, not(shuttle)))]
    pub(super) fn handle_core(&self) -> Shared<Core> {
        self.handle.0.clone()
    }

    pub(super) fn core(&self) -> &Core {
        &self.handle.0
    }

    /// Puts a kernel into the queue: `kernel` is called for all of the numbers `0..items`, in runs of some, by all lanes at the
    /// same time and in no order. Kernels run one after the other, as they were launched. An error or panic ends a kernel: runs
    /// that have not begun are left out.
    ///
    /// Calling threads, memory of the host and so on are none of a kernel's business: it gets at the program's memory by
    /// its [`Lane`], which finds it wherever it is. What it captures is dropped when it has ended, before waiting for it ends.
    ///
    /// # Safety
    /// A kernel reads and writes the program's memory by address, like a thread that uses raw pointers. What it accesses must
    /// be there, for it to access in this way, as long as it runs; what it writes must be valid for whoever reads it.
    ///
    /// # Errors
    /// [`LaunchError`]; nothing was launched then.
    pub unsafe fn launch<F>(&self, items: u64, kernel: F) -> Result<Job, LaunchError>
    where
        F: Fn(&Lane, Range<u64>) -> Result<(), KernelError> + Send + Sync + 'static,
    {
        let core = self.core();
        core.launchable()?;
        core.queue.start(core.lanes.len(), |index| {
            let core = self.handle.0.clone();
            spawn_for_program("peerspace-lane", move || run_lane(core, index)).map(drop)
        })?;
        let kernel: Kernel = allocator_api2::unsize_box!(Box::new_in(kernel, Own));
        Ok(core.queue.push(core, items, kernel))
    }

    /// What it has done so far.
    pub fn statistics(&self) -> AcceleratorStatistics {
        self.core().statistics()
    }

    /// Bytes of its memory.
    pub fn bytes(&self) -> u64 {
        self.core().bytes
    }

    /// Bytes that its page tables take up. They stay until the device goes.
    pub fn table_bytes(&self) -> u64 {
        self.core().table.bytes()
    }

    /// Makes it fail in this way when `after` more requests have gone well, until it is [mended](Accelerator::mend). For tests
    /// of programs that must survive such a device.
    pub fn fail_at(&self, failure: Failure, after: u64) {
        self.core().failures.set(failure, after);
        if failure == Failure::Gone && after == 0 {
            self.core().epoch.bar(super::core::GONE);
        }
    }

    /// It fails in this way no more.
    pub fn mend(&self, failure: Failure) {
        self.core().mend(failure);
    }
}

impl Core {
    /// Makes one transfer of `bytes` at `page`, if they are there, and the device is.
    fn transfer(&self, page: u64, bytes: u64, copy: impl FnOnce(usize)) -> Result<(), DeviceError> {
        self.alive()?;
        copy(self.place(page, bytes)?);
        self.moved.transfers.fetch_add(1, Relaxed);
        Ok(())
    }

    fn copy(&self, peer: &Core, copy: &PeerCopy) -> Result<(), DeviceError> {
        self.alive()?;
        if !std::ptr::eq(self, peer) {
            peer.alive()?;
        }
        let inside = |core: &Core, at: u64| at.checked_add(copy.bytes).is_some_and(|end| end <= core.bytes);
        if !inside(self, copy.to) || !inside(peer, copy.from) {
            return Err(invalid());
        }
        self.memory.copy_from(copy.to as usize, &peer.memory, copy.from as usize, copy.bytes as usize);
        if copy.bytes > 0 {
            self.touched.touch(copy.to >> self.page_shift..((copy.to + copy.bytes - 1) >> self.page_shift) + 1);
        }
        self.moved.transfers.fetch_add(1, Relaxed);
        self.moved.from_peers.fetch_add(copy.bytes, Relaxed);
        Ok(())
    }
}

impl Device for Accelerator {
    fn describe(&self) -> Descriptor {
        let core = self.core();
        let device = Descriptor::private(core.options.name.clone(), core.bytes >> core.page_shift)
            .capacity_bytes(core.bytes)
            .compares()
            .in_ram();
        let memory = if core.options.coherent { MemoryType::Coherent } else { MemoryType::Private };
        Descriptor { memory, takes_evicted: core.options.takes_evicted, ..device }
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        let core = self.core();
        let sent = core.wire.now();
        let mut bytes = 0;
        for store in batch {
            let len = store.bytes.len() as u64;
            store.result = core.transfer(store.page, len, |at| core.memory.write(at, store.bytes));
            if store.result.is_ok() {
                core.touched.touch(store.page..store.page + len.div_ceil(core.page()));
                bytes += len;
            }
        }
        core.moved.into.fetch_add(bytes, Relaxed);
        core.wire.arrive(Way::In, bytes, sent);
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        let core = self.core();
        let sent = core.wire.now();
        let mut bytes = 0;
        for load in batch {
            let len = load.bytes.len() as u64;
            load.result = core.transfer(load.page, len, |at| core.memory.read(at, load.bytes));
            if load.result.is_ok() {
                bytes += len;
            }
        }
        core.moved.out.fetch_add(bytes, Relaxed);
        core.wire.arrive(Way::Out, bytes, sent);
    }

    fn freed(&self, _: DevicePages) {}

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        let core = self.core();
        core.alive()?;
        let at = core.place(page, bytes.len() as u64)?;
        let sent = core.wire.now();
        let holds = core.memory.holds(at, bytes);
        // The answer comes by the link: the comparison is made on the host.
        core.moved.out.fetch_add(bytes.len() as u64, Relaxed);
        core.wire.arrive(Way::Out, bytes.len() as u64, sent);
        Ok(holds)
    }

    fn usage(&self) -> Option<Usage> {
        Some(self.core().touched.usage(self.core().page()))
    }

    fn mmu(&self) -> Option<&dyn Mmu> {
        Some(self)
    }

    fn shared(&self, page: u64) -> Option<SharedMemory<'_>> {
        let core = self.core();
        let file = core.memory.file().filter(|_| !core.foreign.load(Relaxed))?;
        Some(SharedMemory { file, offset: page << core.page_shift })
    }

    fn clear(&self, pages: DevicePages) -> Result<(), DeviceError> {
        let core = self.core();
        core.alive()?;
        let bytes = pages.count.checked_mul(core.page()).ok_or_else(invalid)?;
        core.memory.clear(core.place(pages.first, bytes)?, bytes as usize);
        core.touched.touch(pages.first..pages.first + pages.count);
        Ok(())
    }

    fn copy_from(&self, peer: &dyn Device, batch: &mut [PeerCopy]) {
        let Some(peer) = peer.as_any().and_then(|peer| peer.downcast_ref::<Accelerator>()) else {
            batch.iter_mut().for_each(|copy| copy.result = Err(DeviceError::Unsupported));
            return;
        };
        let (core, peer) = (self.core(), peer.core());
        let sent = (peer.wire.now(), core.wire.now());
        let mut bytes = 0;
        for copy in batch {
            copy.result = core.copy(peer, copy);
            if copy.result.is_ok() {
                bytes += copy.bytes;
            }
        }
        // Within one memory nothing goes by the link.
        if !std::ptr::eq(core, peer) {
            between(&peer.wire, &core.wire, bytes, sent);
        }
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn before_fork(&self) {
        self.core().hold_lanes();
    }

    fn after_fork(&self, side: ForkSide) {
        if side == ForkSide::Child {
            self.core().forget_lanes();
            // What was there has moved elsewhere before; from here on each process has memory of its own.
            self.core().foreign.store(self.core().memory.renew().is_err(), Relaxed);
        }
        self.core().release_lanes(super::core::FORKING);
    }
}
