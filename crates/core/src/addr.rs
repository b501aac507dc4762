//! Addresses, page numbers, sizes and orders, each a type of its own.
//!
//! The engine thinks in pages: a [`Vpn`] is a virtual page number, a [`Pfn`] a page frame number, both counted
//! in base pages of the machine (4 KiB on x86-64, up to 64 KiB on arm64). A *block* is [`BLOCK_PAGES`] base
//! pages, the span of one word of the logical table. [`Geometry`] is the only thing that knows how large a
//! base page is, so bytes appear only where the outside world does.

use core::fmt;
use core::ops::{Add, AddAssign, Sub, SubAssign};

/// Base pages in a block: what one word of the logical table covers while the block is whole.
pub const BLOCK_PAGES: u64 = 1 << BLOCK_ORDER;
/// log2 of [`BLOCK_PAGES`]. Small enough for every interleaving to be tried where a model checker does that.
pub const BLOCK_ORDER: u8 = if cfg!(loom) { 1 } else { 9 };

/// The size of the machine's base page, and what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    page_shift: u8,
}

impl Geometry {
    /// 4 KiB base pages, 2 MiB blocks: x86-64 and most arm64 kernels.
    pub const KIB4: Geometry = Geometry { page_shift: 12 };

    /// A geometry for base pages of `bytes`.
    ///
    /// Returns `None` unless `bytes` is a power of two from 4 KiB to 64 KiB.
    pub const fn from_page_bytes(bytes: u64) -> Option<Geometry> {
        match bytes {
            4096 | 8192 | 16384 | 32768 | 65536 => Some(Geometry { page_shift: bytes.trailing_zeros() as u8 }),
            _ => None,
        }
    }

    /// log2 of the base page in bytes.
    pub const fn page_shift(self) -> u32 {
        self.page_shift as u32
    }

    /// Bytes in a base page.
    pub const fn page_bytes(self) -> usize {
        1 << self.page_shift
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        self.page_bytes() << BLOCK_ORDER
    }

    /// The page that holds `va`.
    pub const fn vpn(self, va: Va) -> Vpn {
        Vpn(va.0 >> self.page_shift)
    }

    /// The first address of page `vpn`.
    pub const fn va(self, vpn: Vpn) -> Va {
        Va(vpn.0 << self.page_shift)
    }

    /// `pages` in bytes.
    pub const fn bytes(self, pages: Pages) -> u64 {
        pages.0 << self.page_shift
    }

    /// Whole pages that fit into `bytes`.
    pub const fn pages_in(self, bytes: u64) -> Pages {
        Pages(bytes >> self.page_shift)
    }

    /// Pages needed to hold `bytes`.
    pub const fn pages_for(self, bytes: u64) -> Pages {
        Pages(bytes.div_ceil(1 << self.page_shift))
    }

    /// The pages that `range` touches, rounded outwards.
    pub const fn pages_out(self, range: VaRange) -> PageRange {
        let first = range.start.0 >> self.page_shift;
        let end = range.end.0.div_ceil(1 << self.page_shift);
        PageRange { start: Vpn(first), end: Vpn(if range.start.0 == range.end.0 { first } else { end }) }
    }

    /// The pages that lie wholly inside `range`.
    pub const fn pages_inside(self, range: VaRange) -> PageRange {
        let first = range.start.0.div_ceil(1 << self.page_shift);
        let end = range.end.0 >> self.page_shift;
        PageRange { start: Vpn(first), end: Vpn(if end < first { first } else { end }) }
    }

    /// `range` in addresses.
    pub const fn range(self, range: PageRange) -> VaRange {
        VaRange { start: self.va(range.start), end: self.va(range.end) }
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $show:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $show, self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $show, self.0)
            }
        }
    };
}

