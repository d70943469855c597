//! The disk, by an honest and a hostile driver.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Access, Block, Cache};
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver};
use crate::rate_limiter::{Limit, Limits};
use crate::{Error, EventSource, feature};

pub(super) const SECTORS: u64 = 128;
pub(super) const HEADER: u64 = BUFFERS;
pub(super) const STATUS: u64 = BUFFERS + 0x100;
pub(super) const DATA: u64 = BUFFERS + 0x1000;
pub(super) const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
pub(super) const READ: u32 = 0;
pub(super) const WRITE: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

pub(super) struct Rig {
    pub(super) disk: Arc<Mutex<Block>>,
    pub(super) driver: FakeDriver,
    pub(super) file: tempfile::NamedTempFile,
}

/// A disk whose byte `n` is `pattern(n)`.
pub(super) fn rig(access: Access) -> Rig {
    rig_with(access, Cache::Writeback, Limits::default())
}

pub(super) fn rig_with(access: Access, cache: Cache, limits: Limits) -> Rig {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(pattern).collect();
    file.as_file().write_all_at(&bytes, 0).unwrap();
    let disk = Block::open(file.path(), access, cache, limits).unwrap();
    let disk = Arc::new(Mutex::new(disk));
    let driver = FakeDriver::start(disk.clone());
    Rig { disk, driver, file }
}

pub(super) fn pattern(at: u64) -> u8 {
    (at % 251) as u8
}

impl Rig {
    /// One request with its data in `data`; returns the status and what was written.
    pub(super) fn request(&mut self, operation: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let mut header = operation.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.driver.put(HEADER, &header);
        self.driver.put(STATUS, &[0xaa]);
        let mut buffers = vec![Buffer::Out(HEADER, 16)];
        buffers.extend(data);
        buffers.push(Buffer::In(STATUS, 1));
        let written = self.driver.request(0, &buffers);
        assert!(!self.driver.needs_reset());
        (self.driver.get(STATUS, 1)[0], written)
    }

    pub(super) fn on_disk(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.as_file().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

#[test]
fn the_configuration_names_the_capacity() {
    let mut rig = rig(Access::ReadOnly);
    assert_eq!(u64::from_le_bytes(rig.driver.config(0)), SECTORS);
    assert_eq!(u32::from_le_bytes(rig.driver.config(12)), 254);
    assert_eq!(u32::from_le_bytes(rig.driver.config(20)), 512);
    assert_eq!(rig.driver.config(60), [0; 8], "beyond the end");
    assert_eq!(rig.driver.config(0xe00), [0; 8]);
}

#[test]
fn a_read_returns_what_the_file_holds() {
    let mut rig = rig(Access::ReadOnly);
    let (status, written) = rig.request(READ, 3, &[Buffer::In(DATA, 1024)]);
    assert_eq!((status, written), (OK, 1025));
    let expected: Vec<u8> = (3 * 512..5 * 512).map(pattern).collect();
    assert_eq!(rig.driver.get(DATA, 1024), expected);
}

#[test]
fn a_write_reaches_the_file_and_a_flush_succeeds() {
    let mut rig = rig(Access::ReadWrite);
    rig.driver.put(DATA, &[7; 1024]);
    let data = [Buffer::Out(DATA, 700), Buffer::Out(DATA + 700, 324)];
    assert_eq!(rig.request(WRITE, 126, &data), (OK, 1));
    assert_eq!(rig.on_disk(126 * 512, 1024), [7; 1024]);
    assert_eq!(rig.on_disk(126 * 512 - 1, 1), [pattern(126 * 512 - 1)]);
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn a_driver_without_flush_writes_through() {
    let mut rig = rig(Access::ReadWrite);
    rig.driver.set_up(feature::EVENT_IDX);
    rig.driver.put(DATA, &[9; 512]);
    assert_eq!(rig.request(WRITE, 0, &[Buffer::Out(DATA, 512)]), (OK, 1));
    assert_eq!(rig.on_disk(0, 512), [9; 512]);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let mut rig = rig(Access::ReadOnly);
    assert_eq!(rig.driver.read(0x10) & 1 << 5, 1 << 5, "VIRTIO_BLK_F_RO");
    for operation in [WRITE, DISCARD, WRITE_ZEROES] {
        let status = rig.request(operation, 0, &[Buffer::Out(DATA, 512)]);
        assert_eq!(status, (IO_ERROR, 1), "operation {operation}");
    }
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.on_disk(0, 2), [0, 1]);
}

#[test]
fn nothing_beyond_the_last_sector_is_touched() {
    let mut rig = rig(Access::ReadWrite);
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 1024),
        (1 << 55, 512),
    ] {
        assert_eq!(
            rig.request(READ, sector, &[Buffer::In(DATA, len)]),
            (IO_ERROR, 1)
        );
        assert_eq!(
            rig.request(WRITE, sector, &[Buffer::Out(DATA, len)]),
            (IO_ERROR, 1)
        );
    }
    assert_eq!(rig.file.as_file().metadata().unwrap().len(), SECTORS * 512);
    assert_eq!(
        rig.request(READ, SECTORS, &[]),
        (OK, 1),
        "nothing is not beyond"
    );
}

