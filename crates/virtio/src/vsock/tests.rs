use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Vsock;
use super::connection::BUFFER_BYTES;
use super::muxer::CONNECTIONS_MAX;
use super::spec::{
    HEADER_LEN, HOST_CID, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
    TYPE_STREAM,
};
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver};
use crate::{Error, EventSource};

const CID: u32 = 3;
const RX: usize = 0;
const TX: usize = 1;
const RX_BUFFERS: u64 = BUFFERS + 0x10_0000;
const RX_LEN: u32 = HEADER_LEN as u32 + 4096;

/// A guest's driver, a host's files, and the event loop between them.
struct Rig {
    driver: FakeDriver,
    vsock: Arc<Mutex<Vsock>>,
    dir: tempfile::TempDir,
    /// What the guest says of its buffers in each packet.
    room: u32,
    consumed: u32,
}

/// Without buffers for the device to fill.
fn starved_rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let vsock = Arc::new(Mutex::new(Vsock::new(CID, &dir.path().join("v")).unwrap()));
    let driver = FakeDriver::start(vsock.clone());
    Rig {
        driver,
        vsock,
        dir,
        room: 64 << 10,
        consumed: 0,
    }
}

fn rig() -> Rig {
    let mut rig = starved_rig();
    rig.post(32);
    rig
}

impl Rig {
    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// Listens where guests connect to `port`.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    fn post(&mut self, buffers: usize) {
        for _ in 0..buffers {
            self.post_one();
        }
        self.driver.kick(RX);
    }

    fn post_one(&mut self) {
        let at = RX_BUFFERS + 0x2000 * u64::from(self.driver.next_head(RX));
        self.driver.add(RX, &[Buffer::In(at, RX_LEN)]);
    }

    /// One turn of the event loop, if it has anything to do within 50 ms.
    fn turn(&self) -> bool {
        let mut vsock = self.vsock.lock().unwrap();
        let fd = vsock.fd();
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)).unwrap() > 0;
        if ready {
            vsock.on_event();
        }
        ready
    }

    /// The next packet for the guest that is there already.
    fn taken(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.driver.used(RX)?;
        let bytes = self
            .driver
            .get(RX_BUFFERS + 0x2000 * u64::from(head), len as usize);
        let (header, data) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
        let header = Header::parse(header);
        assert_eq!(header.len as usize, data.len());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
        assert_eq!(header.kind, TYPE_STREAM);
        self.post_one();
        self.driver.handle_interrupt();
        Some((header, data.to_vec()))
    }

    /// The next packet for the guest, turning the event loop until it comes.
    fn take(&mut self) -> (Header, Vec<u8>) {
        let limit = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(packet) = self.taken() {
                return packet;
            }
            assert!(Instant::now() < limit, "no packet for the guest");
            self.turn();
        }
    }

    /// The next packet, which is to be of kind `op`.
    fn expect(&mut self, op: Operation) -> (Header, Vec<u8>) {
        let (header, data) = self.take();
        assert_eq!(header.op, op as u16, "{header:?}");
        (header, data)
    }

    fn expect_nothing(&mut self) {
        while self.turn() {}
        assert!(self.taken().is_none());
    }

    /// Sends a packet from the guest's `port` to the host's.
    fn send(&mut self, op: Operation, ports: (u32, u32), flags: u32, data: &[u8]) {
        self.send_raw(&self.header(op, ports, flags, data.len()), data);
    }

    fn header(&self, op: Operation, ports: (u32, u32), flags: u32, len: usize) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.0,
            dst_port: ports.1,
            len: len as u32,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: self.room,
            fwd_cnt: self.consumed,
        }
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.driver.put(BUFFERS, &header.bytes());
        self.driver.put(BUFFERS + 0x100, data);
        let mut buffers = vec![Buffer::Out(BUFFERS, HEADER_LEN as u32)];
        if !data.is_empty() {
            buffers.push(Buffer::Out(BUFFERS + 0x100, data.len() as u32));
        }
        assert_eq!(self.driver.request(TX, &buffers), 0);
        assert!(!self.driver.needs_reset());
    }

    /// A connection that the guest opened: its ports and the host's end.
    fn guest_connects(&mut self, guest: u32, host: u32) -> ((u32, u32), UnixStream) {
        let listener = self.listen(host);
        self.send(Operation::Request, (guest, host), 0, &[]);
        let (response, _) = self.expect(Operation::Response);
        assert_eq!((response.dst_port, response.src_port), (guest, host));
        assert_eq!(response.buf_alloc, BUFFER_BYTES);
        let (stream, _) = listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        std::fs::remove_file(self.dir.path().join(format!("v_{host}"))).unwrap();
        ((guest, host), stream)
    }

    /// A connection that the host opened, as the guest's port is `guest`.
    fn host_connects(&mut self, guest: u32) -> ((u32, u32), UnixStream) {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        writeln!(stream, "CONNECT {guest}").unwrap();
        let (request, _) = self.expect(Operation::Request);
        assert_eq!(request.dst_port, guest);
        let ports = (guest, request.src_port);
        self.send(Operation::Response, ports, 0, &[]);
        let answer = format!("OK {}\n", request.src_port);
        assert_eq!(read(&mut stream, answer.len()), answer.as_bytes());
        (ports, stream)
    }

    fn connections(&self) -> usize {
        self.vsock.lock().unwrap().connection_count()
    }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Whether the other end is closed (reset, when it left something unread).
