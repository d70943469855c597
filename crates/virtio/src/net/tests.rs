//! The interface between a driver, honest or not, and a socket in place of a TAP device.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver};
use crate::rate_limiter::{Limit, Limits};
use crate::{EventSource, Interrupt};

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 12;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
/// Beyond the buffers that the tests receive into.
const OUTGOING: u64 = BUFFERS + 0x40_0000;
const MERGES: u64 = 1 << 15;

/// One end of a cable.
struct Cable {
    socket: UnixDatagram,
    offloads: Arc<Mutex<Option<Offloads>>>,
    refuses: bool,
}

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = Some(offloads);
        match self.refuses {
            true => Err(io::ErrorKind::InvalidInput.into()),
            false => Ok(()),
        }
    }
}

/// Takes frames to addresses that begin with 9, sends each back.
#[derive(Default)]
struct Echo {
    frames: Vec<Vec<u8>>,
    due: Option<Instant>,
}

impl Neighbour for Echo {
    fn is_for_me(&self, frame: &[u8]) -> bool {
        assert!(frame.len() <= 42);
        frame.first() == Some(&9)
    }

    fn take(&mut self, frame: &[u8], now: Instant) {
        self.frames.push(frame.to_vec());
        self.due = Some(now);
    }

    fn next_frame(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.due.filter(|due| *due <= now)?;
        (!self.frames.is_empty()).then(|| self.frames.remove(0))
    }

    fn poll_at(&mut self, _: Instant) -> Option<Instant> {
        self.due.filter(|_| !self.frames.is_empty())
    }
}

struct Bench {
    net: Arc<Mutex<Net>>,
    driver: FakeDriver,
    /// The other end.
    far: UnixDatagram,
    offloads: Arc<Mutex<Option<Offloads>>>,
}

fn bench(settings: Settings, features: u64) -> Bench {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    let offloads = Arc::default();
    let cable = Cable {
        socket: near,
        offloads: Arc::clone(&offloads),
        refuses: false,
    };
    let net = Net::new(settings, Box::new(cable), Some(Box::<Echo>::default())).unwrap();
    let net = Arc::new(Mutex::new(net));
    let mut driver = FakeDriver::find(net.clone());
    driver.set_up(features);
    Bench {
        net,
        driver,
        far,
        offloads,
    }
}

fn plain() -> Bench {
    bench(Settings::default(), u64::MAX)
}

/// A frame to an address that begins with `to`.
fn frame(to: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| if at == 0 { to } else { (at * 7) as u8 })
        .collect()
}

fn ops(size: u64) -> Limits {
    Limits {
        bandwidth: None,
        ops: Some(Limit {
            size,
            one_time_burst: 0,
            refill_ms: 100,
        }),
    }
}

impl Bench {
    /// What the event loop does when the descriptor is readable.
    fn turn(&self) {
        self.net.lock().unwrap().on_event();
    }

