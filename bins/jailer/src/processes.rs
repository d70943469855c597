//! Descriptors, processes and namespaces in ways that the standard library does not
//! have: what of this program needs `unsafe`.
//!
//! Invariant: called by a process of one thread only.
#![allow(unsafe_code)] // fork(2), unshare(2), getsid(2), and descriptors that are not ours

use std::io;

use rustix::process::Pid;
use rustix::thread::UnshareFlags;

/// Closes every descriptor but the standard three, in a table that is not shared with
/// another process. Call it before this process opens anything.
///
/// # Errors
/// The host's: close_range(2) is there from Linux 5.9 on.
pub(crate) fn close_inherited() -> io::Result<()> {
    // SAFETY: main() calls this first: nothing here owns a descriptor yet.
    let result = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_UNSHARE as i32) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Which of two processes goes on.
pub(crate) enum Forked {
    /// The new one.
    Child,
    /// The old one; the new one's id as it sees it.
    Parent(Pid),
}

/// fork(2).
///
/// # Errors
/// The host's.
pub(crate) fn fork() -> io::Result<Forked> {
    // SAFETY: this process has one thread, so the child finds no lock held.
    match unsafe { libc::fork() } {
        0 => Ok(Forked::Child),
        number => match Pid::from_raw(number) {
            Some(pid) if number > 0 => Ok(Forked::Parent(pid)),
            _ => Err(io::Error::last_os_error()),
        },
    }
}

/// Whether this process is the leader of its session. A container's first process may
/// be in a session whose leader is outside, which reads as 0: no valid [`Pid`].
pub(crate) fn leads_session() -> bool {
    // SAFETY: neither call touches memory, and neither can fail for the caller itself.
    unsafe { libc::getsid(0) == libc::getpid() }
}

/// Gives this process mounts of its own, which begin as those that it sees.
///
/// # Errors
/// The host's.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: no descriptor table is unshared, which is what can upset code elsewhere.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?)
}

/// Has the next child be the first process of a new PID namespace.
///
/// # Errors
/// The host's.
pub(crate) fn unshare_pids_of_children() -> io::Result<()> {
    // SAFETY: as above.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?)
}
