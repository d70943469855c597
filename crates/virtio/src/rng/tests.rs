//! The random source, by an honest and a hostile driver.

use std::sync::{Arc, Mutex};

use super::Rng;
use crate::EventSource;
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver, told};
use crate::rate_limiter::{Limit, Limits};

fn start() -> FakeDriver {
    let rng = Rng::new(Limits::default()).unwrap();
    FakeDriver::start(Arc::new(Mutex::new(rng)))
}

#[test]
fn every_buffer_is_filled_and_no_byte_beyond() {
    let mut driver = start();
    let buffers = [Buffer::In(BUFFERS, 100), Buffer::In(BUFFERS + 0x1000, 3000)];
    assert_eq!(driver.request(0, &buffers), 3100);
    let long = driver.get(BUFFERS + 0x1000, 3000);
    // 3000 random bytes hold nearly every value; 64 equal ones in a row never come.
    assert!(
        long.chunks_exact(64)
            .all(|chunk| chunk.iter().any(|&byte| byte != chunk[0]))
    );
    assert_eq!(driver.get(BUFFERS + 100, 100), vec![0; 100]);
    assert_eq!(driver.get(BUFFERS + 0x1000 + 3000, 100), vec![0; 100]);
}

#[test]
fn two_requests_differ() {
    let mut driver = start();
    driver.request(0, &[Buffer::In(BUFFERS, 32)]);
    driver.request(0, &[Buffer::In(BUFFERS + 32, 32)]);
    assert_ne!(driver.get(BUFFERS, 32), driver.get(BUFFERS + 32, 32));
}

#[test]
fn a_request_gets_64_kib_at_most() {
    let mut driver = start();
    assert_eq!(driver.request(0, &[Buffer::In(BUFFERS, 1 << 20)]), 64 << 10);
    assert_eq!(driver.get(BUFFERS + (64 << 10), 100), vec![0; 100]);
}

#[test]
fn a_request_without_room_comes_back_empty() {
    let mut driver = start();
    assert_eq!(driver.request(0, &[Buffer::Out(BUFFERS, 100)]), 0);
    assert_eq!(driver.request(0, &[Buffer::In(BUFFERS, 0)]), 0);
    assert!(!driver.needs_reset());
}

#[test]
fn a_limited_source_holds_requests_until_its_timer_rings() {
    let limits = Limits {
        bandwidth: Some(Limit {
            size: 1000,
            one_time_burst: 0,
            refill_ms: 50,
        }),
        ops: None,
    };
    let rng = Arc::new(Mutex::new(Rng::new(limits).unwrap()));
    let mut driver = FakeDriver::start(rng.clone());
    assert_eq!(driver.request(0, &[Buffer::In(BUFFERS, 1000)]), 1000);
    let held = driver.add(0, &[Buffer::In(BUFFERS, 900)]);
    driver.kick(0);
    assert_eq!(driver.used(0), None);
    // A kick is no way around.
    driver.kick(0);
    assert_eq!(driver.used(0), None);
    std::thread::sleep(std::time::Duration::from_millis(60));
    rng.lock().unwrap().on_event();
    assert_eq!(driver.used(0), Some((held, 900)));
    let wanted = [
        ("entropy_event_count", 2),
        ("entropy_bytes", 1900),
        ("entropy_rate_limiter_throttled", 2),
        ("rate_limiter_event_count", 1),
    ];
    assert_eq!(told(&*rng.lock().unwrap().counters()), wanted);
}
