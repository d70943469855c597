//! The random source, by an honest and a hostile driver.

use std::sync::{Arc, Mutex};

use super::Rng;
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver};

fn start() -> FakeDriver {
    FakeDriver::start(Arc::new(Mutex::new(Rng::new())))
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
