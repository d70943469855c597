//! Both buckets and their timer.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::bucket::{Bucket, Limit};
use crate::Error;

/// What a limiter is to limit, or what of it is to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub bandwidth: Option<Limit>,
    /// Requests or packets.
    pub ops: Option<Limit>,
}

/// Both buckets, with the time as an argument.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Buckets {
    pub(super) bandwidth: Option<Bucket>,
    pub(super) ops: Option<Bucket>,
}

impl Buckets {
    pub(super) fn new(limits: Limits, now: Instant) -> Self {
        let mut buckets = Self::default();
        buckets.update(limits, now);
        buckets
    }

    /// Replaces the buckets that `limits` names with full ones.
    pub(super) fn update(&mut self, limits: Limits, now: Instant) {
        if let Some(limit) = limits.bandwidth {
            self.bandwidth = Bucket::new(limit, now);
        }
        if let Some(limit) = limits.ops {
            self.ops = Bucket::new(limit, now);
        }
    }

    /// Takes `bytes` and one operation from their buckets, or nothing from either: then
    /// says how long to wait at least.
    pub(super) fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let wait = |bucket: &mut Option<Bucket>, tokens| {
            let bucket = bucket.as_mut();
            bucket.map_or(Duration::ZERO, |bucket| bucket.wait(tokens, now))
        };
        let wait = wait(&mut self.bandwidth, bytes).max(wait(&mut self.ops, 1));
        if !wait.is_zero() {
            return Err(wait);
        }
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.take(1);
        }
        Ok(())
    }

    fn give_back(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.give_back(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.give_back(1);
        }
    }
}

/// Limits one direction of one device's traffic.
///
/// A device asks [`RateLimiter::allow`] before each request. After a `false` it leaves
/// the request where it is until [`RateLimiter::fd`] is readable; then it calls
/// [`RateLimiter::acknowledge`] and asks again.
#[derive(Debug)]
pub struct RateLimiter {
    pub(super) buckets: Buckets,
    timer: OwnedFd,
    held_until: Option<Instant>,
}

impl RateLimiter {
    /// A limiter with full buckets. One without limits can get them later.
    ///
    /// # Errors
    /// [`Error::Host`]: no timer.
    pub fn new(limits: Limits) -> Result<Self, Error> {
        Self::with(Buckets::new(limits, Instant::now()))
    }

    pub(super) fn with(buckets: Buckets) -> Result<Self, Error> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, flags).map_err(|errno| Error::Host {
                doing: "make a rate limiter's timer",
                source: errno.into(),
            })?;
        Ok(Self {
            buckets,
            timer,
            held_until: None,
        })
    }

    /// Whether one operation of `bytes` may pass now; it is paid for then. Otherwise the
    /// timer is set.
    pub fn allow(&mut self, bytes: u64) -> bool {
        if self.buckets.bandwidth.is_none() && self.buckets.ops.is_none() {
            return true;
        }
        let now = Instant::now();
        if self.held_until.is_some_and(|until| now < until) {
            return false;
        }
        match self.buckets.take(bytes, now) {
            Ok(()) => {
                self.held_until = None;
                true
            }
            Err(wait) => {
                self.held_until = now.checked_add(wait);
                self.arm(wait);
                false
            }
        }
    }

    /// Takes back an [`RateLimiter::allow`] whose operation did not happen.
    pub fn give_back(&mut self, bytes: u64) {
        self.buckets.give_back(bytes);
    }

    /// Puts full buckets in place of those that `limits` names; the others stay. A limit
    /// of size or time 0 is none. What was held up may ask again at once:
    /// [`RateLimiter::fd`] becomes readable.
    pub fn update(&mut self, limits: Limits) {
        self.buckets.update(limits, Instant::now());
        if self.held_until.take().is_some() {
            self.arm(Duration::from_nanos(1));
        }
    }

    /// The limits as they were set last.
    pub fn limits(&self) -> Limits {
        let limit = |bucket: &Option<Bucket>| bucket.as_ref().map(|bucket| bucket.limit);
        Limits {
            bandwidth: limit(&self.buckets.bandwidth),
            ops: limit(&self.buckets.ops),
        }
    }

    /// Whether the last request had to wait and waits still.
    pub fn is_holding(&self) -> bool {
        self.held_until.is_some()
    }

    /// Readable once what was held up may ask again.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Makes [`RateLimiter::fd`] not readable; whether it was.
    pub fn acknowledge(&mut self) -> bool {
        let mut expirations = [0; 8];
        let fired = rustix::io::read(&self.timer, &mut expirations).is_ok();
        if fired {
            self.held_until = None;
        }
        fired
    }

    fn arm(&self, wait: Duration) {
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                // At most 2^64 ns.
                tv_sec: wait.as_secs().cast_signed(),
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        // It fails only for times that cannot be.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }
}
