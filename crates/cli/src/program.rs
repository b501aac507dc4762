//! What a program is: found or not, executable or not, and whether a library can be preloaded into it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why a program cannot be run under management.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// There is no such program.
    NotFound(String),
    /// It cannot be executed, or nothing can be preloaded into it.
    NotExecutable(String),
}

impl Problem {
    /// The exit status that says so.
    pub(crate) fn status(&self) -> u8 {
        match self {
            Problem::NotFound(_) => 127,
            Problem::NotExecutable(_) => 126,
        }
    }
}

/// Finds `program` like a shell would, and checks that a library can be preloaded into it.
pub(crate) fn find(program: &OsStr) -> Result<PathBuf, Problem> {
    let path = locate(program)?;
    preloadable(&path, 0)?;
    Ok(path)
}

fn locate(program: &OsStr) -> Result<PathBuf, Problem> {
    let name = program.to_string_lossy();
    if program.as_bytes().contains(&b'/') {
        let path = PathBuf::from(program);
        return match fs::metadata(&path) {
            Err(e) => Err(Problem::NotFound(format!("{name}: {e}"))),
            Ok(m) if m.is_dir() => Err(Problem::NotExecutable(format!("{name} is a directory"))),
            Ok(m) if m.permissions().mode() & 0o111 == 0 => {
                Err(Problem::NotExecutable(format!("{name} has no permission to be executed")))
            }
            Ok(_) => Ok(path),
        };
    }
    let search = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/bin:/usr/bin"));
    let mut there = None;
    for dir in std::env::split_paths(&search) {
        let path = dir.join(program);
        if let Ok(m) = fs::metadata(&path)
            && m.is_file()
        {
            if m.permissions().mode() & 0o111 != 0 {
                return Ok(path);
            }
            there = there.or(Some(path));
        }
    }
    Err(match there {
        Some(path) => Problem::NotExecutable(format!("{} has no permission to be executed", path.display())),
        None => Problem::NotFound(format!("{name}: no such program in PATH")),
    })
}

