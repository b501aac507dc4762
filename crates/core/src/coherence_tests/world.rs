//! What the model's world is made of: one page, its places, who maps it, and the engine's work on it.
//!
//! A place holds what was written last, or it does not: nothing else about contents matters. Zeros are right as long as the page
//! is *blank*, that is never written since it was made or discarded.

use crate::addr::{DevicePfn, Pfn};
use crate::entry::{Entry, State};
use crate::memmap::Backing;
use crate::sharers::{MmuId, Sharers};

/// Devices at most.
pub(super) const MOST: usize = 3;

/// Where the page's bytes can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// The frame of the host, mapped or on standby.
    Frame,
    /// A page of a tier that runs no code.
    Tier,
    /// The page of a device for data.
    Page(u8),
    /// The page of a device for a copy.
    Copy(u8),
}

impl Place {
    fn bit(self) -> u8 {
        1 << match self {
            Place::Frame => 0,
            Place::Tier => 1,
            Place::Page(d) => 2 + d,
            Place::Copy(d) => 5 + d,
        }
    }

    /// The number it has in table words.
    pub(super) fn pfn(self) -> DevicePfn {
        DevicePfn::new(Pfn(match self {
            Place::Tier => 2,
            Place::Page(d) => 16 + d as u64,
            Place::Frame | Place::Copy(_) => unreachable!("{self:?} stands in no word as a page of a device"),
        }))
    }

    pub(super) fn of(pfn: DevicePfn) -> Place {
        match pfn.pfn().0 {
            2 => Place::Tier,
            n => Place::Page((n - 16) as u8),
        }
    }

    /// Whose memory it is, if it is that of a device that runs code.
    pub(super) fn device(self) -> Option<usize> {
        match self {
            Place::Page(d) | Place::Copy(d) => Some(d as usize),
            Place::Frame | Place::Tier => None,
        }
    }
}

/// The number of the only frame.
pub(super) const FRAME: Pfn = Pfn(1);

/// What the CPU maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Cpu {
    Nothing,
    Read,
    Write,
    /// The page of the tier or of a device, to read and to write.
    InPlace,
}

/// What a device maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Pte {
    Nothing,
    Own,
    Copy,
    Frame {
        writable: bool,
    },
    Zeros,
    /// What is in place, of another device or (`None`) of the tier: through the port, to read and to write.
    InPlace {
        of: Option<u8>,
    },
}

impl Pte {
    pub(super) fn writes(self) -> bool {
        matches!(self, Pte::Own | Pte::Frame { writable: true } | Pte::InPlace { .. })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Health {
    Fine,
    /// It answers nothing any more, and may go on using what it maps. Nobody knows yet.
    Hung,
    /// Quarantined.
    Cut,
}

/// An access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    Read,
    /// Of a part of the page: the rest is to be what it was.
    Write,
    Atomic,
}

/// An access that is under way, by the translation that there was when it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Flight {
    pub(super) by: Pte,
    pub(super) kind: Kind,
}

impl Flight {
    /// It is made through the port, by code of ours, and ends whatever the device does.
    pub(super) fn by_port(self) -> bool {
        matches!(self.by, Pte::Frame { .. } | Pte::InPlace { .. })
    }
}

/// A device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Device {
    pub(super) pte: Pte,
    pub(super) flight: Option<Flight>,
    pub(super) health: Health,
}

/// Where a clean frame's content can be had again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kept {
    Nowhere,
    Zeros,
    At(Place),
}

impl Kept {
    pub(super) fn backing(self) -> Backing {
        match self {
            Kept::Nowhere => Backing::None,
            Kept::Zeros => Backing::Zero,
            Kept::At(place) => Backing::Page(place.pfn()),
        }
    }

    pub(super) fn device(self) -> Option<usize> {
        match self {
            Kept::At(place) => place.device(),
            _ => None,
        }
    }
}

/// What the program holds the page for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Pin {
    Not,
    Read,
    Write,
}

