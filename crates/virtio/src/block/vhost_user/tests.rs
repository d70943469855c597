//! The disk, between a driver and a back end of which either may be hostile.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use proptest::prelude::*;
use ram::{ByteSize, Further, Gpa, GuestRam};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::fake_back_end::{FakeBackEnd, Manner};
use super::shadow::{SLOT_BYTES, SLOTS, USED_AT};
use super::{Connection, VhostUserBlock};
use crate::block::Cache;
use crate::block::spec::{F_FLUSH, F_RO};
use crate::block::tests::{DATA, DISCARD, FLUSH, GET_ID, HEADER, OK, READ, STATUS, WRITE, pattern};
use crate::fake_driver::{Buffer, FakeDriver, told};
use crate::{Error, EventSource, VirtioDevice, feature};

const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const PENDING: u8 = 0xaa;

struct Rig {
    disk: Arc<Mutex<VhostUserBlock>>,
    driver: FakeDriver,
    back_end: FakeBackEnd,
}

fn rig() -> Rig {
    rig_with(Manner::default(), Cache::Writeback)
}

fn rig_with(manner: Manner, cache: Cache) -> Rig {
    let (back_end, disk) = made(manner, cache);
    let disk = Arc::new(Mutex::new(disk.unwrap()));
    Rig {
        driver: FakeDriver::start(disk.clone()),
        disk,
        back_end,
    }
}

fn made(manner: Manner, cache: Cache) -> (FakeBackEnd, Result<VhostUserBlock, Error>) {
    let back_end = FakeBackEnd::start(manner);
    let connection = Connection::open(&back_end.path).unwrap();
    let disk = VhostUserBlock::new(connection, cache);
    (back_end, disk)
}

/// What a disk cannot be made of, with the causes.
fn refusal(manner: Manner) -> String {
    let (back_end, disk) = made(manner, Cache::Unsafe);
    let said = crate_chain(&disk.unwrap_err());
    said.replace(back_end.path.to_str().unwrap(), "SOCKET")
}

fn crate_chain(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        said = format!("{said}: {cause}");
        source = cause.source();
    }
    said
}

impl Rig {
    /// Puts request `nth` there, with its data in `data`; its name.
    fn put(&mut self, nth: u64, operation: u32, sector: u64, data: &[Buffer]) -> u16 {
        let mut header = operation.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        let (header_at, status_at) = (HEADER + 16 * nth, STATUS + 0x300 + nth);
        self.driver.put(header_at, &header);
        self.driver.put(status_at, &[PENDING]);
        let mut buffers = vec![Buffer::Out(header_at, 16)];
        buffers.extend(data);
        buffers.push(Buffer::In(status_at, 1));
        self.driver.add(0, &buffers)
    }

    fn status(&self, nth: u64) -> u8 {
        self.driver.get(STATUS + 0x300 + nth, 1)[0]
    }

    fn event(&mut self) {
        self.disk.lock().unwrap().on_event();
    }

    /// One request, done by the back end where it gets there; status and what was written.
    fn request(&mut self, operation: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let head = self.put(0, operation, sector, data);
        self.driver.kick(0);
        for _ in 0..2 {
            self.back_end.serve_all();
            self.event();
        }
        let (used, written) = self.driver.used(0).expect("it was not answered");
        assert_eq!(used, head);
        assert!(!self.driver.needs_reset());
        (self.status(0), written)
    }

    /// Waits until there is something for the event loop.
    fn wait(&self) {
        let disk = self.disk.lock().unwrap();
        let mut polled = [PollFd::from_borrowed_fd(disk.fd(), PollFlags::IN)];
        let patience = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        assert_eq!(poll(&mut polled, Some(&patience)).unwrap(), 1);
    }

    /// Sets it up as a new driver does.
    fn set_up(&mut self, features: u64) {
        self.driver.set_up(features);
    }
}