fn at_end(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn the_configuration_names_the_guest() {
    assert_eq!(u64::from_le_bytes(rig().driver.config(0)), u64::from(CID));
}

#[test]
fn a_guest_talks_to_a_host_that_listens() {
    let mut rig = rig();
    let (ports, mut host) = rig.guest_connects(1000, 52);
    rig.send(Operation::Data, ports, 0, b"from the guest");
    // Inside of the notification: no turn of the event loop in between.
    host.set_nonblocking(true).unwrap();
    assert_eq!(read(&mut host, 14), b"from the guest");
    host.write_all(b"from the host").unwrap();
    assert_eq!(rig.expect(Operation::Data).1, b"from the host");
    rig.expect_nothing();
}

#[test]
fn one_turn_of_the_event_loop_brings_data_to_the_guest_with_one_interrupt() {
    let mut rig = rig();
    let (_, mut host) = rig.guest_connects(1000, 52);
    while rig.turn() {}
    let rises = rig.driver.rises();
    host.write_all(&[1; 10_000]).unwrap();
    assert!(rig.turn());
    assert_eq!(rig.driver.rises(), rises + 1);
    let lens: Vec<_> = std::iter::from_fn(|| rig.taken())
        .map(|(header, _)| header.len)
        .collect();
    assert_eq!(lens, [4096, 4096, 1808]);
}

#[test]
fn a_host_talks_to_a_guest_that_listens() {
    let mut rig = rig();
    let (ports, mut host) = rig.host_connects(80);
    assert!((1 << 30..1 << 31).contains(&ports.1));
    host.write_all(b"question").unwrap();
    assert_eq!(rig.expect(Operation::Data).1, b"question");
    rig.send(Operation::Data, ports, 0, b"answer");
    assert_eq!(read(&mut host, 6), b"answer");
    let (other, _host) = rig.host_connects(80);
    assert_ne!(other.1, ports.1, "each connection has a port of its own");
}

#[test]
fn data_behind_the_greeting_belong_to_the_connection() {
    let mut rig = rig();
    let mut host = UnixStream::connect(rig.path()).unwrap();
    host.write_all(b"CONNECT 80\nearly").unwrap();
    let (request, _) = rig.expect(Operation::Request);
    rig.send(Operation::Response, (80, request.src_port), 0, &[]);
    assert_eq!(rig.expect(Operation::Data).1, b"early");
}

#[test]
fn a_greeting_may_come_in_pieces() {
    let mut rig = rig();
    let mut host = UnixStream::connect(rig.path()).unwrap();
    for piece in [&b"CON"[..], b"NECT 8", b"0"] {
        host.write_all(piece).unwrap();
        rig.expect_nothing();
    }
    host.write_all(b"\n").unwrap();
    assert_eq!(rig.expect(Operation::Request).0.dst_port, 80);
}

#[test]
fn nonsense_instead_of_a_greeting_is_hung_up_on() {
    let mut rig = rig();
    for greeting in [
        &b"\n"[..],
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 1 2\n",
        b"HELLO 1\n",
        b"\xff\xfe\n",
        b"CONNECT                              1\n",
        &[b'a'; 100],
    ] {
        let mut host = UnixStream::connect(rig.path()).unwrap();
        host.write_all(greeting).unwrap();
        rig.expect_nothing();
        assert!(at_end(&mut host), "{greeting:?}");
    }
    assert_eq!(rig.connections(), 0);
}

#[test]
fn a_host_is_hung_up_on_when_the_guest_does_not_listen() {
    let mut rig = rig();
    let mut host = UnixStream::connect(rig.path()).unwrap();
    host.write_all(b"CONNECT 80\n").unwrap();
    let (request, _) = rig.expect(Operation::Request);
    rig.send(Operation::Reset, (80, request.src_port), 0, &[]);
    assert!(at_end(&mut host));
    assert_eq!(rig.connections(), 0);
}

#[test]
fn a_host_is_hung_up_on_when_the_guest_does_not_answer_for_2_s() {
    let mut rig = rig();
    let mut host = UnixStream::connect(rig.path()).unwrap();
    host.write_all(b"CONNECT 80\n").unwrap();
    rig.expect(Operation::Request);
    let start = Instant::now();
    rig.expect(Operation::Reset);
    let waited = start.elapsed();
    assert!(
        (Duration::from_millis(1500)..Duration::from_secs(4)).contains(&waited),
        "{waited:?}"
    );
    assert!(at_end(&mut host));
}

#[test]
fn a_host_that_connects_early_waits_for_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let vsock = Arc::new(Mutex::new(Vsock::new(CID, &path).unwrap()));
    let driver = FakeDriver::find(vsock.clone());
    let mut host = UnixStream::connect(&path).unwrap();
    host.write_all(b"CONNECT 80\n").unwrap();
    let mut rig = Rig {
        driver,
        vsock,
        dir,
        room: 64 << 10,
        consumed: 0,
    };
    assert!(
        !rig.turn(),
        "an event loop without a driver has nothing to do"
    );
    rig.driver.set_up(u64::MAX);
    rig.post(4);
    assert_eq!(rig.expect(Operation::Request).0.dst_port, 80);
}

