//! Pluggable memory, by an honest and a hostile driver.

use std::sync::{Arc, Mutex, MutexGuard};

use bus::IrqLine;
use proptest::prelude::*;
use ram::{Further, Gpa, GuestRam, Region};

use super::*;
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver, RAM, told};
use crate::{Interrupt, VirtioDevice};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const ANSWER: u64 = BUFFERS + 0x1000;

const DONE: (u16, u16) = (0, 0);
const UNPLUGGED: (u16, u16) = (0, 1);
const MIXED: (u16, u16) = (0, 2);
const REFUSED: (u16, u16) = (1, 0);
const ERROR: (u16, u16) = (3, 0);

struct Bench {
    driver: FakeDriver,
    mem: Arc<Mutex<Mem>>,
    region: Region,
}

fn memory() -> (GuestRam, Region) {
    let further = Further::Pluggable {
        len: 64 * MIB,
        block: BLOCK,
    };
    let ram = GuestRam::with(RAM, vec![further]).unwrap();
    let region = ram.regions().last().unwrap();
    (ram, region)
}

fn bench() -> Bench {
    let (ram, region) = memory();
    let mem = Mem::new(&ram, region, 16 * MIB).unwrap();
    let mem = Arc::new(Mutex::new(mem));
    Bench {
        driver: FakeDriver::start_in(ram, mem.clone()),
        mem,
        region,
    }
}

impl Bench {
    fn mem(&self) -> MutexGuard<'_, Mem> {
        self.mem.lock().unwrap()
    }

    fn at(&self, block: u64) -> u64 {
        self.region.start.0 + block * BLOCK
    }

    /// Request by number; gives the answer's kind and state.
    fn ask(&mut self, kind: u16, at: u64, blocks: u16) -> (u16, u16) {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&at.to_le_bytes());
        request[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.driver.put(BUFFERS, &request);
        let buffers = [Buffer::Out(BUFFERS, 24), Buffer::In(ANSWER, 10)];
        assert_eq!(self.driver.request(0, &buffers), 10);
        let answer = self.driver.get(ANSWER, 10);
        let word = |at| u16::from_le_bytes([answer[at], answer[at + 1]]);
        (word(0), word(8))
    }

    fn plug(&mut self, block: u64, blocks: u16) -> (u16, u16) {
        self.ask(0, self.at(block), blocks)
    }

    fn unplug(&mut self, block: u64, blocks: u16) -> (u16, u16) {
        self.ask(1, self.at(block), blocks)
    }

    fn state(&mut self, block: u64, blocks: u16) -> (u16, u16) {
        self.ask(3, self.at(block), blocks)
    }

    fn config(&mut self) -> [u64; 7] {
        let bytes: [u8; 56] = self.driver.config(0);
        let mut fields = [0; 7];
        for (field, bytes) in fields.iter_mut().zip(bytes.chunks_exact(8)) {
            *field = u64::from_le_bytes(bytes.try_into().unwrap());
        }
        fields
    }
}

#[test]
fn the_configuration_follows_what_is_requested() {
    let mut bench = bench();
    let at = bench.region.start.0;
    assert_eq!(bench.config(), [BLOCK, 0, at, 64 * MIB, 0, 0, 0]);
    bench.mem().request(18).unwrap();
    assert_eq!(bench.config()[4..], [32 * MIB, 0, 18 * MIB]);
    assert_eq!(bench.driver.handle_interrupt(), 2);
    bench.mem().request(2).unwrap();
    assert_eq!(bench.config()[4..], [32 * MIB, 0, 2 * MIB], "usable stays");
    let size = MemError::Size {
        asked: 66,
        block: 2,
        total: 64,
    };
    assert_eq!(bench.mem().request(66), Err(size));
    for mib in [1, 3, 63, u32::MAX] {
        assert!(bench.mem().request(mib).is_err(), "{mib}");
    }
    let status = Status {
        block_mib: 2,
        slot_mib: 16,
        total_mib: 64,
        plugged_mib: 0,
        requested_mib: 2,
    };
    assert_eq!(bench.mem().status(), status);
    bench.driver.write(0x70, 0);
    assert_eq!(bench.mem().request(4), Err(MemError::Inactive));
}

#[test]
fn blocks_are_plugged_up_to_what_is_requested_and_unplugged() {
    let mut bench = bench();
    bench.mem().request(8).unwrap();
    assert_eq!(bench.state(0, 8), UNPLUGGED);
    assert_eq!(bench.plug(1, 2), DONE);
    assert_eq!(bench.plug(5, 2), DONE);
    assert_eq!(bench.plug(3, 1), REFUSED);
    assert_eq!((bench.state(1, 2), bench.state(1, 3)), (DONE, MIXED));
    assert_eq!(bench.config()[5], 8 * MIB);
    let (ram, at) = (bench.driver.ram.clone(), bench.at(1));
    assert!(ram.allows(Gpa(at), 2 * BLOCK, true) && !ram.contains(Gpa(at - 1), 1));
    bench.driver.put(at, b"full");
    assert_eq!(bench.unplug(1, 1), DONE);
    assert!(!ram.contains(Gpa(at), 1));
    assert_eq!((bench.unplug(1, 1), bench.unplug(0, 8)), (ERROR, ERROR));
    assert_eq!(bench.plug(2, 1), ERROR, "plugged already");
    assert_eq!(bench.plug(1, 1), DONE);
    assert_eq!(bench.driver.get(at, 4), [0; 4], "the host had it");
    assert_eq!(bench.mem().status().plugged_mib, 8);
    assert_eq!(bench.ask(2, 0, 0), DONE);
    assert_eq!(bench.config()[4..], [16 * MIB, 0, 8 * MIB]);
    assert_eq!(bench.state(0, 8), UNPLUGGED);
    let wanted = [
        ("queue_event_count", 13),
        ("plug_count", 3),
        ("plug_bytes", 5 * BLOCK),
        ("plug_fails", 2),
        ("unplug_count", 1),
        ("unplug_bytes", BLOCK),
        ("unplug_fails", 2),
        ("unplug_all_count", 1),
        ("state_count", 4),
    ];
    assert_eq!(told(&*bench.mem().counters()), wanted);
}

