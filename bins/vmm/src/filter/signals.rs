//! The system calls of the thread that takes SIGTERM and SIGINT: it waits, wakes the
//! others, and ends the process.

/// With any arguments, besides what every thread may.
pub(super) const ANY: &[i64] = &[
    // between a signal's handler and the thread
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_read,
    libc::SYS_poll,
];

/// What a panic asks for while it looks for its program's symbols: it fails.
pub(super) const REFUSED: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getcwd,
];