#[test]
fn parts_of_sectors_are_refused() {
    let mut rig = rig(Access::ReadWrite);
    for len in [1, 511, 513] {
        assert_eq!(
            rig.request(READ, 0, &[Buffer::In(DATA, len)]),
            (IO_ERROR, 1)
        );
        assert_eq!(
            rig.request(WRITE, 0, &[Buffer::Out(DATA, len)]),
            (IO_ERROR, 1)
        );
    }
}

#[test]
fn the_identifier_is_made_of_the_numbers_of_the_file() {
    let mut rig = rig(Access::ReadOnly);
    assert_eq!(rig.request(GET_ID, 0, &[Buffer::In(DATA, 20)]), (OK, 21));
    let metadata = rig.file.as_file().metadata().unwrap();
    let mut id = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino()).into_bytes();
    id.resize(20, 0);
    assert_eq!(rig.driver.get(DATA, 20), id);
    assert_eq!(
        rig.request(GET_ID, 0, &[Buffer::In(DATA, 19)]),
        (IO_ERROR, 1)
    );
}

#[test]
fn unknown_operations_are_unsupported() {
    let mut rig = rig(Access::ReadWrite);
    for operation in [2, 3, 5, 7, 12, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(
            rig.request(operation, 0, &[Buffer::In(DATA, 512)]),
            (UNSUPPORTED, 1)
        );
    }
}

pub(super) fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros() {
    let mut rig = rig(Access::ReadWrite);
    let mut ranges = range(8, 8, 0);
    ranges.extend(range(32, 1, 0));
    rig.driver.put(DATA, &ranges);
    assert_eq!(rig.request(DISCARD, 0, &[Buffer::Out(DATA, 32)]), (OK, 1));
    assert_eq!(rig.on_disk(8 * 512, 8 * 512), vec![0; 8 * 512]);
    assert_eq!(rig.on_disk(32 * 512, 512), vec![0; 512]);
    assert_eq!(rig.on_disk(33 * 512, 1), [pattern(33 * 512)]);
    rig.driver.put(DATA, &range(64, 2, 1));
    assert_eq!(
        rig.request(WRITE_ZEROES, 0, &[Buffer::Out(DATA, 16)]),
        (OK, 1)
    );
    assert_eq!(rig.on_disk(64 * 512, 1024), vec![0; 1024]);
    assert_eq!(rig.file.as_file().metadata().unwrap().len(), SECTORS * 512);
}

