//! Numbers of virtio 1.2 §5.19.

/// VIRTIO_PMEM_REQ_TYPE_FLUSH: the only request there is.
pub(super) const FLUSH: u32 = 0;

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Answer {
    Done = 0,
    /// Any other number means that it failed.
    Failed = 1,
}

/// §5.19.4: where the memory is, from byte `start`, `size` bytes.
pub(super) fn config(start: u64, size: u64) -> [u8; 16] {
    (u128::from(start) | u128::from(size) << 64).to_le_bytes()
}
