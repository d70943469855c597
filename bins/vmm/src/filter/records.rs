//! The system calls of threads that write what is to last: kept translations, and metrics
//! that the command line or a configuration named. They touch files and nothing else.

/// With any arguments, besides what every thread may.
pub(super) const ANY: &[i64] = &[
    // the folder of translations is open; its files are opened from there
    libc::SYS_openat,
    libc::SYS_getdents64,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_flock,
    // a line that a full disk tears is taken back
    libc::SYS_ftruncate,
    libc::SYS_renameat,
    libc::SYS_unlinkat,
    libc::SYS_geteuid,
    // what a panic asks for while it looks for its program's symbols
    libc::SYS_readlink,
    libc::SYS_getcwd,
];
