//! Every process that is ours to wait for: the one that was asked for, and orphans that come to us.

use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions, WaitStatus, wait};

use crate::spawn;

/// How long killed processes may take to vanish before the machine goes off all the same.
const KILL_TIME_MAX: Duration = Duration::from_secs(2);

/// Collects every child that has ended; gives the status of `watched` if it is among them.
pub(crate) fn reap(watched: Option<Pid>) -> Option<WaitStatus> {
    let mut found = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if Some(pid) == watched {
            found = Some(status);
        }
    }
    found
}

/// Kills everything that is left and waits, briefly, until it is gone.
pub(crate) fn kill_everything() {
    let start = Instant::now();
    while start.elapsed() < KILL_TIME_MAX {
        if rustix::process::getpid().is_init() {
            spawn::kill_all_others();
        } else {
            kill_children();
        }
        // No child left: neither will others come to us.
        if let Err(rustix::io::Errno::CHILD) = wait(WaitOptions::NOHANG) {
            return;
        }
        reap(None);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// As an ordinary process that adopts orphans: its children, whose own children then become its own.
fn kill_children() {
    let pid = rustix::process::getpid().as_raw_nonzero();
    let list =
        std::fs::read_to_string(format!("/proc/self/task/{pid}/children")).unwrap_or_default();
    for child in list
        .split_ascii_whitespace()
        .filter_map(|number| Pid::from_raw(number.parse().ok()?))
    {
        spawn::signal(child, 9);
    }
}
