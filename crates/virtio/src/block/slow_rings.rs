//! Drives with rings, and a kernel that is as slow and as unordered as a test wants.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use ram::ring::Done;
use ram::{Further, Gpa, GuestRam};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::Bytes;

use super::flight::Flight;
use super::gate::Gate;
use super::rings::{Completions, Rings};
use super::tests::{
    DATA, DISCARD, FLUSH, GET_ID, HEADER, OK, READ, Rig, SECTORS, STATUS, WRITE, WRITE_ZEROES,
    limited_to, pattern, range, rig_with, wait_and_serve,
};
use super::{Access, Block, Cache, Worker};
use crate::fake_driver::{Buffer, FakeDriver, RAM};
use crate::rate_limiter::Limits;
use crate::{Error, EventSource};

/// What a test does to what the kernel has done.
#[derive(Debug, Default)]
pub(super) struct Rigged {
    pub(super) gate: Option<Arc<Gate>>,
    /// Of a sequence that shuffles; 0 for the kernel's own order.
    pub(super) seed: Mutex<u64>,
}

impl Rigged {
    /// Whether nothing is done yet, as it seems.
    pub(super) fn holds_back(&self) -> bool {
        self.gate.as_ref().is_some_and(|gate| !gate.is_open())
    }

    /// Waits until something may be done.
    pub(super) fn pass(&self) {
        if let Some(gate) = &self.gate {
            gate.pass();
        }
    }

    pub(super) fn reorder(&self, done: &mut [Done<Flight>]) {
        let mut seed = self.seed.lock().unwrap();
        if *seed == 0 {
            return;
        }
        for at in (1..done.len()).rev() {
            // Knuth's MMIX.
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005) | 1;
            done.swap(at, (*seed >> 33) as usize % (at + 1));
        }
    }
}

/// A drive with rings that leaves all to the kernel, a gate before what the kernel has done,
/// and the event loop.
struct Ringed {
    rig: Rig,
    gate: Arc<Gate>,
    completions: Completions,
    /// Names of requests that were made, by name of the driver's.
    asked: HashMap<u16, u64>,
}

fn ringed(access: Access) -> Ringed {
    ringed_with(access, Cache::Writeback, Limits::default())
}

fn ringed_with(access: Access, cache: Cache, limits: Limits) -> Ringed {
    let rig = rig_with(access, cache, limits);
    let gate = Arc::new(Gate::default());
    put_on_rings(&mut rig.disk.lock().unwrap(), &gate);
    let completions = Completions::of(&rig.disk).unwrap();
    Ringed {
        rig,
        gate,
        completions,
        asked: HashMap::new(),
    }
}

fn put_on_rings(block: &mut Block, gate: &Arc<Gate>) {
    let rings = Rings::new(&block.disk).expect("these tests need a host with io_uring");
    block.rings = Some(Box::new(rings));
    block.disk.put_behind(&Arc::default());
    rings_of(block).rig.gate = Some(gate.clone());
}

fn rings_of(block: &mut Block) -> &mut Rings {
    block.rings.as_mut().unwrap()
}