#[test]
fn ranges_that_cannot_be_are_refused() {
    let mut rig = rig(Access::ReadWrite);
    for (operation, bytes, status) in [
        (DISCARD, range(SECTORS, 1, 0), IO_ERROR),
        (DISCARD, range(0, u32::MAX, 0), IO_ERROR),
        (DISCARD, range(u64::MAX, 1, 0), IO_ERROR),
        (DISCARD, range(0, 1, 1), UNSUPPORTED),
        (WRITE_ZEROES, range(0, 1, 2), UNSUPPORTED),
        (DISCARD, range(0, 1, 0)[..15].to_vec(), IO_ERROR),
        (DISCARD, range(0, 1, 0).repeat(33), IO_ERROR),
    ] {
        rig.driver.put(DATA, &bytes);
        let got = rig.request(operation, 0, &[Buffer::Out(DATA, bytes.len() as u32)]);
        assert_eq!(got, (status, 1));
    }
    assert_eq!(rig.on_disk(1, 1), [1]);
}

#[test]
fn a_request_without_header_fails_and_one_without_status_comes_back() {
    let mut rig = rig(Access::ReadOnly);
    rig.driver.put(STATUS, &[0xaa]);
    let short = [Buffer::Out(HEADER, 15), Buffer::In(STATUS, 1)];
    assert_eq!(rig.driver.request(0, &short), 1);
    assert_eq!(rig.driver.get(STATUS, 1), [IO_ERROR]);
    assert_eq!(rig.driver.request(0, &[Buffer::Out(HEADER, 16)]), 0);
    assert!(!rig.driver.needs_reset());
}

#[test]
fn an_unsafe_cache_offers_no_flush_and_answers_one_all_the_same() {
    let mut rig = rig_with(Access::ReadWrite, Cache::Unsafe, Limits::default());
    assert_eq!(rig.driver.read(0x10) & 1 << 9, 0, "VIRTIO_BLK_F_FLUSH");
    rig.driver.put(DATA, &[7; 512]);
    assert_eq!(rig.request(WRITE, 0, &[Buffer::Out(DATA, 512)]), (OK, 1));
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.on_disk(0, 512), [7; 512]);
}

/// Makes a read of a sector available and kicks.
fn ask_for_a_sector(rig: &mut Rig) {
    let mut header = READ.to_le_bytes().to_vec();
    header.extend([0; 12]);
    rig.driver.put(HEADER, &header);
    let buffers = [
        Buffer::Out(HEADER, 16),
        Buffer::In(DATA, 512),
        Buffer::In(STATUS, 1),
    ];
    rig.driver.add(0, &buffers);
    rig.driver.kick(0);
}

pub(super) fn limited_to(size: u64, refill_ms: u64) -> Limit {
    Limit {
        size,
        one_time_burst: 0,
        refill_ms,
    }
}

