//! Launches: work on a device that cannot fault, or need not (rule G4).

use crate::args::{self, Versioned, VersionedOut};
use crate::error::{Failure, Inside, call, inside, ps_status};
use crate::space::{ps_device, with_device};
use peerspace::{LaunchError, Piece};
use peerspace_os::own::{Own, Vec};
use std::ffi::{c_int, c_void};

/// An operand of a launch. This structure stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_operand {
    /// Its first byte.
    pub start: *mut c_void,
    /// The bytes that each item needs, one after the other, or those that every piece needs.
    pub bytes: u64,
    /// Not 0: each item has its own part. 0: every piece needs all of it.
    pub each: u64,
}

/// Bytes of an operand. This structure stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_range {
    /// The first.
    pub start: u64,
    /// The one after the last.
    pub end: u64,
}

/// What a piece of a launch works on. This structure stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_piece {
    /// The first item.
    pub first_item: u64,
    /// How many there are.
    pub items: u64,
    /// The addresses of the operands' parts, in the order in which they were named: all of them are mapped on the device.
    pub operands: *const ps_range,
    /// How many operands there are.
    pub operand_count: usize,
}

/// Work for a device.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_launch {
    /// sizeof(struct ps_launch).
    pub size: usize,
    /// The device.
    pub device: ps_device,
    /// The work is that on so many items, which can be done in pieces; 0 for one item.
    pub items: u64,
    /// No piece has more items than this; 0 for no limit.
    pub at_most: u64,
    /// The operands; at least one.
    pub operands: *const ps_operand,
    /// How many there are.
    pub operand_count: usize,
    /// Does a piece of the work, in the calling thread. Returns 0, or a number that says what went wrong. While it runs, an access
    /// of the CPU to the operands' pages waits until it is over: so it must not touch them but through the device, nor allocate
    /// where they are on the heap, nor wait for somebody who does, nor fork; of this library it can use ports, and questions.
    pub work: Option<unsafe extern "C" fn(context: *mut c_void, piece: *const ps_piece) -> c_int>,
    /// Passed to `work`.
    pub context: *mut c_void,
}

// SAFETY: repr(C), begins with its size; words of eight bytes: numbers, pointers, and a function that may be null.
unsafe impl Versioned for ps_launch {}

/// How a launch went.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_launch_report {
    /// sizeof(struct ps_launch_report); afterwards, the bytes that were filled in.
    pub size: usize,
    /// Pieces it took: 1 when all of it fitted.
    pub pieces: u64,
    /// Items done.
    pub items: u64,
}

// SAFETY: repr(C), begins with its size; numbers of eight bytes.
unsafe impl Versioned for ps_launch_report {}

/// Does work on a device: calls `work` for each piece, with the pages of its operands mapped on the device, to read and to write, and
/// held there. Returns when the last one is done. `report` may be null.
///
/// Errors: PS_ERR_WORK with the items at which `work` returned another number than 0; PS_ERR_DISCARDED when the program has
/// discarded or unmapped an operand meanwhile; PS_ERR_RANGE, PS_ERR_MIGRATE, PS_ERR_DEVICE when the operands cannot be brought there.
/// The pieces before are done.
///
/// # Safety
/// `launch`, what it points to, and `report` are null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_launch_run(launch: *const ps_launch, report: *mut ps_launch_report) -> ps_status {
    call("ps_launch_run", || {
        // SAFETY: the caller's promise, here and below.
        let launch = unsafe { args::versioned(launch, "launch") }?;
        // SAFETY: as above.
        let out = (!report.is_null()).then(|| unsafe { VersionedOut::new(report, "report") }).transpose()?;
        // SAFETY: as above.
        let operands = unsafe { args::array(launch.operands, launch.operand_count, "launch.operands") }?;
        let work = launch.work.ok_or_else(|| Failure::argument("launch.work is null"))?;
        // The work may take long: whoever releases the space meanwhile need not wait for it.
        let (space, device) = with_device(launch.device, |entry, id| Ok((entry.space.clone(), id)))?;
        let mut described = space.launch(device);
        if launch.items != 0 {
            described = described.items(launch.items);
        }
        if launch.at_most != 0 {
            described = described.at_most(launch.at_most);
        }
        for (i, operand) in operands.iter().enumerate() {
            let bytes = usize::try_from(operand.bytes).unwrap_or(usize::MAX);
            args::memory(operand.start, bytes, &format!("launch.operands[{i}].start"))?;
            described = match operand.each {
                0 => described.whole(operand.start.cast(), bytes),
                _ => described.each(operand.start.cast(), bytes),
            };
        }
        // Made before pages are held, of memory that never is.
        let mut ranges: Vec<ps_range> = Vec::with_capacity_in(operands.len(), Own);
        let run = |piece: &Piece| {
            ranges.clear();
            ranges.extend(piece.operands.iter().map(|r| ps_range { start: r.start, end: r.end }));
            let piece = ps_piece {
                first_item: piece.items.start,
                items: piece.items.end - piece.items.start,
                operands: ranges.as_ptr(),
                operand_count: ranges.len(),
            };
            // SAFETY: the caller's promise; the piece is good while it runs.
            match inside(Inside::Work, || unsafe { work(launch.context, &piece) }) {
                0 => Ok(()),
                number => Err(number),
            }
        };
        let done = described.run(run).map_err(|e| match e {
            LaunchError::Operands(items, why) => {
                let Failure { status, text } = why.into();
                Failure::new(status, format!("items {items:?} cannot be brought to the device: {text}"))
            }
            LaunchError::Work(items, number) => {
                Failure::new(ps_status::PS_ERR_WORK, format!("the work on items {items:?} returned {number}"))
            }
            e @ LaunchError::Discarded(_) => Failure::new(ps_status::PS_ERR_DISCARDED, e.to_string()),
            e => Failure::new(ps_status::PS_ERR_DEVICE, e.to_string()),
        })?;
        if let Some(out) = out {
            let size = size_of::<ps_launch_report>();
            out.put(&ps_launch_report { size, pieces: done.pieces, items: done.items });
        }
        Ok(())
    })
}
