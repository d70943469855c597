//! Registers and rings, by an honest and a hostile driver.

use std::sync::{Arc, Mutex};

use bus::{Lifecycle, MmioDevice};
use proptest::prelude::*;
use ram::{Further, GuestRam};

use crate::fake_driver::{
    BUFFERS, Buffer, F_INDIRECT, F_NEXT, F_WRITE, FakeDriver, QUEUE_SIZE, RAM,
};
use crate::rate_limiter::Limits;
use crate::rng::Rng;
use crate::transport::Doorbell;
use crate::{EventSource, VirtioDevice, feature};

fn rng() -> Arc<Mutex<dyn VirtioDevice>> {
    Arc::new(Mutex::new(Rng::new(Limits::default()).unwrap()))
}

#[test]
fn it_says_what_it_is() {
    let mut driver = FakeDriver::find(rng());
    assert_eq!(driver.read(0x00), 0x7472_6976);
    assert_eq!(driver.read(0x04), 2);
    assert_eq!(driver.read(0x08), 4);
    driver.write(0x14, 1);
    assert_eq!(driver.read(0x10), 1, "VERSION_1");
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0);
    assert_eq!(
        (driver.read(0xb0), driver.read(0xb4)),
        (u32::MAX, u32::MAX),
        "no shared memory"
    );
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 0, "no second queue");
}

#[test]
fn status_moves_one_bit_at_a_time() {
    let mut driver = FakeDriver::find(rng());
    for value in [2, 3, 4, 8, 11, 15, 0x40, 0xff] {
        driver.write(0x70, value);
        assert_eq!(driver.read(0x70), 0, "from 0 to {value}");
    }
    driver.write(0x70, 1);
    for value in [2, 5, 9, 11, 15] {
        driver.write(0x70, value);
        assert_eq!(driver.read(0x70), 1, "from 1 to {value}");
    }
    driver.write(0x70, 3);
    driver.write(0x70, 1);
    assert_eq!(driver.read(0x70), 3, "never back");
    driver.write(0x70, 0);
    assert_eq!(driver.read(0x70), 0, "but by a reset");
}

#[test]
fn a_failed_driver_stays_failed_until_reset() {
    let mut driver = FakeDriver::find(rng());
    driver.write(0x70, 1);
    driver.write(0x70, 1 | 0x80);
    driver.write(0x70, 3 | 0x80);
    assert_eq!(driver.read(0x70), 0x81);
    driver.set_up(u64::MAX);
    assert_eq!(driver.read(0x70), 15);
}

#[test]
fn features_ok_needs_version_1() {
    let mut driver = FakeDriver::find(rng());
    driver.write(0x70, 1);
    driver.accept(u64::MAX); // too early: not DRIVER yet
    driver.write(0x70, 3);
    driver.write(0x70, 11);
    assert_eq!(driver.read(0x70), 3);
    driver.accept(feature::VERSION_1);
    driver.write(0x70, 11);
    assert_eq!(driver.read(0x70), 11);
}

#[test]
fn queues_are_set_up_only_between_features_ok_and_driver_ok() {
    let mut driver = FakeDriver::find(rng());
    driver.write(0x70, 1);
    driver.write(0x70, 3);
    driver.write(0x30, 0);
    driver.write(0x44, 1);
    assert_eq!(driver.read(0x44), 0, "too early");
    driver.set_up(u64::MAX);
    driver.write(0x30, 0);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 1, "too late");
}

#[test]
fn a_queue_outside_of_memory_makes_the_device_need_a_reset() {
    for register in [0x84, 0x94, 0xa4] {
        let mut driver = FakeDriver::find(rng());
        driver.write(0x70, 1);
        driver.write(0x70, 3);
        driver.accept(u64::MAX);
        driver.write(0x70, 11);
        driver.set_up_queues();
        driver.write(0x30, 0);
        driver.write(register, 0xffff_ffff);
        driver.write(0x70, 15);
        assert!(driver.needs_reset(), "register {register:#x}");
        assert_eq!(
            driver.handle_interrupt(),
            2,
            "told by a configuration change"
        );
        driver.set_up(u64::MAX);
        assert!(!driver.needs_reset());
    }
}

#[test]
fn a_kick_before_driver_ok_is_replayed() {
    let mut driver = FakeDriver::find(rng());
    driver.write(0x70, 1);
    driver.write(0x70, 3);
    driver.accept(u64::MAX);
    driver.write(0x70, 11);
    driver.set_up_queues();
    driver.add(0, &[Buffer::In(BUFFERS, 32)]);
    driver.kick(0);
    assert_eq!(driver.used(0), None);
    driver.write(0x70, 15);
    assert_eq!(driver.used(0), Some((0, 32)));
}