/// Who has the entry locked, and how far it has come. States to be committed are kept as words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Op {
    /// Nobody.
    Idle,
    /// The devices in `left` are to lose their translations; those in `asked` have, and are waited for.
    Recall {
        left: u16,
        asked: u16,
    },
    /// Committed; the translation is to be written.
    Enter {
        to: u8,
        pte: Pte,
    },
    Replicate {
        to: u8,
        sharers: u16,
        copied: bool,
    },
    /// A page of the kernel's own is taken in hand.
    Adopt,
    Protect {
        done: bool,
    },
    Unmap {
        done: bool,
    },
    Move {
        to: u8,
        copied: bool,
    },
    Home {
        write: bool,
    },
    /// The frame has its content, and is to be mapped.
    Install {
        target: u64,
    },
    Installed {
        target: u64,
    },
    Evict {
        same_life: bool,
    },
    Evicted {
        target: u64,
    },
    /// The page of a device leaves it.
    Expel {
        to_tier: bool,
    },
    Expelled {
        target: u64,
    },
    Discard {
        done: bool,
    },
    /// To the tier's memory in place.
    Settle,
    Settled,
    /// What is on a device, or the tier, is put in place.
    Show,
    Shown,
    /// All devices let go of what is in place, which is taken from there then, or discarded.
    Vacate {
        left: u16,
        asked: u16,
        discard: bool,
    },
    Leave,
    Left,
}

impl Op {
    fn device(&mut self) -> Option<&mut u8> {
        match self {
            Op::Enter { to: d, .. } | Op::Replicate { to: d, .. } | Op::Move { to: d, .. } => Some(d),
            _ => None,
        }
    }
}

/// Everything there is at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// The table's word.
    pub(super) word: u64,
    pub(super) op: Op,
    pub(super) cpu: Cpu,
    pub(super) backing: Kept,
    pub(super) pin: Pin,
    /// Places in use.
    used: u8,
    /// Places that hold what was written last.
    latest: u8,
    pub(super) blank: bool,
    /// The frame is a page of the kernel's own, in adopted memory: the table knows nothing of it.
    pub(super) native: bool,
    /// What was written last was on a device when that failed.
    pub(super) lost: bool,
    pub(super) devices: [Device; MOST],
}

impl World {
    /// Memory that nobody has touched.
    pub(super) fn untouched() -> World {
        World {
            word: Entry::EMPTY.word(),
            op: Op::Idle,
            cpu: Cpu::Nothing,
            backing: Kept::Nowhere,
            pin: Pin::Not,
            used: 0,
            latest: 0,
            blank: true,
            native: false,
            lost: false,
            devices: [Device { pte: Pte::Nothing, flight: None, health: Health::Fine }; MOST],
        }
    }

    /// Memory that the kernel has populated, and the program has written to.
    pub(super) fn adopted() -> World {
        let mut world = World { native: true, cpu: Cpu::Write, ..World::untouched() };
        world.take(Place::Frame, false);
        world.write(Place::Frame);
        world
    }

    pub(super) fn state(&self) -> State {
        Entry::from_word(self.word).state()
    }

    /// The same, locked for `op`.
    pub(super) fn with_op(self, op: Op) -> World {
        World { op, ..self }
    }

    pub(super) fn with_pin(self, pin: Pin) -> World {
        World { pin, ..self }
    }

    /// Changes the table's word.
    pub(super) fn set(&mut self, state: State) {
        self.word = Entry::new(state).word();
        // What has been saved is not lost.
        self.lost &= matches!(state, State::Poisoned { .. }) || self.truth().is_some_and(|place| self.is_cut(place));
    }

    /// Changes the word and unlocks it.
    pub(super) fn commit(&mut self, state: State) {
        self.set(state);
        self.op = Op::Idle;
    }

    pub(super) fn is_used(&self, place: Place) -> bool {
        self.used & place.bit() != 0
    }

    pub(super) fn is_latest(&self, place: Place) -> bool {
        self.latest & place.bit() != 0
    }

    /// Takes `place`, with the content that it is said to have.
    pub(super) fn take(&mut self, place: Place, latest: bool) {
        assert!(!self.is_used(place), "{place:?} has an owner: {self:?}");
        self.used |= place.bit();
        self.fill(place, latest);
    }