    fn is_readable(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let net = self.net.lock().unwrap();
        let mut fds = [PollFd::from_borrowed_fd(net.fd(), PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
    }

    fn count(&self, name: &str) -> u64 {
        let counters = self.net.lock().unwrap().counters();
        let found = counters.all().find(|(each, _)| *each == name);
        found.unwrap().1
    }

    /// Sends one frame as guest, header in a buffer of its own.
    fn send(&mut self, frame: &[u8]) -> Option<(u16, u32)> {
        self.driver.put(OUTGOING, &[0; HEADER]);
        self.driver.put(OUTGOING + 0x1000, frame);
        let buffers = [
            Buffer::Out(OUTGOING, HEADER as u32),
            Buffer::Out(OUTGOING + 0x1000, frame.len() as u32),
        ];
        self.driver.add(TX, &buffers);
        self.driver.kick(TX);
        let sent = self.driver.used(TX);
        sent.or_else(|| {
            self.turn();
            self.driver.used(TX)
        })
    }

    /// Has a frame of 60,000 bytes in the ring, which is kicked.
    fn leave_long_frame(&mut self) {
        self.driver.put(OUTGOING, &[0; HEADER]);
        self.driver.put(OUTGOING + 0x1000, &frame(2, 60_000));
        let buffers = [
            Buffer::Out(OUTGOING, HEADER as u32),
            Buffer::Out(OUTGOING + 0x1000, 60_000),
        ];
        self.driver.add(TX, &buffers);
        self.driver.kick(TX);
    }

    /// Sends one frame as network.
    fn arrive(&self, frame: &[u8]) {
        let mut bytes = vec![0xee; HEADER];
        bytes.extend(frame);
        self.far.send(&bytes).unwrap();
    }

    /// What reached the network: header and frame.
    fn arrived(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        let n = self.far.recv(&mut bytes).ok()?;
        bytes.truncate(n);
        Some(bytes)
    }

    /// Gives `count` buffers of `len` bytes for frames.
    fn offer(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let nth = u64::from(self.driver.next_head(RX));
            let buffer = Buffer::In(BUFFERS + nth * u64::from(len), len);
            self.driver.add(RX, &[buffer]);
        }
        self.driver.kick(RX);
    }

    /// The next frame that the guest got: its header and itself, put together from
    /// buffers of `len` bytes.
    fn received(&mut self, len: u32) -> Option<(Vec<u8>, Vec<u8>)> {
        let (head, written) = self.driver.used(RX)?;
        let at = |head: u16| BUFFERS + u64::from(head) * u64::from(len);
        let mut bytes = self.driver.get(at(head), written as usize);
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..buffers {
            let (head, written) = self.driver.used(RX).expect("a part that was promised");
            bytes.extend(self.driver.get(at(head), written as usize));
        }
        let frame = bytes.split_off(HEADER);
        Some((bytes, frame))
    }
}

#[test]
fn frames_of_the_guest_reach_the_link_with_their_headers() {
    let mut bench = plain();
    for len in [14, 60, 1514, 65_550] {
        let sent = frame(2, len);
        assert!(bench.send(&sent).is_some());
        let mut wanted = vec![0; HEADER];
        wanted.extend(&sent);
        assert!(bench.arrived() == Some(wanted), "{len}");
    }
    assert_eq!(bench.arrived(), None);
    assert_eq!(bench.count("tx_packets_count"), 4);
    assert_eq!(bench.driver.handle_interrupt(), 1);
}

#[test]
fn a_kick_leaves_long_frames_to_the_event_loop() {
    let mut bench = plain();
    assert!(!bench.is_readable());
    bench.leave_long_frame();
    assert_eq!(bench.arrived(), None);
    assert!(bench.is_readable());
    bench.turn();
    assert_eq!(bench.arrived().map(|bytes| bytes.len()), Some(60_012));
    assert!(bench.driver.used(TX).is_some());
    assert!(!bench.is_readable());
}

#[test]
fn an_answer_that_the_vcpu_reads_itself_wakes_nobody_else() {
    let mut bench = plain();
    bench.offer(2, 2048);
    for nth in 0..3 {
        // There when the frame was written, as a host's answer is.
        bench.arrive(&frame(2, 60 + nth));
        assert!(bench.is_readable());
        assert!(bench.send(&frame(2, 60)).is_some());
        if nth < 2 {
            let (_, got) = bench.received(2048).unwrap();
            assert_eq!(got.len(), 60 + nth);
            assert!(!bench.is_readable());
        }
    }
    // For the third the guest had no room yet.
    assert!(bench.received(2048).is_none());
    assert!(bench.is_readable());
    bench.offer(1, 2048);
    assert_eq!(bench.received(2048).unwrap().1.len(), 62);
    // What comes later wakes the event loop as ever.
    bench.turn();
    assert!(!bench.is_readable());
    bench.arrive(&frame(2, 70));
    assert!(bench.is_readable());
    bench.offer(1, 2048);
    bench.turn();
    assert_eq!(bench.received(2048).unwrap().1.len(), 70);
}

#[test]
fn a_kick_does_not_wait_while_another_thread_works_with_the_interface() {
    let mut bench = plain();
    let (net, busy) = (bench.net.clone(), Instant::now());
    let lock = net.lock().unwrap();
    bench.driver.put(OUTGOING, &[0; HEADER + 60]);
    bench.driver.add(TX, &[Buffer::Out(OUTGOING, 72)]);
    bench.driver.kick(TX);
    assert!(busy.elapsed() < Duration::from_secs(5));
    drop(lock);
    assert_eq!(bench.arrived(), None);
    assert!(bench.is_readable());
    bench.turn();
    assert_eq!(bench.arrived().map(|bytes| bytes.len()), Some(72));
}

#[test]
fn a_stream_to_the_guest_is_read_by_the_event_loop_and_answers_by_the_kick() {
    let mut bench = plain();
    bench.offer(60, 4096);
    bench.arrive(&frame(1, 60_000));
    bench.turn();
    assert!(bench.received(4096).is_some());
    bench.arrive(&frame(1, 20_000));
    bench.send(&frame(2, 60));
    assert_eq!(bench.received(4096), None);
    bench.turn();
    assert!(bench.received(4096).unwrap().1 == frame(1, 20_000));
    // It is over once short frames come.
    bench.offer(16, 4096);
    for _ in 0..4 {
        bench.arrive(&frame(1, 60));
        bench.turn();
        assert!(bench.received(4096).is_some());
    }
    bench.arrive(&frame(1, 70));
    bench.send(&frame(2, 60));
    assert_eq!(bench.received(4096).unwrap().1, frame(1, 70));
}

#[test]
fn buffers_for_a_stream_that_waits_bring_the_event_loop_back() {
    let mut bench = plain();
    bench.offer(15, 4096);
    bench.arrive(&frame(1, 60_000));
    bench.arrive(&frame(1, 60_001));
    bench.turn();
    assert!(bench.received(4096).unwrap().1 == frame(1, 60_000));
    assert!(!bench.is_readable());
    bench.offer(15, 4096);
    assert!(bench.is_readable());
    bench.turn();
    assert!(bench.received(4096).unwrap().1 == frame(1, 60_001));
}

#[test]
fn a_long_frame_that_was_left_is_sent_by_the_interface_that_goes_on() {
    let mut bench = plain();
    bench.leave_long_frame();
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    let cable = Cable {
        socket: near,
        offloads: Arc::default(),
        refuses: false,
    };
    let net = Net::new(Settings::default(), Box::new(cable), None).unwrap();
    bench.net = Arc::new(Mutex::new(net));
    bench.far = far;
    bench.driver.move_to(bench.net.clone());
    assert!(bench.is_readable());
    bench.turn();
    assert_eq!(bench.arrived().map(|bytes| bytes.len()), Some(60_012));
}

#[test]
fn a_frame_in_one_buffer_together_with_its_header_is_one_too() {
    let mut bench = plain();
    let mut bytes = vec![3; HEADER];
    bytes.extend(frame(2, 100));
    bench.driver.put(OUTGOING, &bytes);
    bench
        .driver
        .request(TX, &[Buffer::Out(OUTGOING, bytes.len() as u32)]);
    assert_eq!(bench.arrived(), Some(bytes));
}

#[test]
fn what_is_no_frame_comes_back_and_goes_nowhere() {
    let mut bench = plain();
    let too_short = [Buffer::Out(OUTGOING, 25)];
    let too_long = [Buffer::Out(OUTGOING, 65_563)];
    let writable = [Buffer::Out(OUTGOING, 100), Buffer::In(OUTGOING, 100)];
    for buffers in [&too_short[..], &too_long, &writable] {
        assert_eq!(bench.driver.request(TX, buffers), 0);
    }
    assert_eq!(bench.arrived(), None);
    assert_eq!(bench.count("tx_malformed_frames"), 3);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn frames_that_the_link_does_not_take_are_lost() {
    let mut bench = plain();
    let mut sent = 0;
    while bench.count("tx_fails") == 0 {
        assert!(bench.send(&frame(2, 60)).is_some());
        sent += 1;
        assert!(sent < 100_000, "a socket that never fills");
    }
    // Full is not failed.
    assert_eq!(bench.count("tap_write_fails"), 0);
    let (_, other) = UnixDatagram::pair().unwrap();
    bench.far = other;
    assert!(bench.send(&frame(2, 60)).is_some());
    assert_eq!(bench.count("tap_write_fails"), 1);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn a_frame_fills_one_buffer_or_as_many_as_it_needs() {
    let mut bench = plain();
    bench.offer(60, 1536);
    for len in [14, 1514, 1525, 20_000] {
        bench.arrive(&frame(1, len));
        bench.turn();
        let (header, got) = bench.received(1536).unwrap();
        assert!(got == frame(1, len), "{len}");
        let buffers = (len + HEADER).div_ceil(1536) as u8;
        let mut wanted = vec![0xee; 10];
        wanted.extend([buffers, 0]);
        assert_eq!(header, wanted);
    }
    assert_eq!(bench.received(1536), None);
    assert_eq!(bench.driver.handle_interrupt(), 1);
    // The buffers that were not filled are still the device's: nothing is skipped.
    assert_eq!(bench.count("rx_count"), 1 + 1 + 2 + 14);
}

#[test]
fn without_merging_a_frame_has_one_buffer() {
    for features in [0, 0xffff & !MERGES] {
        let mut bench = bench(Settings::default(), features);
        bench.offer(3, 70_000);
        bench.arrive(&frame(1, 1514));
        bench.turn();
        let (header, got) = bench.received(70_000).unwrap();
        assert_eq!((header[10], got), (1, frame(1, 1514)));
        assert_eq!(bench.received(70_000), None);
    }
}

#[test]
fn buffers_too_small_for_a_frame_need_a_reset() {
    for (features, len) in [(0, 1525), (0xffff & !MERGES, 65_561), (u64::MAX, 0)] {
        let mut bench = bench(Settings::default(), features);
        bench.offer(1, len);
        assert!(bench.driver.needs_reset(), "{features:x}");
        bench.arrive(&frame(1, 100));
        bench.turn();
        assert_eq!(bench.driver.used(RX), None);
    }
}

#[test]
fn frames_wait_for_buffers() {
    let mut bench = plain();
    bench.arrive(&frame(1, 100));
    bench.arrive(&frame(1, 200));
    bench.turn();
    assert_eq!(bench.count("no_rx_avail_buffer"), 1);
    // The event loop is left alone meanwhile.
    assert!(!bench.is_readable());
    bench.offer(60, 1536);
    for len in [100, 200] {
        assert_eq!(bench.received(1536).unwrap().1, frame(1, len));
    }
}

#[test]
fn a_frame_that_was_read_waits_until_there_is_room_for_all_of_it() {
    let mut bench = plain();
    bench.offer(2, 1536);
    bench.arrive(&frame(1, 5000));
    bench.arrive(&frame(1, 70));
    bench.turn();
    bench.offer(1, 1536);
    assert_eq!(bench.received(1536), None);
    bench.offer(10, 1536);
    assert!(bench.received(1536).unwrap().1 == frame(1, 5000));
    assert_eq!(bench.received(1536).unwrap().1, frame(1, 70));
    // A reset forgets it, as it does everything else.
    bench.arrive(&frame(1, 60_000));
    bench.turn();
    bench.driver.set_up(u64::MAX);
    bench.offer(60, 1536);
    assert_eq!(bench.received(1536), None);
}

#[test]
fn a_frame_too_long_for_a_guest_that_does_not_merge_is_lost() {
    let mut bench = bench(Settings::default(), 0);
    bench.offer(3, 1526);
    bench.arrive(&frame(1, 1515));
    bench.arrive(&frame(1, 1514));
    bench.turn();
    bench.turn();
    assert_eq!(bench.received(1526).unwrap().1, frame(1, 1514));
    assert_eq!(bench.count("rx_fails"), 1);
}

#[test]
fn a_thousand_frames_come_one_after_the_other() {
    let mut bench = plain();
    let mut next = 0;
    for round in 0..40_u8 {
        bench.offer(if round == 0 { 64 } else { 25 }, 4096);
        for nth in 0..25 {
            bench.arrive(&frame(round, 60 + nth));
        }
        bench.turn();
        for nth in 0..25 {
            let (head, written) = bench.driver.used(RX).unwrap();
            assert_eq!(head, next % 64);
            assert_eq!(written as usize, HEADER + 60 + nth);
            next += 1;
        }
        assert!(bench.driver.used(RX).is_none());
    }
}

#[test]
fn the_neighbour_gets_its_frames_and_answers_before_the_link() {
    let mut bench = plain();
    bench.arrive(&frame(1, 77));
    bench.turn();
    assert!(bench.send(&frame(9, 300)).is_some());
    bench.offer(60, 1536);
    assert_eq!(bench.received(1536).unwrap().1, frame(9, 300));
    assert_eq!(bench.received(1536).unwrap().1, frame(1, 77));
    assert_eq!(bench.arrived(), None);
    assert_eq!(bench.count("tx_packets_count"), 0);
}

#[test]
fn what_the_neighbour_says_later_comes_with_the_event_loop() {
    let mut bench = plain();
    assert!(bench.send(&frame(9, 300)).is_some());
    // There is no buffer: the event loop has next to nothing to do, and the kick does it.
    let (until, mut turns) = (Instant::now() + Duration::from_millis(100), 0);
    while Instant::now() < until {
        if bench.is_readable() {
            bench.turn();
            turns += 1;
        }
    }
    assert!(turns <= 10, "{turns}");
    bench.offer(60, 1536);
    assert_eq!(bench.received(1536).unwrap().1, frame(9, 300));
}

#[test]
fn limits_hold_frames_of_the_guest_back() {
    let settings = Settings {
        tx_limits: ops(2),
        ..Settings::default()
    };
    let mut bench = bench(settings, u64::MAX);
    assert!(bench.send(&frame(2, 60)).is_some());
    // What is the neighbour's costs nothing.
    for _ in 0..5 {
        assert!(bench.send(&frame(9, 60)).is_some());
    }
    assert!(bench.send(&frame(2, 61)).is_some());
    assert!(bench.send(&frame(2, 62)).is_none());
    std::thread::sleep(Duration::from_millis(60));
    assert!(bench.is_readable());
    bench.turn();
    assert!(bench.driver.used(TX).is_some());
    let lens: Vec<_> = std::iter::from_fn(|| bench.arrived())
        .map(|bytes| bytes.len() - HEADER)
        .collect();
    assert_eq!(lens, [60, 61, 62]);
}

#[test]
fn limits_hold_frames_for_the_guest_back() {
    let settings = Settings {
        rx_limits: ops(1),
        ..Settings::default()
    };
    let mut bench = bench(settings, u64::MAX);
    bench.offer(60, 1536);
    bench.arrive(&frame(1, 60));
    bench.arrive(&frame(1, 5000));
    bench.turn();
    assert_eq!(bench.received(1536).unwrap().1, frame(1, 60));
    assert_eq!(bench.received(1536), None);
    assert_eq!(bench.count("rx_rate_limiter_throttled"), 1);
    // Neither kicks nor frames are a way around.
    bench.driver.kick(RX);
    bench.arrive(&frame(1, 70));
    bench.turn();
    assert_eq!(bench.received(1536), None);
    std::thread::sleep(Duration::from_millis(120));
    bench.turn();
    assert_eq!(bench.received(1536).unwrap().1, frame(1, 5000));
    // Limits that are lifted let the rest go on.
    let none = Limits {
        ops: Some(Limit {
            size: 0,
            one_time_burst: 0,
            refill_ms: 0,
        }),
        bandwidth: None,
    };
    bench
        .net
        .lock()
        .unwrap()
        .update_limits(none, Limits::default());
    bench.turn();
    assert_eq!(bench.received(1536).unwrap().1, frame(1, 70));
}

#[test]
fn the_configuration_space_has_what_was_set() {
    let settings = Settings {
        mac: Some(MAC),
        mtu: Some(9000),
        ..Settings::default()
    };
    let mut bench = bench(settings, u64::MAX);
    assert_eq!(bench.driver.config::<6>(0), MAC);
    assert_eq!(bench.driver.config::<2>(10), 9000_u16.to_le_bytes());
    bench.driver.write(0x14, 0);
    assert_eq!(bench.driver.read(0x10) & 0x28, 0x28);
    bench.send(&frame(2, 60));
    assert_eq!(bench.count("tx_spoofed_mac_count"), 1);
    let mut own = frame(2, 60);
    own[6..12].copy_from_slice(&MAC);
    bench.send(&own);
    assert_eq!(bench.count("tx_spoofed_mac_count"), 1);
    let mut bare = plain();
    bare.driver.write(0x14, 0);
    assert_eq!(bare.driver.read(0x10) & 0x28, 0);
}

#[test]
fn the_link_makes_frames_that_the_guest_can_take() {
    let offloads = |features| {
        let bench = bench(Settings::default(), features);
        let offloads = *bench.offloads.lock().unwrap();
        offloads.unwrap()
    };
    assert_eq!(offloads(0), Offloads::default());
    let all = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ufo: true,
    };
    assert_eq!(offloads(u64::MAX), all);
    // Segments without checksums: against the rules, and so not taken.
    assert_eq!(offloads(1 << 7), Offloads::default());
}

#[test]
fn a_link_that_refuses_leaves_a_device_that_needs_a_reset() {
    let (near, _far) = UnixDatagram::pair().unwrap();
    let cable = Cable {
        socket: near,
        offloads: Arc::default(),
        refuses: true,
    };
    let net = Net::new(Settings::default(), Box::new(cable), None).unwrap();
    let counters = net.counters();
    let mut driver = FakeDriver::start(Arc::new(Mutex::new(net)));
    assert!(driver.needs_reset());
    assert!(counters.all().any(|each| each == ("activate_fails", 1)));
}

#[test]
fn a_saved_interface_goes_on_where_it_was() {
    let settings = Settings {
        mac: Some(MAC),
        mtu: Some(1400),
        rx_limits: ops(1),
        tx_limits: ops(5),
    };
    let mut bench = bench(settings, u64::MAX);
    bench.offer(60, 1536);
    bench.arrive(&frame(1, 60));
    bench.arrive(&frame(1, 61));
    bench.turn();
    assert_eq!(bench.received(1536).unwrap().1, frame(1, 60));
    // The frame that was held back is not lost.
    let saved = bench.net.lock().unwrap().save().unwrap();
    assert_eq!(bench.received(1536).unwrap().1, frame(1, 61));
    let twice = bench.net.lock().unwrap().save().unwrap();
    assert_eq!(saved.live, twice.live);

    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let cable = Cable {
        socket: near,
        offloads: Arc::default(),
        refuses: false,
    };
    let offloads = Arc::clone(&cable.offloads);
    let interrupt = Interrupt::new(bus::IrqLine::new(|_| {}));
    let unlimited = Settings {
        rx_limits: Limits::default(),
        ..settings
    };
    let mut restored = Net::new(unlimited, Box::new(cable), None).unwrap();
    let memory = bench.driver.ram.memory();
    saved.put_into(&mut restored, memory, &interrupt).unwrap();
    assert!(offloads.lock().unwrap().unwrap().tso4);
    assert_eq!(restored.limits().0, ops(1));
    let again = restored.save().unwrap();
    assert_eq!((again.mac, again.live), (saved.mac, saved.live));
    std::thread::sleep(Duration::from_millis(120));
    far.send(&[5; 100]).unwrap();
    restored.on_event();
    assert_eq!(bench.received(1536).unwrap().1, [5; 88]);
}

#[test]
fn a_saved_state_that_cannot_be_is_refused() {
    let bench = plain();
    let good = bench.net.lock().unwrap().save().unwrap();
    let mut bad = good.clone();
    bad.live.as_mut().unwrap().queues[1].size = 77;
    let (near, _far) = UnixDatagram::pair().unwrap();
    let cable = Cable {
        socket: near,
        offloads: Arc::default(),
        refuses: false,
    };
    let interrupt = Interrupt::new(bus::IrqLine::new(|_| {}));
    let mut net = Net::new(Settings::default(), Box::new(cable), None).unwrap();
    let refused = bad.put_into(&mut net, bench.driver.ram.memory(), &interrupt);
    assert!(matches!(
        refused,
        Err(crate::Error::Saved { device: "net" })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever the driver puts into its rings, frames reach nothing but its buffers.
    #[test]
    fn any_driver_and_any_network_leave_the_rest_of_memory_alone(
        features in any::<u64>(),
        steps in prop::collection::vec(
            (0..2_usize, 0..8_u64, 0..80_000_u32, any::<bool>(), 0..3_usize),
            1..40,
        ),
    ) {
        let mut bench = bench(Settings::default(), features);
        let beyond = BUFFERS + 0x80_0000;
        bench.driver.put(beyond, &[0xa5; 4096]);
        for (queue, page, len, write, frames) in steps {
            let at = BUFFERS + page * 0x1_0000;
            let buffer = if write { Buffer::In(at, len) } else { Buffer::Out(at, len) };
            bench.driver.add(queue, &[buffer, Buffer::In(at + 0x8_0000, 100)][..1 + frames % 2]);
            bench.driver.kick(queue);
            for _ in 0..frames {
                let _ = bench.far.send(&frame(1, len as usize % 66_000));
            }
            bench.turn();
            while bench.driver.used(RX).is_some() {}
            while bench.arrived().is_some() {}
        }
        prop_assert_eq!(bench.driver.get(beyond, 4096), vec![0xa5; 4096]);
        // What the driver broke, a reset mends.
        bench.driver.set_up(u64::MAX);
        while bench.arrived().is_some() {}
        prop_assert!(bench.send(&frame(2, 60)).is_some());
        prop_assert_eq!(bench.arrived().map(|bytes| bytes.len()), Some(72));
    }
}
