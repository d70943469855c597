//! The device: five queues, a timer, and what its owner may ask.
//!
//! ```text
//! statistics: guest's buffer held ─timer─▶ given back ─▶ guest fills it again ─▶ held
//! hinting:    start: a new command number in the configuration
//!             guest: that number, free ranges, …, STOP ─▶ DONE, if it is to be
//!             acknowledged ─▶ the guest has its pages again
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use ram::{Gpa, GuestMemory, GuestRam};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::spec::{
    ACTUAL_AT, CONFIG_LEN, F_DEFLATE_ON_OOM, F_HINTING, F_REPORTING, F_STATS, FRAMES_MAX,
    HINTS_DONE, HINTS_STOP, PAGE, Queue, STATISTIC_LEN, STATISTICS_MAX, queues,
};
use super::statistics::Statistics;
use super::{BalloonError, SavedBalloon};
use crate::{
    Activation, Buffers, Chain, Counted, DeviceType, Error, EventSource, Interrupt, QueueError,
    SavedDevice, VirtQueue, VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;
const PAGES_PER_MIB: u32 = 256;

/// What the balloon is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// MiB that the guest is asked to give up.
    pub amount_mib: u32,
    /// The guest takes memory back when it runs out of it.
    pub deflate_on_oom: bool,
    /// Seconds between two looks at the guest's statistics; none when 0.
    pub statistics_interval_s: u16,
    /// The guest can be asked once for all of its free pages.
    pub hinting: bool,
    /// The guest reports free pages as they become free.
    pub reporting: bool,
}

/// Where a run of hinting is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hinting {
    /// What the host asked for: 0 nothing yet, 1 done, else a run's number.
    pub host_command: u32,
    /// What the guest last said, in the same numbers.
    pub guest_command: Option<u32>,
    /// Number of the last run.
    pub(super) last: u32,
    /// The guest gets its pages back when it has named all.
    pub(super) acknowledge: bool,
}

/// What happened since the machine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests to inflate.
    pub inflations: u64,
    /// Requests to deflate.
    pub deflations: u64,
    /// Bytes that inflating gave back.
    pub inflated_bytes: u64,
    /// Statistics that came.
    pub statistics_updates: u64,
    /// Statistics that are not known.
    pub statistics_unknown: u64,
    /// Ranges that were reported.
    pub reports: u64,
    /// Bytes of them that were given back.
    pub reported_bytes: u64,
    /// Ranges that were hinted at.
    pub hints: u64,
    /// Bytes of them that were given back.
    pub hinted_bytes: u64,
    /// Ranges that are no memory of the guest's, or that the host did not take.
    pub refused: u64,
}

impl Counted for Mutex<Balloon> {
    /// By Firecracker's names (its metrics' group `balloon`) where it has one.
    fn counts(&self) -> Vec<(&'static str, u64)> {
        let balloon = self.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = balloon.counts;
        vec![
            ("inflate_count", counts.inflations),
            ("inflated_bytes", counts.inflated_bytes),
            ("deflate_count", counts.deflations),
            ("stats_updates_count", counts.statistics_updates),
            ("stats_unknown_count", counts.statistics_unknown),
            ("free_page_report_count", counts.reports),
            ("free_page_report_freed", counts.reported_bytes),
            ("free_page_hint_count", counts.hints),
            ("free_page_hint_freed", counts.hinted_bytes),
            ("refused_count", counts.refused),
        ]
    }
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    ram: GuestRam,
    pub(super) settings: Settings,
    queue_sizes: Vec<u16>,
    timer: OwnedFd,
    pub(super) actual_pages: u32,
    pub(super) hinting: Hinting,
    pub(super) statistics: Statistics,
    counts: Counts,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
    Idle,
    Live(Live),
}

#[derive(Debug)]
pub(super) struct Live {
    pub(super) memory: GuestMemory,
    pub(super) queues: Vec<(Queue, VirtQueue)>,
    pub(super) interrupt: Interrupt,
    pub(super) features: u64,
    /// The guest's buffer for statistics, if we have it.
    pub(super) statistics_head: Option<u16>,
}

