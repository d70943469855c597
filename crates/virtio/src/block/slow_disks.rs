//! Drives that take their time: who waits for them, and who does not.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::gate::Gate;
use super::tests::{
    DATA, DISCARD, FLUSH, HEADER, OK, READ, Rig, SECTORS, STATUS, WRITE, limited_to, pattern,
    range, rig, rig_with, wait_and_serve,
};
use super::{Access, Block, Cache, Worker};
use crate::EventSource;
use crate::fake_driver::Buffer;
use crate::rate_limiter::Limits;

/// A drive with a worker, behind a gate, and the event loop that serves the worker.
struct Slow {
    rig: Rig,
    gate: Arc<Gate>,
    worker: Worker,
}

fn slow(access: Access) -> Slow {
    slow_with(access, Limits::default())
}

fn slow_with(access: Access, limits: Limits) -> Slow {
    let rig = rig_with(access, Cache::Writeback, limits);
    let gate = Arc::new(Gate::default());
    rig.disk.lock().unwrap().disk.put_behind(&gate);
    let worker = Worker::of(&rig.disk).unwrap();
    Slow { rig, gate, worker }
}

fn is_readable(source: &impl EventSource) -> bool {
    let fd = source.fd();
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&now)).unwrap() == 1
}

impl Slow {
    /// Makes request `nth` of a test available and kicks. Each has a header, a status and
    /// a page of data of its own.
    fn ask(&mut self, nth: u64, operation: u32, sector: u64, bytes: u32) {
        let driver = &mut self.rig.driver;
        let mut header = operation.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        driver.put(HEADER + 16 * nth, &header);
        driver.put(STATUS + nth, &[0xaa]);
        let at = DATA + 0x1000 * nth;
        let data = match operation {
            READ => Buffer::In(at, bytes),
            _ => Buffer::Out(at, bytes),
        };
        let mut buffers = vec![Buffer::Out(HEADER + 16 * nth, 16)];
        buffers.extend((bytes > 0).then_some(data));
        buffers.push(Buffer::In(STATUS + nth, 1));
        driver.add(0, &buffers);
        driver.kick(0);
        if is_readable(&self.worker) {
            self.worker.on_event();
        }
    }

    /// Waits until the next request is given back: what was written.
    fn answer(&mut self) -> u32 {
        let start = Instant::now();
        loop {
            if let Some((_, written)) = self.rig.driver.used(0) {
                return written;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "no answer");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn status(&self, nth: u64) -> u8 {
        self.rig.driver.get(STATUS + nth, 1)[0]
    }

    fn counted(&self, name: &str) -> u64 {
        let metrics = self.rig.disk.lock().unwrap().metrics();
        metrics
            .counters
            .all()
            .find(|(one, _)| *one == name)
            .unwrap()
            .1
    }
}

#[test]
fn who_kicks_does_not_wait_for_the_disk() {
    let mut slow = slow(Access::ReadWrite);
    for (nth, (operation, bytes)) in (0..).zip([(READ, 512), (WRITE, 512), (FLUSH, 0)]) {
        slow.ask(nth, operation, 3, bytes);
    }
    slow.gate.wait_for_somebody();
    assert_eq!(slow.rig.driver.used(0), None);
    assert!(!slow.rig.driver.line_is_high());
    // Nor does who reads registers or configuration meanwhile.
    assert_eq!(u64::from_le_bytes(slow.rig.driver.config(0)), SECTORS);
    slow.gate.open();
    assert_eq!([slow.answer(), slow.answer(), slow.answer()], [513, 1, 1]);
    assert!(slow.rig.driver.line_is_high());
    for nth in 0..3 {
        assert_eq!(slow.status(nth), OK);
    }
    let expected: Vec<u8> = (3 * 512..4 * 512).map(pattern).collect();
    assert_eq!(slow.rig.driver.get(DATA, 512), expected);
    assert_eq!(slow.counted("flush_count"), 1);
    assert_eq!(slow.counted("handed_over_count"), 1);
}

#[test]
fn what_is_in_memory_is_answered_at_once_beside_a_worker() {
    let mut rig = rig(Access::ReadWrite);
    let worker = Worker::of(&rig.disk).unwrap();
    let id = [Buffer::In(DATA, 20)];
    assert_eq!(rig.request(super::tests::GET_ID, 0, &id), (OK, 21));
    // Just written, so that the host need not ask its disk. Not every file system of the
    // host's can tell.
    let data = [Buffer::In(DATA, 1024)];
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        assert_eq!(rig.request(READ, 3, &data), (OK, 1025));
    }))
    .is_err()
    {
        assert!(is_readable(&worker), "neither answered nor handed over");
    }
}