/// What the event loop does.
pub(super) fn wait_and_serve(rig: &Rig) {
    let mut disk = rig.disk.lock().unwrap();
    let timer = disk.fd();
    let mut fds = [PollFd::new(&timer, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    assert_eq!(
        poll(&mut fds, Some(&timeout)),
        Ok(1),
        "the timer never came"
    );
    disk.on_event();
}

#[test]
fn a_request_over_the_limit_stays_in_the_queue_until_the_timer() {
    for limits in [
        Limits {
            bandwidth: Some(limited_to(512, 200)),
            ops: None,
        },
        Limits {
            bandwidth: None,
            ops: Some(limited_to(1, 200)),
        },
    ] {
        let mut rig = rig_with(Access::ReadOnly, Cache::Unsafe, limits);
        ask_for_a_sector(&mut rig);
        assert!(rig.driver.used(0).is_some());
        let start = Instant::now();
        ask_for_a_sector(&mut rig);
        assert_eq!(rig.driver.used(0), None);
        rig.driver.kick(0);
        assert_eq!(rig.driver.used(0), None, "a further kick changes nothing");
        wait_and_serve(&rig);
        assert!(start.elapsed() > Duration::from_millis(100));
        assert!(rig.driver.used(0).is_some());
        assert_eq!(rig.driver.get(STATUS, 1), [OK]);
    }
}

#[test]
fn new_limits_let_what_waits_pass() {
    let hours = Limits {
        bandwidth: None,
        ops: Some(limited_to(1, 1 << 32)),
    };
    let mut rig = rig_with(Access::ReadOnly, Cache::Unsafe, hours);
    ask_for_a_sector(&mut rig);
    ask_for_a_sector(&mut rig);
    assert!(rig.driver.used(0).is_some());
    assert_eq!(rig.driver.used(0), None);
    rig.disk.lock().unwrap().update_limiter(Limits {
        bandwidth: None,
        ops: Some(limited_to(0, 0)),
    });
    wait_and_serve(&rig);
    assert!(rig.driver.used(0).is_some());
}

#[test]
fn a_new_file_brings_its_capacity_and_an_interrupt() {
    let mut rig = rig(Access::ReadWrite);
    let other = tempfile::NamedTempFile::new().unwrap();
    other.as_file().write_all_at(&[3; 1024], 0).unwrap();
    rig.driver.handle_interrupt();
    let generation = rig.driver.read(0xfc);
    rig.disk.lock().unwrap().update_path(other.path()).unwrap();
    assert_eq!(
        rig.driver.handle_interrupt(),
        2,
        "a change of configuration"
    );
    assert_ne!(rig.driver.read(0xfc), generation);
    assert_eq!(u64::from_le_bytes(rig.driver.config(0)), 2);
    assert_eq!(rig.request(READ, 1, &[Buffer::In(DATA, 512)]), (OK, 513));
    assert_eq!(rig.driver.get(DATA, 512), [3; 512]);
    assert_eq!(
        rig.request(READ, 2, &[Buffer::In(DATA, 512)]),
        (IO_ERROR, 1)
    );
    let missing = rig
        .disk
        .lock()
        .unwrap()
        .update_path(&other.path().join("x"));
    assert!(matches!(missing, Err(Error::OpenDisk { .. })));
    assert_eq!(rig.disk.lock().unwrap().path(), other.path());
    assert_eq!(rig.request(READ, 1, &[Buffer::In(DATA, 512)]), (OK, 513));
}

#[test]
fn a_file_that_became_shorter_is_an_io_error() {
    let mut rig = rig(Access::ReadOnly);
    rig.file.as_file().set_len(600).unwrap();
    let (status, _) = rig.request(READ, 0, &[Buffer::In(DATA, 1024)]);
    assert_eq!(status, IO_ERROR);
}

#[test]
fn reads_are_recorded_as_writes_to_memory() {
    let mut rig = rig(Access::ReadOnly);
    let epochs = rig.driver.ram.epochs().clone();
    let cursor = epochs.cursor();
    epochs.watch(ram::Gpa(DATA));
    rig.request(READ, 0, &[Buffer::In(DATA, 4096)]);
    assert!(epochs.was_written_since(ram::Gpa(DATA), cursor));
    assert_eq!(epochs.take_watched_writes(), [ram::Gpa(DATA)]);
}

#[test]
fn what_is_no_disk_is_refused_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let open =
        |path| Block::open(path, Access::ReadOnly, Cache::Unsafe, Limits::default()).unwrap_err();
    assert!(matches!(open(dir.path()), Error::NotADisk { path } if path == dir.path()));
    let missing = dir.path().join("missing");
    assert!(matches!(open(&missing), Error::OpenDisk { path, .. } if path == missing));
}

#[test]
fn the_end_of_a_file_that_fills_no_sector_is_left_out() {
    let file = tempfile::NamedTempFile::new().unwrap();
    File::set_len(file.as_file(), 1500).unwrap();
    assert_eq!(
        Block::open(
            file.path(),
            Access::ReadOnly,
            Cache::Unsafe,
            Limits::default()
        )
        .unwrap()
        .sectors(),
        2
    );
}

proptest! {
    #[test]
    fn data_scattered_over_memory_arrive_in_order(
        sector in 0u64..64,
        cuts in proptest::collection::btree_set(1u32..8192, 0..20),
    ) {
        let mut rig = rig(Access::ReadWrite);
        // 8192 bytes in pieces, each on pages of its own.
        let mut pieces = Vec::new();
        let mut from = 0;
        for (nth, to) in cuts.into_iter().chain([8192]).enumerate() {
            pieces.push((DATA + 0x3000 * nth as u64 + 5, from, to - from));
            from = to;
        }
        let input: Vec<_> = pieces.iter().map(|&(at, _, len)| Buffer::In(at, len)).collect();
        prop_assert_eq!(rig.request(READ, sector, &input), (OK, 8193));
        for &(at, from, len) in &pieces {
            let first = sector * 512 + u64::from(from);
            let expected: Vec<u8> = (first..first + u64::from(len)).map(pattern).collect();
            prop_assert_eq!(rig.driver.get(at, len as usize), expected);
        }
        let output: Vec<_> = pieces.iter().map(|&(at, _, len)| Buffer::Out(at, len)).collect();
        prop_assert_eq!(rig.request(WRITE, 112, &output), (OK, 1));
        prop_assert_eq!(rig.on_disk(112 * 512, 8192), rig.on_disk(sector * 512, 8192));
    }
}

#[test]
fn a_restored_disk_goes_on_with_the_same_file_and_cache() {
    for wanted in [u64::MAX, 0] {
        let mut rig = rig(Access::ReadWrite);
        rig.driver.set_up(wanted);
        rig.driver.put(DATA, &[7; 512]);
        assert_eq!(rig.request(WRITE, 5, &[Buffer::Out(DATA, 512)]), (OK, 1));
        let flushing = rig.disk.lock().unwrap().flushing;
        let (access, cache) = (Access::ReadWrite, Cache::Writeback);
        let disk = Block::open(rig.file.path(), access, cache, Limits::default()).unwrap();
        rig.disk = Arc::new(Mutex::new(disk));
        rig.driver.handle_interrupt();
        rig.driver.move_to(rig.disk.clone());
        assert_eq!(rig.disk.lock().unwrap().flushing, flushing);
        assert_eq!(rig.request(READ, 5, &[Buffer::In(DATA, 512)]), (OK, 513));
        assert_eq!(rig.driver.get(DATA, 512), [7; 512]);
        assert_eq!(rig.driver.handle_interrupt(), 1, "nothing changed but that");
    }
}

#[test]
fn a_restored_disk_whose_file_has_another_length_says_so() {
    let mut rig = rig(Access::ReadWrite);
    rig.file.as_file().set_len(SECTORS * 256).unwrap();
    let (access, cache) = (Access::ReadWrite, Cache::Writeback);
    let disk = Block::open(rig.file.path(), access, cache, Limits::default()).unwrap();
    rig.driver.move_to(Arc::new(Mutex::new(disk)));
    assert_eq!(rig.driver.handle_interrupt(), 2);
    assert_eq!(u64::from_le_bytes(rig.driver.config(0)), SECTORS / 2);
}

#[test]
fn a_restored_disk_has_the_limits_and_debts_that_it_had() {
    let limit = Limit {
        size: 2,
        one_time_burst: 0,
        refill_ms: 3_600_000,
    };
    let limits = Limits {
        bandwidth: None,
        ops: Some(limit),
    };
    let mut rig = rig_with(Access::ReadWrite, Cache::Writeback, limits);
    for _ in 0..2 {
        assert_eq!(rig.request(READ, 0, &[Buffer::In(DATA, 512)]), (OK, 513));
    }
    let none = Limits::default();
    let disk = Block::open(rig.file.path(), Access::ReadWrite, Cache::Writeback, none).unwrap();
    let disk = Arc::new(Mutex::new(disk));
    rig.driver.move_to(disk.clone());
    assert_eq!(disk.lock().unwrap().limits(), limits);
    rig.driver
        .add(0, &[Buffer::Out(HEADER, 16), Buffer::In(STATUS, 1)]);
    rig.driver.kick(0);
    assert_eq!(rig.driver.used(0), None, "both tokens were taken before");
}