number!(
    /// A virtual address, in bytes.
    Va,
    "{:#x}"
);
number!(
    /// A virtual page number: an address divided by the base page size.
    Vpn,
    "vpn {:#x}"
);
number!(
    /// A page frame number. One number space covers the host pool and every device (rule Z1).
    Pfn,
    "pfn {:#x}"
);
number!(
    /// A count of base pages.
    Pages,
    "{} pages"
);

impl Va {
    /// The address `bytes` further on, or `None` past the end of the address space.
    pub const fn checked_add(self, bytes: u64) -> Option<Va> {
        match self.0.checked_add(bytes) {
            Some(v) => Some(Va(v)),
            None => None,
        }
    }

    /// True when the address is a multiple of `align`, which is a power of two.
    pub const fn is_aligned(self, align: usize) -> bool {
        self.0 & (align as u64 - 1) == 0
    }
}

impl Vpn {
    /// The number of the block that holds this page.
    pub const fn block(self) -> u64 {
        self.0 >> BLOCK_ORDER
    }

    /// The place of this page inside its block, 0 to 511.
    pub const fn index(self) -> usize {
        (self.0 & (BLOCK_PAGES - 1)) as usize
    }

    /// The first page of block `block`.
    pub const fn of_block(block: u64) -> Vpn {
        Vpn(block << BLOCK_ORDER)
    }

    /// The first page of this page's block.
    pub const fn block_start(self) -> Vpn {
        Vpn(self.0 & !(BLOCK_PAGES - 1))
    }

    /// True for the first page of a block.
    pub const fn is_block_start(self) -> bool {
        self.index() == 0
    }
}

macro_rules! counts {
    ($name:ident) => {
        impl Add<u64> for $name {
            type Output = $name;
            fn add(self, n: u64) -> $name {
                $name(self.0 + n)
            }
        }
        impl Sub<$name> for $name {
            type Output = u64;
            fn sub(self, other: $name) -> u64 {
                self.0 - other.0
            }
        }
    };
}
counts!(Vpn);
counts!(Pfn);

/// The frame number of a page of a device: what a page that is on a device is known by.
///
/// Without the feature `device` there is no such number (rule Z10). Whatever names one can then not exist either: the
/// compiler knows that, and leaves out every branch for it.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct DevicePfn(Number);

#[cfg(feature = "device")]
type Number = Pfn;
#[cfg(not(feature = "device"))]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Number {}

impl DevicePfn {
    /// A page of a device.
    #[cfg(feature = "device")]
    #[inline]
    pub const fn new(pfn: Pfn) -> DevicePfn {
        DevicePfn(pfn)
    }

    /// A number found where one of a device belongs; `None` in a build without devices.
    #[inline]
    pub const fn decode(pfn: Pfn) -> Option<DevicePfn> {
        #[cfg(feature = "device")]
        return Some(DevicePfn(pfn));
        #[cfg(not(feature = "device"))]
        {
            let _ = pfn;
            None
        }
    }

    /// The number among those of all page frames.
    #[inline]
    pub const fn pfn(self) -> Pfn {
        #[cfg(feature = "device")]
        return self.0;
        #[cfg(not(feature = "device"))]
        match self.0 {}
    }

    /// For callers that know no devices, and so are never called with a page of one.
    ///
    /// # Panics
    /// Where this crate knows devices.
    pub fn of_no_device(self) -> ! {
        #[cfg(feature = "device")]
        panic!("{self} is said to be on a device, and there are none");
        #[cfg(not(feature = "device"))]
        match self.0 {}
    }
}

impl Add<u64> for DevicePfn {
    type Output = DevicePfn;
    #[inline]
    fn add(self, n: u64) -> DevicePfn {
        #[cfg(feature = "device")]
        return DevicePfn(self.0 + n);
        #[cfg(not(feature = "device"))]
        {
            let _ = n;
            match self.0 {}
        }
    }
}

impl Sub<Pfn> for DevicePfn {
    type Output = u64;
    #[inline]
    fn sub(self, other: Pfn) -> u64 {
        self.pfn() - other
    }
}

