//! What comes from C, looked at before it is believed: pointers, strings, arrays, and structures of other versions.

use crate::error::{Failure, ps_status};
use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

/// Structures larger than this no version of the library has.
const LARGEST: usize = 4096;

/// Whether a pointer can lead to a `T` at all.
fn sound<T>(pointer: *const T, name: &str) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::argument(format_args!("{name} is null")));
    }
    if !pointer.is_aligned() {
        let align = align_of::<T>();
        return Err(Failure::argument(format_args!("{name} is {pointer:p}, which is not aligned to {align} bytes")));
    }
    Ok(())
}

/// Where a result goes, known to be writable before anything is done.
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// # Safety
    /// A pointer that is not null, and aligned, leads to room for a `T` until the call is over.
    #[inline]
    pub(crate) unsafe fn new(pointer: *mut T, name: &str) -> Result<Out<T>, Failure> {
        if pointer.is_null() || !pointer.is_aligned() {
            sound(pointer, name)?;
        }
        Ok(Out(pointer))
    }

    #[inline]
    pub(crate) fn put(self, value: T) {
        // SAFETY: what `new` was promised.
        unsafe { self.0.write(value) };
    }
}

/// A structure that C knows by its size, of which there may be older and newer versions: its first field is its size, a
/// `usize`; every field may be zero, and means the default then; versions differ by what they add at the end.
///
/// # Safety
/// `repr(C)`, begins with a `usize`, has no padding, and is valid whatever its bytes are.
pub(crate) unsafe trait Versioned: Copy {}

/// The size that a structure says it has, if that can be.
///
/// # Safety
/// A pointer that is not null, and aligned, leads to a structure that begins with its size.
unsafe fn size_of_version<T: Versioned>(pointer: *const T, name: &str) -> Result<usize, Failure> {
    sound(pointer, name)?;
    // SAFETY: the caller's promise.
    let size = unsafe { pointer.cast::<usize>().read() };
    let why = match size {
        0 => "it was not set: set it to sizeof the structure",
        n if n > LARGEST => "no version of it is so large: was it set to sizeof the structure?",
        n if n % size_of::<usize>() != 0 => "no version of it has such a size: was it set to sizeof the structure?",
        _ => return Ok(size),
    };
    Err(Failure::new(ps_status::PS_ERR_SIZE, format!("the size of {name} is {size}: {why}")))
}

/// A structure as this version has it: what an older caller's lacks is zero.
///
/// # Errors
/// Where a newer caller's says something that this version does not know.
///
/// # Safety
/// A pointer that is not null, and aligned, leads to a structure that has the size which it begins with.
pub(crate) unsafe fn versioned<T: Versioned>(pointer: *const T, name: &str) -> Result<T, Failure> {
    // SAFETY: the caller's promise.
    let size = unsafe { size_of_version(pointer, name) }?;
    let known = size.min(size_of::<T>());
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: the source has `size` bytes, of which `known` are copied to a place that has as many.
    unsafe { pointer.cast::<u8>().copy_to_nonoverlapping(value.as_mut_ptr().cast(), known) };
    // SAFETY: the rest of the source.
    let rest = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known) };
    if let Some(at) = rest.iter().position(|byte| *byte != 0) {
        let why = format!(
            "{name} says something at byte {} that this version of the library ({}) does not know: it is for a newer one",
            known + at,
            env!("CARGO_PKG_VERSION"),
        );
        return Err(Failure::new(ps_status::PS_ERR_SIZE, why));
    }
    // SAFETY: it is valid whatever its bytes are.
    Ok(unsafe { value.assume_init() })
}

/// Where a structure goes that is filled in as far as the caller's version has it.
pub(crate) struct VersionedOut<T> {
    to: *mut T,
    size: usize,
}