#[test]
fn nobody_at_the_port_is_a_reset() {
    let mut rig = rig();
    rig.send(Operation::Request, (1000, 53), 0, &[]);
    let (reset, _) = rig.expect(Operation::Reset);
    assert_eq!((reset.dst_port, reset.src_port), (1000, 53));
}

#[test]
fn packets_for_no_connection_are_answered_by_a_reset_but_resets_are_not() {
    let mut rig = rig();
    for op in [
        Operation::Response,
        Operation::Shutdown,
        Operation::Data,
        Operation::CreditUpdate,
        Operation::CreditRequest,
    ] {
        rig.send(op, (5, 6), 0, &[]);
        rig.expect(Operation::Reset);
    }
    rig.send(Operation::Reset, (5, 6), 0, &[]);
    rig.expect_nothing();
}

#[test]
fn packets_of_others_and_for_others_are_dropped() {
    let mut rig = rig();
    let good = rig.header(Operation::Request, (5, 6), 0, 0);
    rig.send_raw(&Header { src_cid: 4, ..good }, &[]);
    rig.send_raw(&Header { dst_cid: 4, ..good }, &[]);
    rig.send_raw(
        &Header {
            src_cid: u64::from(CID) | 1 << 32,
            ..good
        },
        &[],
    );
    rig.expect_nothing();
    let seqpacket = Header { kind: 2, ..good };
    rig.send_raw(&seqpacket, &[]);
    let (head, len) = rig.driver.used(RX).unwrap();
    let bytes = rig
        .driver
        .get(RX_BUFFERS + 0x2000 * u64::from(head), len as usize);
    let answer = Header::parse(bytes.first_chunk().unwrap());
    assert_eq!((answer.op, answer.kind), (Operation::Reset as u16, 2));
}

#[test]
fn the_host_ending_one_direction_leaves_the_other() {
    let mut rig = rig();
    let (ports, mut host) = rig.guest_connects(1000, 52);
    host.write_all(b"last words").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.expect(Operation::Data).1, b"last words");
    assert_eq!(rig.expect(Operation::Shutdown).0.flags, SHUTDOWN_SEND);
    rig.send(Operation::Data, ports, 0, b"I still talk");
    assert_eq!(read(&mut host, 12), b"I still talk");
    rig.send(Operation::Shutdown, ports, SHUTDOWN_BOTH, &[]);
    rig.expect(Operation::Reset);
    assert!(at_end(&mut host));
    assert_eq!(rig.connections(), 0);
}

