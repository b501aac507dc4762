//! A space: what a program creates first, and what its regions and devices belong to.

#[cfg(feature = "devices")]
use crate::device::Device;
use crate::engine::serve::Helper;
use crate::engine::tiers::OpenDevice;
use crate::engine::{self, Config, Engine, MIN_LIMIT};
use crate::error::Error;
use crate::fork::Forks;
use crate::region::Region;
use crate::report::Statistics;
#[cfg(feature = "devices")]
use crate::spec::{DeviceSpec, SpecError, own};
use peerspace_core::addr::{Access, Geometry, Va};
use peerspace_core::reclaim::{Policy, S3Fifo};
use peerspace_core::regions::Attributes;
use peerspace_os::linux::signal::{FaultHandler, Registration, register, with_sigbus};
use peerspace_os::linux::thread::Thread;
use peerspace_os::linux::{Delivery, Linux, Setup, fork, thread};
use peerspace_os::own::{Box as OwnBox, Own, Shared, Vec as OwnVec};
use peerspace_os::{Kernel, Wake};
use rustix::process::{Pid, getpid};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// The engine over a real kernel.
pub(crate) type Real = Engine<Linux>;

/// How faults reach a space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Faults {
    /// By threads where this process may have system calls served too, by signal otherwise. What was chosen:
    /// [`Space::faults`].
    #[default]
    Auto,
    /// By SIGBUS in the faulting thread: three to five microseconds, no privilege. A system call that meets a page
    /// that is not there fails with EFAULT: see [`Space::make_resident`].
    Signal,
    /// By threads of the engine. Serves the kernel's own accesses, so that any memory can be handed to any system
    /// call. Needs root, `vm.unprivileged_userfaultfd`, or access to `/dev/userfaultfd`.
    Threads,
}