impl Balloon {
    /// A balloon for the machine of `ram`.
    ///
    /// # Errors
    /// [`Error::Host`] when there is no timer.
    pub fn new(settings: Settings, ram: &GuestRam) -> Result<Self, Error> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, flags).map_err(|errno| Error::Host {
                doing: "make a timer",
                source: errno.into(),
            })?;
        Ok(Self {
            ram: ram.clone(),
            settings,
            queue_sizes: queues(offered(&settings)).map(|_| QUEUE_SIZE).collect(),
            timer,
            actual_pages: 0,
            hinting: Hinting::default(),
            statistics: Statistics::default(),
            counts: Counts::default(),
            state: State::Idle,
        })
    }

    /// What it is to be now.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Pages of 4 KiB that the guest says it gave up.
    pub fn actual_pages(&self) -> u32 {
        self.actual_pages
    }

    /// Pages of 4 KiB that the guest is to give up.
    pub fn target_pages(&self) -> u32 {
        self.settings.amount_mib.saturating_mul(PAGES_PER_MIB)
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Asks the guest to give up `amount_mib`.
    ///
    /// # Errors
    /// [`BalloonError::Inactive`], [`BalloonError::TooLarge`].
    pub fn update(&mut self, amount_mib: u32) -> Result<(), BalloonError> {
        let State::Live(live) = &self.state else {
            return Err(BalloonError::Inactive);
        };
        let memory = self.ram.size().bytes() >> 20;
        if u64::from(amount_mib) > memory || amount_mib > u32::MAX / PAGES_PER_MIB {
            return Err(BalloonError::TooLarge {
                asked: amount_mib,
                memory,
            });
        }
        self.settings.amount_mib = amount_mib;
        live.interrupt.config_changed();
        Ok(())
    }

    /// Looks at the statistics every `seconds` from now on, and once at once: by the timer,
    /// as only the event loop may write to the guest's memory.
    ///
    /// # Errors
    /// [`BalloonError::StatisticsFixed`] for 0, or when there are none.
    pub fn update_statistics_interval(&mut self, seconds: u16) -> Result<(), BalloonError> {
        let before = self.settings.statistics_interval_s;
        if before == seconds {
            return Ok(());
        }
        if before == 0 || seconds == 0 {
            return Err(BalloonError::StatisticsFixed);
        }
        self.settings.statistics_interval_s = seconds;
        if matches!(self.state, State::Live(_)) {
            self.arm_from(AT_ONCE, seconds);
        }
        Ok(())
    }

    /// The last statistics.
    ///
    /// # Errors
    /// [`BalloonError::NoStatistics`].
    pub fn statistics(&self) -> Result<Statistics, BalloonError> {
        if self.settings.statistics_interval_s == 0 {
            return Err(BalloonError::NoStatistics);
        }
        Ok(self.statistics)
    }

    /// Asks the guest for all of its free pages. With `acknowledge` it may use them
    /// again as soon as it has named all, without it after [`Balloon::stop_hinting`].
    ///
    /// # Errors
    /// [`BalloonError::NoHinting`], [`BalloonError::Inactive`].
    pub fn start_hinting(&mut self, acknowledge: bool) -> Result<(), BalloonError> {
        self.check_hinting()?;
        // The first two numbers have a meaning of their own.
        let run = self.hinting.last.wrapping_add(1).max(2);
        self.hinting.last = run;
        self.hinting.acknowledge = acknowledge;
        self.command(run)
    }

    /// Where hinting is.
    ///
    /// # Errors
    /// [`BalloonError::NoHinting`].
    pub fn hinting(&self) -> Result<Hinting, BalloonError> {
        self.check_hinting().map(|()| self.hinting)
    }

    /// Lets the guest use the hinted pages again.
    ///
    /// # Errors
    /// [`BalloonError::NoHinting`], [`BalloonError::Inactive`].
    pub fn stop_hinting(&mut self) -> Result<(), BalloonError> {
        self.check_hinting()?;
        self.command(HINTS_DONE)
    }

    fn check_hinting(&self) -> Result<(), BalloonError> {
        if self.settings.hinting {
            Ok(())
        } else {
            Err(BalloonError::NoHinting)
        }
    }

    fn command(&mut self, command: u32) -> Result<(), BalloonError> {
        let State::Live(live) = &self.state else {
            return Err(BalloonError::Inactive);
        };
        self.hinting.host_command = command;
        live.interrupt.config_changed();
        Ok(())
    }

    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedBalloon {
        SavedBalloon::of(self)
    }

    /// The balloon as it was saved, for a machine with the memory that it had.
    /// `interrupt` is the one of its transport.
    ///
    /// # Errors
    /// [`Error::Host`], [`Error::Saved`].
    pub fn restore(
        saved: &SavedBalloon,
        ram: &GuestRam,
        interrupt: &Interrupt,
    ) -> Result<Self, Error> {
        let mut balloon = saved.balloon(ram, interrupt)?;
        // A run that was going on is over: its pages are the guest's.
        if balloon.hinting.host_command != HINTS_STOP {
            let _ = balloon.command(HINTS_DONE);
        }
        if matches!(balloon.state, State::Live(_)) {
            balloon.arm(balloon.settings.statistics_interval_s);
        }
        Ok(balloon)
    }

    /// Rings every `seconds`; never for 0.
    fn arm(&self, seconds: u16) {
        self.arm_from(whole(seconds), seconds);
    }

    /// Rings after `first`, then every `seconds`.
    fn arm_from(&self, first: Timespec, seconds: u16) {
        let times = Itimerspec {
            it_interval: whole(seconds),
            it_value: first,
        };
        // Fails for times that cannot be only.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &times);
    }

    /// Gives the guest's buffer back, to be filled again.
    fn ask_for_statistics(&mut self) -> Result<(), QueueError> {
        let State::Live(live) = &mut self.state else {
            return Ok(());
        };
        let Some(head) = live.statistics_head.take() else {
            tracing::debug!("balloon statistics: the guest has not answered yet");
            return Ok(());
        };
        let queue = live
            .queues
            .iter_mut()
            .find(|(q, _)| *q == Queue::Statistics);
        match queue {
            Some((_, queue)) => {
                queue.complete(&live.memory, head, 0)?;
                queue.signal(&live.memory)
            }
            None => Ok(()),
        }
    }
}

