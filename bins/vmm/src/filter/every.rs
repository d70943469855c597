//! What every thread may ask that runs no guest code and whose list is one of [`super`]'s:
//! the allocator, waiting, its own signals, the log, its end.

/// With any arguments.
pub(super) const ANY: &[i64] = &[
    // memory
    libc::SYS_brk,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // a file mapped into the guest that became shorter (`ram`)
    libc::SYS_mincore,
    // waiting, and being woken
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_membarrier,
    // the seeds of hash maps
    libc::SYS_getrandom,
    // the log; wake-ups
    libc::SYS_write,
    libc::SYS_writev,
    // the thread's own: its stack, what it says when it panics, its end
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What madvise(2) may be asked for: to give memory back, to have it there, and what a core
/// dump holds. Nothing that merges pages with those of others.
pub(super) const ADVICE: &[u64] = &[
    libc::MADV_DONTNEED as u64,
    libc::MADV_FREE as u64,
    libc::MADV_REMOVE as u64,
    libc::MADV_HUGEPAGE as u64,
    libc::MADV_NOHUGEPAGE as u64,
    libc::MADV_DONTDUMP as u64,
    libc::MADV_POPULATE_READ as u64,
    libc::MADV_POPULATE_WRITE as u64,
];

/// What fcntl(2) may be asked for: std looks whether a descriptor is open before it closes
/// it, in debug builds; who reads a folder looks how it was opened.
pub(super) const DESCRIPTORS: &[u64] = &[libc::F_GETFD as u64, libc::F_GETFL as u64];
