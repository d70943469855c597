//! The balloon, by an honest and a hostile driver.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bus::MmioDevice;
use proptest::prelude::*;
use ram::{ByteSize, Further, Gpa, GuestRam};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver, QUEUE_SIZE, RAM};
use crate::{EventSource, Interrupt, VirtioDevice};

const PAGE: u64 = 4096;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const HINTING: usize = 3;
const REPORTING: usize = 4;
/// Where the pages lie that the tests give away.
const PAGES: u64 = 0x80_0000;

struct Bench {
    driver: FakeDriver,
    balloon: Arc<Mutex<Balloon>>,
}

fn everything() -> Settings {
    Settings {
        amount_mib: 4,
        deflate_on_oom: true,
        statistics_interval_s: 1,
        hinting: true,
        reporting: true,
    }
}

fn bench(settings: Settings) -> Bench {
    bench_in(GuestRam::new(RAM).unwrap(), settings)
}

fn bench_in(ram: GuestRam, settings: Settings) -> Bench {
    let balloon = Balloon::new(settings, &ram).unwrap();
    let balloon = Arc::new(Mutex::new(balloon));
    Bench {
        driver: FakeDriver::start_in(ram, balloon.clone()),
        balloon,
    }
}

impl Bench {
    fn balloon(&self) -> MutexGuard<'_, Balloon> {
        self.balloon.lock().unwrap()
    }

    fn config(&mut self, at: u64) -> u32 {
        u32::from_le_bytes(self.driver.config(at))
    }

    fn fill(&self, pages: std::ops::Range<u64>) {
        for page in pages {
            self.driver.put(PAGES + page * PAGE, b"full");
        }
    }

    fn is_full(&self, page: u64) -> bool {
        match &self.driver.get(PAGES + page * PAGE, 4)[..] {
            b"full" => true,
            [0, 0, 0, 0] => false,
            other => panic!("{other:?}"),
        }
    }

    fn frames(&mut self, queue: usize, frames: &[u32]) {
        let bytes: Vec<u8> = frames.iter().flat_map(|f| f.to_le_bytes()).collect();
        self.driver.put(BUFFERS, &bytes);
        let buffer = Buffer::Out(BUFFERS, bytes.len() as u32);
        assert_eq!(self.driver.request(queue, &[buffer]), 0);
    }

    fn statistics(&mut self, statistics: &[(u16, u64)]) -> u16 {
        let bytes: Vec<u8> = statistics
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
            .collect();
        self.driver.put(BUFFERS, &bytes);
        let buffer = Buffer::Out(BUFFERS, bytes.len() as u32);
        let head = self.driver.add(STATISTICS, &[buffer]);
        self.driver.kick(STATISTICS);
        head
    }

    /// The guest says that it is at `command`.
    fn say(&mut self, command: u32) {
        self.driver.put(BUFFERS, &command.to_le_bytes());
        assert_eq!(self.driver.request(HINTING, &[Buffer::Out(BUFFERS, 4)]), 0);
    }

    fn hint(&mut self, page: u64, pages: u64) {
        let range = Buffer::In(PAGES + page * PAGE, (pages * PAGE) as u32);
        assert_eq!(self.driver.request(HINTING, &[range]), 0);
    }
}

fn first_frame() -> u32 {
    (PAGES / PAGE) as u32
}

#[test]
fn what_was_asked_for_is_offered() {
    let all = Balloon::new(everything(), &GuestRam::new(RAM).unwrap()).unwrap();
    assert_eq!(all.features(), 0b10_1110);
    assert_eq!(all.queue_sizes().len(), 5);
    let none = Balloon::new(Settings::default(), &GuestRam::new(RAM).unwrap()).unwrap();
    assert_eq!((none.features(), none.queue_sizes().len()), (0, 2));
}

#[test]
fn inflated_pages_are_given_back_and_no_others() {
    let mut bench = bench(everything());
    bench.fill(0..8);
    bench.driver.put(BUFFERS, &[0]);
    let before = bench.driver.ram.resident_bytes().unwrap();
    let first = first_frame();
    bench.frames(
        INFLATE,
        &[first + 5, first, first + 1, first + 5, first + 2],
    );
    let after = bench.driver.ram.resident_bytes().unwrap();
    assert_eq!(before - after, 4 * PAGE);
    let left: Vec<_> = (0..8).filter(|page| bench.is_full(*page)).collect();
    assert_eq!(left, [3, 4, 6, 7]);
    assert_eq!(bench.balloon().counts().inflated_bytes, 4 * PAGE);
    assert_eq!(bench.driver.handle_interrupt() & 1, 1);
    bench.frames(DEFLATE, &[first, first + 1]);
    assert_eq!(bench.balloon().counts().deflations, 1);
}

