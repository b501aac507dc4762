//! Forks (rule G12): parent and child both keep all data, what lived on devices included.
//!
//! Before the fork the engine is brought to rest, so that the child's copy of all its tables is consistent. Private
//! memory is copied by the kernel: mapped pages, staged pages, and the stores of devices that keep theirs in RAM.
//! What the child does not get is the registration of its pages, threads, and whatever devices share by descriptor;
//! it sets these up anew before a single instruction of the program runs there.
//!
//! A child whose faults are to be delivered to threads has none at first, and starting one touches the C library's
//! heap, which may be managed itself. Until its threads run, its faults therefore come by signal.
//!
//! Files are shared read-only from then on, and each side writes to one of its own. Pages that a fork shares cannot be moved:
//! they are made the process's own first.

use crate::engine::tiers::ForkSide;
use crate::space::{Real, start_threads};
use peerspace_core::addr::{Access, PageRange, Pages, VaRange, Vpn};
use peerspace_core::entry::State;
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_os::linux::fork::{ForkHandler, early_child_memory};
use peerspace_os::linux::signal;
use peerspace_os::linux::{Delivery, Kept, exit_now};
use peerspace_os::own::{Shared, Vec};
use peerspace_os::{Kernel, OsError, own};
use std::sync::{Mutex, PoisonError};

/// Pages held across a fork because the C library touches them in the child before anybody can serve a fault.
pub(crate) struct Held(Mutex<Vec<PageRange>>);

impl Held {
    pub(crate) const fn new() -> Held {
        Held(Mutex::new(Vec::new_in(own::Own)))
    }

    fn hold_early_memory(&self, engine: &Real) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.clear();
        early_child_memory(&mut |range: VaRange| {
            for vpn in engine.geometry.pages_out(range).iter() {
                let page = PageRange::new(vpn, Pages(1));
                // What is left in place is there for whoever touches it; the turn is taken, so it is not held.
                if engine.region(vpn).is_some()
                    && !is_in_place(engine, vpn)
                    && engine.hold_pages(page, Access::Write).is_ok()
                {
                    held.push(page);
                }
            }
        });
    }

    /// Lets the pages go, in either process.
    pub(crate) fn let_go(&self, engine: &Real) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.drain(..).for_each(|page| engine.let_go(page));
    }
}

/// Before a fork: brings `engine` to rest.
pub(crate) fn come_to_rest(engine: &Real, held: &Held) {
    // Nothing is put in place from here on.
    let turn = engine.take_turn();
    engine.leave_shared_memory(&turn);
    turn.keep();
    held.hold_early_memory(engine);
    loop {
        engine.settle_changes();
        engine.contexts.freeze();
        // What a change has moved is not yet where the table says: the child would never hear of it.
        if !engine.kernel.is_changing() && !is_launching(engine) {
            break;
        }
        engine.contexts.thaw();
        std::thread::yield_now();
    }
    // Devices go on in the parent alone: what they map they would change under the child. Nobody can map anything now.
    engine.recall_all();
    // A frame that lies ready would be shared by both, and worth nothing to either.
    while engine.release_ready() {}
    engine.tiers.before_fork();
}

/// After a fork, in the parent: lets `engine` go on.
pub(crate) fn go_on(engine: &Real, held: &Held) {
    engine.tiers.after_fork(ForkSide::Parent);
    engine.inplace.is_left_behind();
    engine.contexts.thaw();
    engine.reopen_shared_memory();
    engine.give_up_turn();
    held.let_go(engine);
}

