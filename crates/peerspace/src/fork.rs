//! Forks (rule G12): parent and child both keep all data, what lived on devices included.
//!
//! Before the fork the engine is brought to rest, so that the child's copy of all its tables is consistent. Private
//! memory is copied by the kernel: mapped pages, staged pages, and the stores of devices that keep theirs in RAM.
//! What the child does not get is the registration of its pages, threads, and whatever devices share by descriptor;
//! it sets these up anew before a single instruction of the program runs there.
//!
//! A child whose faults are to be delivered to threads has none at first, and starting one touches the C library's
//! heap, which may be managed itself. Until its threads run, its faults therefore come by signal.

use crate::device::ForkSide;
use crate::space::{Real, start_threads};
use peerspace_core::addr::{Access, PageRange, Pages, VaRange};
use peerspace_os::linux::fork::{ForkHandler, early_child_memory};
use peerspace_os::linux::signal;
use peerspace_os::linux::{Delivery, exit_now};
use peerspace_os::own::{Shared, Vec};
use peerspace_os::{Kernel, OsError, own};
use std::sync::Mutex;

/// An engine, and what it takes to set it going in a child.
pub(crate) struct Forks {
    pub(crate) engine: Shared<Real>,
    pub(crate) handlers: usize,
    /// Pages held across the fork because the C library touches them in the child before anybody can serve a fault.
    held: Mutex<Vec<PageRange>>,
}

impl Forks {
    pub(crate) fn new(engine: Shared<Real>, handlers: usize) -> Forks {
        Forks { engine, handlers, held: Mutex::new(Vec::new_in(own::Own)) }
    }

    fn hold_early_memory(&self) {
        let engine = &self.engine;
        let mut held = self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        held.clear();
        early_child_memory(&mut |range: VaRange| {
            for vpn in engine.geometry.pages_out(range).iter() {
                let page = PageRange::new(vpn, Pages(1));
                if engine.region(vpn).is_some() && engine.hold_pages(page, Access::Write).is_ok() {
                    held.push(page);
                }
            }
        });
    }

    fn let_go(&self) {
        let mut held = self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        held.drain(..).for_each(|page| self.engine.let_go(page));
    }

    fn set_up_child(&self) -> Result<(), OsError> {
        let engine = &self.engine;
        let regions = || engine.regions.iter().map(|r| engine.addresses(r.range));
        engine.begin_life();
        let bootstrap = engine.kernel.delivery() == Delivery::Messages;
        let mut gone: Vec<VaRange> = Vec::new_in(own::Own);
        engine.kernel.renew(bootstrap, regions(), &mut |r| gone.push(r))?;
        for range in gone {
            engine.forget_range(range, &engine.contexts.all()[0].as_ref().counters);
        }
        engine.tiers.after_fork(ForkSide::Child);
        engine.contexts.thaw();
        let start = || {
            start_threads(engine, self.handlers)
                .map_err(|e| OsError::plain(format!("start a thread in a forked process: {e}")))
        };
        if bootstrap {
            let inline = signal::register(engine.clone());
            let inline = inline.map_err(|_| OsError::plain("handle SIGBUS in a forked process"))?;
            signal::with_sigbus(start)?;
            drop(inline);
            // The threads still wait, and this one does not touch managed memory: nothing is missed in between.
            engine.kernel.renew(false, regions(), &mut |_| {})?;
        } else {
            start()?;
        }
        engine.service.go(&engine.kernel.park());
        self.let_go();
        Ok(())
    }
}

impl ForkHandler for Forks {
    fn before(&self) {
        let engine = &self.engine;
        self.hold_early_memory();
        loop {
            engine.settle_changes();
            engine.contexts.freeze();
            // What a change has moved is not yet where the table says: the child would never hear of it.
            if !engine.kernel.is_changing() {
                break;
            }
            engine.contexts.thaw();
        }
        // A frame that lies ready would be shared by both, and worth nothing to either.
        while engine.release_ready() {}
        engine.tiers.before_fork();
    }

    fn parent(&self) {
        self.engine.tiers.after_fork(ForkSide::Parent);
        self.engine.contexts.thaw();
        self.let_go();
    }

    fn child(&self) {
        if let Err(e) = self.set_up_child() {
            // To go on would mean zeros in the place of data.
            crate::tell::warning(format_args!("a forked process cannot go on: {e}"));
            exit_now(125);
        }
    }
}