/// The shortest time: zero would be never.
const AT_ONCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1,
};

fn whole(seconds: u16) -> Timespec {
    Timespec {
        tv_sec: seconds.into(),
        tv_nsec: 0,
    }
}

fn offered(settings: &Settings) -> u64 {
    [
        (settings.deflate_on_oom, F_DEFLATE_ON_OOM),
        (settings.statistics_interval_s > 0, F_STATS),
        (settings.hinting, F_HINTING),
        (settings.reporting, F_REPORTING),
    ]
    .into_iter()
    .filter(|(asked, _)| *asked)
    .fold(0, |features, (_, feature)| features | feature)
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        offered(&self.settings)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn queues_in_use(&self, features: u64) -> usize {
        queues(features & self.features()).count()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; CONFIG_LEN];
        let fields = [
            self.target_pages(),
            self.actual_pages,
            self.hinting.host_command,
        ];
        for (to, field) in bytes.chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        crate::device::copy_config(&bytes, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL_AT, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual_pages = u32::from_le_bytes(data);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        let purposes = queues(activation.features);
        self.state = State::Live(Live {
            memory: activation.memory,
            queues: purposes.zip(activation.queues).collect(),
            interrupt: activation.interrupt,
            features: activation.features,
            statistics_head: None,
        });
        if activation.features & F_STATS != 0 {
            self.arm(self.settings.statistics_interval_s);
        }
        Ok(())
    }

    fn notify(&mut self, queue: u16) -> Result<(), QueueError> {
        let State::Live(live) = &mut self.state else {
            return Ok(());
        };
        let Live { memory, queues, .. } = live;
        let Some((purpose, queue)) = queues.get_mut(usize::from(queue)) else {
            return Ok(());
        };
        let (ram, counts) = (&self.ram, &mut self.counts);
        match purpose {
            Queue::Inflate => queue.serve(memory, |chain| {
                counts.inflations += 1;
                counts.inflated_bytes += inflate(ram, chain.readable, &mut counts.refused);
                0
            }),
            // The host backs pages as they are touched.
            Queue::Deflate => queue.serve(memory, |_| {
                counts.deflations += 1;
                0
            }),
            Queue::Statistics => take_statistics(
                memory,
                queue,
                &mut live.statistics_head,
                &mut self.statistics,
                counts,
            ),
            Queue::Reporting => queue.serve(memory, |mut chain| {
                let (ranges, bytes) = free(ram, &mut chain.writable, &mut counts.refused);
                counts.reports += ranges;
                counts.reported_bytes += bytes;
                0
            }),
            Queue::Hinting => {
                let hinting = &mut self.hinting;
                let mut ended = false;
                queue.serve(memory, |chain| {
                    let (ranges, bytes) =
                        hint(ram, chain, hinting, &mut ended, &mut counts.refused);
                    counts.hints += ranges;
                    counts.hinted_bytes += bytes;
                    0
                })?;
                if ended && hinting.acknowledge {
                    let _ = self.command(HINTS_DONE);
                }
                Ok(())
            }
        }
    }

    fn save(&mut self) -> Result<SavedDevice, Error> {
        Ok(SavedDevice::Balloon(Balloon::save(self)))
    }

    fn restore(
        &mut self,
        saved: &SavedDevice,
        _memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        match saved {
            SavedDevice::Balloon(saved) => {
                *self = Balloon::restore(saved, &self.ram.clone(), interrupt)?;
                Ok(())
            }
            other => Err(other.misplaced()),
        }
    }

    fn reset(&mut self) {
        self.state = State::Idle;
        self.actual_pages = 0;
        self.hinting = Hinting::default();
        self.statistics = Statistics::default();
        self.arm(0);
    }
}