#[test]
fn requests_are_done_by_the_back_end_on_its_disk() {
    let mut rig = rig();
    let into = [Buffer::In(DATA, 700), Buffer::In(DATA + 0x2000, 324)];
    assert_eq!(rig.request(READ, 3, &into), (OK, 1025));
    let wanted: Vec<u8> = (3 * 512..5 * 512).map(pattern).collect();
    let got = [
        rig.driver.get(DATA, 700),
        rig.driver.get(DATA + 0x2000, 324),
    ]
    .concat();
    assert!(got == wanted);
    rig.driver.put(DATA, &[7; 1024]);
    let from = [Buffer::Out(DATA, 1000), Buffer::Out(DATA + 1000, 24)];
    assert_eq!(rig.request(WRITE, 4094, &from), (OK, 1));
    assert!(rig.back_end.disk[4094 * 512..] == [7; 1024]);
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.request(GET_ID, 0, &[Buffer::In(DATA, 20)]), (OK, 21));
    assert_eq!(rig.driver.get(DATA, 20), b"a fake back end's ID");
    assert_eq!(rig.back_end.done, [READ, WRITE, FLUSH, GET_ID]);
    assert!(rig.back_end.kicks() > 0);
}

#[test]
fn the_driver_is_offered_what_the_back_end_has_and_bounds_of_ours() {
    let manner = Manner {
        features: Manner::default().features | F_RO | 1 << 13 | 1 << 29,
        ..Manner::default()
    };
    let mut rig = rig_with(manner, Cache::Writeback);
    let accepted = rig.back_end.given.lock().unwrap().accepted;
    assert_eq!(accepted, feature::VERSION_1 | 1 << 30 | F_RO | F_FLUSH);
    let offered = rig.disk.lock().unwrap().features();
    assert_eq!(offered, F_RO | F_FLUSH | 1 << 1 | 1 << 2);
    assert_eq!(u64::from_le_bytes(rig.driver.config(0)), 4096);
    let (bytes, segments) = (rig.driver.config(8), rig.driver.config(12));
    let most = u32::from_le_bytes(bytes) * u32::from_le_bytes(segments);
    assert_eq!(most as usize, SLOT_BYTES);
    rig.driver.put(DATA, &[7; 512]);
    let refused = rig.request(WRITE, 0, &[Buffer::Out(DATA, 512)]);
    assert_eq!((refused, rig.back_end.done.len()), ((IO_ERROR, 1), 0));
}

#[test]
fn what_cannot_be_done_never_reaches_the_back_end() {
    let mut rig = rig_with(Manner::default(), Cache::Unsafe);
    // A flush of a cache that was not offered is done already.
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
    let big = SLOT_BYTES as u32 + 512;
    for (operation, sector, data, status) in [
        (READ, 4096, vec![Buffer::In(DATA, 512)], IO_ERROR),
        (READ, 4095, vec![Buffer::In(DATA, 1024)], IO_ERROR),
        (READ, u64::MAX, vec![Buffer::In(DATA, 512)], IO_ERROR),
        (READ, 0, vec![Buffer::In(DATA, 511)], IO_ERROR),
        (READ, 0, vec![Buffer::In(DATA, big)], IO_ERROR),
        (READ, 0, vec![], OK),
        (WRITE, 4096, vec![Buffer::Out(DATA, 512)], IO_ERROR),
        (WRITE, 0, vec![Buffer::Out(DATA, big)], IO_ERROR),
        (GET_ID, 0, vec![Buffer::In(DATA, 19)], IO_ERROR),
        (DISCARD, 0, vec![Buffer::Out(DATA, 16)], UNSUPPORTED),
        (99, 0, vec![], UNSUPPORTED),
    ] {
        let got = rig.request(operation, sector, &data);
        assert_eq!(got, (status, 1), "{operation} {sector}");
    }
    // No header, no room for a status.
    assert_eq!(rig.driver.request(0, &[Buffer::In(STATUS, 1)]), 1);
    assert_eq!(rig.driver.request(0, &[Buffer::Out(HEADER, 16)]), 0);
    assert_eq!(rig.back_end.done, [0; 0]);
}

#[test]
fn a_driver_that_knows_no_flush_has_each_write_flushed() {
    let mut rig = rig();
    rig.set_up(feature::EVENT_IDX);
    rig.driver.put(DATA, &[9; 512]);
    assert_eq!(rig.request(WRITE, 1, &[Buffer::Out(DATA, 512)]), (OK, 1));
    assert_eq!(rig.request(READ, 1, &[Buffer::In(DATA, 512)]), (OK, 513));
    assert_eq!(rig.back_end.done, [WRITE, FLUSH, READ]);
}

