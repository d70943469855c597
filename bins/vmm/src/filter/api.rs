//! The system calls of the threads that serve the API: they speak with clients, open what
//! these name, write snapshots, start a thread for each connection and one for metrics. What
//! needs more (a machine's parts) the main thread makes, before it is the event loop.

use super::{
    FIONBIO, KVM_GET_CLOCK, KVM_GET_DIRTY_LOG, KVM_GET_IRQCHIP, KVM_IRQ_LINE,
    KVM_SET_USER_MEMORY_REGION, SIOCGIFINDEX, TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ,
};

/// With any arguments, besides what every thread may.
pub(super) const ANY: &[i64] = &[
    // clients
    libc::SYS_accept4,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // back ends of drives
    libc::SYS_connect,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    // what they name: kernels, drives, logs, metrics
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_stat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    // snapshots; lines of a full disk that are taken back
    libc::SYS_lseek,
    libc::SYS_pwrite64,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_rename,
    libc::SYS_unlink,
    // requests that a device has still to look at; limits and timers of devices
    libc::SYS_io_uring_enter,
    libc::SYS_timerfd_settime,
    // a thread's start
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    // what a panic asks for while it looks for its program's symbols
    libc::SYS_readlink,
    libc::SYS_getcwd,
];

/// What io_uring_register(2) may be asked for: to put a drive's new file in place.
pub(super) const REGISTER: &[u64] = &[ram::ring::REPLACE_FILES as u64];

/// What ioctl(2) may be asked for: whether a TAP device can be had, and of KVM what a
/// snapshot and a device's interrupt need.
pub(super) const REQUESTS: &[u64] = &[
    FIONBIO,
    SIOCGIFINDEX,
    TUNSETIFF,
    TUNSETVNETHDRSZ,
    TUNSETOFFLOAD,
    KVM_IRQ_LINE,
    KVM_GET_IRQCHIP,
    KVM_GET_CLOCK,
    KVM_GET_DIRTY_LOG,
    KVM_SET_USER_MEMORY_REGION,
];

/// What fcntl(2) may be asked for besides: descriptors of files that two hold.
pub(super) const COPIES: &[u64] = &[libc::F_DUPFD_CLOEXEC as u64];

/// The flags with which glibc makes a thread (`pthread_create`): no process, no namespace.
pub(super) const A_THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// What prctl(2) may be asked for: names of threads and of memory.
pub(super) const PRCTL: &[u64] = &[libc::PR_SET_NAME as u64, libc::PR_SET_VMA as u64];
