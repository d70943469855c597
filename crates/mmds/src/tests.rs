//! The service as a guest sees it: another TCP stack on the other end of the cable.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::json;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{
    ArpOperation, ArpPacket, EthernetAddress, EthernetFrame, IpCidr, Ipv4Packet, TcpPacket,
};

use crate::answer::answer;
use crate::http::{Request, Status};
use crate::{Address, Counters, Endpoint, Metadata, Version};

const GUEST_MAC: EthernetAddress = EthernetAddress([0xaa, 0xfc, 0, 0, 0, 1]);
const SERVER: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

fn metadata(now: Instant) -> Metadata {
    let mut metadata = Metadata::new("vm", 51_200, now).unwrap();
    metadata
        .store
        .put(json!({"age": 43, "name": {"first": "John"}, "long": "x".repeat(50_000)}))
        .unwrap();
    metadata
}

/// A guest's stack, with a cable whose frames the test moves.
struct Guest {
    now: Instant,
    start: Instant,
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    endpoint: Endpoint,
    counters: Arc<Counters>,
    metadata: Arc<Mutex<Metadata>>,
    port: u16,
}

#[derive(Default)]
struct Cable {
    to_guest: VecDeque<Vec<u8>>,
    from_guest: VecDeque<Vec<u8>>,
}

struct Got(Vec<u8>);
struct Room<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Got {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        self.0.push_back(bytes);
        result
    }
}