#[test]
fn pages_that_are_not_there_are_left_out() {
    let mut bench = bench(everything());
    bench.fill(0..3);
    let end = (RAM.bytes() / PAGE) as u32;
    let first = first_frame();
    bench.frames(INFLATE, &[u32::MAX, end, first + 1, 0xd_0000, u32::MAX - 1]);
    assert!(bench.is_full(0) && !bench.is_full(1) && bench.is_full(2));
    assert!(!bench.driver.needs_reset());
    // A run that begins in memory and ends behind it.
    bench.driver.put(u64::from(end - 1) * PAGE, b"full");
    bench.frames(INFLATE, &[end - 1, end, end + 1]);
    assert_eq!(bench.driver.get(u64::from(end - 1) * PAGE, 4), [0; 4]);
    assert_eq!(bench.balloon().counts().inflated_bytes, 2 * PAGE);
}

#[test]
fn a_file_of_the_host_is_never_given_back() {
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 8192], 0).unwrap();
    let further = Further::File {
        file: file.try_clone().unwrap(),
        read_only: false,
    };
    let ram = GuestRam::with(RAM, vec![further]).unwrap();
    let at = ram.regions().last().unwrap().start.0;
    let mut bench = bench_in(ram, everything());
    bench.frames(INFLATE, &[(at / PAGE) as u32]);
    bench.driver.request(REPORTING, &[Buffer::In(at, 8192)]);
    let mut content = [0; 8192];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 0).unwrap();
    assert_eq!(content, [7; 8192]);
    assert_eq!(bench.balloon().counts().refused, 2);
}

#[test]
fn one_request_costs_256_pages_at_most() {
    let mut bench = bench(everything());
    bench.fill(0..300);
    let frames: Vec<u32> = (0..300).map(|n| first_frame() + n).collect();
    bench.frames(INFLATE, &frames);
    assert!(!bench.is_full(255) && bench.is_full(256));
}

#[test]
fn half_a_frame_number_is_none() {
    let mut bench = bench(everything());
    bench.fill(0..1);
    bench.driver.put(BUFFERS, &first_frame().to_le_bytes());
    bench.driver.request(INFLATE, &[Buffer::Out(BUFFERS, 3)]);
    bench.driver.request(INFLATE, &[Buffer::In(BUFFERS, 4)]);
    bench.driver.request(INFLATE, &[Buffer::Out(BUFFERS, 0)]);
    assert!(bench.is_full(0) && !bench.driver.needs_reset());
}

#[test]
fn the_target_is_live_and_at_most_all_memory() {
    let mut bench = bench(everything());
    assert_eq!(
        (bench.config(0), bench.config(4), bench.config(8)),
        (1024, 0, 0)
    );
    bench.balloon().update(16).unwrap();
    assert_eq!(bench.config(0), 4096);
    assert_eq!(bench.driver.handle_interrupt(), 2);
    let refused = bench.balloon().update(17);
    let too_large = BalloonError::TooLarge {
        asked: 17,
        memory: 16,
    };
    assert_eq!(refused, Err(too_large));
    assert!(bench.balloon().update(u32::MAX).is_err());
    assert_eq!(
        (bench.config(0), bench.balloon().settings().amount_mib),
        (4096, 16)
    );
    // The guest reports.
    bench
        .driver
        .registers()
        .write(0x104, &1234_u32.to_le_bytes());
    assert_eq!(
        (bench.config(4), bench.balloon().actual_pages()),
        (1234, 1234)
    );
}

#[test]
fn the_guest_may_write_nothing_but_how_much_it_gave_up() {
    let mut bench = bench(everything());
    for (at, len) in [(0, 4), (8, 4), (4, 1), (4, 8), (2, 4), (12, 4), (0xe00, 4)] {
        bench.driver.registers().write(0x100 + at, &vec![0xff; len]);
    }
    assert_eq!(
        (bench.config(0), bench.config(4), bench.config(8)),
        (1024, 0, 0)
    );
}

#[test]
fn without_a_driver_nothing_is_asked_of_it() {
    let ram = GuestRam::new(RAM).unwrap();
    let mut balloon = Balloon::new(everything(), &ram).unwrap();
    assert_eq!(balloon.update(1), Err(BalloonError::Inactive));
    assert_eq!(balloon.start_hinting(true), Err(BalloonError::Inactive));
    assert_eq!(balloon.stop_hinting(), Err(BalloonError::Inactive));
    let mut plain = Balloon::new(Settings::default(), &ram).unwrap();
    assert_eq!(plain.start_hinting(true), Err(BalloonError::NoHinting));
    assert_eq!(plain.hinting(), Err(BalloonError::NoHinting));
    assert_eq!(plain.statistics(), Err(BalloonError::NoStatistics));
    assert_eq!(
        plain.update_statistics_interval(1),
        Err(BalloonError::StatisticsFixed)
    );
    assert_eq!(plain.update_statistics_interval(0), Ok(()));
}

