//! The system calls of the event loop, which is the main thread once the machine runs: it
//! moves data between open files, TAP devices and Unix sockets, gives memory of the guest
//! back, and at the end keeps translations and takes sockets away. It starts no threads.

use super::{KVM_IRQ_LINE, KVM_SET_USER_MEMORY_REGION, TUNSETOFFLOAD};

/// With any arguments, besides what every thread may.
pub(super) const ANY: &[i64] = &[
    // what happened
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_timerfd_settime,
    libc::SYS_timer_delete,
    // disks, TAP devices, the console
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_fdatasync,
    libc::SYS_io_uring_enter,
    // holes: of disks, of the guest's memory
    libc::SYS_fallocate,
    // vsock
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    // the end: kept translations, sockets of ours, the last line of metrics
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_getdents64,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_flock,
    libc::SYS_ftruncate,
    libc::SYS_renameat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_geteuid,
    // what a panic asks for while it looks for its program's symbols
    libc::SYS_readlink,
    libc::SYS_getcwd,
];

/// What io_uring_register(2) may be asked for: to close a drive's file that was replaced.
pub(super) const REGISTER: &[u64] = &[ram::ring::REPLACE_FILES as u64];

/// What ioctl(2) may be asked for.
pub(super) const REQUESTS: &[u64] = &[KVM_IRQ_LINE, KVM_SET_USER_MEMORY_REGION, TUNSETOFFLOAD];
