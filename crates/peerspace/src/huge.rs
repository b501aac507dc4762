//! Huge folios as far as users have a say: hints, and collapse on request (rules H3, H4).

#[cfg(feature = "devices")]
use crate::attach::DeviceId;
use crate::engine::collapse::NoCollapse;
use crate::error::Error;
#[cfg(feature = "devices")]
use crate::peers::Node;
use crate::space::Space;
use peerspace_core::addr::{BLOCK_PAGES, PageRange, VaRange};
use peerspace_core::regions::Attributes;
use peerspace_os::linux::signal::without_signals;

/// How often a block is tried that somebody works with.
const TRIES: u32 = 8;

/// How memory is going to be used: see [`Region::advise`](crate::Region::advise) and
/// [`Adopted::advise`](crate::Adopted::advise).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Hint {
    /// Nothing is known: small pages at first, and huge folios where faults show a stream.
    #[default]
    Normal,
    /// Most of it will be used, and neighbours together: huge folios from the first fault on. The first byte used of
    /// two mebibytes brings all of them in.
    Dense,
    /// Single pages here and there: never huge folios, so that what is not used takes up no RAM.
    Sparse,
    /// Small pages, and huge folios only where [`collapse`](crate::Region::collapse) makes them.
    OnRequest,
    /// Read far more often than written: devices that read it get copies, all of which go when anybody writes (rule G8).
    /// False takes it back. Leaves other hints as they are.
    #[cfg(feature = "devices")]
    ReadMostly(bool),
    /// Where the data had best be: devices that can access it there do, and that device's own faults bring it there. `None`
    /// takes it back. Leaves other hints as they are.
    #[cfg(feature = "devices")]
    Prefer(Option<Node>),
    /// This device accesses the memory of the host in place instead of having it moved (rule G8); a device that cannot moves it
    /// as before. False takes it back. Leaves other hints as they are.
    #[cfg(feature = "devices")]
    AccessedBy(DeviceId, bool),
}

impl Hint {
    /// What it changes about a region's attributes.
    fn change(self, space: &Space) -> Result<impl Fn(Attributes) -> Attributes, Error> {
        let any = Attributes::HUGE.with(Attributes::NO_HUGE).with(Attributes::ON_REQUEST);
        #[cfg(feature = "devices")]
        let (place, mmu) = match self {
            Hint::Prefer(node) => (node.map(|node| space.place_of(node)).transpose()?, None),
            Hint::AccessedBy(id, _) => (None, Some(space.mmu_of(id)?)),
            _ => (None, None),
        };
        #[cfg(not(feature = "devices"))]
        let _ = space;
        Ok(move |old: Attributes| match self {
            Hint::Normal => old.without(any),
            Hint::Dense => old.without(any).with(Attributes::HUGE),
            Hint::Sparse => old.without(any).with(Attributes::NO_HUGE),
            Hint::OnRequest => old.without(any).with(Attributes::ON_REQUEST),
            #[cfg(feature = "devices")]
            Hint::ReadMostly(true) => old.with(Attributes::READ_MOSTLY),
            #[cfg(feature = "devices")]
            Hint::ReadMostly(false) => old.without(Attributes::READ_MOSTLY),
            #[cfg(feature = "devices")]
            Hint::Prefer(_) => old.with_preferred(place),
            #[cfg(feature = "devices")]
            Hint::AccessedBy(_, yes) => mmu.map_or(old, |mmu| old.with_accessed_by(mmu, yes)),
        })
    }
}

impl Space {
    /// Says how managed memory is going to be used.
    pub(crate) fn advise(&self, range: VaRange, hint: Hint) -> Result<(), Error> {
        let engine = self.engine();
        let change = hint.change(self)?;
        without_signals(|| engine.advise(engine.geometry.pages_inside(range), change)).map_err(|_| Error::BadRange {
            what: format!("{hint:?} for {range}"),
            why: "the space has as many regions as it can have",
        })
    }

    /// Makes huge folios of the blocks inside managed memory. Returns how many bytes are huge then.
    pub(crate) fn collapse(&self, range: VaRange) -> Result<usize, Error> {
        let engine = self.engine();
        let pages = engine.geometry.pages_inside(range);
        if engine.region(pages.start).is_some_and(|r| r.attributes.has(Attributes::NO_HUGE)) {
            return Err(Error::BadRange {
                what: format!("{range}"),
                why: "it is to stay in small pages, as the hint Sparse says",
            });
        }
        let block = |range: &PageRange| range.pages().0 == BLOCK_PAGES;
        let huge = |range: &PageRange| {
            for _ in 0..TRIES {
                match engine.collapse(range.start) {
                    Ok(()) | Err(NoCollapse::Huge) => return true,
                    Err(NoCollapse::Unsuitable | NoCollapse::NoRoom) => return false,
                    // Reclaim may have one of its pages in hand for a moment, or just have taken one away.
                    Err(NoCollapse::Busy | NoCollapse::Sparse) => std::thread::yield_now(),
                }
            }
            false
        };
        let blocks = pages.by_block().filter(block);
        Ok(without_signals(|| blocks.filter(huge).count()) * engine.geometry.block_bytes())
    }
}