#[test]
fn statistics_are_held_until_the_timer_asks_for_new_ones() {
    let mut bench = bench(everything());
    let all: Vec<(u16, u64)> = (0..16).map(|tag| (tag, 100 + u64::from(tag))).collect();
    let head = bench.statistics(&all);
    let statistics = bench.balloon().statistics().unwrap();
    assert_eq!(
        (statistics.swap_in, statistics.direct_reclaim),
        (Some(100), Some(115))
    );
    assert_eq!(statistics.free_memory, Some(104));
    assert_eq!(bench.driver.used(STATISTICS), None);

    {
        let mut balloon = bench.balloon();
        let mut ready = [PollFd::from_borrowed_fd(balloon.fd(), PollFlags::IN)];
        let patience = Timespec::try_from(Duration::from_secs(10)).unwrap();
        assert_eq!(poll(&mut ready, Some(&patience)), Ok(1));
        balloon.on_event();
    }
    assert_eq!(bench.driver.used(STATISTICS), Some((head, 0)));
    bench.balloon().on_event();
    assert_eq!(bench.driver.used(STATISTICS), None);

    bench.statistics(&[(4, 7), (999, 1)]);
    let statistics = bench.balloon().statistics().unwrap();
    assert_eq!(
        (statistics.free_memory, statistics.swap_in),
        (Some(7), Some(100))
    );
    assert_eq!(bench.balloon().counts().statistics_unknown, 1);
}

#[test]
fn a_new_interval_asks_at_once_and_0_is_refused() {
    let mut bench = bench(everything());
    let head = bench.statistics(&[(4, 7)]);
    bench.balloon().update_statistics_interval(1).unwrap();
    assert_eq!(bench.driver.used(STATISTICS), None, "no change");
    bench.balloon().update_statistics_interval(60).unwrap();
    assert_eq!(bench.driver.used(STATISTICS), None, "the event loop's");
    bench.balloon().on_event();
    assert_eq!(bench.driver.used(STATISTICS), Some((head, 0)));
    assert_eq!(
        bench.balloon().update_statistics_interval(0),
        Err(BalloonError::StatisticsFixed)
    );
    assert_eq!(bench.balloon().settings().statistics_interval_s, 60);
}

