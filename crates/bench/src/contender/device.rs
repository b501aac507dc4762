//! The devices that are measured: the one place that knows how each is made.

use crate::error::Trouble;
use crate::spec::{DeviceKind, Spec};
use peerspace::Builder;
use peerspace::device::soft::Soft;

/// Whether this build has the device.
pub(crate) fn available(device: DeviceKind) -> bool {
    match device {
        DeviceKind::Soft => true,
        DeviceKind::Compressed => cfg!(feature = "compressed"),
        DeviceKind::File => cfg!(feature = "file"),
    }
}

/// Adds the device to a space that is being made, with room for the data and some more. Says how it works here, if
/// that is not the same everywhere.
pub(super) fn attach(
    builder: Builder,
    device: DeviceKind,
    spec: &Spec,
) -> Result<(Builder, Option<String>), Trouble> {
    let bytes = spec.data + spec.data / 2 + spec.host;
    match device {
        DeviceKind::Soft => {
            let soft = Soft::new(bytes).map_err(Trouble::unavailable("the device soft"))?;
            Ok((builder.device(soft), None))
        }
        DeviceKind::Compressed => compressed(builder, bytes),
        DeviceKind::File => file(builder, bytes, spec),
    }
}

#[cfg(feature = "compressed")]
fn compressed(builder: Builder, bytes: u64) -> Result<(Builder, Option<String>), Trouble> {
    let device = peerspace::device::compressed::Compressed::new(bytes)
        .map_err(Trouble::unavailable("the device compressed"))?;
    Ok((builder.device(device), None))
}

#[cfg(not(feature = "compressed"))]
fn compressed(_: Builder, _: u64) -> Result<(Builder, Option<String>), Trouble> {
    Err(missing())
}

#[cfg(feature = "file")]
fn file(builder: Builder, bytes: u64, spec: &Spec) -> Result<(Builder, Option<String>), Trouble> {
    let device = peerspace::device::file::File::open(&spec.dir, Some(bytes))
        .map_err(Trouble::unavailable("the device file"))?;
    Ok((builder.device(device), None))
}

#[cfg(not(feature = "file"))]
fn file(_: Builder, _: u64, _: &Spec) -> Result<(Builder, Option<String>), Trouble> {
    Err(missing())
}

#[cfg(not(all(feature = "compressed", feature = "file")))]
fn missing() -> Trouble {
    Trouble::Unavailable("this device is not available in this build".into())
}