#[test]
fn a_doorbell_has_the_device_look_at_its_queues_once_rung() {
    let mut driver = FakeDriver::find(rng());
    let mut bell = Doorbell::of(&driver.transport).unwrap();
    assert_eq!(bell.queues(), 1);
    let ring = |bell: &Doorbell| rustix::io::write(bell.fd(), &1_u64.to_ne_bytes()).unwrap();
    driver.write(0x70, 1);
    driver.write(0x70, 3);
    driver.accept(u64::MAX);
    driver.write(0x70, 11);
    driver.set_up_queues();
    driver.add(0, &[Buffer::In(BUFFERS, 32)]);
    // Before the driver is ready, as by a kick; kept when the machine is saved then.
    bell.note();
    assert_eq!(driver.save().unwrap().early_kicks, 0, "nobody rang");
    ring(&bell);
    bell.note();
    assert_eq!(driver.save().unwrap().early_kicks, 1);
    bell.on_event();
    assert_eq!(driver.used(0), None);
    driver.write(0x70, 15);
    assert_eq!(driver.used(0), Some((0, 32)));

    driver.add(0, &[Buffer::In(BUFFERS, 16)]);
    bell.on_event();
    assert_eq!(driver.used(0), None, "nobody rang");
    ring(&bell);
    ring(&bell);
    // Whoever saves the machine leaves it to the event loop.
    bell.note();
    assert_eq!(driver.used(0), None);
    bell.on_event();
    assert_eq!(driver.used(0), Some((1, 16)));
    // What is broken is told as with a kick.
    driver.add(0, &[Buffer::In(u64::MAX - 4, 16)]);
    ring(&bell);
    bell.on_event();
    assert!(driver.needs_reset());
    driver.write(0x70, 0);
    ring(&bell);
    bell.on_event();
    assert!(!driver.needs_reset());
}

#[test]
fn requests_added_while_paused_are_served_on_resume() {
    let mut driver = FakeDriver::start(rng());
    driver.registers().pause();
    driver.add(0, &[Buffer::In(BUFFERS, 32)]);
    driver.registers().resume();
    assert_eq!(driver.used(0), Some((0, 32)));
}