#[test]
fn the_guest_ending_one_direction_leaves_the_other() {
    let mut rig = rig();
    let (ports, mut host) = rig.host_connects(80);
    rig.send(Operation::Data, ports, 0, b"last words");
    rig.send(Operation::Shutdown, ports, SHUTDOWN_SEND, &[]);
    let mut heard = Vec::new();
    host.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"last words");
    host.write_all(b"I still talk").unwrap();
    assert_eq!(rig.expect(Operation::Data).1, b"I still talk");
    rig.send(Operation::Data, ports, 0, b"no more");
    rig.expect(Operation::Reset);
}

#[test]
fn a_host_that_closes_is_heard_out_before_both_directions_end() {
    let mut rig = rig();
    let (ports, mut host) = rig.guest_connects(1000, 52);
    host.write_all(&[7; 10_000]).unwrap();
    drop(host);
    let mut heard = 0;
    let mut told = 0;
    while told != SHUTDOWN_BOTH || heard < 10_000 {
        let (header, data) = rig.take();
        if header.op == Operation::Data as u16 {
            assert_eq!(told & SHUTDOWN_SEND, 0, "data after the end");
            heard += data.len();
        } else {
            assert_eq!(header.op, Operation::Shutdown as u16);
            told |= header.flags;
        }
        if told & SHUTDOWN_RECEIVE == 0 {
            // What nobody hears is no error as long as the guest cannot know.
            rig.send(Operation::Data, ports, 0, b"hello?");
        }
    }
    rig.send(Operation::Reset, ports, 0, &[]);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn a_guest_that_ignores_the_end_is_reset_after_2_s() {
    let mut rig = rig();
    let (_, host) = rig.guest_connects(1000, 52);
    drop(host);
    let start = Instant::now();
    loop {
        let (header, _) = rig.take();
        if header.op == Operation::Reset as u16 {
            break;
        }
        assert_eq!(header.op, Operation::Shutdown as u16);
    }
    assert!(start.elapsed() > Duration::from_millis(1500));
    assert_eq!(rig.connections(), 0);
}

#[test]
fn the_guest_sends_64_kib_ahead_of_the_host_and_hears_when_there_is_room() {
    let mut rig = rig();
    let (ports, mut host) = rig.guest_connects(1000, 52);
    // Until the socket is full and 64 KiB wait: then the credit is used up.
    let (mut sent, mut forwarded) = (0u32, 0u32);
    let mut expected = Vec::new();
    loop {
        while let Some((header, _)) = rig.taken() {
            assert_eq!(header.op, Operation::CreditUpdate as u16);
            forwarded = header.fwd_cnt;
        }
        if sent - forwarded > BUFFER_BYTES - 4096 {
            break;
        }
        let data: Vec<u8> = (0..4096u32).map(|n| (n * 7 + sent) as u8).collect();
        rig.send(Operation::Data, ports, 0, &data);
        expected.extend(data);
        sent += 4096;
        assert!(sent < 16 << 20, "a socket that never fills");
    }
    // The host reads it all, and the guest is told.
    host.set_nonblocking(true).unwrap();
    let mut got: Vec<u8> = Vec::new();
    let limit = Instant::now() + Duration::from_secs(5);
    while got.len() < expected.len() && Instant::now() < limit {
        let mut bytes = [0; 65536];
        match host.read(&mut bytes) {
            Ok(n) => got.extend(&bytes[..n]),
            Err(_) => {
                rig.turn();
            }
        }
    }
    assert!(
        got == expected,
        "{} of {} bytes, or other ones",
        got.len(),
        expected.len()
    );
    let mut last = forwarded;
    while let Some((header, _)) = rig.taken() {
        assert_eq!(header.op, Operation::CreditUpdate as u16);
        last = header.fwd_cnt;
    }
    assert!(sent - last <= BUFFER_BYTES / 2);
}

#[test]
fn a_guest_that_sends_beyond_its_credit_is_reset() {
    let mut rig = rig();
    let (ports, _host) = rig.guest_connects(1000, 52);
    let limit = Instant::now() + Duration::from_secs(5);
    while rig.connections() == 1 {
        rig.send(Operation::Data, ports, 0, &[0; 4096]);
        assert!(Instant::now() < limit, "it was never reset");
        // Nothing reads: sooner or later socket and backlog are full.
        while let Some((header, _)) = rig.taken() {
            assert!([Operation::CreditUpdate as u16, Operation::Reset as u16].contains(&header.op));
        }
    }
}

#[test]
fn the_guest_is_never_sent_more_than_it_has_room_for() {
    let mut rig = rig();
    rig.room = 5000;
    // As if 2^32 bytes were about to wrap.
    let (ports, mut host) = rig.guest_connects(1000, 52);
    host.write_all(&[1; 12_000]).unwrap();
    assert_eq!(rig.expect(Operation::Data).0.len, 4096);
    assert_eq!(rig.expect(Operation::Data).0.len, 904);
    rig.expect(Operation::CreditRequest);
    rig.expect_nothing();
    rig.consumed = 5000;
    rig.send(Operation::CreditUpdate, ports, 0, &[]);
    assert_eq!(rig.expect(Operation::Data).0.len, 4096);
    assert_eq!(rig.expect(Operation::Data).0.len, 904);
    rig.expect(Operation::CreditRequest);
    rig.consumed = 10_000;
    rig.send(Operation::CreditUpdate, ports, 0, &[]);
    assert_eq!(rig.expect(Operation::Data).0.len, 2000);
    rig.expect_nothing();
}

#[test]
fn a_guest_that_claims_to_have_read_more_than_was_sent_gets_nothing() {
    let mut rig = rig();
    let (ports, mut host) = rig.guest_connects(1000, 52);
    rig.consumed = 1;
    rig.send(Operation::CreditUpdate, ports, 0, &[]);
    host.write_all(b"x").unwrap();
    rig.expect(Operation::CreditRequest);
    rig.expect_nothing();
}

#[test]
fn a_credit_request_is_answered() {
    let mut rig = rig();
    let (ports, mut host) = rig.guest_connects(1000, 52);
    rig.send(Operation::Data, ports, 0, b"12345");
    read(&mut host, 5);
    rig.send(Operation::CreditRequest, ports, 0, &[]);
    let (update, _) = rig.expect(Operation::CreditUpdate);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUFFER_BYTES, 5));
}