impl EventSource for Balloon {
    fn fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    fn on_event(&mut self) {
        let mut expirations = [0; 8];
        if rustix::io::read(&self.timer, &mut expirations).is_err() {
            return;
        }
        if let Err(error) = self.ask_for_statistics() {
            tracing::warn!(%error, "balloon needs a reset");
            if let State::Live(live) = &self.state {
                live.interrupt.needs_reset();
            }
        }
    }
}

/// Gives back the pages whose frame numbers are in `frames`; returns how many bytes.
fn inflate(ram: &GuestRam, mut frames: Buffers<'_>, refused: &mut u64) -> u64 {
    let mut pages = Vec::with_capacity(FRAMES_MAX.min(frames.len() / 4));
    while pages.len() < FRAMES_MAX
        && let Some(frame) = frames.read_array()
    {
        pages.push(u32::from_le_bytes(frame));
    }
    pages.sort_unstable();
    pages.dedup();
    let mut bytes = 0;
    for run in pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
        let first = run.first().copied().unwrap_or(0);
        let at = Gpa(u64::from(first) * PAGE);
        match ram.discard(at, run.len() as u64 * PAGE) {
            Ok(freed) => bytes += freed,
            // A run may begin in memory and end behind it.
            Err(_) if run.len() > 1 => {
                for &frame in run {
                    bytes += discard(ram, Gpa(u64::from(frame) * PAGE), PAGE, refused);
                }
            }
            Err(error) => refuse(&error, refused),
        }
    }
    bytes
}

fn discard(ram: &GuestRam, at: Gpa, len: u64, refused: &mut u64) -> u64 {
    ram.discard(at, len).unwrap_or_else(|error| {
        refuse(&error, refused);
        0
    })
}

fn refuse(error: &ram::Error, refused: &mut u64) {
    *refused += 1;
    tracing::debug!(%error, "balloon: not given back");
}

/// Gives back the ranges that buffers are; returns their number and how many bytes.
fn free(ram: &GuestRam, ranges: &mut Buffers<'_>, refused: &mut u64) -> (u64, u64) {
    let (mut n, mut bytes) = (0, 0);
    for range in ranges.pieces() {
        n += 1;
        bytes += discard(ram, range.bitmap().start(), range.len() as u64, refused);
    }
    (n, bytes)
}

/// Takes one request of the hinting queue: a command number, ranges, or both.
fn hint(
    ram: &GuestRam,
    mut chain: Chain<'_>,
    hinting: &mut Hinting,
    ended: &mut bool,
    refused: &mut u64,
) -> (u64, u64) {
    while let Some(command) = chain.readable.read_array() {
        let command = u32::from_le_bytes(command);
        hinting.guest_command = Some(command);
        // DONE is the host's to say; from a guest it can only mean the same.
        *ended = command == HINTS_STOP || command == HINTS_DONE;
    }
    let run = hinting.host_command;
    let current = run != HINTS_STOP && run != HINTS_DONE && hinting.guest_command == Some(run);
    if current {
        free(ram, &mut chain.writable, refused)
    } else {
        // Of a run that was stopped: the guest may use them already.
        (0, 0)
    }
}

/// Reads statistics, and holds the last buffer until they are wanted again.
fn take_statistics(
    memory: &GuestMemory,
    queue: &mut VirtQueue,
    held: &mut Option<u16>,
    statistics: &mut Statistics,
    counts: &mut Counts,
) -> Result<(), QueueError> {
    loop {
        while let Some(mut chain) = queue.pop(memory)? {
            counts.statistics_updates += 1;
            let mut left = STATISTICS_MAX;
            while left > 0
                && let Some(bytes) = chain.readable.read_array::<STATISTIC_LEN>()
            {
                left -= 1;
                let [t0, t1, value @ ..] = bytes;
                let tag = u16::from_le_bytes([t0, t1]);
                if !statistics.take(tag, u64::from_le_bytes(value)) {
                    counts.statistics_unknown += 1;
                }
            }
            // Drivers have one buffer; who has more gets the earlier ones back.
            if let Some(earlier) = held.replace(chain.head) {
                queue.complete(memory, earlier, 0)?;
            }
        }
        if !queue.want_kick(memory)? {
            return queue.signal(memory);
        }
    }
}