impl fmt::Debug for DevicePfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.pfn(), f)
    }
}

impl fmt::Display for DevicePfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.pfn(), f)
    }
}

impl Add for Pages {
    type Output = Pages;
    fn add(self, other: Pages) -> Pages {
        Pages(self.0 + other.0)
    }
}

impl Sub for Pages {
    type Output = Pages;
    fn sub(self, other: Pages) -> Pages {
        Pages(self.0 - other.0)
    }
}

impl AddAssign for Pages {
    fn add_assign(&mut self, other: Pages) {
        self.0 += other.0;
    }
}

impl SubAssign for Pages {
    fn sub_assign(&mut self, other: Pages) {
        self.0 -= other.0;
    }
}

/// log2 of a folio's size in base pages: 0 is a base page, [`BLOCK_ORDER`] a whole block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order(u8);

impl Order {
    /// A single base page.
    pub const BASE: Order = Order(0);
    /// A whole block: 2 MiB with 4 KiB pages.
    pub const BLOCK: Order = Order(BLOCK_ORDER);

    /// The order `n`, or `None` where `n` is larger than [`Order::BLOCK`].
    pub const fn new(n: u8) -> Option<Order> {
        if n <= BLOCK_ORDER { Some(Order(n)) } else { None }
    }

    /// log2 of the number of pages.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Pages in a folio of this order.
    pub const fn pages(self) -> Pages {
        Pages(1 << self.0)
    }

    /// The smallest order that holds `pages`, or `None` if no order does.
    pub const fn holding(pages: Pages) -> Option<Order> {
        if pages.0 == 0 || pages.0 > BLOCK_PAGES {
            return None;
        }
        Some(Order(pages.0.next_power_of_two().trailing_zeros() as u8))
    }
}

/// What an access wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Load.
    Read,
    /// Store, or a read-modify-write.
    Write,
}

/// A half-open range of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VaRange {
    /// First address.
    pub start: Va,
    /// First address behind the range.
    pub end: Va,
}

impl VaRange {
    /// The range of `len` bytes from `start`, or `None` if it wraps.
    pub const fn new(start: Va, len: u64) -> Option<VaRange> {
        match start.checked_add(len) {
            Some(end) => Some(VaRange { start, end }),
            None => None,
        }
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// True when the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start.0 >= self.end.0
    }

    /// True when `va` lies inside.
    pub const fn contains(self, va: Va) -> bool {
        self.start.0 <= va.0 && va.0 < self.end.0
    }

    /// True when the two have a byte in common.
    pub const fn overlaps(self, other: VaRange) -> bool {
        self.start.0 < other.end.0 && other.start.0 < self.end.0
    }
}

impl fmt::Debug for VaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start.0, self.end.0)
    }
}

impl fmt::Display for VaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A half-open range of virtual pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// First page.
    pub start: Vpn,
    /// First page behind the range.
    pub end: Vpn,
}

impl PageRange {
    /// `pages` pages from `start`.
    pub const fn new(start: Vpn, pages: Pages) -> PageRange {
        PageRange { start, end: Vpn(start.0 + pages.0) }
    }

    /// The whole of block `block`.
    pub const fn block(block: u64) -> PageRange {
        PageRange::new(Vpn::of_block(block), Pages(BLOCK_PAGES))
    }

    /// Number of pages.
    pub const fn pages(self) -> Pages {
        Pages(self.end.0.saturating_sub(self.start.0))
    }

    /// True when there is no page in it.
    pub const fn is_empty(self) -> bool {
        self.start.0 >= self.end.0
    }

    /// True when `vpn` lies inside.
    pub const fn contains(self, vpn: Vpn) -> bool {
        self.start.0 <= vpn.0 && vpn.0 < self.end.0
    }

    /// True when every page of `other` lies inside.
    pub const fn covers(self, other: PageRange) -> bool {
        self.start.0 <= other.start.0 && other.end.0 <= self.end.0
    }