/// Whether the dynamic loader will preload anything into the program at `path`.
fn preloadable(path: &Path, depth: u32) -> Result<(), Problem> {
    let name = path.display();
    let cannot = |why: String| Err(Problem::NotExecutable(why));
    let mut file = match fs::File::open(path) {
        Ok(file) => file,
        // It can be executed without being read; the loader will find out.
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Ok(()),
        Err(e) => return cannot(format!("{name}: {e}")),
    };
    if let Ok(m) = file.metadata()
        && (m.mode() & 0o4000 != 0 && m.uid() != rustix::process::geteuid().as_raw()
            || m.mode() & 0o2000 != 0 && m.gid() != rustix::process::getegid().as_raw())
    {
        return cannot(format!(
            "{name} runs with another user's rights: the loader preloads nothing into such programs"
        ));
    }
    let mut bytes = Vec::new();
    if let Err(e) = file.by_ref().take(1 << 16).read_to_end(&mut bytes) {
        return cannot(format!("{name}: {e}"));
    }
    if let Some(rest) = bytes.strip_prefix(b"#!") {
        let line = rest.split(|b| *b == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let Some(interpreter) = line.split_whitespace().next() else {
            return cannot(format!("{name} names no interpreter in its first line"));
        };
        if depth > 4 {
            return cannot(format!("{name}: interpreters of interpreters, too many of them"));
        }
        if !Path::new(interpreter).exists() {
            return Err(Problem::NotFound(format!("{name}: its interpreter {interpreter} does not exist")));
        }
        return preloadable(Path::new(interpreter), depth + 1);
    }
    match Elf::parse(&bytes) {
        // Neither a script nor an ELF file: a shell may know what to do with it, we do not.
        None => cannot(format!("{name} is no program this system can execute")),
        Some(elf) if !elf.native => cannot(format!("{name} is made for another kind of machine")),
        Some(Elf { interpreter: None, .. }) => cannot(format!(
            "{name} is statically linked: there is no loader that could preload anything into it. Link it dynamically, \
             or use the library"
        )),
        Some(Elf { interpreter: Some(i), .. }) if i.contains("musl") => cannot(format!(
            "{name} is linked with musl, and this command's library with glibc: they cannot be in one process"
        )),
        Some(_) => Ok(()),
    }
}

/// What matters about an ELF file.
#[derive(Debug)]
struct Elf {
    /// It is for this machine.
    native: bool,
    /// The loader it asks for.
    interpreter: Option<String>,
}

impl Elf {
    fn parse(bytes: &[u8]) -> Option<Elf> {
        const PT_INTERP: u32 = 3;
        const CLASS64: u8 = 2;
        const MACHINE: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
        if !bytes.starts_with(b"\x7fELF") {
            return None;
        }
        let u16_at = |at: usize| bytes.get(at..at + 2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
        let u32_at = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
        let u64_at = |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_ne_bytes);
        let native = bytes.get(4) == Some(&CLASS64) && u16_at(18) == Some(MACHINE);
        if !native {
            return Some(Elf { native, interpreter: None });
        }
        let (table, size, count) = (u64_at(32)? as usize, u16_at(54)? as usize, u16_at(56)? as usize);
        let mut interpreter = None;
        for i in 0..count.min(64) {
            let at = table.checked_add(i * size)?;
            if u32_at(at) == Some(PT_INTERP) {
                let (offset, len) = (u64_at(at + 8)? as usize, u64_at(at + 32)? as usize);
                let text = bytes.get(offset..offset.checked_add(len)?)?;
                interpreter = Some(String::from_utf8_lossy(text).trim_end_matches('\0').to_string());
            }
        }
        Some(Elf { native, interpreter })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    fn script(dir: &Path, name: &str, mode: u32, text: &[u8]) -> PathBuf {
        use std::io::Write;
        let path = dir.join(name);
        let mut f = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(mode).open(&path).unwrap();
        f.write_all(text).unwrap();
        path
    }

    #[test]
    fn programs_are_found_like_a_shell_finds_them() {
        assert!(find(OsStr::new("sh")).unwrap().is_absolute());
        assert_eq!(find(OsStr::new("no-such-program-anywhere")).unwrap_err().status(), 127);
        assert_eq!(find(OsStr::new("/no/such/file")).unwrap_err().status(), 127);
        assert_eq!(find(OsStr::new("/etc/passwd")).unwrap_err().status(), 126);
        assert_eq!(find(OsStr::new("/")).unwrap_err().status(), 126);
    }

    #[test]
    fn scripts_are_judged_by_their_interpreter() {
        let dir = tempfile::tempdir().unwrap();
        let ok = script(dir.path(), "ok", 0o755, b"#!/bin/sh\necho\n");
        assert_eq!(find(ok.as_os_str()), Ok(ok));
        let lost = script(dir.path(), "lost", 0o755, b"#!/no/interpreter\n");
        assert!(matches!(find(lost.as_os_str()), Err(Problem::NotFound(why)) if why.contains("/no/interpreter")));
        let noise = script(dir.path(), "noise", 0o755, b"nothing anybody knows");
        assert_eq!(find(noise.as_os_str()).unwrap_err().status(), 126);
        let closed = script(dir.path(), "closed", 0o644, b"#!/bin/sh\n");
        assert_eq!(find(closed.as_os_str()).unwrap_err().status(), 126);
    }

    #[test]
    fn a_static_binary_is_told_apart() {
        // The least ELF header there is: native, without segments.
        let mut elf = vec![0u8; 64];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        elf[18] = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "static", 0o755, &elf);
        match find(path.as_os_str()) {
            Err(Problem::NotExecutable(why)) => assert!(why.contains("statically linked"), "{why}"),
            other => panic!("{other:?}"),
        }
        elf[18] = 40;
        let path = script(dir.path(), "foreign", 0o755, &elf);
        assert!(matches!(find(path.as_os_str()), Err(Problem::NotExecutable(w)) if w.contains("another kind")));
    }
}