#[test]
fn data_wait_for_buffers_without_keeping_the_event_loop_busy() {
    let mut rig = starved_rig();
    rig.post(1);
    let (_, mut host) = rig.guest_connects(1000, 52);
    while rig.taken().is_some() {}
    // One buffer is there again, for the first 4096 bytes.
    host.write_all(&[1; 9000]).unwrap();
    while rig.turn() {}
    assert!(!rig.turn(), "nothing to do until the guest posts buffers");
    let mut got = 0;
    while let Some((header, _)) = rig.taken() {
        got += header.len;
        // `taken` posted a buffer, which the kick brings to notice.
        rig.driver.kick(RX);
    }
    assert_eq!(got, 9000);
}

#[test]
fn connections_beyond_1023_are_refused_on_both_sides() {
    let mut rig = rig();
    let mut streams: Vec<UnixStream> = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        streams.push(UnixStream::connect(rig.path()).unwrap());
        if streams.len().is_multiple_of(64) {
            rig.turn();
        }
    }
    while rig.turn() {}
    assert_eq!(rig.connections(), CONNECTIONS_MAX);
    let mut host = UnixStream::connect(rig.path()).unwrap();
    while rig.turn() {}
    assert!(at_end(&mut host));
    let _listener = rig.listen(52);
    rig.send(Operation::Request, (1000, 52), 0, &[]);
    rig.expect(Operation::Reset);
    // One goes, one may come.
    streams.pop();
    while rig.turn() {}
    rig.send(Operation::Request, (1000, 52), 0, &[]);
    rig.expect(Operation::Response);
}

#[test]
fn a_guest_that_takes_no_packets_is_not_listened_to() {
    let mut rig = starved_rig();
    let mut taken = 0;
    for n in 0..1000 {
        let header = rig.header(Operation::Data, (n, 6), 0, 0);
        rig.driver.put(BUFFERS, &header.bytes());
        rig.driver
            .add(TX, &[Buffer::Out(BUFFERS, HEADER_LEN as u32)]);
        rig.driver.kick(TX);
        if rig.driver.used(TX).is_none() {
            break;
        }
        taken += 1;
    }
    assert!(
        (200..300).contains(&taken),
        "{taken} packets were answered in memory"
    );
    rig.post(32);
    let mut resets = 0;
    while let Some((header, _)) = rig.taken() {
        assert_eq!(header.op, Operation::Reset as u16);
        resets += 1;
        rig.driver.kick(RX);
    }
    assert_eq!(resets, taken + 1, "and then it is again");
}

