//! What the model finds when something is wrong: each of these bugs breaks a rule, and the shortest way there is printed.

use super::engine::Setup;
use super::explore::explore;
use super::*;

/// Something wrong with the engine, or with its decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bug {
    /// A device gets a copy of a frame that the CPU may write to.
    ReplicatesWithoutProtecting,
    /// Devices are not waited for that are in the middle of an access.
    RecallDoesNotWait,
    /// One device of several keeps its translation.
    RecallForgetsOne,
    /// The CPU's first write leaves devices their copies.
    CpuWritesDoNotRecall,
    /// A translation is written before the commit, and without the lock: somebody else's recall may not have come to its end.
    EntersWithoutTheLock,
    /// An atomic access to a frame of the host in place.
    AtomicsGoRemote,
    /// The data moves while the CPU maps it.
    MovesWithoutUnmapping,
    /// A launch is no reason to wait.
    TakesWhatIsHeld,
    /// A fault of a device undoes what it has done.
    BringsHomeWhatItMoves,
    /// The CPU gets a frame of zeros while devices map zeros.
    ZerosAreFilledUnderReaders,
    /// What cannot be read back is taken for zeros.
    LostIsZeros,
    /// A clean frame is dropped although the device that has its content is gone.
    DropsToTheDead,
    /// A device that is cut off is not waited for where it uses the host's memory, either.
    QuarantineForgetsThePort,
    /// The port lets a device at what the table's word says, not at what it maps: the word changes last.
    ThePortTrustsTheWord,
    /// There is no deadline.
    FailedDevicesAreWaitedFor,
    /// A pin is no reason to stay.
    UnmapsWhatIsPinned,
    /// A copy stays in use when its device has lost the translation.
    RecallKeepsCopies,
    /// A device that is cut off keeps what it maps.
    QuarantineLeavesTranslations,
    /// The CPU's first write leaves the frame clean.
    WritesStayClean,
    /// What cannot be loaded just now is given up.
    RefusalIsLoss,
    /// Memory in place is taken from there while devices map it.
    LeavesUnderDevices,
    /// `Empty` is taken for zeros where the kernel has populated the page.
    NativeIsZeros,
}

/// `bug` breaks `rule` within so few steps that a reader can follow them.
fn finds(bug: Bug, rule: &str) {
    finds_in(EVERYTHING, bug, rule);
}

fn finds_in(setup: Setup, bug: Bug, rule: &str) {
    let trace = match explore(Setup { bug: Some(bug), ..setup }) {
        Err(trace) => trace,
        Ok(found) => panic!("{bug:?} breaks no rule in {} worlds", found.worlds),
    };
    std::println!("{bug:?}: {}\n  {}", trace.rule, trace.events.join("\n  "));
    assert!(trace.rule.starts_with(rule), "{bug:?} should break {rule}, and broke {}", trace.rule);
    assert!(trace.events.len() <= 20, "{} steps", trace.events.len());
}

#[test]
fn g3_a_copy_of_what_the_cpu_may_write_is_found() {
    finds(Bug::ReplicatesWithoutProtecting, "G3");
}

#[test]
fn g2_an_access_that_a_recall_does_not_wait_for_is_found() {
    finds(Bug::RecallDoesNotWait, "G");
}

#[test]
fn g2_a_translation_that_a_recall_forgets_is_found() {
    finds(Bug::RecallForgetsOne, "G2");
}

#[test]
fn g2_a_write_of_the_cpu_beside_readers_is_found() {
    finds(Bug::CpuWritesDoNotRecall, "G2");
}

#[test]
fn g2_a_translation_entered_before_its_commit_is_found() {
    finds(Bug::EntersWithoutTheLock, "G2");
}

#[test]
fn g14_an_atomic_access_in_place_is_found() {
    finds(Bug::AtomicsGoRemote, "G14");
}

#[test]
fn g2_a_move_of_what_the_cpu_maps_is_found() {
    finds(Bug::MovesWithoutUnmapping, "G");
}

#[test]
fn z8_a_launch_that_loses_its_page_is_found() {
    finds(Bug::TakesWhatIsHeld, "Z8");
}

#[test]
fn g4_a_fault_that_runs_in_circles_is_found() {
    finds(Bug::BringsHomeWhatItMoves, "headway: device 0");
}

#[test]
fn g3_zeros_that_are_mapped_beside_a_writer_are_found() {
    finds(Bug::ZerosAreFilledUnderReaders, "G3");
}

#[test]
fn z9_zeros_for_what_is_lost_are_found() {
    finds(Bug::LostIsZeros, "G2");
}

#[test]
fn z9_a_frame_given_up_for_a_copy_that_is_gone_is_found() {
    finds(Bug::DropsToTheDead, "Z9");
}

#[test]
fn g5_an_access_that_outlives_its_quarantine_is_found() {
    finds(Bug::QuarantineForgetsThePort, "G");
}

#[test]
fn g5_a_port_that_opens_again_during_a_recall_is_found() {
    finds(Bug::ThePortTrustsTheWord, "G");
}

#[test]
fn g5_an_endless_wait_for_a_device_that_failed_is_found() {
    finds(Bug::FailedDevicesAreWaitedFor, "headway");
}

#[test]
fn h5_a_pinned_page_that_leaves_is_found() {
    finds(Bug::UnmapsWhatIsPinned, "H5");
}

#[test]
fn g16_a_copy_that_nobody_frees_is_found() {
    finds(Bug::RecallKeepsCopies, "G16: a place");
}

#[test]
fn g5_a_translation_that_outlives_its_quarantine_is_found() {
    finds(Bug::QuarantineLeavesTranslations, "G5");
}

#[test]
fn g16_a_frame_that_is_not_as_clean_as_it_says_is_found() {
    finds(Bug::WritesStayClean, "G16: a frame");
}

#[test]
fn z9_a_page_given_up_without_need_is_found() {
    finds(Bug::RefusalIsLoss, "Z9: a page is poisoned");
}

#[test]
fn z5_memory_taken_from_its_place_under_devices_is_found() {
    finds(Bug::LeavesUnderDevices, "G2");
    // By the device itself, and by one whose accesses through the port are not waited for.
    let setup = Setup { coherent_devices: true, ..EVERYTHING };
    finds_in(setup, Bug::LeavesUnderDevices, "G2");
    finds_in(
        Setup { coherent_devices: true, tier: false, coherent: false, ..EVERYTHING },
        Bug::RecallDoesNotWait,
        "G",
    );
}

#[test]
fn g1_zeros_in_place_of_a_page_of_the_kernel_are_found() {
    finds(Bug::NativeIsZeros, "G");
}