    pub(super) fn fill(&mut self, place: Place, latest: bool) {
        self.latest = if latest { self.latest | place.bit() } else { self.latest & !place.bit() };
    }

    pub(super) fn free(&mut self, place: Place) {
        self.used &= !place.bit();
        self.latest &= !place.bit();
    }

    pub(super) fn free_all(&mut self) {
        (self.used, self.latest) = (0, 0);
    }

    /// What is written to `place` is the latest, and nothing else is.
    pub(super) fn write(&mut self, place: Place) {
        self.latest = place.bit();
        self.blank = false;
    }

    /// The frame is the only copy from now on.
    pub(super) fn forget_backing(&mut self) {
        if let Kept::At(place) = self.backing {
            self.free(place);
        }
        self.backing = Kept::Nowhere;
    }

    /// What holds the page by the word of the table; `None` for zeros.
    pub(super) fn truth(&self) -> Option<Place> {
        match self.state() {
            State::Empty if self.native => Some(Place::Frame),
            State::Empty | State::Zero { .. } | State::Poisoned { .. } => None,
            State::Host { .. } | State::Shared { .. } | State::Standby { .. } => Some(Place::Frame),
            State::Device { pfn, .. } | State::Mapped { pfn, .. } | State::Coherent { pfn } => Some(Place::of(pfn)),
            State::Leaf(_) => unreachable!("a page is no leaf"),
        }
    }

    /// Whether what `place` holds (zeros for `None`) is what was written last.
    pub(super) fn holds_latest(&self, place: Option<Place>) -> bool {
        place.map_or(self.blank, |place| self.is_latest(place))
    }

    /// What an access of `device` by `pte` gets to.
    pub(super) fn target(device: usize, pte: Pte) -> Option<Place> {
        match pte {
            Pte::Own => Some(Place::Page(device as u8)),
            Pte::Copy => Some(Place::Copy(device as u8)),
            Pte::Frame { .. } => Some(Place::Frame),
            Pte::Zeros => None,
            Pte::InPlace { of } => Some(of.map_or(Place::Tier, Place::Page)),
            Pte::Nothing => unreachable!("no access without a translation"),
        }
    }

    /// Which devices' translations a recall takes away.
    pub(super) fn members(&self) -> u16 {
        match self.state() {
            State::Shared { sharers, .. } | State::Zero { sharers } => sharers.bits(),
            State::Mapped { pfn, .. } => 1 << Place::of(pfn).device().expect("a device maps its own page"),
            _ => 0,
        }
    }

    /// The place that the CPU maps in place, by the word of the table.
    pub(super) fn in_place(&self) -> Option<Place> {
        match self.state() {
            State::Coherent { pfn } => Some(Place::of(pfn)),
            _ => None,
        }
    }

    pub(super) fn is_held(&self) -> bool {
        matches!(self.state(), State::Mapped { held: true, .. })
    }

    /// Nobody is in the middle of anything.
    pub(super) fn is_quiet(&self) -> bool {
        self.op == Op::Idle && self.devices.iter().all(|d| d.flight.is_none())
    }

