//! Our own heap across forks, while other threads use it. In a process of its own: forks make all its pages shared for a
//! moment, which other tests would notice.

use peerspace_os::own::{Box, Own, freeze_heap, thaw_heap};
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn a_forked_process_finds_the_heap_usable() {
    // The first use has forks watched; who forks while that is under way is not waited for.
    drop(Box::new_in(0u8, Own));
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop(Box::new_in([0u8; 3000], Own));
                }
            });
        }
        let mut status = 0;
        for round in 0..300 {
            // Frozen by hand as well, every third time.
            let by_hand = round % 3 == 0;
            if by_hand {
                freeze_heap();
            }
            // SAFETY: the child uses nothing but this heap, and ends.
            let pid = unsafe { libc::fork() };
            if by_hand {
                thaw_heap();
            }
            if pid == 0 {
                // SAFETY: as above; if the heap is locked, the alarm ends the child.
                unsafe {
                    libc::alarm(10);
                    drop(Box::new_in([1u8; 5000], Own));
                    libc::_exit(0)
                }
            }
            // SAFETY: waits for the child just made.
            assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
            if status != 0 {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(status, 0, "a child waited for the heap");
    });
}