#[test]
fn requests_are_done_in_order_and_a_flush_after_what_came_before() {
    let mut slow = slow(Access::ReadWrite);
    slow.rig.driver.put(DATA, &[1; 512]);
    slow.rig.driver.put(DATA + 0x1000, &[2; 512]);
    slow.ask(0, WRITE, 7, 512);
    slow.gate.wait_for_somebody();
    slow.ask(1, WRITE, 7, 512);
    slow.ask(2, FLUSH, 0, 0);
    slow.ask(3, READ, 7, 512);
    assert_eq!(slow.counted("flush_count"), 0);
    slow.gate.open();
    for _ in 0..4 {
        slow.answer();
    }
    assert_eq!(slow.rig.on_disk(7 * 512, 512), [2; 512]);
    assert_eq!(slow.rig.driver.get(DATA + 0x3000, 512), [2; 512]);
}

#[test]
fn while_it_is_held_nothing_reaches_the_driver_and_nothing_is_taken() {
    let mut slow = slow(Access::ReadWrite);
    slow.ask(0, READ, 3, 512);
    slow.ask(1, READ, 4, 512);
    slow.gate.wait_for_somebody();
    let in_hand = {
        let disk = slow.rig.disk.lock().unwrap();
        disk.hold(true);
        disk.in_hand().unwrap()
    };
    slow.gate.open();
    // The disk is done; who changes the drive's file waits for that only.
    in_hand.wait();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(slow.rig.driver.used(0), None);
    slow.rig.disk.lock().unwrap().hold(false);
    assert_eq!([slow.answer(), slow.answer()], [513, 513]);
    assert_eq!([slow.status(0), slow.status(1)], [OK, OK]);
}

#[test]
fn a_reset_waits_for_what_is_in_hand_and_forgets_the_rest() {
    let mut slow = slow(Access::ReadWrite);
    slow.ask(0, READ, 3, 512);
    slow.ask(1, READ, 4, 512);
    slow.gate.wait_for_somebody();
    let gate = slow.gate.clone();
    let opened = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        let before = Instant::now();
        gate.open();
        before
    });
    slow.rig.driver.write(0x70, 0);
    assert!(Instant::now() >= opened.join().unwrap());
    // The memory is the guest's again: nothing of the driver before reaches it.
    slow.rig.driver.put(DATA, &[0x55; 0x2000]);
    slow.rig.driver.set_up(u64::MAX);
    assert_eq!(slow.rig.driver.used(0), None);
    assert!(!slow.rig.driver.line_is_high());
    slow.ask(2, READ, 5, 512);
    assert_eq!(slow.answer(), 513);
    assert_eq!(slow.rig.driver.get(DATA, 0x2000), [0x55; 0x2000]);
}

#[test]
fn a_snapshot_taken_meanwhile_has_the_request_to_do() {
    for in_hand in [false, true] {
        let mut slow = slow(Access::ReadWrite);
        slow.rig.driver.put(DATA, &[9; 512]);
        if in_hand {
            slow.ask(0, WRITE, 5, 512);
            slow.gate.wait_for_somebody();
            slow.ask(1, READ, 5, 512);
        } else {
            // Nobody serves the worker yet.
            slow.rig.driver.put(HEADER + 16, &[0; 16]);
            let buffers = [Buffer::Out(HEADER + 16, 16), Buffer::In(STATUS + 1, 1)];
            slow.rig.driver.add(0, &buffers);
            slow.rig.driver.kick(0);
        }
        let saved = slow.rig.driver.save().unwrap();
        let path = slow.rig.file.path();
        let disk = Block::open(path, Access::ReadWrite, Cache::Writeback, Limits::default());
        let disk = Arc::new(Mutex::new(disk.unwrap()));
        // The one before never gets further: its machine is no more.
        slow.rig.driver.restore(&saved, disk.clone()).unwrap();
        if in_hand {
            assert_eq!(slow.answer(), 1);
            assert_eq!(slow.answer(), 513);
            assert_eq!(slow.rig.on_disk(5 * 512, 512), [9; 512]);
            assert_eq!(slow.rig.driver.get(DATA + 0x1000, 512), [9; 512]);
        } else {
            assert_eq!(slow.answer(), 1);
        }
        slow.gate.open();
    }
}

#[test]
fn a_request_in_hand_goes_to_the_file_before_and_the_next_to_the_new_one() {
    let mut slow = slow(Access::ReadWrite);
    let other = tempfile::NamedTempFile::new().unwrap();
    other.as_file().set_len(SECTORS * 512).unwrap();
    slow.rig.driver.put(DATA, &[1; 512]);
    slow.rig.driver.put(DATA + 0x1000, &[2; 512]);
    slow.ask(0, WRITE, 7, 512);
    slow.gate.wait_for_somebody();
    slow.ask(1, WRITE, 7, 512);
    let in_hand = {
        let mut disk = slow.rig.disk.lock().unwrap();
        disk.update_path(other.path()).unwrap();
        disk.in_hand().expect("a write waits in front of the gate")
    };
    slow.gate.open();
    in_hand.wait();
    assert_eq!(slow.rig.on_disk(7 * 512, 512), [1; 512]);
    assert_eq!([slow.answer(), slow.answer()], [1, 1]);
    let written = std::fs::read(other.path()).unwrap();
    assert_eq!(written[7 * 512..8 * 512], [2; 512]);
    assert_eq!(slow.rig.on_disk(7 * 512, 512), [1; 512]);
    assert!(slow.rig.disk.lock().unwrap().in_hand().is_none());
}