    /// Devices are alike: of all worlds that differ in their numbers alone, one.
    pub(super) fn canonical(&self, devices: usize) -> World {
        let owner = self.truth().and_then(Place::device);
        let poisoned = match self.state() {
            State::Poisoned { pfn } => Place::of(pfn).device(),
            _ => None,
        };
        let mut op = self.op;
        let worked_on = op.device().map(|d| *d as usize);
        let (left, asked) = match op {
            Op::Recall { left, asked } | Op::Vacate { left, asked, .. } => (left, asked),
            Op::Replicate { sharers, .. } => (sharers, 0),
            _ => (0, 0),
        };
        let target = match op {
            Op::Evicted { target } | Op::Expelled { target } => device_in(target),
            _ => None,
        };
        let mut order: [usize; MOST] = [0, 1, 2];
        let key = |d: usize| {
            let marks = [owner, poisoned, worked_on, self.backing.device(), target]
                .iter()
                .fold(0, |bits, mark| bits << 1 | (*mark == Some(d)) as u16);
            let shares = [self.members(), left, asked].map(|bits| bits >> d & 1);
            let places = [Place::Page(d as u8), Place::Copy(d as u8)].map(|p| (self.is_used(p), self.is_latest(p)));
            // Whose memory it maps in place of is said by the marks.
            let bare = |pte| if let Pte::InPlace { of: Some(_) } = pte { Pte::InPlace { of: Some(0) } } else { pte };
            let mut it = self.devices[d];
            it.pte = bare(it.pte);
            it.flight = it.flight.map(|flight| Flight { by: bare(flight.by), ..flight });
            (it, marks, shares, places)
        };
        order[..devices].sort_by_key(|d| key(*d));
        if order == [0, 1, 2] { *self } else { self.renamed(order) }
    }

    /// The same with device `order[i]` called `i`.
    fn renamed(&self, order: [usize; MOST]) -> World {
        let new = |d: usize| order.iter().position(|o| *o == d).expect("each device has a place") as u8;
        let page = |place: Place| match place {
            Place::Page(d) => Place::Page(new(d as usize)),
            other => other,
        };
        let pfn = |pfn: DevicePfn| page(Place::of(pfn)).pfn();
        let bits = |bits: u16| (0..MOST).fold(0, |all, d| all | (bits >> d & 1) << new(d));
        let sharers = |s: Sharers| Sharers::decode(bits(s.bits())).expect("as many as before");
        let word = |word: u64| {
            Entry::new(match Entry::from_word(word).state() {
                State::Device { pfn: p, stamp, rewritten } => State::Device { pfn: pfn(p), stamp, rewritten },
                State::Mapped { pfn: p, held } => State::Mapped { pfn: pfn(p), held },
                State::Coherent { pfn: p } => State::Coherent { pfn: pfn(p) },
                State::Poisoned { pfn: p } => State::Poisoned { pfn: pfn(p) },
                State::Zero { sharers: s } => State::Zero { sharers: sharers(s) },
                State::Shared { pfn, writable, dirt, sharers: s } => {
                    State::Shared { pfn, writable, dirt, sharers: sharers(s) }
                }
                other => other,
            })
            .word()
        };
        let mut to = *self;
        to.word = word(self.word);
        if let Kept::At(place) = self.backing {
            to.backing = Kept::At(page(place));
        }
        if let Some(d) = to.op.device() {
            *d = new(*d as usize);
        }
        match &mut to.op {
            Op::Recall { left, asked } | Op::Vacate { left, asked, .. } => {
                (*left, *asked) = (bits(*left), bits(*asked));
            }
            Op::Replicate { sharers, .. } => *sharers = bits(*sharers),
            Op::Install { target } | Op::Installed { target } | Op::Evicted { target } | Op::Expelled { target } => {
                *target = word(*target);
            }
            _ => {}
        }
        for place in [Place::Page as fn(u8) -> Place, Place::Copy] {
            (0..MOST as u8).for_each(|d| to.free(place(d)));
            for (i, d) in order.iter().enumerate() {
                if self.is_used(place(*d as u8)) {
                    to.take(place(i as u8), self.is_latest(place(*d as u8)));
                }
            }
        }
        let named = |pte| match pte {
            Pte::InPlace { of: Some(d) } => Pte::InPlace { of: Some(new(d as usize)) },
            other => other,
        };
        to.devices = order.map(|d| {
            let it = self.devices[d];
            Device { pte: named(it.pte), flight: it.flight.map(|f| Flight { by: named(f.by), ..f }), ..it }
        });
        to
    }
}

fn device_in(word: u64) -> Option<usize> {
    match Entry::from_word(word).state() {
        State::Device { pfn, .. } => Place::of(pfn).device(),
        _ => None,
    }
}

/// Whose number `device` is.
pub(super) fn mmu(device: usize) -> MmuId {
    MmuId(device as u8)
}
