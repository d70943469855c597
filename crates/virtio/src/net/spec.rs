//! What virtio 1.2 §5.1 lays down.

/// Device handles packets with partial checksums.
pub(super) const F_CSUM: u64 = 1 << 0;
/// Driver handles packets with partial checksums.
pub(super) const F_GUEST_CSUM: u64 = 1 << 1;
/// The configuration space has an MTU.
pub(super) const F_MTU: u64 = 1 << 3;
/// The configuration space has an address.
pub(super) const F_MAC: u64 = 1 << 5;
/// Driver takes long TCP segments over IPv4.
pub(super) const F_GUEST_TSO4: u64 = 1 << 7;
/// The same over IPv6.
pub(super) const F_GUEST_TSO6: u64 = 1 << 8;
/// Driver takes long UDP datagrams.
pub(super) const F_GUEST_UFO: u64 = 1 << 10;
/// Device takes long TCP segments over IPv4.
pub(super) const F_HOST_TSO4: u64 = 1 << 11;
/// The same over IPv6.
pub(super) const F_HOST_TSO6: u64 = 1 << 12;
/// Device takes long UDP datagrams.
pub(super) const F_HOST_UFO: u64 = 1 << 14;
/// Driver takes frames in several buffers.
pub(super) const F_MRG_RXBUF: u64 = 1 << 15;

/// `struct virtio_net_hdr`, §5.1.6: always with `num_buffers`, as the device is not a
/// legacy one.
pub(super) const HEADER_LEN: usize = 12;
/// Where `num_buffers` is in it.
pub(super) const NUM_BUFFERS: usize = 10;
/// Ethernet's header.
pub(super) const ETHERNET_LEN: usize = 14;
/// A header and the longest frame that segmentation makes (§5.1.6.3.1).
pub(super) const LONG_FRAME: usize = 65_550 + HEADER_LEN;
/// A header and the longest frame of Ethernet, as Linux's driver counts it.
pub(super) const SHORT_FRAME: usize = 1514 + HEADER_LEN;

/// `struct virtio_net_config`, §5.1.4, as far as features give it meaning.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
}

impl Config {
    pub(super) fn bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        let (mac, rest) = bytes.split_at_mut(6);
        mac.copy_from_slice(&self.mac);
        // `status` and `max_virtqueue_pairs` are between.
        if let Some(mtu) = rest.get_mut(4..) {
            mtu.copy_from_slice(&self.mtu.to_le_bytes());
        }
        bytes
    }
}