#[test]
fn a_request_on_a_connection_that_is_there_resets_it() {
    let mut rig = rig();
    let (ports, mut host) = rig.guest_connects(1000, 52);
    rig.send(Operation::Request, ports, 0, &[]);
    rig.expect(Operation::Reset);
    assert!(at_end(&mut host));
}

#[test]
fn a_packet_shorter_than_it_says_resets_its_connection() {
    let mut rig = rig();
    let (ports, mut host) = rig.guest_connects(1000, 52);
    let header = rig.header(Operation::Data, ports, 0, 100);
    rig.send_raw(&header, &[0; 99]);
    rig.expect(Operation::Reset);
    assert!(at_end(&mut host));
    // And what is not even a header is only given back.
    assert_eq!(rig.driver.request(TX, &[Buffer::Out(BUFFERS, 43)]), 0);
    assert!(!rig.driver.needs_reset());
}

#[test]
fn a_reset_of_the_device_ends_every_connection() {
    let mut rig = rig();
    let (_, mut guests) = rig.guest_connects(1000, 52);
    let (_, mut hosts) = rig.host_connects(80);
    rig.driver.write(0x70, 0);
    assert!(at_end(&mut guests) && at_end(&mut hosts));
    assert_eq!(rig.connections(), 0);
    rig.driver.set_up(u64::MAX);
    rig.post(32);
    rig.host_connects(80);
}

#[test]
fn a_ring_broken_while_the_host_sends_asks_for_a_reset() {
    let mut rig = rig();
    let (_, mut host) = rig.guest_connects(1000, 52);
    let index = rig.driver.ring(RX).avail + 2;
    rig.driver.put(index, &0x8000u16.to_le_bytes());
    host.write_all(b"x").unwrap();
    while rig.turn() {}
    assert!(rig.driver.needs_reset());
    assert!(rig.driver.line_is_high());
    assert!(at_end(&mut host));
}

#[test]
fn the_path_goes_with_the_device_and_a_stale_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind by a process that died");
    let vsock = Vsock::new(CID, &path).unwrap();
    assert!(path.exists());
    drop(vsock);
    assert!(!path.exists());
}

#[test]
fn a_path_that_somebody_else_took_over_is_left_to_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let vsock = Vsock::new(CID, &path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    drop(vsock);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn a_path_in_use_is_refused_and_stays_usable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let _first = Vsock::new(CID, &path).unwrap();
    let error = Vsock::new(4, &path).unwrap_err();
    assert!(matches!(&error, Error::VsockInUse { path: named } if *named == path));
    assert!(error.to_string().contains("in use"));
    UnixStream::connect(&path).unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let blocked = Vsock::new(4, &dir.path().join("file")).unwrap_err();
    assert!(matches!(blocked, Error::VsockBlocked { .. }));
    let nowhere = Vsock::new(4, &dir.path().join("no/such/dir")).unwrap_err();
    assert!(matches!(nowhere, Error::VsockListen { .. }));
}

#[test]
fn reserved_context_identifiers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u32::MAX] {
        let error = Vsock::new(cid, &dir.path().join("v")).unwrap_err();
        assert!(matches!(error, Error::ReservedCid { cid: named } if named == u64::from(cid)));
    }
}

#[test]
fn a_header_survives_its_bytes() {
    let bytes: [u8; HEADER_LEN] = std::array::from_fn(|n| n as u8);
    let header = Header::parse(&bytes);
    assert_eq!(header.bytes(), bytes);
    assert_eq!(header.src_port, 0x1312_1110);
    assert_eq!(header.op, 0x1f1e);
}