#[test]
fn pages_that_a_back_end_filled_count_as_written() {
    let mut rig = rig();
    let epochs = rig.driver.ram.epochs().clone();
    for sector in [0, 1] {
        let cursor = epochs.cursor();
        epochs.watch(Gpa(DATA));
        assert_eq!(rig.request(READ, sector, &[Buffer::In(DATA, 512)]).0, OK);
        assert!(epochs.was_written_since(Gpa(DATA), cursor));
        assert_eq!(epochs.take_watched_writes(), [Gpa(DATA)]);
    }
}

#[test]
fn more_requests_than_slots_wait_and_are_done_in_any_order() {
    let mut rig = rig();
    // A ring of 64 entries has room for 21 requests of three: several times as many as there are slots.
    let mut answered = 0;
    for round in 0..4 {
        let mut names = Vec::new();
        for nth in 0..21 {
            let at = DATA + 512 * nth;
            names.push(rig.put(nth, READ, round * 21 + nth, &[Buffer::In(at, 512)]));
        }
        rig.driver.kick(0);
        let mut found: Vec<_> = std::iter::from_fn(|| rig.back_end.find()).collect();
        found.rotate_left(round as usize * 5);
        found.iter().rev().for_each(|one| rig.back_end.serve(one));
        rig.back_end.ring();
        rig.event();
        let mut used: Vec<_> = std::iter::from_fn(|| rig.driver.used(0)).collect();
        assert!(used.iter().all(|(_, written)| *written == 513));
        used.sort_unstable();
        names.sort_unstable();
        assert!(used.iter().map(|(name, _)| *name).eq(names));
        for nth in 0..21 {
            let sector = round * 21 + nth;
            let wanted: Vec<u8> = (sector * 512..(sector + 1) * 512).map(pattern).collect();
            assert!(rig.driver.get(DATA + 512 * nth, 512) == wanted, "{sector}");
            answered += 1;
        }
    }
    assert!(answered > SLOTS);
}

#[test]
fn what_has_no_slot_waits_for_one() {
    let mut rig = rig();
    // Requests without data of two descriptors: 32 of them fill the driver's ring and all slots; the driver that is
    // reset does not get its slots back before the back end is done.
    let flush = |rig: &mut Rig, nth| {
        let header = 16 * nth;
        rig.driver
            .put(HEADER + header, &[FLUSH.to_le_bytes(), [0; 4]].concat());
        rig.driver.put(STATUS + 0x300 + nth, &[PENDING]);
        let buffers = [
            Buffer::Out(HEADER + header, 16),
            Buffer::In(STATUS + 0x300 + nth, 1),
        ];
        rig.driver.add(0, &buffers)
    };
    for nth in 0..SLOTS as u64 {
        flush(&mut rig, nth);
    }
    rig.driver.kick(0);
    let found: Vec<_> = std::iter::from_fn(|| rig.back_end.find()).collect();
    assert_eq!(found.len(), SLOTS);
    rig.set_up(u64::MAX);
    let name = flush(&mut rig, 0);
    rig.driver.kick(0);
    assert!(rig.back_end.find().is_none() && rig.driver.used(0).is_none());
    rig.back_end.serve(&found[7]);
    rig.back_end.ring();
    rig.event();
    assert_eq!(
        rig.driver.used(0),
        None,
        "an answer to a driver that is gone"
    );
    let last = rig.back_end.find().expect("a slot is free again");
    for one in found.iter().filter(|one| one.head != last.head) {
        rig.back_end.serve(one);
    }
    rig.event();
    assert_eq!(rig.driver.used(0), None);
    rig.back_end.serve(&last);
    rig.event();
    assert_eq!(rig.driver.used(0), Some((name, 1)));
    assert_eq!(rig.status(0), OK);
}

