//! The virtual cable between a guest's network device and the TCP stack.
//!
//! Invariant: what waits to be fetched by the guest is bounded by [`OUTGOING_MAX`]; IPv4
//! packets leave with a time to live of one hop, so that nothing routes them further.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpHardware, ArpOperation, ArpPacket, EthernetAddress, EthernetFrame, EthernetProtocol,
    Ipv4Packet,
};

/// Frames that wait for the guest.
const OUTGOING_MAX: usize = 64;
/// Bytes of a frame to the guest: those of Ethernet. Its own segments may be longer.
const FRAME_BYTES: usize = 1514;
/// Bytes of a frame from the guest: the most that segmentation offload makes.
pub(crate) const INCOMING_BYTES_MAX: usize = 65_550;

const ETHERNET_BYTES: usize = 14;
const ARP_BYTES: usize = 28;
const IPV4_BYTES: usize = 20;
const PROTOCOL_TCP: u8 = 6;

/// What a frame for this service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A question for our address, or an answer to ours.
    Arp,
    /// Part of a connection, from this guest's address.
    Tcp(Ipv4Addr),
    /// Another protocol over IPv4.
    Unusual,
}

/// What `frame` is if it is for `address`. Its hardware address does not matter: a guest
/// that has only a default route sends to its gateway's.
pub(crate) fn kind(frame: &[u8], address: Ipv4Addr) -> Option<Kind> {
    let payload = frame.get(ETHERNET_BYTES..)?;
    let is_ours = |at: usize| payload.get(at..at + 4) == Some(&address.octets()[..]);
    match (frame[12], frame[13]) {
        (0x08, 0x06) if payload.len() >= ARP_BYTES && is_ours(24) => Some(Kind::Arp),
        (0x08, 0x00) if payload.len() >= IPV4_BYTES && payload[0] >> 4 == 4 && is_ours(16) => {
            let from = [payload[12], payload[13], payload[14], payload[15]];
            Some(if payload[9] == PROTOCOL_TCP {
                Kind::Tcp(from.into())
            } else {
                Kind::Unusual
            })
        }
        _ => None,
    }
}

/// Queues of whole frames in both directions.
#[derive(Default)]
pub(crate) struct Wire {
    incoming: VecDeque<Vec<u8>>,
    pub(crate) outgoing: VecDeque<Vec<u8>>,
}

impl Wire {
    /// Whether the guest has yet to fetch as much as may wait.
    pub(crate) fn is_full(&self) -> bool {
        self.outgoing.len() >= OUTGOING_MAX
    }

    /// A frame from the guest, as if it had been sent to `hardware`.
    pub(crate) fn push(&mut self, frame: &[u8], hardware: EthernetAddress) {
        let mut frame = frame.to_vec();
        frame[..6].copy_from_slice(hardware.as_bytes());
        self.incoming.push_back(frame);
    }

    /// Tells the stack where a guest's address is, as if the guest had: one that never
    /// asked for ours is not asked for its own.
    pub(crate) fn introduce(
        &mut self,
        guest: (EthernetAddress, Ipv4Addr),
        own: (EthernetAddress, Ipv4Addr),
    ) {
        let mut bytes = vec![0; ETHERNET_BYTES + ARP_BYTES];
        let mut frame = EthernetFrame::new_unchecked(&mut bytes);
        frame.set_src_addr(guest.0);
        frame.set_dst_addr(own.0);
        frame.set_ethertype(EthernetProtocol::Arp);
        let mut arp = ArpPacket::new_unchecked(frame.payload_mut());
        arp.set_hardware_type(ArpHardware::Ethernet);
        arp.set_protocol_type(EthernetProtocol::Ipv4);
        arp.set_hardware_len(6);
        arp.set_protocol_len(4);
        arp.set_operation(ArpOperation::Reply);
        arp.set_source_hardware_addr(guest.0.as_bytes());
        arp.set_source_protocol_addr(&guest.1.octets());
        arp.set_target_hardware_addr(own.0.as_bytes());
        arp.set_target_protocol_addr(&own.1.octets());
        self.incoming.push_back(bytes);
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        let frame = self.incoming.pop_front()?;
        Some((Incoming(frame), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        (!self.is_full()).then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES;
        // A guest with checksum offload leaves them to whoever sends the frame on.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// One frame from the guest.
pub(crate) struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

/// Room for one frame to the guest.
pub(crate) struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        if len >= ETHERNET_BYTES + IPV4_BYTES {
            let mut frame = EthernetFrame::new_unchecked(&mut bytes);
            if frame.ethertype() == EthernetProtocol::Ipv4 {
                let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
                packet.set_hop_limit(1);
                packet.fill_checksum();
            }
        }
        self.0.push_back(bytes);
        result
    }
}