#[test]
fn requests_outside_of_the_usable_region_are_errors() {
    let mut bench = bench();
    bench.mem().request(16).unwrap();
    let at = bench.region.start.0;
    for kind in [0, 1, 3] {
        for (at, blocks) in [
            (at, 0),
            (at + 1, 1),
            (at + MIB, 1),
            (at - BLOCK, 1),
            (at + 16 * MIB, 1),
            (at, 9),
            (at, u16::MAX),
            (0, 1),
            (u64::MAX - BLOCK + 1, 1),
            (!0, 0xffff),
        ] {
            assert_eq!(
                bench.ask(kind, at, blocks),
                ERROR,
                "{kind} {at:#x} {blocks}"
            );
        }
    }
    for kind in [4, 0xffff] {
        assert_eq!(bench.ask(kind, at, 1), ERROR);
    }
    assert_eq!(bench.mem().status().plugged_mib, 0);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn requests_that_are_too_short_are_errors_and_answers_fit_into_their_room() {
    let mut bench = bench();
    bench.mem().request(16).unwrap();
    let short = [Buffer::Out(BUFFERS, 23), Buffer::In(ANSWER, 10)];
    assert_eq!(bench.driver.request(0, &short), 10);
    assert_eq!(bench.driver.get(ANSWER, 2), [3, 0]);
    let narrow = [Buffer::Out(BUFFERS, 24), Buffer::In(ANSWER, 4)];
    assert_eq!(bench.driver.request(0, &narrow), 4);
    assert_eq!(bench.driver.request(0, &[Buffer::Out(BUFFERS, 24)]), 0);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn a_buffer_in_memory_that_is_not_plugged_is_no_buffer() {
    let mut bench = bench();
    bench.mem().request(16).unwrap();
    assert_eq!(bench.plug(0, 1), DONE);
    let at = bench.at(0);
    let buffers = [Buffer::Out(at, 24), Buffer::In(at + 64, 10)];
    assert_eq!(bench.driver.request(0, &buffers), 10);
    assert_eq!(bench.unplug(0, 1), DONE);
    bench.driver.add(0, &buffers);
    bench.driver.kick(0);
    assert!(bench.driver.needs_reset());
}

#[test]
fn what_is_plugged_stays_when_the_driver_starts_anew() {
    let mut bench = bench();
    bench.mem().request(8).unwrap();
    assert_eq!(bench.plug(0, 4), DONE);
    bench.driver.set_up(u64::MAX);
    assert_eq!(bench.state(0, 4), DONE);
    assert_eq!(bench.config()[4..], [16 * MIB, 8 * MIB, 8 * MIB]);
    // The driver must know that it is not to touch what is unplugged.
    assert_eq!(bench.mem().features(), 2);
}

#[test]
fn a_restored_device_has_the_same_blocks() {
    let mut bench = bench();
    bench.mem().request(8).unwrap();
    assert_eq!((bench.plug(0, 1), bench.plug(2, 2)), (DONE, DONE));
    let saved = bench.mem().save();
    assert_eq!(saved.plugged.len(), 2);
    let interrupt = Interrupt::new(IrqLine::new(|_| {}));
    let (ram, region) = memory();
    let restored = Mem::restore(&saved, &ram, region, &interrupt).unwrap();
    assert_eq!(restored.save(), saved);
    assert_eq!(restored.status(), bench.mem().status());
    assert!(ram.contains(Gpa(bench.at(2)), 2 * BLOCK) && !ram.contains(Gpa(bench.at(1)), 1));

    type Change = fn(&mut SavedMem);
    let changes: [Change; 5] = [
        |saved| saved.start += BLOCK,
        |saved| saved.block *= 2,
        |saved| saved.usable = u64::MAX,
        |saved| saved.plugged.push((0, BLOCK)),
        |saved| saved.queue.as_mut().unwrap().max_size = 0,
    ];
    for change in changes {
        let mut wrong = saved.clone();
        change(&mut wrong);
        let (ram, region) = memory();
        let refused = Mem::restore(&wrong, &ram, region, &interrupt);
        assert!(refused.is_err(), "{wrong:?}");
    }
}

proptest! {
    #[test]
    fn any_requests_keep_the_books(
        steps in prop::collection::vec((0_u16..5, 0_u64..34, 0_u16..9, 0_u32..35), 1..60)
    ) {
        let mut bench = bench();
        for (kind, block, blocks, request) in steps {
            let _ = bench.mem().request(request * 2);
            let requested = bench.mem().status().requested_mib;
            let before = bench.mem().status().plugged_mib;
            bench.ask(kind, bench.at(block), blocks);
            let after = bench.mem().status().plugged_mib;
            prop_assert!(after <= requested.max(before));
            let ram = &bench.driver.ram;
            let really = (0..32).filter(|n| ram.contains(Gpa(bench.at(*n)), BLOCK)).count();
            prop_assert_eq!(really as u64 * 2, after);
        }
        prop_assert!(!bench.driver.needs_reset());
    }
}