fn is_ready(source: &impl EventSource, seconds: i64) -> bool {
    let fd = source.fd();
    let timeout = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

impl Ringed {
    /// Makes request `nth` of a test available. Each has a header, a status and two pages of
    /// data of its own.
    fn add(&mut self, nth: u64, operation: u32, sector: u64, bytes: u32) {
        let driver = &mut self.rig.driver;
        let mut header = operation.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        driver.put(HEADER + 16 * nth, &header);
        driver.put(STATUS + 0x200 + nth, &[0xaa]);
        let at = DATA + 0x2000 * nth;
        let data = match operation {
            READ | GET_ID => Buffer::In(at, bytes),
            _ => Buffer::Out(at, bytes),
        };
        let mut buffers = vec![Buffer::Out(HEADER + 16 * nth, 16)];
        buffers.extend((bytes > 0).then_some(data));
        buffers.push(Buffer::In(STATUS + 0x200 + nth, 1));
        let head = driver.add(0, &buffers);
        self.asked.insert(head, nth);
    }

    fn ask(&mut self, nth: u64, operation: u32, sector: u64, bytes: u32) {
        self.add(nth, operation, sector, bytes);
        self.rig.driver.kick(0);
    }

    /// The next request that is given back: which, and what was written.
    fn answer(&mut self) -> (u64, u32) {
        let start = Instant::now();
        loop {
            if let Some((head, written)) = self.rig.driver.used(0) {
                return (self.asked[&head], written);
            }
            assert!(start.elapsed() < Duration::from_secs(10), "no answer");
            // In tests the gate keeps back what the kernel has rung for.
            is_ready(&self.completions, i64::from(self.gate.is_open()));
            self.completions.on_event();
        }
    }

    /// So many answers, by request.
    fn answers(&mut self, n: usize) -> Vec<(u64, u32)> {
        let mut answers: Vec<_> = (0..n).map(|_| self.answer()).collect();
        assert_eq!(self.rig.driver.used(0), None);
        answers.sort_unstable();
        answers
    }

    fn status(&self, nth: u64) -> u8 {
        self.rig.driver.get(STATUS + 0x200 + nth, 1)[0]
    }

    fn data(&self, nth: u64, len: usize) -> Vec<u8> {
        self.rig.driver.get(DATA + 0x2000 * nth, len)
    }

    fn put(&self, nth: u64, data: &[u8]) {
        self.rig.driver.put(DATA + 0x2000 * nth, data);
    }

    fn open(&mut self) {
        self.gate.open();
        self.completions.on_event();
    }

    fn counted(&self, name: &str) -> u64 {
        let metrics = self.rig.disk.lock().unwrap().metrics();
        let mut all = metrics.counters.all();
        all.find(|(one, _)| *one == name).unwrap().1
    }

    fn held(&self) -> usize {
        rings_of(&mut self.rig.disk.lock().unwrap()).held()
    }
}

fn expected(sector: u64, bytes: u64) -> Vec<u8> {
    (sector * 512..sector * 512 + bytes).map(pattern).collect()
}

#[test]
fn who_kicks_does_not_wait_for_the_kernel() {
    let mut ringed = ringed(Access::ReadWrite);
    for (nth, (operation, bytes)) in (0..).zip([(READ, 512), (WRITE, 512), (FLUSH, 0)]) {
        ringed.ask(nth, operation, 3, bytes);
    }
    ringed.completions.on_event();
    assert_eq!(ringed.rig.driver.used(0), None);
    assert!(!ringed.rig.driver.line_is_high());
    assert_eq!(u64::from_le_bytes(ringed.rig.driver.config(0)), SECTORS);
    ringed.open();
    assert_eq!(ringed.answers(3), [(0, 513), (1, 1), (2, 1)]);
    assert!(ringed.rig.driver.line_is_high());
    assert!((0..3).all(|nth| ringed.status(nth) == OK));
    for name in ["read_count", "write_count", "flush_count"] {
        assert_eq!(ringed.counted(name), 1, "{name}");
    }
    assert_eq!(ringed.counted("read_bytes"), 512);
    assert_eq!(ringed.counted("write_bytes"), 512);
}

#[test]
fn requests_end_in_any_order_and_each_once() {
    let mut ringed = ringed(Access::ReadOnly);
    let mut out_of_order = false;
    for seed in 1..100 {
        ringed.gate.close();
        *rings_of(&mut ringed.rig.disk.lock().unwrap())
            .rig
            .seed
            .lock()
            .unwrap() = seed;
        for nth in 0..16 {
            ringed.ask(nth, READ, nth * 4, 2048);
        }
        ringed.gate.open();
        let order: Vec<_> = (0..16).map(|_| ringed.answer()).collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..16).map(|nth| (nth, 2049)).collect::<Vec<_>>());
        for nth in 0..16 {
            assert!(ringed.data(nth, 2048) == expected(nth * 4, 2048), "{nth}");
        }
        out_of_order |= order != sorted;
    }
    assert!(out_of_order);
}