#[test]
fn the_line_is_high_until_every_bit_is_acknowledged() {
    let mut driver = FakeDriver::start(rng());
    driver.request(0, &[Buffer::In(BUFFERS, 8)]);
    assert!(driver.line_is_high());
    driver.write(0x64, 2);
    assert!(driver.line_is_high(), "only the bits named are cleared");
    assert_eq!(driver.read(0x60), 1);
    driver.write(0x64, 1);
    assert!(!driver.line_is_high());
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn a_driver_that_asks_for_it_is_interrupted_once_for_many_requests() {
    let mut driver = FakeDriver::start(rng());
    for _ in 0..20 {
        driver.add(0, &[Buffer::In(BUFFERS, 8)]);
    }
    driver.kick(0);
    assert_eq!(driver.rises(), 1);
    driver.handle_interrupt();
    // used_event is left at 0: no interest in what comes after the first.
    for _ in 0..20 {
        driver.add(0, &[Buffer::In(BUFFERS, 8)]);
    }
    driver.kick(0);
    assert_eq!(driver.rises(), 1);
}

#[test]
fn without_event_idx_every_batch_interrupts() {
    let mut driver = FakeDriver::find(rng());
    driver.set_up(0);
    for n in 1..=3 {
        driver.request(0, &[Buffer::In(BUFFERS, 8)]);
        driver.handle_interrupt();
        assert_eq!(driver.rises(), n);
    }
    driver.kick(0);
    assert_eq!(driver.rises(), 3, "nothing was used");
}

#[test]
fn rings_survive_the_wrap_of_their_indices() {
    let mut driver = FakeDriver::start(rng());
    for _ in 0..70_000 {
        assert_eq!(driver.request(0, &[Buffer::In(BUFFERS, 4)]), 4);
    }
}

#[test]
fn registers_answer_only_to_32_bit_accesses() {
    let mut driver = FakeDriver::find(rng());
    for len in [1, 2, 8] {
        let mut data = vec![0xff; len];
        driver.registers().read(0, &mut data);
        assert_eq!(data, vec![0; len]);
        let mut one = vec![0; len];
        one[0] = 1;
        driver.registers().write(0x70, &one);
        assert_eq!(driver.read(0x70), 0);
    }
}

/// What a hostile driver puts into the ring, and what must come of it.
fn broken_by(sabotage: impl FnOnce(&mut FakeDriver)) {
    let mut driver = FakeDriver::start(rng());
    sabotage(&mut driver);
    driver.kick(0);
    assert!(driver.needs_reset());
    assert!(driver.line_is_high());
    driver.kick(0);
    // And a reset cures it.
    driver.set_up(u64::MAX);
    assert_eq!(driver.request(0, &[Buffer::In(BUFFERS, 4)]), 4);
}

#[test]
fn a_chain_that_loops_needs_a_reset() {
    broken_by(|driver| {
        let table = driver.ring(0).desc;
        driver.put_descriptor(table, 0, BUFFERS, 8, F_WRITE | F_NEXT, 1);
        driver.put_descriptor(table, 1, BUFFERS, 8, F_WRITE | F_NEXT, 0);
        driver.publish(0, 0);
    });
}

#[test]
fn a_head_or_next_out_of_range_needs_a_reset() {
    broken_by(|driver| driver.publish(0, QUEUE_SIZE));
    broken_by(|driver| driver.publish(0, u16::MAX));
    broken_by(|driver| {
        let table = driver.ring(0).desc;
        driver.put_descriptor(table, 0, BUFFERS, 8, F_WRITE | F_NEXT, QUEUE_SIZE);
        driver.publish(0, 0);
    });
}

#[test]
fn a_buffer_outside_of_memory_needs_a_reset() {
    for (addr, len) in [
        (0xffff_f000, 8),
        (u64::MAX, 8),
        (BUFFERS, u32::MAX),
        (u64::MAX - 3, 4),
    ] {
        broken_by(|driver| {
            driver.add(0, &[Buffer::In(addr, len)]);
        });
    }
}

#[test]
fn a_readable_buffer_behind_a_writable_one_needs_a_reset() {
    broken_by(|driver| {
        driver.add(0, &[Buffer::In(BUFFERS, 8), Buffer::Out(BUFFERS, 8)]);
    });
}

#[test]
fn more_requests_than_the_ring_holds_need_a_reset() {
    broken_by(|driver| {
        let index = driver.ring(0).avail + 2;
        driver.put(index, &(QUEUE_SIZE + 1).to_le_bytes());
    });
}

#[test]
fn indirect_tables_are_followed_one_level_deep() {
    let mut driver = FakeDriver::start(rng());
    let (direct, indirect) = (driver.ring(0).desc, BUFFERS + 0x1000);
    driver.put_descriptor(indirect, 0, BUFFERS, 8, F_WRITE | F_NEXT, 1);
    driver.put_descriptor(indirect, 1, BUFFERS + 8, 8, F_WRITE, 0);
    driver.put_descriptor(direct, 0, indirect, 32, F_INDIRECT, 0);
    driver.publish(0, 0);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((0, 16)));
    assert!(!driver.needs_reset());

    for (addr, len) in [
        (indirect, 31),
        (indirect, 0),
        (u64::MAX - 15, 16),
        (0xf000_0000, 32),
    ] {
        broken_by(|driver| {
            driver.put_descriptor(driver.ring(0).desc, 0, addr, len, F_INDIRECT, 0);
            driver.publish(0, 0);
        });
    }
    broken_by(|driver| {
        driver.put_descriptor(indirect, 0, indirect, 16, F_INDIRECT, 0);
        driver.put_descriptor(driver.ring(0).desc, 0, indirect, 16, F_INDIRECT, 0);
        driver.publish(0, 0);
    });
}

/// One thing that a hostile guest does.
#[derive(Clone, Debug)]
pub(super) enum Move {
    Write {
        register: u64,
        data: Vec<u8>,
    },
    Read {
        register: u64,
        len: usize,
    },
    SetUp,
    Scribble {
        queue: usize,
        part: u8,
        at: u64,
        bytes: Vec<u8>,
    },
    Publish {
        queue: usize,
        head: u16,
    },
    Add {
        queue: usize,
        buffers: Vec<(bool, u64, u32)>,
    },
    Kick {
        queue: usize,
    },
}

pub(super) fn moves() -> impl Strategy<Value = Vec<Move>> {
    let register = prop_oneof![
        5 => (0u64..0x40).prop_map(|n| n * 4),
        1 => 0x100u64..0x200,
        1 => any::<u64>(),
    ];
    let data = prop_oneof![
        3 => prop_oneof![0u32..16, Just(0x40), Just(0x80), any::<u32>()]
            .prop_map(|n| n.to_le_bytes().to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..9),
    ];
    let addr = prop_oneof![4 => BUFFERS..BUFFERS + 0x2000, 1 => any::<u64>()];
    let len = prop_oneof![4 => 0u32..6000, 1 => any::<u32>()];
    let one = prop_oneof![
        4 => (register.clone(), data).prop_map(|(register, data)| Move::Write { register, data }),
        1 => (register, 0usize..9).prop_map(|(register, len)| Move::Read { register, len }),
        2 => Just(Move::SetUp),
        3 => (0usize..5, 0u8..3, 0u64..64, proptest::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(queue, part, at, bytes)| Move::Scribble { queue, part, at, bytes }),
        2 => (0usize..5, 0u16..80).prop_map(|(queue, head)| Move::Publish { queue, head }),
        4 => (0usize..5, proptest::collection::vec((any::<bool>(), addr, len), 1..6))
            .prop_map(|(queue, buffers)| Move::Add { queue, buffers }),
        4 => (0usize..6).prop_map(|queue| Move::Kick { queue }),
    ];
    proptest::collection::vec(one, 1..60)
}

