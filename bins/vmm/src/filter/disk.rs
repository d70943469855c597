//! The system calls of a drive's thread (`virtio::block::Worker`): on an open file it reads,
//! writes, flushes and punches holes; it wakes others. It opens nothing, has no socket and
//! maps no code. It works on what the guest asks, so it has the least of all.

use super::KVM_IRQ_LINE;

/// With any arguments, besides what every thread may.
pub(super) const ANY: &[i64] = &[
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    // as the C library does the same where nothing is asked for
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
];

/// What ioctl(2) may be asked for: interrupts of KVM's machines.
pub(super) const REQUESTS: &[u64] = &[KVM_IRQ_LINE];

/// What a panic asks for while it looks for its program's symbols: it fails.
pub(super) const REFUSED: &[i64] = super::signals::REFUSED;