#[test]
fn a_flush_waits_for_the_writes_before_it_and_nothing_waits_for_a_flush() {
    for seed in 1..20 {
        let mut ringed = ringed(Access::ReadWrite);
        *rings_of(&mut ringed.rig.disk.lock().unwrap())
            .rig
            .seed
            .lock()
            .unwrap() = seed;
        for nth in 0..4 {
            ringed.put(nth, &[1; 4096]);
            ringed.ask(nth, WRITE, nth * 8, 4096);
        }
        ringed.ask(4, FLUSH, 0, 0);
        ringed.ask(5, WRITE, 40, 512);
        ringed.ask(6, READ, 48, 512);
        ringed.ask(7, FLUSH, 0, 0);
        assert_eq!((ringed.held(), ringed.counted("flush_count")), (2, 0));
        ringed.gate.open();
        let order: Vec<_> = (0..8).map(|_| ringed.answer().0).collect();
        let place = |nth: u64| order.iter().position(|one| *one == nth).unwrap();
        assert!((0..4).all(|write| place(write) < place(4)), "{order:?}");
        assert!((0..6).all(|write| write == 4 || place(write) < place(7)));
        assert!((0..8).all(|nth| ringed.status(nth) == OK));
        assert_eq!((ringed.held(), ringed.counted("flush_count")), (0, 2));
    }
}

#[test]
fn a_flush_alone_and_reads_before_one_are_not_waited_for() {
    let mut ringed = ringed(Access::ReadWrite);
    ringed.ask(0, READ, 0, 512);
    ringed.ask(1, FLUSH, 0, 0);
    assert_eq!(ringed.held(), 0);
    ringed.open();
    assert_eq!(ringed.answers(2), [(0, 513), (1, 1)]);
}

#[test]
fn what_has_no_room_stays_in_the_queue_until_something_is_done() {
    let mut ringed = ringed(Access::ReadWrite);
    rings_of(&mut ringed.rig.disk.lock().unwrap()).most = 4;
    for nth in 0..10 {
        ringed.ask(nth, READ, nth, 512);
    }
    // Each kick from the fifth on.
    assert_eq!(ringed.counted("io_engine_throttled_events"), 6);
    assert_eq!(ringed.counted("handed_over_count"), 4);
    ringed.open();
    let wanted: Vec<_> = (0..10).map(|nth| (nth, 513)).collect();
    assert_eq!(ringed.answers(10), wanted);
    assert!((0..10).all(|nth| ringed.data(nth, 512) == expected(nth, 512)));
    // A kick is wanted again.
    ringed.ask(10, READ, 10, 512);
    assert_eq!(ringed.answer(), (10, 513));
}

#[test]
fn a_reset_waits_for_the_kernel_and_forgets_the_rest() {
    let mut ringed = ringed(Access::ReadWrite);
    ringed.ask(0, READ, 3, 512);
    ringed.ask(1, WRITE, 4, 512);
    ringed.ask(2, FLUSH, 0, 0);
    let gate = ringed.gate.clone();
    let opened = std::thread::spawn(move || {
        gate.wait_for_somebody();
        let before = Instant::now();
        gate.open();
        before
    });
    ringed.rig.driver.write(0x70, 0);
    assert!(Instant::now() >= opened.join().unwrap());
    // The memory is the guest's again: nothing of the driver before reaches it.
    ringed.rig.driver.put(DATA, &[0x55; 0x2000]);
    ringed.completions.on_event();
    ringed.rig.driver.set_up(u64::MAX);
    assert_eq!(ringed.rig.driver.used(0), None);
    assert!(!ringed.rig.driver.line_is_high());
    ringed.ask(2, READ, 5, 512);
    assert_eq!(ringed.answer(), (2, 513));
    assert!(ringed.rig.driver.get(DATA, 0x2000) == [0x55; 0x2000]);
    assert_eq!(ringed.status(1), 0xaa);
}