#[test]
fn an_answer_after_a_reset_touches_no_memory() {
    let mut rig = rig();
    rig.put(0, READ, 0, &[Buffer::In(DATA, 512)]);
    rig.driver.kick(0);
    rig.driver.put(DATA, &[0x55; 512]);
    rig.set_up(u64::MAX);
    rig.back_end.serve_all();
    rig.event();
    assert!(rig.driver.get(DATA, 512) == [0x55; 512]);
    assert_eq!((rig.status(0), rig.driver.used(0)), (PENDING, None));
    assert_eq!(rig.request(READ, 0, &[Buffer::In(DATA, 512)]), (OK, 513));
}

#[test]
fn memory_that_goes_while_the_back_end_works_is_not_written() {
    let block = 2 << 20;
    let further = vec![Further::Pluggable { len: block, block }];
    let ram = GuestRam::with(ByteSize::mib(16), further).unwrap();
    let at = ram.regions().last().unwrap().start;
    ram.plug(at, block).unwrap();
    let (back_end, disk) = made(Manner::default(), Cache::Unsafe);
    let disk = Arc::new(Mutex::new(disk.unwrap()));
    let driver = FakeDriver::start_in(ram.clone(), disk.clone());
    let mut rig = Rig {
        disk,
        driver,
        back_end,
    };
    rig.put(0, READ, 0, &[Buffer::In(at.0, 512)]);
    rig.driver.kick(0);
    ram.unplug(at, block).unwrap();
    rig.back_end.serve_all();
    rig.event();
    assert_eq!(rig.status(0), IO_ERROR);
    ram.plug(at, block).unwrap();
    assert!(rig.driver.get(at.0, 512) == [0; 512]);
}

#[test]
fn a_back_end_that_lies_loses_its_drive_and_the_driver_hears_of_it() {
    for lie in 0..4 {
        let mut rig = rig();
        rig.put(0, READ, 0, &[Buffer::In(DATA, 512)]);
        rig.put(1, READ, 1, &[Buffer::In(DATA, 512)]);
        rig.driver.kick(0);
        match lie {
            0 => rig.back_end.answer(8, 0),
            1 => rig.back_end.answer(1, 0),
            2 => rig.back_end.answer(u32::MAX, 0),
            _ => rig.back_end.set_used(3),
        }
        rig.back_end.ring();
        rig.event();
        assert_eq!([rig.status(0), rig.status(1)], [IO_ERROR; 2], "lie {lie}");
        // What it says afterwards is not listened to.
        rig.back_end.set_used(0);
        rig.back_end.ring();
        rig.event();
        let head = rig.put(0, READ, 0, &[Buffer::In(DATA, 512)]);
        rig.driver.kick(0);
        let used: Vec<_> = std::iter::from_fn(|| rig.driver.used(0)).collect();
        assert_eq!((used.len(), used[2].0), (3, head));
        assert_eq!(rig.status(0), IO_ERROR);
        assert!(!rig.driver.needs_reset());
    }
}

#[test]
fn a_status_that_is_none_is_an_error_and_a_failure_a_failure() {
    let mut rig = rig();
    for (said, wanted) in [(PENDING, IO_ERROR), (3, IO_ERROR), (1, 1), (2, 2)] {
        rig.put(0, READ, 0, &[Buffer::In(DATA, 512)]);
        rig.driver.put(DATA, &[0x55; 512]);
        rig.driver.kick(0);
        let found = rig.back_end.find().unwrap();
        rig.back_end.put(found.pieces.last().unwrap().0, &[said]);
        rig.back_end.answer(found.head.into(), 513);
        rig.event();
        rig.driver.used(0).unwrap();
        assert_eq!(rig.status(0), wanted);
        assert!(rig.driver.get(DATA, 512) == [0x55; 512]);
    }
}

#[test]
fn a_back_end_that_goes_fails_what_it_had_and_what_comes() {
    let mut rig = rig();
    rig.put(0, READ, 0, &[Buffer::In(DATA, 512)]);
    rig.driver.kick(0);
    rig.back_end.hang_up();
    rig.wait();
    rig.event();
    assert_eq!(rig.status(0), IO_ERROR);
    rig.put(1, FLUSH, 0, &[]);
    rig.driver.kick(0);
    assert_eq!(rig.status(1), IO_ERROR);
    rig.set_up(u64::MAX);
    let counters = rig.disk.lock().unwrap().counters();
    let counted = told(&*counters);
    assert!(counted.contains(&("activate_fails", 1)), "{counted:?}");
    rig.put(0, WRITE, 0, &[Buffer::Out(DATA, 512)]);
    rig.driver.kick(0);
    assert_eq!(rig.status(0), IO_ERROR);
}

