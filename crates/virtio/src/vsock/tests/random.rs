//! Random behaviour of both sides.

use proptest::prelude::*;

use super::*;

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
