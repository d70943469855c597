//! Who reaches whom, and how it ends.

use super::*;

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
    while rig.turn() {}
    rig.send(Operation::Data, ports, 0, b"more");
    assert_eq!(read(&mut host, 4), b"more");
    assert!(!rig.turn(), "a host that reads is nothing to wake up for");
    host.write_all(b"from the host").unwrap();
    assert_eq!(rig.expect(Operation::Data).1, b"from the host");
    rig.expect_nothing();
    let counters = rig.vsock.lock().unwrap().counters();
    let counted = |name| {
        let mut all = counters.all();
        all.find(|(one, _)| *one == name).unwrap().1
    };
    assert_eq!(counted("tx_bytes_count"), 18);
    assert_eq!(counted("rx_bytes_count"), 13);
    // A request and data twice; its answer and data.
    assert_eq!(counted("tx_packets_count"), 3);
    assert_eq!(counted("rx_packets_count"), 2);
    assert_eq!((counted("conns_added"), counted("conns_removed")), (1, 0));
    rig.send(Operation::Reset, ports, 0, b"");
    assert_eq!((counted("conns_removed"), counted("conns_killed")), (1, 0));
    assert_eq!(counted("tx_queue_event_count"), 4);
    assert_eq!(counted("tx_queue_event_fails"), 0);
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
    let counters = rig.vsock.lock().unwrap().counters();
    assert!(counters.all().any(|one| one == ("conns_killed", 1)));
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
fn a_header_survives_its_bytes() {
    let bytes: [u8; HEADER_LEN] = std::array::from_fn(|n| n as u8);
    let header = Header::parse(&bytes);
    assert_eq!(header.bytes(), bytes);
    assert_eq!(header.src_port, 0x1312_1110);
    assert_eq!(header.op, 0x1f1e);
}