#[test]
fn a_back_end_is_asked_anew_and_the_driver_told() {
    let mut rig = rig();
    let reread = |rig: &Rig| {
        let session = rig.disk.lock().unwrap().session();
        let (since, said) = (Instant::now(), session.config());
        rig.disk.lock().unwrap().update(said, since)
    };
    rig.back_end.manner.lock().unwrap().sectors = 8192;
    reread(&rig).unwrap();
    assert_eq!(u64::from_le_bytes(rig.driver.config(0)), 8192);
    assert_eq!(rig.driver.handle_interrupt(), 2);
    // One that does not answer is not asked again, and works on.
    rig.back_end.manner.lock().unwrap().silent_from = Some(24);
    for _ in 0..2 {
        let got = reread(&rig).unwrap_err();
        assert!(matches!(got, Error::BackEndSilent { .. }), "{got}");
    }
    rig.event();
    assert_eq!(rig.request(READ, 0, &[Buffer::In(DATA, 512)]), (OK, 513));
    let counters = rig.disk.lock().unwrap().counters();
    assert!(told(&*counters).contains(&("cfg_fails", 2)));
}

#[test]
fn what_is_no_back_end_is_refused_by_name() {
    let none = Connection::open("/no/such/socket".as_ref()).unwrap_err();
    assert_eq!(
        crate_chain(&none),
        "failed to connect to the vhost-user back end at \"/no/such/socket\": No such file or directory (os error 2)"
    );
    let manner = Manner::default;
    let no_config = refusal(Manner {
        protocol_features: 0,
        ..manner()
    });
    assert_eq!(
        no_config,
        "the vhost-user back end at \"SOCKET\" does not offer VHOST_USER_PROTOCOL_F_CONFIG"
    );
    let legacy = refusal(Manner {
        features: 1 << 30,
        ..manner()
    });
    assert_eq!(
        legacy,
        "the vhost-user back end at \"SOCKET\" does not offer VIRTIO_F_VERSION_1"
    );
    for request in [1, 15, 24] {
        let silent = refusal(Manner {
            silent_from: Some(request),
            ..manner()
        });
        assert!(silent.contains(" within "), "{silent}");
        for answer in [vec![], vec![0xff; 12], vec![0xff; 4096], vec![0; 4096]] {
            let said = refusal(Manner {
                answer: Some((request, answer)),
                ..manner()
            });
            assert!(said.contains("did not say"), "{said}");
        }
    }
}

#[test]
fn the_memory_of_a_back_end_keeps_its_length() {
    let rig = rig();
    let given = rig.back_end.given.lock().unwrap();
    let memory = given.memory.as_ref().unwrap();
    let len = memory.metadata().unwrap().len();
    assert!(memory.set_len(0).is_err() && memory.set_len(len + 4096).is_err());
    assert!(memory.as_fd().try_clone_to_owned().is_ok());
}

proptest! {
    #[test]
    fn whatever_a_back_end_writes_a_driver_gets_answers_or_silence(
        rounds in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..64), 0..0x3000_usize, 0..6_u16, 0..140_u32),
            1..12,
        ),
    ) {
        let mut rig = rig();
        for (bytes, at, step, name) in rounds {
            rig.put(0, READ, 0, &[Buffer::In(DATA, 512)]);
            rig.driver.kick(0);
            rig.back_end.put(at, &bytes);
            rig.back_end.answer(name, 513);
            rig.back_end.put(USED_AT + 2, &rig.back_end.used.wrapping_add(step).to_le_bytes());
            rig.back_end.ring();
            rig.event();
            while rig.driver.used(0).is_some() {}
            prop_assert!(!rig.driver.needs_reset());
        }
        // A driver that starts anew is answered, or its back end has still to.
        rig.set_up(u64::MAX);
        rig.put(0, FLUSH, 0, &[]);
        rig.driver.kick(0);
        rig.back_end.hang_up();
        rig.wait();
        rig.event();
        prop_assert_eq!(rig.status(0), IO_ERROR);
    }
}
