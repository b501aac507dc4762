//! Spaces, and the devices that belong to them (rules Z3, Z9, Z11).

use crate::args::{self, Out, Versioned, VersionedOut};
use crate::device::{CDevice, ps_device_ops};
use crate::error::{Failure, Inside, call, call_from, ps_status};
use crate::statistics::{ps_device_statistics, ps_statistics};
use crate::table;
use peerspace::{DeviceId, DeviceSpec, Faults, Space};
use peerspace_os::own::{Own, Shared, Vec as OwnVec};
use std::ffi::c_char;
use std::sync::{Mutex, PoisonError};

/// A space: one address space for the CPU and its devices.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_space {
    /// A handle; 0 is none.
    pub id: u64,
}

/// A device of a space. It needs no release: it is good until it is detached, or its space is released. Where a place for
/// data is meant, PS_HOST is RAM.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_device {
    /// A handle; 0 is none.
    pub id: u64,
}

/// How faults of the CPU reach a space.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub enum ps_faults {
    /// By threads where this process may have system calls served too, by signal otherwise.
    PS_FAULTS_AUTO = 0,
    /// By SIGBUS in the faulting thread: three to five microseconds, no privilege. A system call that meets a page that is
    /// not in RAM fails with EFAULT: see ps_pin.
    PS_FAULTS_SIGNAL = 1,
    /// By threads of the space. System calls are served as well. Needs root, vm.unprivileged_userfaultfd, or access to
    /// /dev/userfaultfd.
    PS_FAULTS_THREADS = 2,
}

/// A device that a space begins with: one of the two. This structure stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_device_choice {
    /// As on a command line: "compressed:1G", "file:/var/tmp:8G", "dax:1G", "soft:64M". Null where `ops` is meant.
    pub spec: *const c_char,
    /// Implemented in C: see struct ps_device_ops. Null where `spec` is meant.
    pub ops: *const ps_device_ops,
}

/// What a space is made with. What is 0 has its default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_space_options {
    /// sizeof(struct ps_space_options).
    pub size: usize,
    /// How much RAM the space's memory may take up, in bytes. Has no default.
    pub host_bytes: u64,
    /// How many bytes may be kept resident at once: three quarters of `host_bytes` otherwise.
    pub pin_limit: u64,
    /// An enum ps_faults.
    pub faults: u32,
    /// How many threads serve faults when they are delivered to threads: one for each two processors otherwise, from two
    /// to eight.
    pub handlers: u32,
    /// The devices, in the order in which they are tried. At least one.
    pub devices: *const ps_device_choice,
    /// How many there are.
    pub device_count: usize,
    /// Does without these features of userfaultfd, bits as in <linux/userfaultfd.h>: to find out how a space works on an
    /// older kernel.
    pub without_features: u64,
}

// SAFETY: repr(C), begins with its size; 8 + 8 + 8 + 4 + 4 + 8 + 8 + 8 bytes without padding, of numbers and pointers.
unsafe impl Versioned for ps_space_options {}

/// In memory of our own: who works on it may wait for nothing that waits for a fork.
type Devices = OwnVec<(DeviceId, u64)>;

/// A space, and the handles of its devices.
pub(crate) struct SpaceEntry {
    pub(crate) space: Space,
    devices: Mutex<Devices>,
}

/// A device, and its space. Whoever releases a space releases those of its devices as well, so this does not keep it.
pub(crate) struct DeviceEntry {
    id: DeviceId,
    of: Shared<SpaceEntry>,
    /// The handle of the space.
    space: u64,
}

