//! What the mirror of a device would see, a byte for each page, without touching any.

use crate::abi::{Command, snapshot as byte};
use crate::access::Work;
use crate::device::PAGE;
use crate::user::hand_over;
use peerspace::{CpuMapping, PageView, Residence};
use peerspace_os::linux::scan::Vma;
use rustix::io::Errno;

/// Puts a byte for each page of the range where the request says.
pub(crate) fn take(work: &Work<'_>, command: &mut Command) -> Result<(), Errno> {
    let mut bytes = work.byte_for_each(byte::ERROR)?;
    let mut at = work.range.start.0;
    while at < work.range.end.0 {
        let vma = work.world.mapping_from(at).filter(|vma| vma.range.start < work.range.end);
        let Some(vma) = vma else { break };
        let (start, end) = (vma.range.start.0.max(at), vma.range.end.0.min(work.range.end.0));
        if vma.read {
            let pages = work.world.space.pages(start as *const u8, (end - start) as usize);
            let first = ((start - work.range.start.0) / PAGE) as usize;
            for (nth, view) in pages.into_iter().flatten().enumerate() {
                bytes[first + nth] = of_page(work, start + nth as u64 * PAGE, &view, &vma);
            }
        }
        at = end;
    }
    hand_over(&bytes, command)
}

/// The byte of a page that can be read.
fn of_page(work: &Work<'_>, va: u64, view: &PageView, vma: &Vma) -> u8 {
    let permission = |write: bool| if write && vma.write { byte::WRITE } else { byte::READ };
    let size = match view.huge {
        true if vma.page_bytes == 1 << 30 => byte::PUD,
        true => byte::PMD,
        false => 0,
    };
    match view.residence {
        // Nobody else can access it: to a mirror it is not there.
        Residence::Device { .. } | Residence::Coherent(_) if is_exclusive(work, va) => byte::NONE,
        Residence::Device { id, .. } | Residence::Coherent(id) => {
            let at = work.world.members.iter().find(|member| member.id == id);
            permission(true)
                | size
                | match at {
                    Some(at) if at.id == work.member.id && at.is_coherent => byte::COHERENT_HERE,
                    Some(at) if at.id == work.member.id => byte::PRIVATE_HERE,
                    Some(at) if at.is_coherent => byte::COHERENT_ELSEWHERE,
                    // Only a fault brings it home.
                    Some(_) => return byte::NONE,
                    // Where the space keeps what leaves RAM: to the program it is on the host.
                    None => 0,
                }
        }
        // On the host, mapped by nobody for the time being.
        Residence::Standby => permission(true) | size,
        Residence::Lost => byte::ERROR,
        _ => match view.cpu {
            CpuMapping::None => byte::NONE,
            CpuMapping::Zero => byte::ZERO | byte::READ | size,
            CpuMapping::ReadOnly => permission(false) | size,
            CpuMapping::Writable => permission(true) | size,
        },
    }
}

fn is_exclusive(work: &Work<'_>, va: u64) -> bool {
    work.world.members.iter().any(|member| member.mirror.is_exclusive(va))
}
