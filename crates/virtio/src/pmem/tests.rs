//! Persistent memory, by an honest and a hostile driver.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use bus::IrqLine;
use ram::{Further, GuestRam, Region};

use super::*;
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver, RAM, told};
use crate::rate_limiter::{Limit, Limits};
use crate::{EventSource, Interrupt, VirtioDevice};

struct Bench {
    driver: FakeDriver,
    pmem: Arc<Mutex<Pmem>>,
    file: File,
    region: Region,
}

fn bench(read_only: bool) -> Bench {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 8192], 0).unwrap();
    let further = Further::File {
        file: file.try_clone().unwrap(),
        read_only,
    };
    let ram = GuestRam::with(RAM, vec![further]).unwrap();
    let region = ram.regions().last().unwrap();
    let pmem = Pmem::new(file.try_clone().unwrap(), region, Limits::default()).unwrap();
    let pmem = Arc::new(Mutex::new(pmem));
    Bench {
        driver: FakeDriver::start_in(ram, pmem.clone()),
        pmem,
        file,
        region,
    }
}

const ANSWER: u64 = BUFFERS + 0x1000;

impl Bench {
    fn ask(&mut self, request: u32) -> u32 {
        self.driver.put(BUFFERS, &request.to_le_bytes());
        self.driver.put(ANSWER, &[0xff; 4]);
        let buffers = [Buffer::Out(BUFFERS, 4), Buffer::In(ANSWER, 4)];
        assert_eq!(self.driver.request(0, &buffers), 4);
        self.answer()
    }

    fn answer(&self) -> u32 {
        u32::from_le_bytes(self.driver.get(ANSWER, 4).try_into().unwrap())
    }

    fn flushes(&self) -> u64 {
        {
            let counters = self.pmem.lock().unwrap().counters();
            counters
                .flush_count
                .load(std::sync::atomic::Ordering::Relaxed)
        }
    }
}

#[test]
fn the_configuration_says_where_the_memory_is() {
    let mut bench = bench(false);
    let config: [u8; 16] = bench.driver.config(0);
    let mut wanted = bench.region.start.0.to_le_bytes().to_vec();
    wanted.extend((2_u64 << 20).to_le_bytes());
    assert_eq!(config[..], wanted);
    assert_eq!(bench.region.start.0 % (2 << 20), 0);
}

#[test]
fn a_flush_makes_stores_durable_and_says_so() {
    let mut bench = bench(false);
    bench.driver.put(bench.region.start.0, b"stored");
    assert_eq!((bench.ask(0), bench.flushes()), (0, 1));
    let mut content = [0; 6];
    bench.file.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"stored");
}

#[test]
fn requests_that_came_together_are_one_flush() {
    let mut bench = bench(false);
    bench.driver.put(BUFFERS, &[0; 4]);
    for _ in 0..5 {
        let buffers = [Buffer::Out(BUFFERS, 4), Buffer::In(ANSWER, 4)];
        bench.driver.add(0, &buffers);
    }
    bench.driver.kick(0);
    let answered = std::iter::from_fn(|| bench.driver.used(0)).count();
    assert_eq!((answered, bench.flushes()), (5, 1));
}

#[test]
fn a_read_only_file_has_nothing_to_flush() {
    let mut bench = bench(true);
    assert_eq!((bench.ask(0), bench.flushes()), (0, 0));
}