impl SpaceEntry {
    /// Works on the list of devices, which nobody does while the process forks: in the child it would stay locked.
    fn with_devices<T>(&self, work: impl FnOnce(&mut Devices) -> T) -> T {
        let _no_fork = table::no_fork();
        work(&mut self.devices.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives a device of the space, which has the handle `space`, a handle.
    fn add_device(this: &Shared<SpaceEntry>, id: DeviceId, space: u64) -> Result<u64, Failure> {
        let handle = table::open(DeviceEntry { id, of: this.clone(), space })?;
        this.with_devices(|devices| devices.push((id, handle)));
        Ok(handle)
    }
}

/// The device `device` of the space with the handle `space`; none for PS_HOST.
pub(crate) fn device_of(space: u64, device: ps_device) -> Result<Option<DeviceId>, Failure> {
    if device.id == 0 {
        return Ok(None);
    }
    let entry = table::find::<DeviceEntry>(device.id, "device")?;
    if entry.space != space {
        let why = format!("device: {:#x} is a device of another space", device.id);
        return Err(Failure::new(ps_status::PS_ERR_HANDLE, why));
    }
    Ok(Some(entry.id))
}

/// The same where RAM is not meant.
pub(crate) fn true_device_of(space: u64, device: ps_device) -> Result<DeviceId, Failure> {
    device_of(space, device)?.ok_or_else(|| Failure::argument("device is PS_HOST, and a device is needed"))
}

/// A device and its space.
pub(crate) fn with_device<T>(
    device: ps_device,
    f: impl FnOnce(&SpaceEntry, DeviceId) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let entry = table::find::<DeviceEntry>(device.id, "device")?;
    f(&entry.of, entry.id)
}

/// Makes a space.
///
/// A program that handles SIGBUS itself does so before it makes its first space, or calls ps_forward_sigbus from its handler.
///
/// Errors: PS_ERR_BUDGET; PS_ERR_NO_DEVICE without a device; PS_ERR_DEVICE when one cannot be had; PS_ERR_SYSTEM when this
/// system does not allow what is needed. Devices in C are not destroyed then.
///
/// # Safety
/// `options`, what it points to, and `space` are null or good; so are the functions of devices, until those are destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_space_create(options: *const ps_space_options, space: *mut ps_space) -> ps_status {
    call("ps_space_create", || {
        // SAFETY: the caller's promise, here and below.
        let out = unsafe { Out::new(space, "space") }?;
        // SAFETY: as above.
        let options = unsafe { args::versioned(options, "options") }?;
        let faults =
            args::choice(options.faults, &[Faults::Auto, Faults::Signal, Faults::Threads], "options.faults")?;
        let mut builder =
            Space::builder().host(options.host_bytes).faults(faults).handlers(options.handlers as usize);
        builder = builder.without_features(options.without_features);
        if options.pin_limit != 0 {
            builder = builder.pin_limit(options.pin_limit);
        }
        // SAFETY: as above.
        let choices = unsafe { args::array(options.devices, options.device_count, "options.devices") }?;
        let mut owned = Vec::new();
        for (i, choice) in choices.iter().enumerate() {
            let name = format!("options.devices[{i}]");
            builder = match (choice.spec.is_null(), choice.ops.is_null()) {
                (false, true) => {
                    // SAFETY: as above.
                    let spec = unsafe { args::text(choice.spec, &format!("{name}.spec")) }?;
                    builder.spec(&spec.parse::<DeviceSpec>()?)?
                }
                (true, false) => {
                    // SAFETY: as above.
                    let device = unsafe { CDevice::new(choice.ops, &format!("{name}.ops")) }?;
                    owned.push(device.ownership());
                    match device.deadline() {
                        None => builder.device(device),
                        Some(limit) => builder.device(device.within(limit)?),
                    }
                }
                (true, true) => return Err(Failure::argument(format_args!("{name} has neither spec nor ops"))),
                (false, false) => {
                    return Err(Failure::argument(format_args!("{name} has both spec and ops: one is meant")));
                }
            };
        }
        let made = builder.build()?;
        let ids = made.devices();
        let entry = Shared::new(SpaceEntry { space: made, devices: Mutex::new(OwnVec::new_in(Own)) });
        let handle = table::open(entry.clone())?;
        let added = ids.into_iter().try_for_each(|id| SpaceEntry::add_device(&entry, id, handle).map(drop));
        if let Err(e) = added {
            drop(release(handle));
            return Err(e);
        }
        // Only now are they the space's for good.
        owned.into_iter().for_each(|device| device.take());
        out.put(ps_space { id: handle });
        Ok(())
    })
}

fn release(handle: u64) -> Result<(), Failure> {
    let entry = table::close::<Shared<SpaceEntry>>(handle, "space")?;
    // Not locked: calls on devices are waited for, and one that detaches its device wants the list.
    let devices = entry.with_devices(|devices| std::mem::replace(devices, OwnVec::new_in(Own)));
    for (_, device) in devices {
        // Detached by another thread in this moment.
        let _ = table::close::<DeviceEntry>(device, "device");
    }
    Ok(())
}

/// Releases a space, and the handles of its devices. The space lives until its last region, adopted memory and pin are
/// released as well; then its devices are destroyed.
///
/// Calls under way are waited for. Errors: PS_ERR_HANDLE.
#[unsafe(no_mangle)]
pub extern "C" fn ps_space_release(space: ps_space) -> ps_status {
    call("ps_space_release", || release(space.id))
}

/// How faults reach the space: PS_FAULTS_SIGNAL or PS_FAULTS_THREADS.
///
/// # Safety
/// `faults` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_space_faults(space: ps_space, faults: *mut u32) -> ps_status {
    call_from(Inside::Work, "ps_space_faults", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(faults, "faults") }?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        out.put(match entry.space.faults() {
            Faults::Signal => ps_faults::PS_FAULTS_SIGNAL as u32,
            _ => ps_faults::PS_FAULTS_THREADS as u32,
        });
        Ok(())
    })
}