    /// The pages both have.
    pub fn intersect(self, other: PageRange) -> PageRange {
        let start = self.start.max(other.start);
        PageRange { start, end: self.end.min(other.end).max(start) }
    }

    /// The pieces of this range, cut at block boundaries, in order.
    pub fn by_block(self) -> impl Iterator<Item = PageRange> {
        let mut at = self.start;
        core::iter::from_fn(move || {
            if at >= self.end {
                return None;
            }
            let end = Vpn((at.block() + 1) << BLOCK_ORDER).min(self.end);
            let piece = PageRange { start: at, end };
            at = end;
            Some(piece)
        })
    }

    /// Every page, in order.
    pub fn iter(self) -> impl Iterator<Item = Vpn> {
        (self.start.0..self.end.0).map(Vpn)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vpn {:#x}..{:#x}", self.start.0, self.end.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_outwards_and_inwards() {
        let g = Geometry::KIB4;
        let r = VaRange::new(Va(4095), 2).unwrap();
        assert_eq!(g.pages_out(r), PageRange { start: Vpn(0), end: Vpn(2) });
        assert!(g.pages_inside(r).is_empty());
        let r = VaRange::new(Va(1), 3 * 4096).unwrap();
        assert_eq!(g.pages_inside(r), PageRange { start: Vpn(1), end: Vpn(3) });
        assert!(g.pages_out(VaRange::new(Va(5), 0).unwrap()).is_empty());
    }

    #[test]
    fn ranges_that_wrap_are_refused() {
        assert!(VaRange::new(Va(u64::MAX), 2).is_none());
        assert!(Va(u64::MAX).checked_add(1).is_none());
    }

    #[test]
    fn blocks_cut_a_range_without_gap_or_overlap() {
        let r = PageRange { start: Vpn(500), end: Vpn(1600) };
        let mut at = r.start;
        for piece in r.by_block() {
            assert_eq!(piece.start, at);
            assert_eq!(piece.start.block(), Vpn(piece.end.0 - 1).block());
            at = piece.end;
        }
        assert_eq!(at, r.end);
    }

    #[test]
    fn orders_hold_what_they_say() {
        assert_eq!(Order::holding(Pages(1)), Some(Order::BASE));
        assert_eq!(Order::holding(Pages(3)).map(Order::get), Some(2));
        assert_eq!(Order::holding(Pages(512)), Some(Order::BLOCK));
        assert_eq!(Order::holding(Pages(513)), None);
        assert_eq!(Order::holding(Pages(0)), None);
        assert_eq!(Order::new(10), None);
    }

    #[test]
    fn only_real_page_sizes_make_a_geometry() {
        assert!(Geometry::from_page_bytes(4096).is_some());
        assert!(Geometry::from_page_bytes(65536).is_some());
        assert!(Geometry::from_page_bytes(2048).is_none());
        assert!(Geometry::from_page_bytes(5000).is_none());
    }

    #[cfg(feature = "device")]
    #[test]
    fn a_device_page_is_its_number_and_nothing_else() {
        assert_eq!(size_of::<DevicePfn>(), size_of::<Pfn>());
        let page = DevicePfn::decode(Pfn(700)).unwrap();
        assert_eq!((page, page.pfn()), (DevicePfn::new(Pfn(700)), Pfn(700)));
        assert_eq!(((page + 5).pfn(), page - Pfn(600)), (Pfn(705), 100));
        assert_eq!(format!("{page} {page:?}"), "pfn 0x2bc pfn 0x2bc");
    }

    /// Rule Z10: what takes up no room in an `Option` is what can never be there.
    #[cfg(not(feature = "device"))]
    #[test]
    fn without_devices_no_page_is_on_one() {
        assert_eq!(size_of::<DevicePfn>(), 0);
        assert_eq!(size_of::<Option<DevicePfn>>(), 0);
        assert_eq!(DevicePfn::decode(Pfn(700)), None);
    }
}
