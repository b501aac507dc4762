//! For preloaded libraries: functions that take the place of the C library's, and the way to those.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// A function of the C library, looked up when it is first needed.
#[derive(Debug)]
pub struct Real {
    name: &'static CStr,
    at: AtomicPtr<c_void>,
}

impl Real {
    /// One of this name, not looked up yet.
    pub const fn new(name: &'static CStr) -> Real {
        Real { name, at: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// Its address; null if there is no such function.
    pub fn get(&self) -> *mut c_void {
        let known = self.at.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: looks up a name behind this library in the search order.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.at.store(found, Ordering::Relaxed);
        found
    }
}

/// Declares a function that takes the place of the C library's: inside the body, what is named last is that one.
///
/// ```ignore
/// interpose! {
///     fn close(fd: c_int) -> c_int, real => {
///         // SAFETY: the caller's argument, passed on.
///         unsafe { real(fd) }
///     }
/// }
/// ```
#[macro_export]
macro_rules! interpose {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $result:ty, $real:ident => $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> $result {
            static REAL: $crate::linux::interpose::Real = $crate::linux::interpose::Real::new(
                // SAFETY: the literal ends with a zero byte and has no other.
                unsafe { std::ffi::CStr::from_bytes_with_nul_unchecked(concat!(stringify!($name), "\0").as_bytes()) },
            );
            type Function = unsafe extern "C" fn($($type),*) -> $result;
            let address = REAL.get();
            if address.is_null() {
                return $crate::linux::interpose::missing::<$result>();
            }
            // SAFETY: the C library's function of this name has this type.
            #[allow(unused_variables)]
            let $real: Function = unsafe { std::mem::transmute::<*mut std::ffi::c_void, Function>(address) };
            $body
        }
    )*};
}

/// What a function returns that cannot be found; `errno` says so.
pub fn missing<T: Failure>() -> T {
    set_errno(libc::ENOSYS);
    T::FAILURE
}

/// Sets `errno` of the calling thread. It lies in libc's own static thread-local storage, not in any that is allocated.
pub fn set_errno(code: i32) {
    // SAFETY: errno of the calling thread.
    unsafe { *libc::__errno_location() = code };
}

/// `errno` of the calling thread.
pub fn errno() -> i32 {
    // SAFETY: errno of the calling thread.
    unsafe { *libc::__errno_location() }
}

/// Types by which C functions say that they failed.
pub trait Failure {
    /// The value that says so.
    const FAILURE: Self;
}

impl Failure for i32 {
    const FAILURE: i32 = -1;
}

impl Failure for isize {
    const FAILURE: isize = -1;
}

impl Failure for usize {
    /// SIG_ERR.
    const FAILURE: usize = usize::MAX;
}

impl Failure for () {
    const FAILURE: () = ();
}

impl Failure for *mut c_void {
    const FAILURE: *mut c_void = libc::MAP_FAILED;
}

impl Failure for *mut libc::FILE {
    const FAILURE: *mut libc::FILE = std::ptr::null_mut();
}