/// Makes a [`Space`].
///
/// ```no_run
/// use peerspace::{Space, device::compressed::Compressed};
///
/// let space = Space::builder().host(256 << 20).device(Compressed::new(1 << 30)?).build()?;
/// let mut region = space.region(1 << 30)?;
/// region.bytes_mut()[123_456_789] = 7;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a builder makes nothing until it is built"]
pub struct Builder {
    host: u64,
    faults: Faults,
    devices: OwnVec<OpenDevice>,
    policy: Option<OwnBox<dyn Policy<<Linux as Kernel>::Words>>>,
    handlers: usize,
    without: u64,
    pin_limit: Option<u64>,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("host", &self.host).field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl Builder {
    /// How much RAM the space's memory may take up, in bytes.
    pub fn host(self, bytes: u64) -> Builder {
        Builder { host: bytes, ..self }
    }

    /// Adds a device. Devices are tried in the order in which they are added.
    ///
    /// The device is moved out of the program's heap. What it has allocated itself stays where it is, and must
    /// never be managed by a space: see [`device`](crate::device).
    #[cfg(feature = "devices")]
    pub fn device(mut self, device: impl Device + 'static) -> Builder {
        self.devices.push(own(device));
        self
    }

    /// Adds a device as it is written on a command line. A size that is left out follows from the
    /// [budget](Builder::host), which is therefore to be set before.
    ///
    /// # Errors
    /// When the device cannot be had, or this build is without it.
    #[cfg(feature = "devices")]
    pub fn spec(mut self, spec: &DeviceSpec) -> Result<Builder, SpecError> {
        self.devices.push(spec.open(self.host)?);
        Ok(self)
    }

    /// How faults reach the space.
    pub fn faults(self, faults: Faults) -> Builder {
        Builder { faults, ..self }
    }

    /// Another policy for choosing what leaves RAM. [`S3Fifo`] otherwise.
    pub fn policy(mut self, policy: impl Policy<<Linux as Kernel>::Words> + 'static) -> Builder {
        self.policy = Some(allocator_api2::unsize_box!(OwnBox::new_in(policy, Own)));
        self
    }

    /// How many bytes may be kept [resident](Space::make_resident) at once; three quarters of the budget otherwise. What
    /// goes beyond the budget exceeds it.
    pub fn pin_limit(self, bytes: u64) -> Builder {
        Builder { pin_limit: Some(bytes), ..self }
    }

    /// How many threads serve faults when they are delivered to [threads](Faults::Threads). One for each two
    /// processors otherwise, from two to eight.
    pub fn handlers(self, n: usize) -> Builder {
        Builder { handlers: n, ..self }
    }

    /// Does without userfaultfd features (bits as in `<linux/userfaultfd.h>`) although the kernel has them: to
    /// find out how a space works on an older kernel.
    pub fn without_features(self, bits: u64) -> Builder {
        Builder { without: bits, ..self }
    }

    /// Makes the space.
    ///
    /// # Errors
    /// When the budget is too small to work, there is no device, or this system does not allow it.
    pub fn build(self) -> Result<Space, Error> {
        let page = rustix::param::page_size() as u64;
        let geometry = Geometry::from_page_bytes(page).unwrap_or(Geometry::KIB4);
        let limit = geometry.pages_in(self.host);
        if limit < MIN_LIMIT {
            return Err(Error::BudgetTooSmall { given: self.host, least: geometry.bytes(MIN_LIMIT) });
        }
        // Frames have 32-bit numbers.
        let most = peerspace_core::addr::Pages(1 << 29);
        if limit > most {
            return Err(Error::BudgetTooLarge { given: self.host, most: geometry.bytes(most) });
        }
        if cfg!(feature = "devices") && self.devices.is_empty() {
            return Err(Error::NoDevice);
        }
        let (blocks, slots) = engine::staging_layout(limit);
        let open = |delivery| Linux::open(Setup { delivery, blocks, slots, without: self.without });
        let kernel = match self.faults {
            Faults::Signal => open(Delivery::Signal)?,
            Faults::Threads => open(Delivery::Messages)?,
            Faults::Auto => open(Delivery::Messages).or_else(|_| open(Delivery::Signal))?,
        };
        let policy = self.policy.unwrap_or_else(|| allocator_api2::unsize_box!(OwnBox::new_in(S3Fifo::new(), Own)));
        let ram = geometry.pages_in(peerspace_os::linux::probe::ram_bytes());
        let config = Config { limit, ram, devices: self.devices, policy, contexts: usual_contexts() };
        let engine = Engine::new(kernel, config)?;
        if let Some(bytes) = self.pin_limit {
            engine.budget.set_most_pinned(geometry.pages_in(bytes));
        }
        let handlers = if self.handlers == 0 { usual_handlers() } else { self.handlers };
        Space::start(Shared::new(engine), handlers)
    }
}

/// One virtual address space for the CPU and its devices.
///
/// Memory of a space is used through ordinary references and pointers; what does not fit into the
/// [budget](Builder::host) lives on the devices and comes back when it is touched. A `Space` is a handle: clones
/// are the same space, and it lives until the last handle and the last region are gone.
///
/// # Threads and signals
///
/// With [`Faults::Signal`], SIGBUS must not be blocked in any thread that touches the space's memory, and a program
/// that installs a SIGBUS handler of its own does so before it makes its first space.
#[derive(Clone)]
pub struct Space {
    service: Arc<Service>,
}

/// The engine with everything that serves it. Dropped, it ends all of that.
struct Service {
    engine: Shared<Real>,
    #[cfg(feature = "devices")]
    ports: Arc<crate::ports::Ports>,
    _forks: Option<fork::Registration<Forks>>,
    registration: Option<Registration<Real>>,
    threads: Vec<Thread>,
    hired: Arc<Hired>,
    /// The process that started `threads`: in a forked one they do not exist.
    pid: Pid,
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How many threads serve faults where nobody has said it.
pub(crate) fn usual_handlers() -> usize {
    (processors() / 2).clamp(2, 8)
}

/// How many threads may be in an engine's hands at once; more wait.
pub(crate) fn usual_contexts() -> usize {
    (2 * processors() + 6).min(128)
}

/// A loop that a thread of a space runs, and the thread's name.
type Loop<K> = (&'static str, fn(&Engine<K>));

/// The loops without which the program could not go on: they receive what the kernel sends by `delivery`.
fn receiving<K: Kernel>(delivery: Delivery, handlers: usize) -> OwnVec<Loop<K>> {
    let (one, n): (Loop<K>, _) = match delivery {
        Delivery::Signal => (("peerspace-changes", Engine::serve_changes), 1),
        Delivery::Messages => (("peerspace-faults", Engine::serve_messages), handlers),
    };
    let mut loops = OwnVec::new_in(Own);
    loops.resize(n, one);
    loops
}

fn start_each<K: Kernel>(
    engine: &Shared<Engine<K>>,
    loops: impl IntoIterator<Item = Loop<K>>,
) -> std::io::Result<Vec<Thread>> {
    let start = |(name, run): Loop<K>| {
        let engine = engine.clone();
        thread::spawn(name, move || run(&engine))
    };
    loops.into_iter().map(start).collect()
}

/// Starts the threads that serve `engine`, which gets its faults by `delivery`. Those that are hired later are put into `hired`
/// or, in a forked process, left alone.
pub(crate) fn start_threads<K: Kernel>(
    engine: &Shared<Engine<K>>,
    delivery: Delivery,
    handlers: usize,
    hired: Option<Arc<Hired>>,
) -> std::io::Result<Vec<Thread>> {
    let mut threads = start_each(engine, receiving(delivery, handlers))?;
    let of_thread = engine.clone();
    threads.push(thread::spawn("peerspace-reclaim", move || {
        of_thread.serve_reclaim(|helper| hire(&of_thread, helper, hired.as_deref()));
    })?);
    Ok(threads)
}

/// The threads that were started after the others.
pub(crate) type Hired = Mutex<Vec<Thread>>;

fn hire<K: Kernel>(engine: &Shared<Engine<K>>, helper: Helper, hired: Option<&Hired>) {
    let name = match helper {
        Helper::Ahead => "peerspace-ahead",
        // Blocks of its kind need no thread where there are none.
        Helper::Collapse if !engine.has_huge() => return,
        Helper::Collapse => "peerspace-collapse",
        #[cfg(feature = "devices")]
        Helper::Send => "peerspace-send",
        Helper::Watch => "peerspace-watch",
    };
    let of_thread = engine.clone();
    // The program's heap may be managed, and its faults come by signal.
    match (with_sigbus(|| thread::spawn(name, move || of_thread.serve(helper))), hired) {
        (Ok(thread), Some(hired)) => hired.lock().unwrap_or_else(PoisonError::into_inner).push(thread),
        (Ok(_), None) => {}
        (Err(e), _) => {
            crate::tell::warning(format_args!("{name} cannot be started, the program goes on without: {e}"))
        }
    }
}

impl<K: Kernel> FaultHandler for Engine<K> {
    fn fault(&self, va: Va, access: Access) -> bool {
        use crate::engine::fault::{Outcome, Patience};
        match Engine::fault(self, va, access, Wake::No, Patience::Waits) {
            Ok(Outcome::Foreign) => self.fill_unknown(va),
            outcome => matches!(outcome, Ok(Outcome::Resolved)),
        }
    }
}

impl Space {
    /// Begins to make a space.
    pub fn builder() -> Builder {
        Builder {
            host: 0,
            faults: Faults::Auto,
            devices: OwnVec::new_in(Own),
            policy: None,
            handlers: 0,
            without: 0,
            pin_limit: None,
        }
    }

    fn start(engine: Shared<Real>, handlers: usize) -> Result<Space, Error> {
        let mut service = Service {
            engine,
            #[cfg(feature = "devices")]
            ports: Arc::default(),
            _forks: None,
            registration: None,
            threads: Vec::new(),
            hired: Arc::default(),
            pid: getpid(),
        };
        if service.engine.kernel.delivery() == Delivery::Signal {
            let e = |_| Error::Thread("SIGBUS cannot be handled, or there are too many spaces".into());
            service.registration = Some(register(service.engine.clone()).map_err(e)?);
        }
        // On failure the service is dropped, which ends the threads that run already.
        let delivery = service.engine.kernel.delivery();
        service.threads = start_threads(&service.engine, delivery, handlers, Some(service.hired.clone()))
            .map_err(|e| Error::Thread(e.to_string()))?;
        let forks = fork::register(Shared::new(Forks::new(
            service.engine.clone(),
            #[cfg(feature = "devices")]
            service.ports.clone(),
            handlers,
        )));
        service._forks = Some(forks.map_err(|_| Error::Thread("there are too many spaces".into()))?);
        let space = Space { service: Arc::new(service) };
        #[cfg(feature = "devices")]
        for id in space.devices() {
            space.connect(id)?;
        }
        Ok(space)
    }

    /// How faults reach this space: never [`Faults::Auto`].
    pub fn faults(&self) -> Faults {
        match self.engine().kernel.delivery() {
            Delivery::Signal => Faults::Signal,
            Delivery::Messages => Faults::Threads,
        }
    }

    /// Maps a region of at least `bytes` bytes: zeros, none of them in RAM yet.
    ///
    /// Takes the same time for any size.
    ///
    /// # Errors
    /// For no bytes, more than the address space has, or more regions than a process can have mappings.
    pub fn region(&self, bytes: u64) -> Result<Region, Error> {
        self.region_with(bytes, Attributes::default())
    }

    pub(crate) fn region_with(&self, bytes: u64, attributes: Attributes) -> Result<Region, Error> {
        Region::new(self.clone(), bytes, attributes)
    }

    /// What the space is doing.
    pub fn statistics(&self) -> Statistics {
        Statistics::of(self.engine())
    }

    /// Walks everything and checks the engine's invariants. Nothing else may use the space meanwhile. For tests.
    ///
    /// # Panics
    /// When one does not hold.
    pub fn check(&self) {
        self.engine().check();
    }

    #[cfg(feature = "devices")]
    pub(crate) fn ports(&self) -> &crate::ports::Ports {
        &self.service.ports
    }

    pub(crate) fn engine(&self) -> &Shared<Real> {
        &self.service.engine
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        #[cfg(feature = "devices")]
        self.ports.cut_all();
        self.engine.stop();
        if self.pid != getpid() {
            // Those that were hired stay where they are: the parent's reclaimer may have had the lock.
            std::mem::forget(self.hired.clone());
            return self.threads.drain(..).for_each(std::mem::forget);
        }
        // A thread that panicked has said so. When the reclaimer has ended, nobody is hired any more.
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for thread in self.hired.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").field("faults", &self.faults()).finish_non_exhaustive()
    }
}
