//! The ends and beginnings of processes: reports at exit, the environment of programs that are started, and the order
//! in which things happen around a fork.

use peerspace::process::{Options, last_words};
use peerspace_os::interpose;
use peerspace_os::linux::{fork, place};
use std::ffi::{CStr, CString, c_char, c_int, c_void};

/// Has the report written when the program exits.
pub(crate) fn report_at_exit() {
    unsafe extern "C" {
        fn on_exit(function: extern "C" fn(c_int, *mut c_void), arg: *mut c_void) -> c_int;
    }
    extern "C" fn report(status: c_int, _: *mut c_void) {
        last_words(status & 0xff);
    }
    // SAFETY: enters a function that lives as long as this library.
    unsafe { on_exit(report, std::ptr::null_mut()) };
}

interpose! {
    fn _exit(status: c_int) -> (), real => {
        last_words(status & 0xff);
        // SAFETY: ends the process.
        unsafe { real(status) }
    }

    fn _Exit(status: c_int) -> (), real => {
        last_words(status & 0xff);
        // SAFETY: ends the process.
        unsafe { real(status) }
    }

    fn quick_exit(status: c_int) -> (), real => {
        last_words(status & 0xff);
        // SAFETY: ends the process.
        unsafe { real(status) }
    }

    // A fork that calls none of the handlers that `pthread_atfork` entered.
    fn _Fork() -> libc::pid_t, real => {
        if !crate::is_on() {
            // SAFETY: passed on.
            return unsafe { real() };
        }
        fork::before();
        // SAFETY: passed on.
        let pid = unsafe { real() };
        if pid == 0 {
            fork::child();
        } else {
            fork::parent();
        }
        pid
    }

    // What is entered first is asked last before a fork, and told first after it; that must be us, so that handlers of
    // the program never run while its memory is not served.
    fn __register_atfork(
        before: Option<unsafe extern "C" fn()>,
        parent: Option<unsafe extern "C" fn()>,
        child: Option<unsafe extern "C" fn()>,
        library: *mut c_void,
    ) -> c_int, real => {
        // Our own entry comes by here too.
        fork::install();
        // SAFETY: the caller's arguments, passed on.
        unsafe { real(before, parent, child, library) }
    }

    fn execve(path: *const c_char, arguments: *const *const c_char, environment: *const *const c_char) -> c_int,
    real => {
        let carried = carry(environment);
        let environment = carried.as_ref().map_or(environment, |c| c.pointers.as_ptr());
        // SAFETY: the caller's arguments, but for an environment that holds the caller's and lives until the call.
        unsafe { real(path, arguments, environment) }
    }

    fn execv(path: *const c_char, arguments: *const *const c_char) -> c_int, real => {
        // SAFETY: what execv does, by our own execve; the C library's would use its own.
        unsafe { execve(path, arguments, environ()) }
    }

    fn execvp(file: *const c_char, arguments: *const *const c_char) -> c_int, real => {
        // SAFETY: as above.
        unsafe { execvpe(file, arguments, environ()) }
    }

    fn execvpe(file: *const c_char, arguments: *const *const c_char, environment: *const *const c_char) -> c_int,
    real => {
        let carried = carry(environment);
        let environment = carried.as_ref().map_or(environment, |c| c.pointers.as_ptr());
        // SAFETY: as above.
        unsafe { real(file, arguments, environment) }
    }

    fn fexecve(fd: c_int, arguments: *const *const c_char, environment: *const *const c_char) -> c_int, real => {
        let carried = carry(environment);
        let environment = carried.as_ref().map_or(environment, |c| c.pointers.as_ptr());
        // SAFETY: as above.
        unsafe { real(fd, arguments, environment) }
    }

    fn posix_spawn(
        pid: *mut libc::pid_t,
        path: *const c_char,
        actions: *const libc::posix_spawn_file_actions_t,
        attributes: *const libc::posix_spawnattr_t,
        arguments: *const *const c_char,
        environment: *const *const c_char,
    ) -> c_int, real => {
        let carried = carry(environment);
        let environment = carried.as_ref().map_or(environment, |c| c.pointers.as_ptr());
        // SAFETY: as above.
        unsafe { real(pid, path, actions, attributes, arguments, environment) }
    }

    fn posix_spawnp(
        pid: *mut libc::pid_t,
        file: *const c_char,
        actions: *const libc::posix_spawn_file_actions_t,
        attributes: *const libc::posix_spawnattr_t,
        arguments: *const *const c_char,
        environment: *const *const c_char,
    ) -> c_int, real => {
        let carried = carry(environment);
        let environment = carried.as_ref().map_or(environment, |c| c.pointers.as_ptr());
        // SAFETY: as above.
        unsafe { real(pid, file, actions, attributes, arguments, environment) }
    }

    fn system(command: *const c_char) -> c_int, real => {
        place::settle();
        // SAFETY: the caller's argument, passed on.
        unsafe { real(command) }
    }

    fn popen(command: *const c_char, kind: *const c_char) -> *mut libc::FILE, real => {
        place::settle();
        // SAFETY: the caller's arguments, passed on.
        unsafe { real(command, kind) }
    }
}

/// The environment of this process.
unsafe fn environ() -> *const *const c_char {
    unsafe extern "C" {
        static environ: *const *const c_char;
    }
    // SAFETY: the C library's variable, read like the C library reads it.
    unsafe { environ }
}

/// An environment with our two variables in it.
struct Carried {
    /// The caller's strings and ours, with a null at the end.
    pointers: Vec<*const c_char>,
    _ours: Vec<CString>,
}

/// The environment a new program gets, if the caller's lacks what makes it managed: programs that start others with a
/// clean environment do not mean to have them unbounded.
///
/// Runs also in a child of `vfork`, which shares the parent's memory: it allocates from our own heap alone.
fn carry(environment: *const *const c_char) -> Option<Carried> {
    // What is started, or takes this program's place, inherits where the calling thread may run.
    place::settle();
    if !crate::is_on() {
        return None;
    }
    let (options, library) = (crate::OPTIONS.get()?, crate::LIBRARY.get()?);
    let mut pointers = Vec::new();
    let (mut has_options, mut preload) = (false, None);
    let mut at = environment;
    // SAFETY: an environment is an array of strings that ends with a null, or null itself.
    unsafe {
        while !at.is_null() && !(*at).is_null() {
            let text = CStr::from_ptr(*at).to_bytes();
            has_options |= text.starts_with(Options::VARIABLE.as_bytes());
            match text.strip_prefix(b"LD_PRELOAD=") {
                Some(value) => preload = Some(value.to_vec()),
                None => pointers.push(*at),
            }
            at = at.add(1);
        }
    }
    let names_ours = |list: &[u8]| {
        list.split(|b| *b == b':' || *b == b' ')
            .any(|entry| library.to_bytes().split(|b| *b == b':').any(|l| l == entry))
    };
    if has_options && preload.as_deref().is_some_and(names_ours) {
        return None;
    }
    let mut ours = Vec::new();
    let mut list = library.to_bytes().to_vec();
    if let Some(theirs) = preload.filter(|p| !p.is_empty() && !names_ours(p)) {
        list.push(b':');
        list.extend(theirs);
    }
    ours.push(CString::new([b"LD_PRELOAD=".as_slice(), &list].concat()).ok()?);
    if !has_options {
        ours.push(CString::new([Options::VARIABLE.as_bytes(), b"=", options.to_bytes()].concat()).ok()?);
    }
    pointers.extend(ours.iter().map(|s| s.as_ptr()));
    pointers.push(std::ptr::null());
    Some(Carried { pointers, _ours: ours })
}