#[test]
fn what_is_in_flight_goes_to_the_file_before_and_the_next_to_the_new_one() {
    let mut ringed = ringed(Access::ReadWrite);
    let other = tempfile::NamedTempFile::new().unwrap();
    other.as_file().set_len(SECTORS * 512).unwrap();
    ringed.put(0, &[1; 512]);
    ringed.put(2, &[2; 512]);
    ringed.ask(0, WRITE, 7, 512);
    ringed.ask(1, FLUSH, 0, 0);
    let in_hand = {
        let mut disk = ringed.rig.disk.lock().unwrap();
        assert!(disk.in_hand().is_none());
        disk.update_path(other.path()).unwrap();
        disk.disk.put_behind(&Arc::default());
        disk.in_hand().expect("a write is in flight")
    };
    ringed.ask(2, WRITE, 7, 512);
    ringed.ask(3, FLUSH, 0, 0);
    assert_eq!(ringed.held(), 2);
    let waiting = std::thread::spawn(move || in_hand.wait());
    assert!(!waiting.is_finished());
    ringed.open();
    assert_eq!(ringed.answers(4), [(0, 1), (1, 1), (2, 1), (3, 1)]);
    waiting.join().unwrap();
    assert!((0..4).all(|nth| ringed.status(nth) == OK));
    assert_eq!(ringed.rig.on_disk(7 * 512, 512), [1; 512]);
    let written = std::fs::read(other.path()).unwrap();
    assert_eq!(written[7 * 512..8 * 512], [2; 512]);
    let mut disk = ringed.rig.disk.lock().unwrap();
    assert!(disk.in_hand().is_none());
    assert_eq!(rings_of(&mut disk).open_files(), 1);
}

#[test]
fn a_file_that_nobody_uses_is_closed_when_it_is_replaced_and_there_is_an_end_to_the_others() {
    let mut ringed = ringed(Access::ReadWrite);
    let path = ringed.rig.file.path().to_owned();
    let update = |ringed: &Ringed| ringed.rig.disk.lock().unwrap().update_path(&path);
    for _ in 0..40 {
        update(&ringed).unwrap();
    }
    let open = |ringed: &Ringed| rings_of(&mut ringed.rig.disk.lock().unwrap()).open_files();
    assert_eq!(open(&ringed), 1);
    for nth in 0..15 {
        ringed
            .rig
            .disk
            .lock()
            .unwrap()
            .disk
            .put_behind(&Arc::default());
        ringed.ask(nth, READ, nth, 512);
        update(&ringed).unwrap();
    }
    assert_eq!(open(&ringed), 16);
    ringed
        .rig
        .disk
        .lock()
        .unwrap()
        .disk
        .put_behind(&Arc::default());
    ringed.ask(15, READ, 15, 512);
    let refused = update(&ringed).unwrap_err();
    assert!(matches!(refused, Error::FilesInUse { files: 16, .. }));
    ringed.open();
    ringed.answers(16);
    update(&ringed).unwrap();
    assert_eq!(open(&ringed), 1);
}

#[test]
fn a_reset_lets_those_go_who_wait_for_a_replaced_file() {
    let mut ringed = ringed(Access::ReadWrite);
    ringed.ask(0, WRITE, 7, 512);
    let in_hand = {
        let mut disk = ringed.rig.disk.lock().unwrap();
        let path = disk.path().to_owned();
        disk.update_path(&path).unwrap();
        disk.in_hand().unwrap()
    };
    let waiting = std::thread::spawn(move || in_hand.wait());
    ringed.gate.open();
    ringed.rig.driver.write(0x70, 0);
    assert!(is_ready(&ringed.completions, 0));
    ringed.completions.on_event();
    waiting.join().unwrap();
}