/// After a fork, in the child: registers everything anew. The engine is still at rest then, and has no threads. With
/// `by_signal`, faults come by signal for the time being.
pub(crate) fn new_life(engine: &Real, by_signal: bool) -> Result<(), OsError> {
    engine.begin_life();
    if engine.inplace.is_left_behind() {
        return Err(OsError::plain("it shares memory of a device with the process it was forked from"));
    }
    let mut gone: Vec<VaRange> = Vec::new_in(own::Own);
    engine.kernel.renew(by_signal, regions(engine), &mut |r| gone.push(r))?;
    for range in gone {
        engine.forget_range(range, &engine.contexts.all()[0].as_ref().counters);
    }
    engine.tiers.after_fork(ForkSide::Child);
    Ok(())
}

/// Whether a device works on pages that it relies on.
fn is_launching(engine: &Real) -> bool {
    #[cfg(feature = "devices")]
    return engine.launches.any();
    #[cfg(not(feature = "devices"))]
    {
        let _ = engine;
        false
    }
}

fn is_in_place(engine: &Real, vpn: Vpn) -> bool {
    let state = engine.table.look(vpn).map(|(entry, _)| entry.state());
    matches!(state, Some(State::Coherent { .. }))
}

fn regions(engine: &Real) -> impl Iterator<Item = (VaRange, Kept)> + '_ {
    // What is persistent is the same memory for both, and needs nothing of us: as long as it is in place.
    let persistent = |region: &RegionInfo| region.attributes.has(Attributes::PERSISTENT);
    let kept = |region: &RegionInfo| match region.attributes.has(Attributes::IN_PLACE) {
        true => Kept::InPlace,
        false => Kept::Movable,
    };
    let own = engine.regions.iter().filter(move |r| !persistent(r)).map(move |r| (r.range, kept(&r)));
    let taken = engine.regions.iter().filter(move |r| persistent(r));
    let taken = taken.flat_map(move |r| r.range.by_block().filter(move |piece| !is_in_place(engine, piece.start)));
    own.chain(taken.map(|r| (r, Kept::Movable))).map(|(r, kept)| (engine.addresses(r), kept))
}

/// The engine of a space, and what it takes to set it going in a child.
pub(crate) struct Forks {
    engine: Shared<Real>,
    #[cfg(feature = "devices")]
    ports: std::sync::Arc<crate::ports::Ports>,
    handlers: usize,
    held: Held,
}

impl Forks {
    pub(crate) fn new(
        engine: Shared<Real>,
        #[cfg(feature = "devices")] ports: std::sync::Arc<crate::ports::Ports>,
        handlers: usize,
    ) -> Forks {
        Forks {
            engine,
            #[cfg(feature = "devices")]
            ports,
            handlers,
            held: Held::new(),
        }
    }

    fn set_up_child(&self) -> Result<(), OsError> {
        #[cfg(feature = "devices")]
        self.ports.renew();
        let engine = &self.engine;
        let bootstrap = engine.kernel.delivery() == Delivery::Messages;
        new_life(engine, bootstrap)?;
        engine.contexts.thaw();
        let start = || {
            start_threads(engine, engine.kernel.delivery(), self.handlers, None)
                .map(drop)
                .map_err(|e| OsError::plain(format!("start a thread in a forked process: {e}")))
        };
        if bootstrap {
            let inline = signal::register(engine.clone());
            let inline = inline.map_err(|_| OsError::plain("handle SIGBUS in a forked process"))?;
            signal::with_sigbus(start)?;
            drop(inline);
            // The threads still wait, and this one does not touch managed memory: nothing is missed in between.
            engine.kernel.renew(false, regions(engine), &mut |_| {})?;
        } else {
            start()?;
        }
        engine.service.go(&engine.kernel.park());
        self.held.let_go(engine);
        Ok(())
    }
}

impl ForkHandler for Forks {
    fn before(&self) {
        come_to_rest(&self.engine, &self.held);
    }

    fn parent(&self) {
        go_on(&self.engine, &self.held);
    }

    fn child(&self) {
        if let Err(e) = self.set_up_child() {
            // To go on would mean zeros in the place of data.
            crate::tell::warning(format_args!("a forked process cannot go on: {e}"));
            exit_now(125);
        }
    }
}
