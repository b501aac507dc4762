//! Another process of this program, spoken to in lines of JSON.

use crate::error::Trouble;
use crate::interrupt;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The other end. Dropped, its input ends and its own end is awaited.
#[derive(Debug)]
pub(crate) struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts this program again, with `prefix` and `args`.
    pub(crate) fn start(prefix: &[&str], args: &[&str]) -> Result<Peer, Trouble> {
        let program = std::env::current_exe().map_err(Trouble::failed("find this program"))?;
        let mut child = Command::new(program)
            .args(prefix)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Trouble::failed("start a process"))?;
        let (input, output) = (child.stdin.take(), child.stdout.take().expect("the output is piped"));
        Ok(Peer { child, input, output: BufReader::new(output) })
    }

    /// Sends a line.
    pub(crate) fn tell(&mut self, what: &impl Serialize) -> Result<(), Trouble> {
        let mut line = serde_json::to_string(what).map_err(Trouble::failed("write a message"))?;
        line.push('\n');
        let input = self.input.as_mut().expect("the input is open until the end");
        // A process that does not read any more has said why, or is found to be dead when it should answer.
        let _ = input.write_all(line.as_bytes());
        Ok(())
    }

    /// Waits for a line.
    pub(crate) fn hear<T: DeserializeOwned>(&mut self) -> Result<T, Trouble> {
        let mut line = String::new();
        let n = self.output.read_line(&mut line).map_err(Trouble::failed("hear from a process"))?;
        if interrupt::is_set() {
            return Err(Trouble::Interrupted);
        }
        if n == 0 {
            let status = self.child.wait().map_err(Trouble::failed("wait for a process"))?;
            return Err(Trouble::Ended(status));
        }
        serde_json::from_str(&line).map_err(Trouble::failed("understand a process"))
    }

    /// Its process.
    pub(crate) fn pid(&self) -> Option<Pid> {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Ends it without waiting for what it is doing.
    pub(crate) fn kill(&self) {
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}
