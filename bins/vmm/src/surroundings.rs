//! The process's own surroundings: descriptors it inherited, its parent, the
//! signals that ask it to stop.

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::mpsc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, Resource, Signal, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm_sys_util::signal::{block_signal, unblock_signal};

/// The signals that end a machine in an orderly way.
const STOP_SIGNALS: [i32; 2] = [SIGTERM, SIGINT];

/// Descriptors that one machine may need: Firecracker's jailer gives as many.
const DESCRIPTORS_MAX: u64 = 2048;

/// A descriptor of our own for writing to what whoever started this process left
/// open as `number`. Call it before anything else is opened.
///
/// # Errors
/// The host's, when there is no such descriptor.
pub(crate) fn inherited(number: u32) -> std::io::Result<OwnedFd> {
    let raw = RawFd::try_from(number).map_err(|_| rustix::io::Errno::BADF)?;
    // Sockets cannot be opened by their path; what pidfd_getfd(2) needs, a host's
    // filter of system calls may forbid.
    match File::options()
        .append(true)
        .open(format!("/proc/self/fd/{raw}"))
    {
        Ok(file) => Ok(file.into()),
        Err(_) => {
            let own = rustix::process::getpid();
            let own = rustix::process::pidfd_open(own, PidfdFlags::empty())?;
            Ok(rustix::process::pidfd_getfd(
                own,
                raw,
                PidfdGetfdFlags::empty(),
            )?)
        }
    }
}

/// Has the kernel kill this process when the thread that started it ends.
///
/// # Errors
/// The host's.
pub(crate) fn die_with_parent() -> std::io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(
        Signal::KILL,
    ))?)
}

/// Whether `pipe` is one whose reading end is closed.
pub(crate) fn nobody_reads(pipe: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(pipe, PollFlags::empty())];
    let at_once = Timespec::default();
    poll(&mut polled, Some(&at_once)).is_ok() && polled[0].revents().contains(PollFlags::ERR)
}

/// Raises the soft limit of descriptors, usually 1024, as far as the hard one
/// allows and vsock's 1023 connections with some devices can need.
///
/// # Errors
/// The host's.
pub(crate) fn raise_descriptor_limit() -> std::io::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    if let Some(soft) = limit.current {
        let wanted = DESCRIPTORS_MAX.min(limit.maximum.unwrap_or(u64::MAX));
        limit.current = Some(soft.max(wanted));
        setrlimit(Resource::Nofile, limit)?;
    }
    Ok(())
}

/// Keeps the stop signals away from this thread and all that it starts: a
/// handler must not run on a thread that executes guest code.
///
/// # Errors
/// The host's.
pub(crate) fn block_stop_signals() -> std::io::Result<()> {
    for signal in STOP_SIGNALS {
        block_signal(signal).map_err(|error| std::io::Error::other(error.to_string()))?;
    }
    Ok(())
}

/// Starts the one thread that takes the stop signals, once it has called `confine`: the
/// first one is given to `first`, which stops the machine; a second one ends this process at once.
///
/// # Errors
/// The host's, and those of `confine`.
pub(crate) fn stop_on_signals(
    confine: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    first: impl Fn(i32) + Send + 'static,
) -> std::io::Result<()> {
    let mut signals = Signals::new(STOP_SIGNALS)?;
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let confined = confine();
            let may_run = confined.is_ok();
            let _ = tell.send(confined);
            drop(tell);
            if !may_run {
                return;
            }
            for signal in STOP_SIGNALS {
                // It was blocked by the same call, which succeeded.
                let _ = unblock_signal(signal);
            }
            let mut asked = false;
            for signal in signals.forever() {
                if asked {
                    std::process::exit(128 + signal);
                }
                asked = true;
                first(signal);
            }
        })?;
    // A thread that is gone without a word panicked.
    told.recv().unwrap_or(Ok(()))
}
