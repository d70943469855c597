//! The steps, in order, from a checked plan to the monitor.
//!
//! ```text
//! copy the monitor → network namespace → limits → cgroups → /dev/null
//!     → root → folders → devices → daemon → pid file, PID namespace → user, exec
//! ```

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Pid, getpid, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustix::time::{ClockId, clock_gettime};

use crate::confined;
use crate::error::{Error, at, host};
use crate::plan::Plan;
use crate::processes::{Forked, fork, leads_session, unshare_pids_of_children};

/// When this process began and what it used since: the monitor tells its start-up time
/// including it.
pub(crate) struct Clocks {
    start_us: u64,
    start_cpu_us: u64,
    /// By this process and those that it was forked from.
    spent_us: u64,
}

impl Clocks {
    /// Reads the clocks at the start.
    pub(crate) fn start() -> Self {
        Self {
            start_us: microseconds(ClockId::Monotonic),
            start_cpu_us: microseconds(ClockId::ProcessCPUTime),
            spent_us: 0,
        }
    }

    /// Adds what was used since the start or, in a child, since its fork.
    fn add_up(&mut self) {
        let now = microseconds(ClockId::ProcessCPUTime);
        self.spent_us += now.saturating_sub(self.start_cpu_us);
        self.start_cpu_us = 0;
    }
}

fn microseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

/// Makes the jail and becomes the monitor. Returns only in processes that are left
/// over: those that daemons and PID namespaces were forked from.
///
/// # Errors
/// That of the first step that failed.
pub(crate) fn start(plan: &Plan, mut clocks: Clocks) -> Result<(), Error> {
    fs::create_dir_all(&plan.root).map_err(at("make", &plan.root))?;
    confined::copy_monitor(plan)?;
    if let Some(path) = &plan.netns {
        let netns = File::open(path).map_err(at("open network namespace", path))?;
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|error| at("join network namespace", path)(error.into()))?;
    }
    plan.limits.set()?;
    plan.cgroups.set()?;
    let null = if plan.daemonize {
        let path = "/dev/null";
        let null = File::options().read(true).write(true).open(path);
        Some(null.map_err(at("open", path))?)
    } else {
        None
    };
    confined::enter(&plan.root)?;
    confined::make_folders(plan.uid, plan.gid)?;
    if let Some(error) = confined::make_devices(plan)? {
        println!("kombi-jailer: warning: {}", error.line());
    }
    clocks.add_up();
    if let Some(null) = null
        && matches!(become_daemon(&null, &mut clocks)?, Forked::Parent(_))
    {
        return Ok(());
    }

    let path = plan.inner_pid_file();
    let mut pid_file = File::create_new(&path).map_err(at("make", &path))?;
    let mut note =
        |pid: Pid| write!(pid_file, "{}", pid.as_raw_nonzero()).map_err(at("write", &path));
    if plan.new_pid_ns {
        let leads = leads_session();
        unshare_pids_of_children().map_err(host("make a PID namespace"))?;
        match fork().map_err(host("fork"))? {
            Forked::Parent(monitor) => return note(monitor),
            // A leader's end would send its session a hang-up.
            Forked::Child if leads => setsid().map(drop).map_err(host("start a session"))?,
            Forked::Child => {}
        }
    } else {
        note(getpid())?;
    }
    Err(exec(plan, &clocks))
}

/// Forks twice: the grandchild has a session without a terminal and, not being its
/// leader, will not get one. Returns which of the three this is.
fn become_daemon(null: &File, clocks: &mut Clocks) -> Result<Forked, Error> {
    if let Forked::Parent(pid) = fork().map_err(host("fork"))? {
        return Ok(Forked::Parent(pid));
    }
    setsid().map_err(host("start a session"))?;
    clocks.add_up();
    if let Forked::Parent(pid) = fork().map_err(host("fork"))? {
        return Ok(Forked::Parent(pid));
    }
    let redirected = dup2_stdin(null)
        .and_then(|()| dup2_stdout(null))
        .and_then(|()| dup2_stderr(null));
    redirected.map_err(host("redirect the standard streams"))?;
    Ok(Forked::Child)
}

/// Drops supplementary groups, group and user (in this order), and becomes the monitor
/// with an empty environment. Returns only if that fails.
fn exec(plan: &Plan, clocks: &Clocks) -> Error {
    let path = plan.inner_exec_file();
    let now_cpu_us = microseconds(ClockId::ProcessCPUTime);
    let source = Command::new(&path)
        .args(["--id", &plan.id])
        .args(["--start-time-us", &clocks.start_us.to_string()])
        .args(["--start-time-cpu-us", &now_cpu_us.to_string()])
        .args(["--parent-cpu-time-us", &clocks.spent_us.to_string()])
        .args(&plan.monitor_args)
        .env_clear()
        .uid(plan.uid)
        .gid(plan.gid)
        .exec();
    Error::Exec { path, source }
}