/// Plays `moves` against a device, which must then still be one that a good
/// driver can use.
fn play(device: Arc<Mutex<dyn VirtioDevice>>, moves: &[Move]) {
    play_in(GuestRam::new(RAM).unwrap(), device, moves);
}

fn play_in(ram: GuestRam, device: Arc<Mutex<dyn VirtioDevice>>, moves: &[Move]) {
    let mut driver = FakeDriver::start_in(ram, device);
    make(&mut driver, moves);
    driver.set_up(u64::MAX);
    assert_eq!(driver.read(0x70), 15);
    assert!(!driver.line_is_high());
}

/// Plays `moves`.
pub(super) fn make(driver: &mut FakeDriver, moves: &[Move]) {
    for one in moves {
        match one.clone() {
            Move::Write { register, data } => driver.registers().write(register, &data),
            Move::Read { register, len } => driver.registers().read(register, &mut vec![0; len]),
            Move::SetUp => driver.set_up(u64::MAX),
            Move::Scribble {
                queue,
                part,
                at,
                bytes,
            } => {
                let ring = driver.ring(queue % driver.queues());
                let base = [ring.desc, ring.avail, ring.used][usize::from(part)];
                driver.put(base + at, &bytes);
            }
            Move::Publish { queue, head } => {
                driver.publish(queue % driver.queues(), head);
            }
            Move::Add { queue, buffers } => {
                let buffers: Vec<_> = buffers
                    .into_iter()
                    .map(|(fill, addr, len)| match fill {
                        true => Buffer::In(addr, len),
                        false => Buffer::Out(addr, len),
                    })
                    .collect();
                driver.add(queue % driver.queues(), &buffers);
            }
            Move::Kick { queue } => driver.kick(queue),
        }
        // The line says what the status says.
        let pending = driver.read(0x60) != 0;
        assert_eq!(driver.line_is_high(), pending);
    }
}

/// More than the default, which `PROPTEST_CASES` may still raise.
fn cases() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig {
        cases: config.cases.max(300),
        ..config
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn no_sequence_of_accesses_upsets_a_random_source(moves in moves()) {
        play(rng(), &moves);
    }

    #[test]
    fn no_sequence_of_accesses_upsets_a_disk(moves in moves()) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 10).unwrap();
        let (access, cache) = (crate::block::Access::ReadWrite, crate::block::Cache::Writeback);
        let limits = crate::rate_limiter::Limits::default();
        let disk = crate::block::Block::open(file.path(), access, cache, limits).unwrap();
        play(Arc::new(Mutex::new(disk)), &moves);
        assert_eq!(file.as_file().metadata().unwrap().len(), 64 << 10);
    }

    #[test]
    fn no_sequence_of_accesses_upsets_a_vsock(moves in moves()) {
        let dir = tempfile::tempdir().unwrap();
        let vsock = crate::vsock::Vsock::new(3, &dir.path().join("v")).unwrap();
        play(Arc::new(Mutex::new(vsock)), &moves);
    }

    #[test]
    fn no_sequence_of_accesses_upsets_a_balloon(moves in moves()) {
        let settings = crate::balloon::Settings {
            amount_mib: 8,
            deflate_on_oom: true,
            statistics_interval_s: 1,
            hinting: true,
            reporting: true,
        };
        let ram = GuestRam::new(RAM).unwrap();
        let balloon = crate::balloon::Balloon::new(settings, &ram).unwrap();
        play_in(ram, Arc::new(Mutex::new(balloon)), &moves);
    }

    #[test]
    fn no_sequence_of_accesses_upsets_persistent_memory(moves in moves()) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let further = Further::File { file: file.try_clone().unwrap(), read_only: false };
        let ram = GuestRam::with(RAM, vec![further]).unwrap();
        let region = ram.regions().last().unwrap();
        let pmem = crate::pmem::Pmem::new(file, region, Limits::default()).unwrap();
        play_in(ram, Arc::new(Mutex::new(pmem)), &moves);
    }

    #[test]
    fn no_sequence_of_accesses_upsets_pluggable_memory(moves in moves()) {
        let further = Further::Pluggable { len: 64 << 20, block: 2 << 20 };
        let ram = GuestRam::with(RAM, vec![further]).unwrap();
        let mem = crate::mem::Mem::new(&ram, ram.regions().last().unwrap(), 2 << 20).unwrap();
        play_in(ram, Arc::new(Mutex::new(mem)), &moves);
    }
}
