//! One descriptor for all the sockets and the timer of a device.
//!
//! They are polled edge-triggered: devices remember what they may read or write, so
//! that a descriptor with data which the guest does not take neither keeps the event
//! loop busy nor needs to be re-registered.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::Error;

/// Names a polled socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Token(pub(crate) u64);

/// What happened to a socket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) token: Token,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The other end is closed in both directions.
    pub(crate) hung_up: bool,
}

/// A socket whose other end reads would wake us each time if it were polled for
/// output without need.
const INPUT: EventFlags = EventFlags::IN
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);
const TIMER: Token = Token(u64::MAX);
const EVENTS_MAX: usize = 64;

#[derive(Debug)]
pub(crate) struct Poller {
    epoll: OwnedFd,
    timer: OwnedFd,
}

impl Poller {
    pub(crate) fn new() -> Result<Self, Error> {
        let host = |doing| {
            move |e: rustix::io::Errno| Error::Host {
                doing,
                source: e.into(),
            }
        };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host("make an epoll"))?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )
        .map_err(host("make a timer"))?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER.0), EventFlags::IN)
            .map_err(host("poll a timer"))?;
        Ok(Self { epoll, timer })
    }

    /// Polls `socket` for input until it is closed or removed.
    pub(crate) fn add(&self, socket: impl AsFd, token: Token) -> io::Result<()> {
        let data = EventData::new_u64(token.0);
        Ok(epoll::add(&self.epoll, socket, data, INPUT)?)
    }

    /// Polls `socket`, which was added, for room to write as well, or no more.
    /// What is ready already counts as happening now.
    pub(crate) fn poll_output(&self, socket: impl AsFd, token: Token, wanted: bool) {
        let output = if wanted {
            EventFlags::OUT
        } else {
            EventFlags::empty()
        };
        let data = EventData::new_u64(token.0);
        let changed = epoll::modify(&self.epoll, socket, data, INPUT | output);
        debug_assert!(changed.is_ok(), "the socket was added");
    }

    /// Polls `file`, which was added, anew: input that is there already counts as
    /// happening now.
    pub(crate) fn again(&self, file: impl AsFd, token: Token) {
        self.poll_output(file, token, false);
    }

    /// Hears no more of input for `file`, which was added, until it is polled [`again`](Self::again).
    pub(crate) fn pause(&self, file: impl AsFd, token: Token) {
        let data = EventData::new_u64(token.0);
        let changed = epoll::modify(&self.epoll, file, data, EventFlags::ET);
        debug_assert!(changed.is_ok(), "the file was added");
    }

    pub(crate) fn remove(&self, socket: impl AsFd) {
        // It only fails for what is not there.
        let _ = epoll::delete(&self.epoll, socket);
    }

    /// What happened meanwhile, and whether the alarm went off.
    pub(crate) fn take(&self) -> (Vec<Ready>, bool) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        // A failure leaves no events; the next wake tries again.
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&ZERO));
        let mut alarm = false;
        let mut ready = Vec::with_capacity(events.len());
        for event in events {
            let token = Token(event.data.u64());
            if token == TIMER {
                alarm = true;
                let mut count = [0; 8];
                let _ = rustix::io::read(&self.timer, &mut count);
                continue;
            }
            let flags = event.flags;
            ready.push(Ready {
                token,
                readable: flags.intersects(
                    EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR,
                ),
                writable: flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR),
                hung_up: flags.intersects(EventFlags::HUP | EventFlags::ERR),
            });
        }
        (ready, alarm)
    }

    /// Has the descriptor readable once `after` is over; replaces an earlier alarm.
    pub(crate) fn set_alarm(&self, after: Duration) {
        // Zero would switch it off.
        let after = after.max(Duration::from_nanos(1));
        let once = Itimerspec {
            it_interval: ZERO,
            it_value: Timespec {
                tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        let set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        debug_assert!(set.is_ok(), "setting our own timer to a valid time");
    }
}

const ZERO: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