#[test]
fn the_limiter_counts_a_request_that_was_handed_over_once() {
    let limits = Limits {
        bandwidth: None,
        ops: Some(limited_to(2, 300)),
    };
    let mut slow = slow_with(Access::ReadOnly, limits);
    slow.gate.open();
    let start = Instant::now();
    for nth in 0..3 {
        slow.ask(nth, READ, nth, 512);
    }
    assert_eq!([slow.answer(), slow.answer()], [513, 513]);
    assert!(start.elapsed() < Duration::from_millis(140), "two may pass");
    wait_and_serve(&slow.rig);
    assert_eq!(slow.answer(), 513);
    assert!(start.elapsed() >= Duration::from_millis(140));
    assert_eq!(slow.counted("rate_limiter_throttled_events"), 1);
}

#[test]
fn a_file_that_became_shorter_is_an_io_error_of_the_worker_too() {
    let mut slow = slow(Access::ReadWrite);
    slow.gate.open();
    slow.rig.file.as_file().set_len(600).unwrap();
    slow.ask(0, READ, 0, 1024);
    slow.answer();
    assert_eq!((slow.status(0), slow.counted("execute_fails")), (1, 1));
    slow.ask(1, READ, 0, 512);
    assert_eq!((slow.answer(), slow.status(1)), (513, OK));
}

#[test]
fn a_ring_that_breaks_behind_the_worker_is_a_request_for_a_reset() {
    let mut slow = slow(Access::ReadOnly);
    slow.ask(0, READ, 0, 512);
    slow.gate.wait_for_somebody();
    // A descriptor that cannot be.
    slow.rig.driver.publish(0, 0x7fff);
    slow.gate.open();
    slow.answer();
    let start = Instant::now();
    while !slow.rig.driver.needs_reset() {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(1));
    }
    slow.rig.driver.set_up(u64::MAX);
    slow.ask(1, READ, 0, 512);
    assert_eq!(slow.answer(), 513);
}

#[test]
fn a_worker_that_goes_finishes_what_is_in_hand() {
    let mut slow = slow(Access::ReadWrite);
    slow.ask(0, READ, 0, 512);
    slow.gate.wait_for_somebody();
    slow.gate.open();
    drop(slow.worker);
    assert!(slow.rig.driver.used(0).is_some());
    // And who kicks waits, as there is nobody else to.
    let data = [Buffer::In(DATA, 512)];
    assert_eq!(slow.rig.request(READ, 1, &data), (OK, 513));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever is asked and whenever the disk moves, each request is answered once and in
    /// order, and the disk is as if it had been fast.
    #[test]
    fn a_slow_disk_does_what_a_fast_one_does(
        requests in proptest::collection::vec((0..4_u32, 0..16_u64, any::<u8>(), any::<bool>()), 1..16),
    ) {
        let mut slow = slow(Access::ReadWrite);
        slow.gate.open();
        let mut model: Vec<u8> = (0..16 * 512).map(pattern).collect();
        let mut expected = Vec::new();
        for (nth, &(kind, sector, byte, close)) in (0..).zip(&requests) {
            if close {
                slow.gate.close();
            } else {
                slow.gate.open();
            }
            let at = sector as usize * 512;
            let here = DATA + 0x1000 * nth;
            match kind {
                0 => {
                    expected.push(Some(model[at..at + 512].to_vec()));
                    slow.ask(nth, READ, sector, 512);
                    continue;
                }
                1 => {
                    slow.rig.driver.put(here, &[byte; 512]);
                    model[at..at + 512].fill(byte);
                    slow.ask(nth, WRITE, sector, 512);
                }
                2 => slow.ask(nth, FLUSH, 0, 0),
                _ => {
                    slow.rig.driver.put(here, &range(sector, 1, 0));
                    model[at..at + 512].fill(0);
                    slow.ask(nth, DISCARD, 0, 16);
                }
            }
            expected.push(None);
        }
        slow.gate.open();
        for nth in 0..requests.len() as u64 {
            slow.answer();
            prop_assert_eq!(slow.status(nth), OK);
        }
        prop_assert_eq!(slow.rig.driver.used(0), None);
        for (nth, expected) in (0..).zip(expected) {
            if let Some(expected) = expected {
                prop_assert_eq!(slow.rig.driver.get(DATA + 0x1000 * nth, 512), expected);
            }
        }
        prop_assert_eq!(slow.rig.on_disk(0, 16 * 512), model);
    }
}