/// What the space is doing, in numbers. Set `statistics->size` before; it comes back as the number of bytes that were filled
/// in.
///
/// # Safety
/// `statistics` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_space_get_statistics(space: ps_space, statistics: *mut ps_statistics) -> ps_status {
    call_from(Inside::Work, "ps_space_get_statistics", || {
        // SAFETY: the caller's promise.
        let out = unsafe { VersionedOut::new(statistics, "statistics") }?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        out.put(&ps_statistics::of(&entry.space.statistics()));
        Ok(())
    })
}

/// Walks everything and checks the invariants of the space. Nothing else may use it meanwhile. For tests.
///
/// Errors: PS_ERR_INTERNAL when one does not hold, with a message that says which.
#[unsafe(no_mangle)]
pub extern "C" fn ps_space_check(space: ps_space) -> ps_status {
    call("ps_space_check", || {
        table::find::<Shared<SpaceEntry>>(space.id, "space")?.space.check();
        Ok(())
    })
}

/// The devices of the space, in the order in which they are tried: as many as `room` allows go to `devices`, and `count` gets
/// how many there are.
///
/// # Safety
/// `devices` is null, or has room for `room` handles; `count` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_space_devices(
    space: ps_space,
    devices: *mut ps_device,
    room: usize,
    count: *mut usize,
) -> ps_status {
    call_from(Inside::Work, "ps_space_devices", || {
        // SAFETY: the caller's promise, here and below.
        let out = unsafe { Out::new(count, "count") }?;
        // SAFETY: as above.
        let to = unsafe { args::room(devices, room, "devices") }?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let order = entry.space.devices();
        let known = entry.with_devices(|known| known.clone());
        let mut n = 0;
        for id in order {
            let Some((_, handle)) = known.iter().find(|(of, _)| *of == id) else { continue };
            if let Some(to) = to.get_mut(n) {
                to.write(ps_device { id: *handle });
            }
            n += 1;
        }
        out.put(n);
        Ok(())
    })
}

/// Adds a device that is implemented in C, to be tried after those that are there. What `ops` points to is copied.
///
/// Errors: PS_ERR_ARGUMENT when it lacks a function that it needs; PS_ERR_DEVICE when it cannot be used. It is not destroyed
/// then.
///
/// # Safety
/// `ops`, what it points to, and `device` are null or good; so are the functions, until the device is destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_device_attach(
    space: ps_space,
    ops: *const ps_device_ops,
    device: *mut ps_device,
) -> ps_status {
    call("ps_device_attach", || {
        // SAFETY: the caller's promise, here and below.
        let out = unsafe { Out::new(device, "device") }?;
        // SAFETY: as above.
        let new = unsafe { CDevice::new(ops, "ops") }?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let owned = new.ownership();
        let id = match new.deadline() {
            None => entry.space.attach(new)?,
            Some(limit) => entry.space.attach(new.within(limit)?)?,
        };
        out.put(attached(&entry, id, space)?);
        owned.take();
        Ok(())
    })
}

/// Adds a device as it is written on a command line, such as "compressed:1G", to be tried after those that are there.
///
/// Errors: PS_ERR_ARGUMENT when it cannot be understood; PS_ERR_DEVICE when it cannot be had.
///
/// # Safety
/// `spec` and `device` are null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_device_attach_spec(
    space: ps_space,
    spec: *const c_char,
    device: *mut ps_device,
) -> ps_status {
    call("ps_device_attach_spec", || {
        // SAFETY: the caller's promise, here and below.
        let out = unsafe { Out::new(device, "device") }?;
        // SAFETY: as above.
        let spec = unsafe { args::text(spec, "spec") }?.parse::<DeviceSpec>()?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let id = entry.space.attach_spec(&spec)?;
        out.put(attached(&entry, id, space)?);
        Ok(())
    })
}