impl<T: Versioned> VersionedOut<T> {
    /// # Safety
    /// As for [`versioned`], and until the call is over.
    pub(crate) unsafe fn new(pointer: *mut T, name: &str) -> Result<VersionedOut<T>, Failure> {
        // SAFETY: the caller's promise.
        let size = unsafe { size_of_version(pointer, name) }?;
        Ok(VersionedOut { to: pointer, size })
    }

    /// The size field comes to be the number of bytes that are filled in; what a newer caller has beyond is zero.
    pub(crate) fn put(self, value: &T) {
        let known = self.size.min(size_of::<T>());
        let to = self.to.cast::<u8>();
        // SAFETY: the target has `size` bytes, as `new` was promised; `known` is no more than either has.
        unsafe {
            std::ptr::from_ref(value).cast::<u8>().copy_to_nonoverlapping(to, known);
            to.add(known).write_bytes(0, self.size - known);
            self.to.cast::<usize>().write(known);
        }
    }
}

/// A string.
///
/// # Safety
/// A pointer that is not null leads to bytes of which one is 0, and which stay as they are for `'a`.
pub(crate) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str, Failure> {
    sound(pointer, name)?;
    // SAFETY: the caller's promise.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    bytes.to_str().map_err(|e| Failure::argument(format_args!("{name} is no UTF-8: {e}")))
}

/// An array.
///
/// # Safety
/// A pointer that is not null, and aligned, leads to `count` values, which stay as they are for `'a`.
pub(crate) unsafe fn array<'a, T>(pointer: *const T, count: usize, name: &str) -> Result<&'a [T], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    sound(pointer, name)?;
    fits::<T>(count, name)?;
    // SAFETY: the caller's promise; not more bytes than an object can have.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// Room for an array.
///
/// # Safety
/// As for [`array`], and nobody else uses it.
pub(crate) unsafe fn room<'a, T>(
    pointer: *mut T,
    count: usize,
    name: &str,
) -> Result<&'a mut [MaybeUninit<T>], Failure> {
    if count == 0 {
        return Ok(&mut []);
    }
    sound(pointer, name)?;
    fits::<T>(count, name)?;
    // SAFETY: as in `array`; what is there need not be valid.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer.cast(), count) })
}

fn fits<T>(count: usize, name: &str) -> Result<(), Failure> {
    match count.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Failure::argument(format_args!("{name} is said to have {count} values, more than memory can have"))),
    }
}

/// The bytes from `at` on, `len` of them.
pub(crate) fn part(at: usize, len: usize) -> Result<std::ops::Range<usize>, Failure> {
    let end = at.checked_add(len);
    let end = end
        .ok_or_else(|| Failure::new(ps_status::PS_ERR_RANGE, format!("{len} bytes from {at} on: the range wraps")))?;
    Ok(at..end)
}

/// Whether memory can be there at all.
pub(crate) fn memory<T>(start: *const T, len: usize, name: &str) -> Result<(), Failure> {
    if start.is_null() {
        return Err(Failure::argument(format_args!("{name} is null")));
    }
    if start.addr().checked_add(len).is_none_or(|end| end > isize::MAX as usize) {
        let why =
            format!("{name}: {len} bytes at {start:p}: the range wraps, or lies beyond what a process can have");
        return Err(Failure::new(ps_status::PS_ERR_RANGE, why));
    }
    Ok(())
}

/// Which of the values that there are a number means.
pub(crate) fn choice<T: Copy>(number: u32, values: &[T], name: &str) -> Result<T, Failure> {
    values.get(number as usize).copied().ok_or_else(|| {
        Failure::argument(format_args!("{name} is {number}, and there is nothing of that number: see the header"))
    })
}

/// That no flags are set but those of `known`.
pub(crate) fn flags(flags: u32, known: u32, name: &str) -> Result<(), Failure> {
    match flags & !known {
        0 => Ok(()),
        rest => Err(Failure::argument(format_args!("{name} has bits {rest:#x} that mean nothing: see the header"))),
    }
}
