//! Devices that go on from what a snapshot kept, whatever their driver was doing.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use ram::GuestRam;

use super::SavedTransport;
use super::tests::{make, moves};
use crate::balloon::{Balloon, Settings};
use crate::block::{Access, Block, Cache};
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver, RAM};
use crate::rate_limiter::Limits;
use crate::rng::Rng;
use crate::vsock::Vsock;
use crate::{SavedDevice, VirtioDevice};

fn rng() -> Arc<Mutex<dyn VirtioDevice>> {
    Arc::new(Mutex::new(Rng::new(Limits::default()).unwrap()))
}

#[test]
fn requests_go_on_across_each_step_of_a_driver() {
    let mut driver = FakeDriver::find(rng());
    for status in [0, 1, 3] {
        driver.write(0x70, status);
        driver.move_to(rng());
        assert_eq!(driver.read(0x70), status);
    }
    driver.accept(u64::MAX);
    driver.move_to(rng());
    driver.write(0x70, 11);
    driver.move_to(rng());
    assert_eq!(driver.read(0x70), 11);
    driver.set_up_queues();
    driver.move_to(rng());
    driver.write(0x70, 15);
    driver.move_to(rng());
    for _ in 0..200 {
        assert_eq!(driver.request(0, &[Buffer::In(BUFFERS, 8)]), 8);
        driver.move_to(rng());
    }
}

#[test]
fn a_pending_interrupt_is_pending_and_its_line_high() {
    let mut driver = FakeDriver::start(rng());
    driver.request(0, &[Buffer::In(BUFFERS, 8)]);
    assert!(driver.line_is_high());
    driver.move_to(rng());
    assert!(driver.line_is_high());
    assert_eq!(driver.handle_interrupt(), 1);
    assert!(!driver.line_is_high());
    driver.move_to(rng());
    assert!(!driver.line_is_high());
}

#[test]
fn a_request_whose_kick_was_lost_is_served() {
    let mut driver = FakeDriver::start(rng());
    let head = driver.add(0, &[Buffer::In(BUFFERS, 8)]);
    assert_eq!(driver.used(0), None);
    driver.move_to(rng());
    assert_eq!(driver.used(0), Some((head, 8)));
}

#[test]
fn what_no_driver_can_have_left_is_refused() {
    let mut driver = FakeDriver::start(rng());
    driver.request(0, &[Buffer::In(BUFFERS, 8)]);
    let saved = driver.save().unwrap();
    let disk = tempfile::NamedTempFile::new().unwrap();
    let cache = Cache::Unsafe;
    let block = Block::open(disk.path(), Access::ReadOnly, cache, Limits::default()).unwrap();
    let of_a_disk = FakeDriver::start(Arc::new(Mutex::new(block)));
    let of_a_disk = of_a_disk.save().unwrap().device;
    let wrong: [&dyn Fn(&mut SavedTransport); 9] = [
        &|saved| saved.status = 2,
        &|saved| saved.status = 0x4f,
        &|saved| saved.accepted = u64::MAX,
        &|saved| saved.queues.clear(),
        &|saved| saved.queues.push(saved.queues[0]),
        &|saved| saved.early_kicks = 2,
        &|saved| saved.interrupt.status = 4,
        &|saved| saved.device = of_a_disk.clone(),
        &|saved| match &mut saved.device {
            SavedDevice::Rng(rng) => rng.queue.as_mut().unwrap().max_size = 3,
            _ => unreachable!(),
        },
    ];
    for (nth, wrong) in wrong.iter().enumerate() {
        let mut saved = saved.clone();
        wrong(&mut saved);
        let refused = driver.restore(&saved, rng());
        assert!(refused.is_err(), "{nth}: {saved:?}");
    }
    driver.restore(&saved, rng()).unwrap();
}

/// A device of each kind that needs nothing but its guest's memory and a directory.
fn device(kind: usize, ram: &GuestRam, dir: &std::path::Path) -> Arc<Mutex<dyn VirtioDevice>> {
    match kind {
        0 => rng(),
        1 | 4 => {
            let path = dir.join("disk");
            if !path.exists() {
                std::fs::write(&path, [0; 8192]).unwrap();
            }
            let (access, cache) = (Access::ReadWrite, Cache::Writeback);
            let disk = Block::open(&path, access, cache, Limits::default()).unwrap();
            Arc::new(Mutex::new(match kind {
                1 => disk,
                _ => disk.with_rings().unwrap(),
            }))
        }
        2 => {
            let settings = Settings {
                statistics_interval_s: 1,
                hinting: true,
                reporting: true,
                ..Settings::default()
            };
            Arc::new(Mutex::new(Balloon::new(settings, ram).unwrap()))
        }
        _ => {
            // Each has its own, as the one before is still there.
            let nth = std::fs::read_dir(dir).unwrap().count();
            let path = dir.join(format!("v{nth}"));
            Arc::new(Mutex::new(Vsock::new(3, &path).unwrap()))
        }
    }
}

proptest! {
    #[test]
    fn whatever_a_driver_did_its_device_goes_on(
        kind in 0usize..5,
        before in moves(),
        after in moves(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let ram = GuestRam::new(RAM).unwrap();
        let mut driver = FakeDriver::start_in(ram.clone(), device(kind, &ram, dir.path()));
        make(&mut driver, &before);
        if driver.save().is_ok() {
            driver.move_to(device(kind, &ram, dir.path()));
            make(&mut driver, &after);
        }
        driver.set_up(u64::MAX);
        prop_assert_eq!(driver.read(0x70), 15);
    }

    #[test]
    fn no_bytes_for_a_device_upset_it(
        moves in moves(),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut driver = FakeDriver::start(rng());
        make(&mut driver, &moves);
        let mut bytes = postcard::to_stdvec(&driver.save().unwrap()).unwrap();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(saved) = postcard::from_bytes(&bytes) {
            let _ = driver.restore(&saved, rng());
            make(&mut driver, &moves);
            driver.set_up(u64::MAX);
            prop_assert_eq!(driver.read(0x70), 15);
        }
    }
}