impl Device for Cable {
    type RxToken<'a> = Got;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Got, Room<'_>)> {
        let frame = self.to_guest.pop_front()?;
        Some((Got(frame), Room(&mut self.from_guest)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Room<'_>> {
        Some(Room(&mut self.from_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        // All checksums are verified: those of the server must be right.
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

impl Guest {
    fn new() -> Self {
        let now = Instant::now();
        let metadata = Arc::new(Mutex::new(metadata(now)));
        let counters = Arc::<Counters>::default();
        let endpoint = Endpoint::new(
            Address::default(),
            Arc::clone(&metadata),
            Arc::clone(&counters),
            now,
        )
        .unwrap();
        let mut cable = Cable::default();
        let mut interface = Interface::new(
            Config::new(GUEST_MAC.into()),
            &mut cable,
            smoltcp::time::Instant::ZERO,
        );
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(Ipv4Addr::new(172, 16, 0, 2).into(), 0))
                .unwrap();
        });
        Self {
            now,
            start: now,
            cable,
            interface,
            sockets: SocketSet::new(Vec::new()),
            endpoint,
            counters,
            metadata,
            port: 40_000,
        }
    }

    fn connect(&mut self, receive_bytes: usize) -> SocketHandle {
        let mut socket = Socket::new(
            SocketBuffer::new(vec![0; receive_bytes]),
            SocketBuffer::new(vec![0; 8192]),
        );
        socket.set_nagle_enabled(false);
        self.port += 1;
        socket
            .connect(self.interface.context(), (SERVER, 80), self.port)
            .unwrap();
        self.sockets.add(socket)
    }

    fn clock(&self) -> smoltcp::time::Instant {
        smoltcp::time::Instant::from_micros((self.now - self.start).as_micros() as i64)
    }

    /// The guest's stack only; the frames that it made.
    fn poll_guest(&mut self) {
        let clock = self.clock();
        self.interface
            .poll(clock, &mut self.cable, &mut self.sockets);
    }

    /// Moves frames both ways until both are silent.
    fn settle(&mut self) {
        loop {
            self.poll_guest();
            let mut moved = false;
            while let Some(frame) = self.cable.from_guest.pop_front() {
                moved = true;
                assert!(self.endpoint.is_for_me(&frame));
                self.endpoint.take(&frame, self.now);
            }
            while let Some(frame) = self.endpoint.next_frame(self.now) {
                moved = true;
                self.cable.to_guest.push_back(frame);
            }
            if !moved {
                return;
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        // In steps: both stacks have timers.
        for _ in 0..20 {
            self.now += time / 20;
            self.settle();
        }
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn send(&mut self, handle: SocketHandle, text: &str) {
        let sent = self.socket(handle).send_slice(text.as_bytes()).unwrap();
        assert_eq!(sent, text.len());
        self.settle();
    }

    fn received(&mut self, handle: SocketHandle) -> String {
        let mut all = Vec::new();
        loop {
            self.settle();
            let mut buffer = [0; 2048];
            match self.socket(handle).recv_slice(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(read) => all.extend_from_slice(&buffer[..read]),
            }
        }
        String::from_utf8(all).unwrap()
    }

    /// One connection, one request, what comes back.
    fn ask(&mut self, request: &str) -> String {
        let socket = self.connect(4096);
        self.settle();
        // A question for the server's address may have been lost.
        while self.socket(socket).state() == State::SynSent {
            self.pass(Duration::from_secs(1));
        }
        self.send(socket, request);
        let response = self.received(socket);
        self.socket(socket).close();
        self.settle();
        response
    }
}

fn body(response: &str) -> &str {
    response.split_once("\r\n\r\n").unwrap().1
}

#[test]
fn a_guest_fetches_metadata() {
    let mut guest = Guest::new();
    let response = guest.ask("GET /name HTTP/1.1\r\nAccept: application/json\r\n\r\n");
    assert_eq!(
        response,
        "HTTP/1.1 200 OK\r\nServer: Kombi MMDS\r\nConnection: keep-alive\r\nContent-Type: \
         application/json\r\nContent-Length: 16\r\n\r\n{\"first\":\"John\"}"
    );
    assert_eq!(
        body(&guest.ask("GET / HTTP/1.1\r\n\r\n")),
        "age\nlong\nname/"
    );
    let count = |name: &str| {
        guest
            .counters
            .all()
            .find(|(one, _)| *one == name)
            .unwrap()
            .1
    };
    assert_eq!(count("connections_created"), 2);
    assert_eq!(count("rx_no_token"), 2);
    assert_eq!(count("tx_frames"), count("tx_count"));
    assert!(count("rx_count") > 4 && count("rx_accepted") > count("rx_count"));
}

#[test]
fn a_long_answer_arrives_whole_at_a_guest_with_little_room() {
    let mut guest = Guest::new();
    let socket = guest.connect(100);
    guest.settle();
    guest.send(socket, "GET /long HTTP/1.1\r\n\r\n");
    let response = guest.received(socket);
    assert_eq!(body(&response), "x".repeat(50_000));
}

#[test]
fn requests_come_in_pieces_and_several_at_once() {
    let mut guest = Guest::new();
    let socket = guest.connect(4096);
    guest.settle();
    let request = "GET /age HTTP/1.1\r\nAccept: application/json\r\n\r\n";
    for byte in request.chars() {
        guest.send(socket, &byte.to_string());
    }
    assert_eq!(body(&guest.received(socket)), "43");
    guest.send(socket, &request.repeat(50));
    let responses = guest.received(socket);
    assert_eq!(responses.matches("\r\n\r\n43").count(), 50);
}

#[test]
fn a_guest_that_closes_behind_its_request_is_answered_and_forgotten() {
    let mut guest = Guest::new();
    for request in [
        "GET /age HTTP/1.1\r\nAccept: application/json\r\n\r\n",
        "GET /half",
    ] {
        let socket = guest.connect(4096);
        guest.settle();
        guest.send(socket, request);
        guest.socket(socket).close();
        let response = guest.received(socket);
        assert_eq!(response.contains("43"), request.contains("age"));
        guest.pass(Duration::from_secs(15));
        assert_eq!(guest.socket(socket).state(), State::Closed);
        assert_eq!(guest.endpoint.held(), (1, 0));
    }
}

#[test]
fn a_connection_ends_behind_the_answer_when_the_client_said_so_or_said_nonsense() {
    for (request, status) in [
        (
            "GET /age HTTP/1.0\r\nAccept: application/json\r\n\r\n",
            "200",
        ),
        ("GET /age HTTP/1.1\r\nConnection: close\r\n\r\n", "501"),
        ("\u{1}\r\n\r\n", "400"),
        (&"x".repeat(3000), "413"),
    ] {
        let mut guest = Guest::new();
        let socket = guest.connect(4096);
        guest.settle();
        guest.send(socket, request);
        let response = guest.received(socket);
        let line = response.split("\r\n").next().unwrap();
        assert_eq!(line.split(' ').nth(1), Some(status), "{request:?}");
        assert!(response.contains("Connection: close"), "{response}");
        assert!(!guest.socket(socket).may_recv(), "{request:?}");
    }
}

#[test]
fn version_two_is_served_with_a_token_only() {
    let mut guest = Guest::new();
    guest.metadata.lock().unwrap().version = Version::V2;
    let get = |token: &str| format!("GET /name/first HTTP/1.1\r\n{token}\r\n");
    assert!(guest.ask(&get("")).starts_with("HTTP/1.1 401 "));
    assert!(
        guest
            .ask(&get("X-metadata-token: abc\r\n"))
            .starts_with("HTTP/1.1 401 ")
    );
    for name in ["X-metadata-token", "x-aws-EC2-metadata-token"] {
        let put = format!("PUT /latest/api/token HTTP/1.1\r\n{name}-ttl-seconds: 60\r\n\r\n");
        let response = guest.ask(&put);
        assert!(
            response.contains(&format!("\r\n{name}-ttl-seconds: 60\r\n")),
            "{response}"
        );
        let header = format!("{name}: {}\r\n", body(&response));
        assert_eq!(body(&guest.ask(&get(&header))), "John");
        guest.now += Duration::from_secs(60);
        assert!(guest.ask(&get(&header)).starts_with("HTTP/1.1 401 "));
    }
}

#[test]
fn each_refusal_has_its_status() {
    let now = Instant::now();
    let mut metadata = metadata(now);
    let ttl = "X-metadata-token-ttl-seconds";
    for (request, status) in [
        ("GET http:// HTTP/1.1", Status::BadRequest),
        ("GET * HTTP/1.1", Status::BadRequest),
        ("GET /age HTTP/1.1", Status::NotImplemented),
        ("GET /none HTTP/1.1", Status::NotFound),
        (
            "GET http://169.254.169.254/name/first/ HTTP/1.1",
            Status::Ok,
        ),
        ("PATCH / HTTP/1.1", Status::MethodNotAllowed),
        ("DELETE /age HTTP/1.1", Status::MethodNotAllowed),
        ("POST / HTTP/1.1", Status::NotImplemented),
        ("HEAD / HTTP/1.1", Status::NotImplemented),
        ("PUT /age HTTP/1.1", Status::NotFound),
        ("PUT /latest/api/token/ HTTP/1.1", Status::NotFound),
        ("PUT /latest/api/token HTTP/1.1", Status::BadRequest),
        (
            &format!("PUT /latest/api/token HTTP/1.1\r\n{ttl}: 0"),
            Status::BadRequest,
        ),
        (
            &format!("PUT /latest/api/token HTTP/1.1\r\n{ttl}: 21601"),
            Status::BadRequest,
        ),
        (
            &format!("PUT /latest/api/token HTTP/1.1\r\n{ttl}: -5"),
            Status::BadRequest,
        ),
        (
            &format!("PUT /latest/api/token HTTP/1.1\r\n{ttl}: 5\r\nX-Forwarded-For: 1"),
            Status::BadRequest,
        ),
        (
            &format!("PUT //latest//api/token HTTP/1.1\r\n{ttl}: 21600"),
            Status::Ok,
        ),
    ] {
        for version in [Version::V1, Version::V2] {
            metadata.version = version;
            let token = metadata.tokens.issue(60, now).unwrap();
            let text = format!("{request}\r\nX-metadata-token: {token}\r\n\r\n");
            let parsed = Request::parse(text.as_bytes()).unwrap().unwrap();
            let response = answer(&metadata, &parsed, now, &Counters::default());
            assert_eq!(
                response.status, status,
                "{request} {version:?}: {}",
                response.body
            );
            let allows = response
                .headers
                .iter()
                .any(|(_, value)| value == "GET, PUT");
            assert_eq!(allows, status == Status::MethodNotAllowed);
        }
    }
}

#[test]
fn the_accept_header_chooses_the_form() {
    let now = Instant::now();
    let mut metadata = metadata(now);
    let mut first = |accept: &str, imds_compat| {
        metadata.imds_compat = imds_compat;
        let text = format!("GET /name/first HTTP/1.1\r\n{accept}\r\n");
        let request = Request::parse(text.as_bytes()).unwrap().unwrap();
        answer(&metadata, &request, now, &Counters::default()).body
    };
    for (accept, wanted) in [
        ("", "John"),
        ("Accept:\r\n", "John"),
        ("Accept: */*\r\n", "John"),
        ("Accept: text/plain\r\n", "John"),
        ("Accept: application/xml\r\n", "John"),
        ("accept: application/json\r\n", "\"John\""),
        (
            "Accept: application/json; q=0.9, text/plain, */*\r\n",
            "\"John\"",
        ),
    ] {
        assert_eq!(first(accept, false), wanted, "{accept}");
        assert_eq!(first(accept, true), "John", "{accept}");
    }
}

#[test]
fn frames_for_others_are_not_taken() {
    let mut guest = Guest::new();
    guest.connect(100);
    guest.poll_guest();
    let question = guest.cable.from_guest.pop_front().unwrap();
    assert!(guest.endpoint.is_for_me(&question));
    for end in 0..question.len() {
        assert!(!guest.endpoint.is_for_me(&question[..end]), "{end}");
    }
    let other = Address::new(Ipv4Addr::new(169, 254, 170, 2)).unwrap();
    let metadata = Arc::clone(&guest.metadata);
    let mut endpoint = Endpoint::new(other, metadata, Arc::default(), guest.now).unwrap();
    assert!(!endpoint.is_for_me(&question));
    endpoint.take(&question, guest.now);
    assert_eq!(endpoint.next_frame(guest.now), None);

    guest.endpoint.take(&question, guest.now);
    let answer = guest.endpoint.next_frame(guest.now).unwrap();
    let frame = EthernetFrame::new_checked(&answer).unwrap();
    assert_eq!(frame.dst_addr(), GUEST_MAC);
    let arp = ArpPacket::new_checked(frame.payload()).unwrap();
    assert_eq!(arp.operation(), ArpOperation::Reply);
    assert_eq!(arp.source_protocol_addr(), SERVER.octets());
    assert_eq!(arp.source_hardware_addr(), [6, 1, 0x23, 0x45, 0x67, 1]);
}

#[test]
fn addresses_are_link_local() {
    for (address, taken) in [
        ([169, 254, 170, 2], true),
        ([169, 254, 0, 1], false),
        ([169, 254, 255, 1], false),
        ([169, 253, 1, 1], false),
        ([10, 0, 0, 1], false),
    ] {
        assert_eq!(Address::new(address.into()).is_some(), taken, "{address:?}");
    }
}

/// A frame with one segment of TCP.
fn segment(
    from: [u8; 4],
    port: u16,
    flags: fn(&mut TcpPacket<&mut [u8]>),
    to_mac: [u8; 6],
) -> Vec<u8> {
    let mut bytes = vec![0; 14 + 20 + 20];
    bytes[..6].copy_from_slice(&to_mac);
    bytes[6..12].copy_from_slice(GUEST_MAC.as_bytes());
    bytes[12] = 8;
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes[14..]);
    packet.set_version(4);
    packet.set_header_len(20);
    packet.set_total_len(40);
    packet.set_hop_limit(64);
    packet.set_next_header(smoltcp::wire::IpProtocol::Tcp);
    packet.set_src_addr(from.into());
    packet.set_dst_addr(SERVER);
    let mut tcp = TcpPacket::new_unchecked(packet.payload_mut());
    tcp.set_src_port(port);
    tcp.set_dst_port(80);
    tcp.set_header_len(20);
    tcp.set_window_len(1000);
    flags(&mut tcp);
    // No checksums: offloaded.
    bytes
}

#[test]
fn a_guest_with_only_a_default_route_and_offloaded_checksums_is_answered_within_one_hop() {
    let mut guest = Guest::new();
    let gateway = [2, 2, 2, 2, 2, 2];
    let frame = segment([192, 168, 7, 7], 1234, |tcp| tcp.set_syn(true), gateway);
    assert!(guest.endpoint.is_for_me(&frame));
    guest.endpoint.take(&frame, guest.now);
    let answer = guest.endpoint.next_frame(guest.now).unwrap();
    let frame = EthernetFrame::new_checked(&answer).unwrap();
    assert_eq!(frame.dst_addr(), GUEST_MAC);
    let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
    assert_eq!((packet.hop_limit(), packet.verify_checksum()), (1, true));
    let tcp = TcpPacket::new_checked(packet.payload()).unwrap();
    assert!(tcp.syn() && tcp.ack());
    assert!(tcp.verify_checksum(&SERVER.into(), &Ipv4Addr::new(192, 168, 7, 7).into()));
}

#[test]
fn another_port_is_refused_and_other_protocols_are_ignored() {
    let mut guest = Guest::new();
    let mut frame = segment([192, 168, 7, 7], 1234, |tcp| tcp.set_syn(true), [9; 6]);
    frame[14 + 20 + 3] = 81;
    guest.endpoint.take(&frame, guest.now);
    let answer = guest.endpoint.next_frame(guest.now).unwrap();
    assert_ne!(answer[14 + 20 + 13] & 0x04, 0, "a reset");
    assert_eq!(answer[14 + 8], 1, "one hop");
    frame[14 + 9] = 17;
    guest.endpoint.take(&frame, guest.now);
    assert_eq!(guest.endpoint.next_frame(guest.now), None);
}

#[test]
fn what_a_guest_does_not_fetch_does_not_pile_up() {
    let mut guest = Guest::new();
    for port in 1..=2000_u16 {
        let frame = segment(
            [10, 0, (port >> 8) as u8, port as u8],
            port,
            |tcp| tcp.set_syn(true),
            [9; 6],
        );
        guest.endpoint.take(&frame, guest.now);
        let (connections, frames) = guest.endpoint.held();
        assert!(connections <= 30 && frames <= 66, "{connections} {frames}");
    }
    assert_eq!(guest.endpoint.poll_at(guest.now), None);
    // Nobody completes a handshake: they time out and the service is there again.
    for _ in 0..40 {
        guest.now += Duration::from_secs(1);
        while guest.endpoint.next_frame(guest.now).is_some() {}
    }
    assert_eq!(guest.endpoint.held(), (1, 0));
    assert_eq!(body(&guest.ask("GET /name/first HTTP/1.1\r\n\r\n")), "John");
}

#[test]
fn the_longest_silent_of_too_many_connections_makes_room() {
    let mut guest = Guest::new();
    let sockets: Vec<_> = (0..30).map(|_| guest.connect(256)).collect();
    guest.settle();
    for socket in &sockets {
        assert_eq!(guest.socket(*socket).state(), State::Established);
    }
    let more = guest.connect(256);
    guest.settle();
    assert_ne!(guest.socket(more).state(), State::Established);
    guest.now += Duration::from_secs(11);
    guest.settle();
    for socket in &sockets[1..] {
        guest.send(*socket, "GET /none HTTP/1.1\r\n\r\n");
    }
    let more = guest.connect(256);
    guest.settle();
    assert_eq!(guest.socket(more).state(), State::Established);
    guest.send(sockets[0], "GET /none HTTP/1.1\r\n\r\n");
    assert!(!guest.socket(sockets[0]).is_active());
    assert!(guest.socket(sockets[1]).is_active());
}

#[test]
fn a_lost_frame_is_sent_again_when_poll_at_says() {
    let mut guest = Guest::new();
    let socket = guest.connect(4096);
    guest.settle();
    guest
        .socket(socket)
        .send_slice(b"GET /name/first HTTP/1.1\r\n\r\n")
        .unwrap();
    guest.poll_guest();
    let request = guest.cable.from_guest.pop_front().unwrap();
    guest.endpoint.take(&request, guest.now);
    while guest.endpoint.next_frame(guest.now).is_some() {}
    let at = guest.endpoint.poll_at(guest.now).unwrap();
    assert!(at > guest.now && at < guest.now + Duration::from_secs(5));
    guest.now = at;
    assert_eq!(body(&guest.received(socket)), "John");
}

proptest! {
    #[test]
    fn any_frames_cost_bounded_memory(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 0..60),
        tcp in any::<bool>(),
    ) {
        let mut guest = Guest::new();
        for mut frame in frames {
            // Far enough in to be looked at.
            if frame.len() >= 42 {
                frame[12..14].copy_from_slice(&[8, 0]);
                frame[14] = 0x40 | frame[14] & 0xf;
                frame[30..34].copy_from_slice(&SERVER.octets());
                if tcp {
                    frame[23] = 6;
                    frame[36..38].copy_from_slice(&[0, 80]);
                }
            }
            guest.endpoint.take(&frame, guest.now);
            guest.now += Duration::from_millis(100);
            let (connections, frames) = guest.endpoint.held();
            prop_assert!(connections <= 30 && frames <= 66);
        }
    }

    #[test]
    fn any_mutation_of_a_conversation_upsets_only_its_connection(
        mutations in prop::collection::vec((0_usize..40, 0_usize..200, any::<u8>()), 1..20),
        dropped in prop::collection::vec(0_usize..40, 0..6),
    ) {
        let mut guest = Guest::new();
        let socket = guest.connect(512);
        let mut number = 0;
        for _ in 0..6 {
            let _ = guest.socket(socket).send_slice(b"GET /name HTTP/1.1\r\n\r\n");
            guest.poll_guest();
            while let Some(mut frame) = guest.cable.from_guest.pop_front() {
                for (which, at, value) in &mutations {
                    if *which == number && let Some(byte) = frame.get_mut(*at) {
                        *byte ^= value;
                    }
                }
                if !dropped.contains(&number) {
                    guest.endpoint.take(&frame, guest.now);
                }
                number += 1;
            }
            while let Some(frame) = guest.endpoint.next_frame(guest.now) {
                guest.cable.to_guest.push_back(frame);
            }
            guest.now += Duration::from_millis(300);
        }
        // Another connection is served as ever.
        let response = guest.ask("GET /name/first HTTP/1.1\r\n\r\n");
        prop_assert_eq!(body(&response), "John");
    }

    #[test]
    fn any_flags_in_any_order_upset_nothing(steps in prop::collection::vec((any::<u8>(), 0_u16..3, any::<u32>(), any::<u32>(), 0_u64..3000), 0..80)) {
        let mut guest = Guest::new();
        for (flags, port, sequence, acknowledged, wait) in steps {
            let mut frame = segment([10, 0, 0, 5], 1000 + port, |_| {}, [9; 6]);
            frame[34 + 4..34 + 8].copy_from_slice(&sequence.to_be_bytes());
            frame[34 + 8..34 + 12].copy_from_slice(&acknowledged.to_be_bytes());
            frame[34 + 13] = flags & 0x3f;
            guest.endpoint.take(&frame, guest.now);
            guest.now += Duration::from_millis(wait);
            if wait % 2 == 0 {
                while guest.endpoint.next_frame(guest.now).is_some() {}
            }
            let (connections, frames) = guest.endpoint.held();
            prop_assert!(connections <= 30 && frames <= 66);
        }
    }
}