#[test]
fn who_takes_a_snapshot_ends_what_is_done_and_begins_nothing() {
    let mut ringed = ringed(Access::ReadWrite);
    rings_of(&mut ringed.rig.disk.lock().unwrap()).most = 2;
    for nth in 0..5 {
        ringed.ask(nth, READ, nth, 512);
    }
    ringed.gate.open();
    // Once the kernel has done both, nobody is rung for but by the snapshot.
    is_ready(&ringed.completions, 5);
    std::thread::sleep(Duration::from_millis(20));
    ringed.rig.driver.save().unwrap();
    let disk = ringed.rig.disk.clone();
    assert_eq!(disk.lock().unwrap().rings.as_ref().unwrap().begun(), 2);
    assert_eq!(ringed.answers(5).len(), 5);
}

#[test]
fn a_snapshot_taken_meanwhile_has_all_that_is_not_over_to_do() {
    for with_rings in [true, false] {
        let mut ringed = ringed(Access::ReadWrite);
        // Some are over, so that the others are not what was taken last.
        ringed.gate.open();
        for nth in 0..3 {
            ringed.ask(nth, READ, nth, 512);
            ringed.answer();
        }
        ringed.gate.close();
        ringed.put(3, &[9; 512]);
        ringed.ask(3, WRITE, 5, 512);
        ringed.ask(4, FLUSH, 0, 0);
        ringed.ask(5, READ, 64, 1024);
        // And one that was not taken.
        ringed.add(6, READ, 66, 512);
        let saved = ringed.rig.driver.save().unwrap();
        let path = ringed.rig.file.path();
        let mut disk =
            Block::open(path, Access::ReadWrite, Cache::Writeback, Limits::default()).unwrap();
        let gate = Arc::new(Gate::default());
        gate.open();
        if with_rings {
            put_on_rings(&mut disk, &gate);
        }
        let disk = Arc::new(Mutex::new(disk));
        // The one before never gets further: its machine is no more.
        let before = std::mem::replace(&mut ringed.rig.disk, disk.clone());
        ringed.rig.driver.restore(&saved, disk.clone()).unwrap();
        if let Some(completions) = Completions::of(&disk) {
            ringed.completions = completions;
        }
        assert_eq!(ringed.answers(4), [(3, 1), (4, 1), (5, 1025), (6, 513)]);
        assert!((3..7).all(|nth| ringed.status(nth) == OK));
        assert_eq!(ringed.rig.on_disk(5 * 512, 512), [9; 512]);
        assert!(ringed.data(5, 1024) == expected(64, 1024));
        ringed.ask(7, READ, 67, 512);
        assert_eq!(ringed.answer(), (7, 513));
        ringed.gate.open();
        drop(before);
    }
}

#[test]
fn what_is_over_before_a_snapshot_is_taken_is_told_in_it() {
    let mut ringed = ringed(Access::ReadWrite);
    ringed.ask(0, READ, 3, 512);
    ringed.gate.open();
    // Whether the kernel is done or not, nothing is lost.
    let saved = ringed.rig.driver.save().unwrap();
    let path = ringed.rig.file.path();
    let disk = Block::open(path, Access::ReadWrite, Cache::Writeback, Limits::default());
    let disk = Arc::new(Mutex::new(disk.unwrap()));
    let _before = std::mem::replace(&mut ringed.rig.disk, disk.clone());
    ringed.rig.driver.restore(&saved, disk).unwrap();
    assert_eq!(ringed.answer(), (0, 513));
    assert!(ringed.rig.driver.line_is_high());
}

