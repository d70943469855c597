//! Starting processes, signalling them and hearing of their end: what only unsafe calls can do.
//!
//! Invariant: between fork and exec the child makes async-signal-safe calls only: no allocation, no locks, no panics.
//!
//! Left to others: what to start (`launch`), and what to do when it ends (`session`).

use std::{
    ffi::{CStr, CString, c_char, c_int},
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use rustix::{
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::Pid,
};

/// Largest signal number of Linux on x86-64.
const SIGNAL_MAX: c_int = 64;

/// A process to start, with everything already decided.
#[derive(Debug)]
pub(crate) struct Program<'a> {
    /// Paths to try in turn, as execvp does.
    pub(crate) paths: &'a [CString],
    pub(crate) args: &'a [CString],
    pub(crate) env: &'a [CString],
    pub(crate) cwd: &'a CStr,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: &'a [u32],
    /// Standard input, output and error; none of them is 0, 1 or 2.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// Whether standard input is a terminal that shall control the new session.
    pub(crate) terminal: bool,
}

/// Where starting a process failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Fork,
    Session,
    Stdio,
    Identity,
    Cwd,
    Exec,
}

impl Stage {
    const fn code(self) -> u8 {
        match self {
            Self::Fork => 0,
            Self::Session => 1,
            Self::Stdio => 2,
            Self::Identity => 3,
            Self::Cwd => 4,
            Self::Exec => 5,
        }
    }

    const fn of_code(code: u8) -> Self {
        match code {
            1 => Self::Session,
            2 => Self::Stdio,
            3 => Self::Identity,
            4 => Self::Cwd,
            5 => Self::Exec,
            _ => Self::Fork,
        }
    }
}

/// Starts `program` in a session of its own, with default signals and no other files open.
///
/// Returns when the program runs, or with the stage that failed.
pub(crate) fn start(program: &Program<'_>) -> Result<Pid, (Stage, Errno)> {
    let args = pointers(program.args);
    let env = pointers(program.env);
    // An ordinary user's session can only keep its ids; it may not even set them anew.
    let effective = (rustix::process::geteuid(), rustix::process::getegid());
    let change_ids = effective.0.is_root()
        || effective.0.as_raw() != program.uid
        || effective.1.as_raw() != program.gid;
    let (report, reporter) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| (Stage::Fork, errno))?;

    // SAFETY: this process has one thread, and the child keeps to async-signal-safe calls until it executes or exits.
    let forked = unsafe { libc::fork() };
    if forked == 0 {
        let (stage, errno) = become_program(program, &args, &env, change_ids);
        let [e0, e1, e2, e3] = errno.to_le_bytes();
        let message = [stage.code(), e0, e1, e2, e3];
        // SAFETY: `message` is readable for its whole length; the descriptor is ours; _exit never returns.
        unsafe {
            libc::write(reporter.as_raw_fd(), message.as_ptr().cast(), message.len());
            libc::_exit(127)
        }
    }
    drop(reporter);
    let Some(pid) = Pid::from_raw(forked).filter(|_| forked > 0) else {
        return Err((
            Stage::Fork,
            Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOMEM),
        ));
    };
    let mut message = [0; 5];
    match rustix::io::retry_on_intr(|| rustix::io::read(&report, &mut message)) {
        // Closed by exec.
        Ok(0) => Ok(pid),
        Ok(_) => {
            let [stage, e0, e1, e2, e3] = message;
            Err((
                Stage::of_code(stage),
                Errno::from_raw_os_error(i32::from_le_bytes([e0, e1, e2, e3])),
            ))
        }
        Err(errno) => Err((Stage::Fork, errno)),
    }
}

/// The pointers that execve wants; they live as long as `strings`.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// In the child: becomes the program, or says what failed. Async-signal-safe.
fn become_program(
    program: &Program<'_>,
    args: &[*const c_char],
    env: &[*const c_char],
    change_ids: bool,
) -> (Stage, c_int) {
    reset_signals();
    // SAFETY: no arguments in memory.
    if unsafe { libc::setsid() } < 0 {
        return (Stage::Session, errno());
    }
    let [input, output, error] = program.stdio.map(|fd| fd.as_raw_fd());
    // SAFETY: TIOCSCTTY takes an integer; a new session has no terminal yet.
    if program.terminal && unsafe { libc::ioctl(input, libc::TIOCSCTTY, 0) } < 0 {
        return (Stage::Session, errno());
    }
    for (from, to) in [(input, 0), (output, 1), (error, 2)] {
        // SAFETY: plain descriptors.
        if unsafe { libc::dup2(from, to) } < 0 {
            return (Stage::Stdio, errno());
        }
    }
    close_others_on_exec();
    // As runc does: first with root's rights, for directories that only root may enter, else with the user's.
    // SAFETY: `cwd` is a C string that outlives the call.
    let entered = unsafe { libc::chdir(program.cwd.as_ptr()) } == 0;
    if change_ids && let Err(errno) = change_identity(program) {
        return (Stage::Identity, errno);
    }
    // SAFETY: as above.
    if !entered && unsafe { libc::chdir(program.cwd.as_ptr()) } < 0 {
        return (Stage::Cwd, errno());
    }
    (Stage::Exec, execute_first(program.paths, args, env))
}

