//! The system calls of a drive's thread (`virtio::block::Worker`): on an open file it reads,
//! writes, flushes and punches holes; it wakes others. It opens nothing, has no socket and
//! maps no code. It works on what the guest asks, so it has the least of all.

/// With any arguments.
pub(super) const ANY: &[i64] = &[
    // the file
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    // as the C library does the same where nothing is asked for
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    // waking the event loop and vCPUs; the log
    libc::SYS_write,
    libc::SYS_writev,
    // memory: the allocator, the end of the thread
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // a file mapped into the guest that became shorter (`ram`)
    libc::SYS_mincore,
    // waiting, and being woken
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_membarrier,
    // the thread's own: what it says when it panics, its end
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