/// What guest and host do to each other at random.
#[derive(Clone, Debug)]
enum Move {
    Packet { header: Header, len: usize },
    Take,
    Turn,
    Connect { greeting: Vec<u8> },
    HostWrites { which: usize, len: usize },
    HostReads { which: usize },
    HostEnds { which: usize, how: u8 },
    HostAccepts,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let port = prop_oneof![Just(52u32), Just(80), Just(1 << 30), Just((1 << 30) + 1)];
    let credit = prop_oneof![Just(0u32), Just(65536), any::<u32>()];
    let packet = (
        (port.clone(), port, 0u16..9, 0u32..4),
        (
            credit.clone(),
            credit,
            0usize..5000,
            any::<bool>(),
            prop_oneof![9 => Just(1u16), 1 => 0u16..3],
        ),
    )
        .prop_map(
            |((src_port, dst_port, op, flags), (buf_alloc, fwd_cnt, len, lies, kind))| {
                let claimed = if lies { buf_alloc } else { len as u32 };
                let header = Header {
                    src_cid: CID.into(),
                    dst_cid: HOST_CID,
                    src_port,
                    dst_port,
                    len: claimed,
                    kind,
                    op,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                };
                Move::Packet { header, len }
            },
        );
    let greeting = prop_oneof![
        4 => Just(b"CONNECT 80\n".to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..40),
    ];
    let one = prop_oneof![
        8 => packet,
        4 => Just(Move::Take),
        4 => Just(Move::Turn),
        2 => greeting.prop_map(|greeting| Move::Connect { greeting }),
        2 => (0usize..8, 0usize..20_000).prop_map(|(which, len)| Move::HostWrites { which, len }),
        2 => (0usize..8).prop_map(|which| Move::HostReads { which }),
        1 => (0usize..8, 0u8..4).prop_map(|(which, how)| Move::HostEnds { which, how }),
        1 => Just(Move::HostAccepts),
    ];
    proptest::collection::vec(one, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_behaviour_of_guest_and_host_upsets_the_device(moves in moves()) {
        let mut rig = rig();
        let listener = rig.listen(52);
        listener.set_nonblocking(true).unwrap();
        let mut hosts: Vec<UnixStream> = Vec::new();
        for one in moves {
            match one {
                Move::Packet { header, len } => {
                    rig.driver.put(BUFFERS, &header.bytes());
                    let buffers =
                        [Buffer::Out(BUFFERS, HEADER_LEN as u32), Buffer::Out(BUFFERS, len as u32)];
                    rig.driver.add(TX, &buffers);
                    rig.driver.kick(TX);
                    while rig.driver.used(TX).is_some() {}
                }
                Move::Take => {
                    rig.driver.used(RX);
                    rig.post(1);
                }
                Move::Turn => rig.vsock.lock().unwrap().on_event(),
                Move::Connect { greeting } => {
                    let mut host = UnixStream::connect(rig.path()).unwrap();
                    host.set_nonblocking(true).unwrap();
                    host.write_all(&greeting).unwrap();
                    hosts.push(host);
                }
                Move::HostWrites { which, len } => {
                    if let Some(mut host) = hosts.get(which) {
                        let _ = host.write(&vec![0; len]);
                    }
                }
                Move::HostReads { which } => {
                    if let Some(mut host) = hosts.get(which) {
                        let _ = host.read(&mut [0; 10_000]);
                    }
                }
                Move::HostEnds { which, how } if which < hosts.len() => match how {
                    0 => drop(hosts.remove(which)),
                    1 => drop(hosts[which].shutdown(Shutdown::Read)),
                    2 => drop(hosts[which].shutdown(Shutdown::Write)),
                    _ => drop(hosts[which].shutdown(Shutdown::Both)),
                },
                Move::HostEnds { .. } => {}
                Move::HostAccepts => {
                    if let Ok((host, _)) = listener.accept() {
                        host.set_nonblocking(true).unwrap();
                        hosts.push(host);
                    }
                }
            }
            prop_assert!(!rig.driver.needs_reset());
            prop_assert!(rig.connections() <= CONNECTIONS_MAX);
        }
        // Whatever happened: after a reset, a good driver gets what it wants.
        drop(listener);
        std::fs::remove_file(rig.dir.path().join("v_52")).unwrap();
        drop(hosts);
        rig.driver.set_up(u64::MAX);
        rig.consumed = 0;
        rig.post(32);
        let (ports, mut host) = rig.guest_connects(1000, 52);
        rig.send(Operation::Data, ports, 0, b"fine");
        prop_assert_eq!(read(&mut host, 4), b"fine");
    }
}
