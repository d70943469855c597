//! Credit, back-pressure and limits.

use super::*;
use rustix::process::{Resource, getrlimit, setrlimit};

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
    // Both ends are in this process; the usual soft limit is 1024.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
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
fn a_long_stream_arrives_whole_and_in_order() {
    let mut rig = rig();
    let (ports, mut host) = rig.guest_connects(1000, 52);
    let sent: Vec<u8> = (0..1u32 << 20).map(|n| (n ^ n >> 9) as u8).collect();
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || {
            host.write_all(&sent).unwrap();
            host
        }
    });
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let (header, data) = rig.take();
        match Operation::parse(header.op) {
            Some(Operation::Data) => got.extend(data),
            Some(Operation::CreditRequest) => {
                rig.consumed = got.len() as u32;
                rig.send(Operation::CreditUpdate, ports, 0, &[]);
            }
            other => panic!("{other:?} in the middle of a stream"),
        }
    }
    assert!(got == sent);
    writer.join().unwrap();
}