#[test]
fn names_that_cannot_be_are_refused_in_a_snapshot() {
    let mut ringed = ringed(Access::ReadOnly);
    ringed.ask(0, READ, 3, 512);
    let saved = ringed.rig.driver.save().unwrap();
    let restore = |ringed: &mut Ringed, begun: Vec<u16>| {
        let mut saved = saved.clone();
        let crate::SavedDevice::Block(block) = &mut saved.device else {
            panic!("a block device");
        };
        block.live.as_mut().unwrap().begun = begun;
        let path = ringed.rig.file.path();
        let disk = Block::open(path, Access::ReadOnly, Cache::Writeback, Limits::default());
        let disk = Arc::new(Mutex::new(disk.unwrap()));
        ringed.rig.driver.restore(&saved, disk)
    };
    for begun in [vec![64], vec![u16::MAX]] {
        let refused = restore(&mut ringed, begun).unwrap_err();
        assert!(matches!(refused, Error::Saved { device: "block" }));
    }
    // No driver that keeps the rules has so many out.
    restore(&mut ringed, vec![0; 65]).unwrap();
    assert!(ringed.rig.driver.needs_reset());
    restore(&mut ringed, vec![0]).unwrap();
    assert!(!ringed.rig.driver.needs_reset());
    ringed.gate.open();
}

#[test]
fn what_a_thread_that_ends_has_submitted_is_done_all_the_same() {
    let mut ringed = ringed(Access::ReadWrite);
    ringed.gate.open();
    for round in 0..20_u8 {
        for nth in 0..8 {
            ringed.put(nth, &[round; 4096]);
            ringed.add(nth, WRITE, nth * 8, 4096);
        }
        ringed.add(8, FLUSH, 0, 0);
        let driver = &mut ringed.rig.driver;
        std::thread::scope(|scope| {
            scope.spawn(|| driver.kick(0));
        });
        ringed.answers(9);
        assert!((0..9).all(|nth| ringed.status(nth) == OK));
        assert!(ringed.rig.on_disk(0, 64 * 512) == vec![round; 64 * 512]);
    }
}

#[test]
fn the_limiter_counts_each_request_once() {
    let limits = Limits {
        bandwidth: None,
        ops: Some(limited_to(2, 300)),
    };
    let mut ringed = ringed_with(Access::ReadOnly, Cache::Writeback, limits);
    ringed.gate.open();
    for nth in 0..3 {
        ringed.ask(nth, READ, nth, 512);
    }
    assert_eq!(ringed.answers(2), [(0, 513), (1, 513)]);
    assert_eq!(ringed.counted("rate_limiter_throttled_events"), 1);
    wait_and_serve(&ringed.rig);
    assert_eq!(ringed.answer(), (2, 513));
}

#[test]
fn a_file_that_became_shorter_is_an_io_error_of_the_kernel_s_too() {
    let mut ringed = ringed(Access::ReadWrite);
    ringed.gate.open();
    ringed.rig.file.as_file().set_len(600).unwrap();
    ringed.ask(0, READ, 0, 1024);
    ringed.answer();
    assert_eq!((ringed.status(0), ringed.counted("execute_fails")), (1, 1));
    ringed.ask(1, READ, 0, 512);
    assert_eq!((ringed.answer(), ringed.status(1)), ((1, 513), OK));
}

#[test]
fn a_ring_that_breaks_with_requests_in_flight_is_a_request_for_a_reset() {
    let mut ringed = ringed(Access::ReadOnly);
    ringed.ask(0, READ, 0, 512);
    // A descriptor that cannot be.
    ringed.rig.driver.publish(0, 0x7fff);
    ringed.rig.driver.kick(0);
    assert!(ringed.rig.driver.needs_reset());
    // Neither does a snapshot try again what is in flight.
    ringed.rig.driver.save().unwrap();
    ringed.open();
    assert_eq!(ringed.rig.driver.used(0), None);
    ringed.rig.driver.set_up(u64::MAX);
    ringed.ask(1, READ, 0, 512);
    assert_eq!(ringed.answer(), (1, 513));
}