/// Adds persistent memory: the file or device node at `path`, made with `bytes` bytes where there is none (0: as large as it
/// is). Nothing goes there but regions that have names: see ps_persistent_create (rule Z5).
///
/// Errors: PS_ERR_DEVICE when it cannot be had, or this build is without it.
///
/// # Safety
/// `path` and `device` are null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_device_attach_persistent(
    space: ps_space,
    path: *const c_char,
    bytes: u64,
    device: *mut ps_device,
) -> ps_status {
    call("ps_device_attach_persistent", || {
        // SAFETY: the caller's promise, here and below.
        let out = unsafe { Out::new(device, "device") }?;
        // SAFETY: as above.
        let path = unsafe { args::text(path, "path") }?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let id = attach_persistent(&entry, path, (bytes > 0).then_some(bytes))?;
        out.put(attached(&entry, id, space)?);
        Ok(())
    })
}

#[cfg(feature = "dax")]
fn attach_persistent(entry: &SpaceEntry, path: &str, bytes: Option<u64>) -> Result<DeviceId, Failure> {
    let device = peerspace::device::dax::Dax::persistent(path, bytes);
    let device = device.map_err(|e| Failure::new(ps_status::PS_ERR_DEVICE, format!("{path}: {e}")))?;
    Ok(entry.space.attach(device)?)
}

#[cfg(not(feature = "dax"))]
fn attach_persistent(_: &SpaceEntry, path: &str, _: Option<u64>) -> Result<DeviceId, Failure> {
    let why = format!("{path}: this build of peerspace was made without persistent memory (cargo feature \"dax\")");
    Err(Failure::new(ps_status::PS_ERR_DEVICE, why))
}

/// A handle for a device that was just attached; without one it goes again.
fn attached(entry: &Shared<SpaceEntry>, id: DeviceId, space: ps_space) -> Result<ps_device, Failure> {
    match SpaceEntry::add_device(entry, id, space.id) {
        Ok(id) => Ok(ps_device { id }),
        Err(e) => {
            let _ = entry.space.detach(id);
            Err(e)
        }
    }
}

/// Takes a device away, and destroys it (rule Z3): what it holds moves to other devices and free RAM first, while everything
/// goes on.
///
/// Errors: PS_ERR_NO_ROOM when there is less room than it takes, with the number of bytes; PS_ERR_NO_DEVICE when another
/// thread detaches it; PS_ERR_DEVICE when its pages are in use without pause. It is in use as before then.
#[unsafe(no_mangle)]
pub extern "C" fn ps_device_detach(device: ps_device) -> ps_status {
    call("ps_device_detach", || {
        with_device(device, |entry, id| {
            entry.space.detach(id)?;
            entry.with_devices(|devices| devices.retain(|(of, _)| *of != id));
            Ok(())
        })?;
        // The space may have been released meanwhile, and its devices' handles with it.
        let _ = table::close::<DeviceEntry>(device.id, "device");
        Ok(())
    })
}

/// Marks a device as failed: nothing is asked of it any more, and what it alone holds is lost, page by page, when it is asked
/// for (rule Z9).
#[unsafe(no_mangle)]
pub extern "C" fn ps_device_fail(device: ps_device) -> ps_status {
    call("ps_device_fail", || with_device(device, |entry, id| Ok(entry.space.fail(id)?)))
}

/// Numbers of a device. Set `statistics->size` before; it comes back as the number of bytes that were filled in.
///
/// # Safety
/// `statistics` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_device_get_statistics(
    device: ps_device,
    statistics: *mut ps_device_statistics,
) -> ps_status {
    call_from(Inside::Work, "ps_device_get_statistics", || {
        // SAFETY: the caller's promise.
        let out = unsafe { VersionedOut::new(statistics, "statistics") }?;
        let numbers = with_device(device, |entry, id| Ok(entry.space.device_statistics(id)?))?;
        out.put(&ps_device_statistics::of(&numbers));
        Ok(())
    })
}
