//! What this kernel and this container allow: the facts behind `peerspace doctor`, and the choice of fallbacks.

/// Whether the kernel gives huge pages to memory that asks for them.
pub fn huge_pages_allowed() -> bool {
    read("/sys/kernel/mm/transparent_hugepage/enabled").is_some_and(|s| !s.contains("[never]"))
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}