#[test]
fn a_drive_that_goes_waits_for_the_kernel() {
    let mut ringed = ringed(Access::ReadWrite);
    for nth in 0..8 {
        ringed.put(nth, &[nth as u8 + 1; 4096]);
        ringed.ask(nth, WRITE, nth * 8, 4096);
    }
    let file = ringed.rig.file.reopen().unwrap();
    drop(ringed);
    let mut bytes = [0; 8];
    for nth in 0..8 {
        let at = u64::from(nth) * 4096;
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, at).unwrap();
        assert_eq!(bytes, [nth + 1; 8]);
    }
}

#[test]
fn what_is_in_memory_is_answered_at_once_beside_rings() {
    let rig = rig_with(Access::ReadOnly, Cache::Unsafe, Limits::default());
    {
        let mut disk = rig.disk.lock().unwrap();
        let rings = Rings::new(&disk.disk).unwrap();
        disk.rings = Some(Box::new(rings));
    }
    let mut rig = rig;
    let id = [Buffer::In(DATA, 20)];
    assert_eq!(rig.request(GET_ID, 0, &id), (OK, 21));
    let metrics = rig.disk.lock().unwrap().metrics();
    let handed = metrics.counters.all().last();
    assert_eq!(handed, Some(("handed_over_count", 0)));
}