#[test]
fn a_second_buffer_of_statistics_frees_the_first() {
    let mut bench = bench(everything());
    let first = bench.statistics(&[(4, 1)]);
    bench.statistics(&[(4, 2)]);
    assert_eq!(bench.driver.used(STATISTICS), Some((first, 0)));
    assert_eq!(bench.driver.used(STATISTICS), None);
    let endless = Buffer::Out(BUFFERS, 8 << 20);
    bench.driver.add(STATISTICS, &[endless]);
    bench.driver.kick(STATISTICS);
    assert!(bench.balloon().counts().statistics_unknown < 1000);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn reported_ranges_are_given_back() {
    let mut bench = bench(everything());
    bench.fill(0..6);
    let (at, len) = (PAGES + PAGE, 2 * PAGE as u32);
    let ranges = [Buffer::In(at, len), Buffer::In(PAGES + 4 * PAGE, 100)];
    bench.driver.request(REPORTING, &ranges);
    let left: Vec<_> = (0..6).filter(|page| bench.is_full(*page)).collect();
    assert_eq!(left, [0, 3, 4, 5], "less than a page stays");
    let counts = bench.balloon().counts();
    assert_eq!((counts.reports, counts.reported_bytes), (2, 2 * PAGE));
    // What the device is to read is no report.
    bench.driver.request(REPORTING, &[Buffer::Out(PAGES, 4096)]);
    assert!(bench.is_full(0));
}

#[test]
fn a_run_of_hinting_ends_by_itself_when_it_is_acknowledged() {
    let mut bench = bench(everything());
    bench.fill(0..4);
    bench.balloon().start_hinting(true).unwrap();
    assert_eq!((bench.config(8), bench.driver.handle_interrupt()), (2, 2));
    bench.hint(0, 1);
    assert!(bench.is_full(0), "the guest has not begun");
    bench.say(2);
    bench.hint(0, 2);
    bench.say(0);
    assert!(!bench.is_full(0) && !bench.is_full(1) && bench.is_full(2));
    let hinting = bench.balloon().hinting().unwrap();
    assert_eq!((hinting.host_command, hinting.guest_command), (1, Some(0)));
    assert_eq!(bench.config(8), 1);
    bench.hint(2, 1);
    assert!(bench.is_full(2), "it is over");
}

#[test]
fn a_run_that_is_not_acknowledged_ends_when_it_is_stopped() {
    let mut bench = bench(everything());
    bench.fill(0..4);
    bench.balloon().start_hinting(false).unwrap();
    bench.say(2);
    bench.hint(0, 1);
    bench.say(0);
    assert_eq!(bench.config(8), 2);
    bench.balloon().stop_hinting().unwrap();
    assert_eq!(bench.config(8), 1);
    bench.balloon().start_hinting(false).unwrap();
    assert_eq!(bench.config(8), 3);
    bench.say(2);
    bench.hint(1, 1);
    assert!(bench.is_full(1), "of the run before");
    bench.say(3);
    bench.hint(1, 1);
    assert!(!bench.is_full(1));
    assert_eq!(bench.balloon().counts().hinted_bytes, 2 * PAGE);
}

#[test]
fn queues_of_features_that_were_not_accepted_do_not_count() {
    let mut bench = bench(everything());
    // Reporting alone: its queue is the third.
    bench.driver.set_up(1 << 5);
    assert!(!bench.driver.needs_reset());
    bench.fill(0..2);
    bench.driver.request(2, &[Buffer::In(PAGES, 4096)]);
    assert!(!bench.is_full(0) && bench.is_full(1));
    bench.driver.kick(3);
    bench.driver.kick(4);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn a_reset_forgets_the_guest_and_keeps_what_was_asked() {
    let mut bench = bench(everything());
    bench.balloon().update(8).unwrap();
    bench
        .driver
        .registers()
        .write(0x104, &1234_u32.to_le_bytes());
    bench.statistics(&[(4, 1)]);
    bench.balloon().start_hinting(true).unwrap();
    bench.driver.set_up(u64::MAX);
    assert_eq!(
        (bench.config(0), bench.config(4), bench.config(8)),
        (2048, 0, 0)
    );
    assert_eq!(bench.balloon().statistics().unwrap(), Statistics::default());
}

#[test]
fn a_restored_balloon_goes_on_where_it_was() {
    let mut bench = bench(everything());
    bench.fill(0..2);
    bench.balloon().update(8).unwrap();
    bench.driver.registers().write(0x104, &77_u32.to_le_bytes());
    let head = bench.statistics(&[(4, 1)]);
    bench.balloon().start_hinting(true).unwrap();
    let saved = bench.balloon().save();
    let line = bus::IrqLine::new(|_| {});
    let restored =
        Balloon::restore(&saved, &bench.driver.ram, &Interrupt::new(line.clone())).unwrap();
    assert_eq!(
        (restored.actual_pages(), restored.settings().amount_mib),
        (77, 8)
    );
    assert_eq!(
        restored.hinting().unwrap().host_command,
        1,
        "the run is over"
    );
    *bench.balloon() = restored;
    bench.balloon().update_statistics_interval(9).unwrap();
    bench.balloon().on_event();
    assert_eq!(bench.driver.used(STATISTICS), Some((head, 0)));
    bench.frames(INFLATE, &[first_frame()]);
    assert!(!bench.is_full(0) && bench.is_full(1));
    let again = bench.balloon().save();
    assert_eq!(again.live.as_ref().unwrap().queues.len(), 5);

    let mut wrong = again.clone();
    wrong.live.as_mut().unwrap().queues.pop();
    let interrupt = Interrupt::new(line);
    assert!(Balloon::restore(&wrong, &bench.driver.ram, &interrupt).is_err());
    let mut wrong = again;
    wrong.live.as_mut().unwrap().queues[0].max_size = 3;
    assert!(Balloon::restore(&wrong, &bench.driver.ram, &interrupt).is_err());
}

proptest! {
    #[test]
    fn any_frames_give_back_exactly_what_is_memory(
        frames in prop::collection::vec(prop_oneof![0_u32..8, Just(u32::MAX), any::<u32>()], 0..40)
    ) {
        let ram = GuestRam::new(ByteSize::mib(16)).unwrap();
        let mut bench = bench_in(ram, everything());
        bench.fill(0..8);
        let frames: Vec<u32> = frames
            .into_iter()
            .map(|n| if n < 8 { first_frame() + n } else { n | 1 << 20 })
            .collect();
        bench.frames(INFLATE, &frames);
        for page in 0..8 {
            let named = frames.contains(&(first_frame() + page as u32));
            prop_assert_eq!(bench.is_full(page), !named);
        }
        prop_assert!(bench.driver.ram.contains(Gpa(0), 1) && usize::from(QUEUE_SIZE) > 40);
    }
}
