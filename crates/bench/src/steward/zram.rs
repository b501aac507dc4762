//! Swap on compressed memory: a zram device of our own beside those there are.

use super::patiently;
use super::swap::Swap;
use crate::error::Trouble;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const CONTROL: &str = "/sys/class/zram-control";
/// What the device is compressed with if the kernel has it: as ours is.
const ALGORITHM: &str = "lz4";

/// Swap on zram. The fields are dropped in their order: swap off, the device, the module.
#[derive(Debug)]
pub(super) struct Zram {
    _swap: Swap,
    device: Device,
    _module: Option<Module>,
}

impl Zram {
    pub(super) fn new(bytes: u64) -> Result<Zram, Trouble> {
        let module = Module::load()?;
        let device = Device::add()?;
        // An algorithm that is not there is refused, and the device's own stays.
        let _ = fs::write(device.attribute("comp_algorithm"), ALGORITHM);
        fs::write(device.attribute("disksize"), bytes.to_string())
            .map_err(Trouble::unavailable("size a zram device"))?;
        let swap = Swap::on(&device.path(), bytes)?;
        Ok(Zram { _swap: swap, device, _module: module })
    }

    pub(super) fn what(&self) -> String {
        let algorithms = fs::read_to_string(self.device.attribute("comp_algorithm")).unwrap_or_default();
        // The one in use is in brackets.
        let used = algorithms.split_whitespace().find_map(|a| a.strip_prefix('[')?.strip_suffix(']'));
        format!("zram, {}", used.unwrap_or("unknown algorithm"))
    }
}

/// A device that is removed when dropped.
#[derive(Debug)]
struct Device {
    number: u32,
}

impl Device {
    fn add() -> Result<Device, Trouble> {
        let number =
            fs::read_to_string(format!("{CONTROL}/hot_add")).map_err(Trouble::unavailable("add a zram device"))?;
        let number = number.trim().parse().map_err(Trouble::unavailable("add a zram device"))?;
        let device = Device { number };
        // The node may take a moment to appear.
        patiently("find the node of a zram device", || fs::metadata(device.path()));
        Ok(device)
    }

    fn path(&self) -> PathBuf {
        format!("/dev/zram{}", self.number).into()
    }

    fn attribute(&self, name: &str) -> PathBuf {
        format!("/sys/block/zram{}/{name}", self.number).into()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        patiently("reset a zram device", || fs::write(self.attribute("reset"), "1"));
        patiently("remove a zram device", || fs::write(format!("{CONTROL}/hot_remove"), self.number.to_string()));
    }
}

/// The kernel module, unloaded again if it had to be loaded.
#[derive(Debug)]
struct Module;

impl Module {
    fn load() -> Result<Option<Module>, Trouble> {
        if fs::metadata(CONTROL).is_ok() {
            return Ok(None);
        }
        // It comes with no device of its own: whoever wants one adds it.
        let loaded = Command::new("modprobe").args(["zram", "num_devices=0"]).stdin(Stdio::null()).output();
        if loaded.is_ok_and(|o| o.status.success()) && fs::metadata(CONTROL).is_ok() {
            return Ok(Some(Module));
        }
        Err(Trouble::Unavailable("the kernel has no zram".into()))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // Somebody else may use it by now.
        let _ = Command::new("modprobe").args(["-r", "zram"]).stdin(Stdio::null()).output();
    }
}