#[test]
fn a_write_that_may_wait_is_never_a_vcpu_s_with_rings_and_a_quick_one_is_without() {
    for (with_rings, handed_over) in [(true, 1), (false, 0)] {
        let mut rig = rig_with(Access::ReadWrite, Cache::Unsafe, Limits::default());
        let mut disk = rig.disk.lock().unwrap();
        Arc::get_mut(&mut disk.disk)
            .unwrap()
            .know_no_writes_at_once();
        let metrics = disk.metrics();
        if with_rings {
            disk.rings = Some(Box::new(Rings::new(&disk.disk).unwrap()));
        }
        drop(disk);
        let _worker = (!with_rings).then(|| Worker::of(&rig.disk).unwrap());
        let data = [
            Buffer::Out(HEADER, 16),
            Buffer::Out(DATA, 512),
            Buffer::In(STATUS, 1),
        ];
        rig.driver
            .put(HEADER, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        rig.driver.add(0, &data);
        rig.driver.kick(0);
        let counted = metrics.counters.all().last();
        assert_eq!(counted, Some(("handed_over_count", handed_over)));
    }
}

#[test]
fn memory_that_goes_with_requests_in_flight_keeps_nobody_from_their_end() {
    let mut ringed = ringed(Access::ReadOnly);
    let block = 2 << 20;
    let ram = GuestRam::with(RAM, vec![Further::Pluggable { len: block, block }]).unwrap();
    let at = ram.regions().last().unwrap().start;
    ram.plug(at, block).unwrap();
    ringed.rig.driver = FakeDriver::start_in(ram.clone(), ringed.rig.disk.clone());
    ringed.rig.driver.put(HEADER, &[0; 16]);
    let header = Buffer::Out(HEADER, 16);
    for (data, status) in [(at.0, STATUS), (DATA, at.0 + 4096)] {
        ringed.rig.driver.put(status, &[0xaa]);
        let buffers = [header, Buffer::In(data, 512), Buffer::In(status, 1)];
        ringed.rig.driver.add(0, &buffers);
    }
    ringed.rig.driver.kick(0);
    ram.unplug(at, block).unwrap();
    ringed.gate.open();
    let mut ended = 0;
    let start = Instant::now();
    while ended < 2 {
        ringed.completions.on_event();
        ended += usize::from(ringed.rig.driver.used(0).is_some());
        assert!(start.elapsed() < Duration::from_secs(10), "no answer");
    }
    assert!([OK, 1].contains(&ringed.rig.driver.get(STATUS, 1)[0]));
    assert!(ringed.rig.driver.get(DATA, 512) == expected(0, 512));
    // The status of the other one was not written.
    let mut status = [0xaa];
    ram.memory()
        .read_slice(&mut status, Gpa(at.0 + 4096))
        .unwrap();
    assert_eq!(status, [0]);
}

/// A request of the comparison: on sectors of its own, as drivers do not touch what they
/// have asked for.
#[derive(Clone, Debug)]
struct Asked {
    kind: u32,
    sector: u64,
    sectors: u32,
    byte: u8,
}

fn asked() -> impl Strategy<Value = Asked> {
    let kinds = [READ, WRITE, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99];
    (0..kinds.len(), 0..8_u64, 0..9_u32, any::<u8>()).prop_map(move |(kind, sector, n, byte)| {
        Asked {
            kind: kinds[kind],
            sector,
            sectors: n,
            byte,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is asked, in whatever order the kernel does it: the answers, what was read
    /// and the file are those of a drive that does one request after the other.
    #[test]
    fn rings_do_what_a_drive_without_them_does(
        batches in proptest::collection::vec(proptest::collection::vec(asked(), 1..12), 1..4),
        seed in any::<u64>(),
        read_only in any::<bool>(),
        writeback in any::<bool>(),
        knows_flush in any::<bool>(),
        most in 1..20_usize,
    ) {
        let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        let cache = if writeback { Cache::Writeback } else { Cache::Unsafe };
        let mut one = ringed_with(access, cache, Limits::default());
        one.rig.disk.lock().unwrap().rings = None;
        *one.rig.disk.lock().unwrap().disk.gate.lock().unwrap() = None;
        let mut two = ringed_with(access, cache, Limits::default());
        two.gate.open();
        {
            let mut disk = two.rig.disk.lock().unwrap();
            let rings = rings_of(&mut disk);
            rings.most = most;
            *rings.rig.seed.lock().unwrap() = seed;
            // The identifier is the file's.
            let id = one.rig.disk.lock().unwrap().disk.id;
            Arc::get_mut(&mut disk.disk).unwrap().id = id;
        }
        if !knows_flush {
            one.rig.driver.set_up(!(1 << 9));
            two.rig.driver.set_up(!(1 << 9));
        }
        for batch in batches {
            for ringed in [&mut one, &mut two] {
                for (nth, asked) in (0..).zip(&batch) {
                    // Up to the end of the disk and, with the last ones, beyond it.
                    let sector = nth * 16 + asked.sector;
                    let bytes = match asked.kind {
                        READ | WRITE => asked.sectors * 512,
                        GET_ID => 20 - asked.sectors % 2,
                        DISCARD | WRITE_ZEROES => 32,
                        _ => 0,
                    };
                    ringed.put(nth, &[asked.byte; 8192]);
                    if bytes == 32 {
                        let half = u64::from(asked.sectors / 2);
                        let flags = u32::from(asked.byte % 7 == 0);
                        let mut ranges = range(sector, asked.sectors / 2, flags);
                        ranges.extend(range(sector + half, asked.sectors.div_ceil(2), flags));
                        ringed.put(nth, &ranges);
                    }
                    ringed.add(nth, asked.kind, sector, bytes);
                }
                ringed.rig.driver.kick(0);
            }
            prop_assert_eq!(one.answers(batch.len()), two.answers(batch.len()));
            for nth in 0..batch.len() as u64 {
                prop_assert_eq!(one.status(nth), two.status(nth), "request {}", nth);
                prop_assert!(one.data(nth, 8192) == two.data(nth, 8192), "data of {}", nth);
            }
            let all = SECTORS as usize * 512;
            prop_assert!(one.rig.on_disk(0, all) == two.rig.on_disk(0, all));
        }
        for name in ["read_count", "write_count", "flush_count", "invalid_reqs_count",
            "execute_fails", "read_bytes", "write_bytes"]
        {
            prop_assert_eq!(one.counted(name), two.counted(name), "{}", name);
        }
    }
}