#[test]
fn requests_that_are_none_fail_and_flush_nothing() {
    let mut bench = bench(false);
    assert_eq!(
        (bench.ask(1), bench.ask(u32::MAX), bench.flushes()),
        (1, 1, 0)
    );
    bench.driver.put(BUFFERS, &[0; 8]);
    let short = [Buffer::Out(BUFFERS, 3), Buffer::In(ANSWER, 4)];
    assert_eq!(bench.driver.request(0, &short), 4);
    assert_eq!((bench.answer(), bench.flushes()), (1, 0));
    // No room for an answer: served all the same.
    assert_eq!(bench.driver.request(0, &[Buffer::Out(BUFFERS, 4)]), 0);
    let narrow = [Buffer::Out(BUFFERS, 4), Buffer::In(ANSWER, 3)];
    assert_eq!(bench.driver.request(0, &narrow), 0);
    assert_eq!(bench.flushes(), 2);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn buffers_may_lie_in_the_file_unless_the_device_would_write_a_read_only_one() {
    let mut writable = bench(false);
    let at = writable.region.start.0;
    writable.driver.put(at, &[0; 4]);
    let buffers = [Buffer::Out(at, 4), Buffer::In(at + 4096, 4)];
    assert_eq!(writable.driver.request(0, &buffers), 4);
    let mut content = [0xff; 4];
    writable.file.read_exact_at(&mut content, 4096).unwrap();
    assert_eq!(content, [0; 4]);

    let mut read_only = bench(true);
    let at = read_only.region.start.0;
    let buffers = [Buffer::Out(at, 4), Buffer::In(at + 4096, 4)];
    read_only.driver.add(0, &buffers);
    read_only.driver.kick(0);
    assert!(read_only.driver.needs_reset());
}

#[test]
fn rings_in_a_read_only_file_are_refused() {
    let mut bench = bench(true);
    let at = bench.region.start.0;
    for (register, needs_reset) in [(0x80, false), (0x90, false), (0xa0, true)] {
        let driver = &mut bench.driver;
        for status in [0, 1, 3] {
            driver.write(0x70, status);
        }
        driver.accept(u64::MAX);
        driver.write(0x70, 11);
        driver.set_up_queues();
        driver.write(0x30, 0);
        driver.write(register, at as u32);
        driver.write(register + 4, (at >> 32) as u32);
        driver.write(0x70, 15);
        assert_eq!(driver.needs_reset(), needs_reset, "{register:#x}");
    }
}

#[test]
fn a_file_that_shrinks_fails_no_flush_and_ends_nothing() {
    let mut bench = bench(false);
    bench.file.set_len(0).unwrap();
    bench.driver.put(bench.region.start.0, b"lost");
    assert_eq!(bench.ask(0), 0);
    assert_eq!(bench.driver.get(bench.region.start.0, 4), b"lost");
    assert_eq!(bench.file.metadata().unwrap().len(), 0);
}

#[test]
fn a_restored_device_goes_on_where_it_was() {
    let mut bench = bench(false);
    assert_eq!(bench.ask(0), 0);
    let saved = bench.pmem.lock().unwrap().save();
    let (interrupt, none) = (Interrupt::new(IrqLine::new(|_| {})), Limits::default());
    let (file, memory) = (bench.file.try_clone().unwrap(), bench.driver.ram.memory());
    let restored = Pmem::restore(&saved, file, bench.region, none, memory, &interrupt).unwrap();
    *bench.pmem.lock().unwrap() = restored;
    assert_eq!((bench.ask(0), bench.flushes()), (0, 1));
    assert_eq!(bench.pmem.lock().unwrap().device_type() as u32, 27);

    let mut elsewhere = saved;
    elsewhere.start += 2 << 20;
    let (file, memory) = (bench.file.try_clone().unwrap(), bench.driver.ram.memory());
    assert!(Pmem::restore(&elsewhere, file, bench.region, none, memory, &interrupt).is_err());
}

#[test]
fn a_limited_flush_waits_until_the_limit_goes() {
    let mut bench = bench(false);
    let ops = |size| Limits {
        bandwidth: None,
        ops: Some(Limit {
            size,
            one_time_burst: 0,
            refill_ms: 60_000,
        }),
    };
    bench.pmem.lock().unwrap().update_limits(ops(1));
    assert_eq!(bench.ask(0), 0);
    bench.driver.put(BUFFERS, &[0; 4]);
    let buffers = [Buffer::Out(BUFFERS, 4), Buffer::In(ANSWER, 4)];
    let held = bench.driver.add(0, &buffers);
    bench.driver.kick(0);
    assert_eq!((bench.driver.used(0), bench.flushes()), (None, 1));
    bench.pmem.lock().unwrap().update_limits(ops(0));
    bench.pmem.lock().unwrap().on_event();
    assert_eq!(
        (bench.driver.used(0), bench.flushes()),
        (Some((held, 4)), 2)
    );
    let wanted = [
        ("queue_event_count", 2),
        ("rate_limiter_throttled_events", 1),
        ("rate_limiter_event_count", 1),
        ("flush_count", 2),
    ];
    assert_eq!(told(&*bench.pmem.lock().unwrap().counters()), wanted);
}