/// Tries each path in turn. A path that exists and may not be executed is remembered while others are tried, as execvp
/// does.
fn execute_first(paths: &[CString], args: &[*const c_char], env: &[*const c_char]) -> c_int {
    let mut reason = libc::ENOENT;
    for path in paths {
        // SAFETY: `path` is a C string; `args` and `env` end with null and their strings outlive the call.
        unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
        match errno() {
            libc::ENOENT => {}
            libc::ENOTDIR if reason == libc::ENOENT => reason = libc::ENOTDIR,
            libc::ENOTDIR => {}
            libc::EACCES => reason = libc::EACCES,
            other => return other,
        }
    }
    reason
}

/// Default action for every signal and none blocked. Async-signal-safe.
fn reset_signals() {
    // struct kernel_sigaction: handler SIG_DFL, no flags, no restorer, empty mask. The C library's function would refuse
    // the two signals that it keeps for itself, which may have been inherited as ignored.
    let default = [0_u64; 4];
    for number in 1..=SIGNAL_MAX {
        // SAFETY: `default` is as large as the kernel's structure, and its mask as the size says; it names no handler that
        // could run; signals that cannot be changed are refused harmlessly.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                number,
                default.as_ptr(),
                ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
    let none = signal_set(None);
    // SAFETY: `none` is an initialised set; the old one is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) };
}

/// Marks everything above standard error to be closed by exec. Async-signal-safe.
fn close_others_on_exec() {
    // SAFETY: integers only. Every descriptor of init is close-on-exec already, so that an old kernel's refusal is
    // harmless; this catches what init inherited.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3_u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
}

/// Supplementary groups, group, user, in the order that keeps the right to do so. Async-signal-safe: the C library's own
/// functions would also tell its other threads, which a forked child does not have.
fn change_identity(program: &Program<'_>) -> Result<(), c_int> {
    let (uid, gid) = (program.uid, program.gid);
    // SAFETY: `groups` is readable for its whole length.
    if unsafe {
        libc::syscall(
            libc::SYS_setgroups,
            program.groups.len(),
            program.groups.as_ptr(),
        )
    } < 0
    {
        return Err(errno());
    }
    // SAFETY: integers only.
    if unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) } < 0 {
        return Err(errno());
    }
    // SAFETY: integers only.
    if unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) } < 0 {
        return Err(errno());
    }
    Ok(())
}

/// Async-signal-safe.
fn errno() -> c_int {
    // SAFETY: the C library gives each thread its own errno.
    unsafe { *libc::__errno_location() }
}

/// A set of no signals, or of one. Async-signal-safe.
fn signal_set(member: Option<c_int>) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, after which sigaddset may change it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        if let Some(number) = member {
            libc::sigaddset(set.as_mut_ptr(), number);
        }
        set.assume_init()
    }
}

/// A descriptor that becomes readable when children end.
pub(crate) fn watch_children() -> Result<OwnedFd, std::io::Error> {
    let set = signal_set(Some(libc::SIGCHLD));
    // SAFETY: `set` is an initialised set; a signal must be blocked for signalfd to see it.
    if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: as above; -1 asks for a new descriptor.
    let fd: RawFd =
        unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal by number (rustix knows no real-time ones). False when the kernel refuses: no such process, no such
/// signal.
pub(crate) fn signal(pid: Pid, number: u8) -> bool {
    // SAFETY: integers only; `pid` is positive.
    number != 0 && unsafe { libc::kill(pid.as_raw_nonzero().get(), c_int::from(number)) } == 0
}

/// As PID 1: kills every other process of the machine. Elsewhere it does nothing: that would be every process of the user.
pub(crate) fn kill_all_others() {
    if rustix::process::getpid().is_init() {
        // SAFETY: integers only; kill(2) spares PID 1 itself when asked for -1.
        unsafe { libc::kill(-1, libc::SIGKILL) };
    }
}

/// Lets writes to closed pipes fail instead of killing us. (PID 1 is immune, ordinary processes are not.)
pub(crate) fn ignore_broken_pipes() {
    // SAFETY: SIG_IGN is no handler that could run.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
