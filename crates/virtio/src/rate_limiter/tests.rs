//! Limits, by a clock that the tests turn, and the timer by a real one.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};

use super::limiter::Buckets;
use super::{Limit, Limits, RateLimiter, SavedBucket, SavedLimiter};

const fn limit(size: u64, one_time_burst: u64, refill_ms: u64) -> Limit {
    Limit {
        size,
        one_time_burst,
        refill_ms,
    }
}

fn bandwidth(limit: Limit) -> Limits {
    Limits {
        bandwidth: Some(limit),
        ops: None,
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn a_bucket_starts_full_and_empties() {
    let start = Instant::now();
    let mut buckets = Buckets::new(bandwidth(limit(1000, 0, 100)), start);
    assert_eq!(buckets.take(600, start), Ok(()));
    assert_eq!(buckets.take(400, start), Ok(()));
    assert_eq!(buckets.take(100, start), Err(ms(10)));
    assert_eq!(buckets.take(100, start + ms(10)), Ok(()));
    assert_eq!(buckets.take(1000, start + ms(10)), Err(ms(100)));
    assert_eq!(buckets.take(1000, start + ms(5000)), Ok(()));
    assert_eq!(
        buckets.take(1, start + ms(5000)),
        Err(Duration::from_micros(100)),
        "it never holds more than its size"
    );
}

#[test]
fn the_burst_is_extra_and_does_not_come_back() {
    let start = Instant::now();
    let mut buckets = Buckets::new(bandwidth(limit(1000, 500, 100)), start);
    assert_eq!(buckets.take(1400, start), Ok(()));
    assert_eq!(buckets.take(100, start), Ok(()));
    assert!(buckets.take(1, start).is_err());
    assert_eq!(buckets.take(1000, start + ms(1000)), Ok(()));
    assert_eq!(buckets.take(500, start + ms(1000)), Err(ms(50)));
}

#[test]
fn a_request_larger_than_the_bucket_passes_a_full_one_and_leaves_a_debt() {
    let start = Instant::now();
    let mut buckets = Buckets::new(bandwidth(limit(1000, 0, 100)), start);
    assert_eq!(buckets.take(1, start), Ok(()));
    let wait = buckets.take(3000, start).unwrap_err();
    assert_eq!(wait, Duration::from_micros(100));
    assert_eq!(buckets.take(3000, start + wait), Ok(()));
    let later = start + wait;
    assert_eq!(buckets.take(0, later), Err(ms(200)), "the debt");
    assert_eq!(buckets.take(500, later), Err(ms(250)));
    assert_eq!(buckets.take(500, later + ms(250)), Ok(()));
}

#[test]
fn a_size_or_time_of_0_is_no_limit() {
    let start = Instant::now();
    for none in [limit(0, 9, 9), limit(9, 9, 0)] {
        let limits = Limits {
            bandwidth: Some(none),
            ops: Some(none),
        };
        let mut buckets = Buckets::new(limits, start);
        assert_eq!(buckets, Buckets::default());
        for _ in 0..100 {
            assert_eq!(buckets.take(u64::MAX, start), Ok(()));
        }
    }
}

#[test]
fn operations_are_not_paid_for_when_their_bytes_have_to_wait() {
    let start = Instant::now();
    let limits = Limits {
        bandwidth: Some(limit(100, 0, 100)),
        ops: Some(limit(2, 0, 1_000_000)),
    };
    let mut buckets = Buckets::new(limits, start);
    assert_eq!(buckets.take(100, start), Ok(()));
    for _ in 0..10 {
        assert_eq!(buckets.take(100, start), Err(ms(100)));
    }
    assert_eq!(buckets.take(100, start + ms(100)), Ok(()));
    assert!(buckets.take(0, start + ms(200)).is_err(), "two were all");
}

#[test]
fn an_update_replaces_one_bucket_with_a_full_one_and_leaves_the_other() {
    let start = Instant::now();
    let limits = Limits {
        bandwidth: Some(limit(100, 0, 100)),
        ops: Some(limit(2, 0, 1000)),
    };
    let mut buckets = Buckets::new(limits, start);
    assert_eq!(buckets.take(100, start), Ok(()));
    buckets.update(bandwidth(limit(50, 0, 100)), start);
    assert_eq!(buckets.take(50, start), Ok(()));
    assert_eq!(
        buckets.take(0, start),
        Err(ms(500)),
        "operations are used up"
    );
    buckets.update(
        Limits {
            bandwidth: None,
            ops: Some(limit(0, 0, 0)),
        },
        start,
    );
    assert_eq!(buckets.take(0, start), Ok(()));
    assert_eq!(buckets.take(50, start), Err(ms(100)));
}

fn is_readable(limiter: &RateLimiter, within: Duration) -> bool {
    let timer = limiter.fd();
    let mut fds = [PollFd::new(&timer, PollFlags::IN)];
    let timeout = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: within.subsec_nanos().into(),
    };
    poll(&mut fds, Some(&timeout)).unwrap() == 1
}

#[test]
fn the_timer_says_when_to_ask_again() {
    let mut limiter = RateLimiter::new(bandwidth(limit(1000, 0, 50))).unwrap();
    assert!(limiter.allow(1000));
    assert!(!limiter.allow(1000));
    assert!(limiter.is_holding());
    assert!(!limiter.acknowledge());
    assert!(is_readable(&limiter, ms(900)));
    assert!(limiter.acknowledge());
    assert!(!is_readable(&limiter, Duration::ZERO));
    assert!(limiter.allow(1000));
    assert!(!limiter.is_holding());
}

#[test]
fn an_update_wakes_what_was_held_up() {
    let mut limiter = RateLimiter::new(bandwidth(limit(1000, 0, 1 << 40))).unwrap();
    assert!(limiter.allow(1000));
    assert!(!limiter.allow(1000));
    limiter.update(bandwidth(limit(2000, 0, 1 << 40)));
    assert_eq!(limiter.limits(), bandwidth(limit(2000, 0, 1 << 40)));
    assert!(is_readable(&limiter, ms(900)));
    assert!(limiter.acknowledge());
    assert!(limiter.allow(2000));
    assert!(!limiter.allow(1));
    limiter.give_back(1);
    limiter.update(Limits::default());
    assert!(limiter.allow(1));
}

#[test]
fn a_saved_level_that_cannot_be_is_brought_into_range() {
    let bucket = |level, burst_left| SavedBucket {
        limit: limit(u64::MAX, 10, u64::MAX),
        burst_left,
        level,
    };
    let saved = SavedLimiter {
        bandwidth: Some(bucket(i128::MIN, u64::MAX)),
        ops: Some(bucket(i128::MAX, 0)),
    };
    let mut limiter = RateLimiter::restore(&saved).unwrap();
    assert!(!limiter.allow(u64::MAX));
    let again = limiter.save();
    assert_eq!(again.bandwidth.unwrap().burst_left, 10);
    assert!(again.ops.unwrap().level < i128::MAX);
}

fn any_limit() -> impl Strategy<Value = Limit> {
    let number = || prop_oneof![1..20u64, 1..100_000u64, any::<u64>(), Just(u64::MAX)];
    (number(), prop_oneof![Just(0), number()], number())
        .prop_map(|(size, burst, refill)| limit(size.max(1), burst, refill.max(1)))
}

proptest! {
    #[test]
    fn no_more_passes_than_was_there_and_flowed_in(
        size in 1..5000u64,
        burst in 0..5000u64,
        refill_ms in 1..500u64,
        asked in proptest::collection::vec((1..=5000u64, 0..20_000_000u64), 1..200),
    ) {
        let mut now = Instant::now();
        let start = now;
        let mut buckets = Buckets::new(bandwidth(limit(size, burst, refill_ms)), now);
        let mut passed = 0;
        for (tokens, pause_ns) in asked {
            now += Duration::from_nanos(pause_ns);
            let tokens = tokens.min(size);
            if buckets.take(tokens, now).is_ok() {
                passed += u128::from(tokens);
            }
            let came = (now - start).as_nanos() * u128::from(size)
                / (u128::from(refill_ms) * 1_000_000);
            prop_assert!(passed <= u128::from(size + burst) + came);
        }
    }

    #[test]
    fn who_waits_as_told_passes_and_who_comes_a_nanosecond_early_does_not(
        limit in any_limit(),
        asked in proptest::collection::vec(any::<u64>(), 1..20),
    ) {
        let mut now = Instant::now();
        let mut buckets = Buckets::new(bandwidth(limit), now);
        for tokens in asked {
            // Within the years that a clock has.
            let tokens = tokens % limit.size.saturating_mul(2).max(1);
            if let Err(wait) = buckets.take(tokens, now) {
                let Some(later) = now.checked_add(wait) else { break };
                if wait > Duration::from_secs(1 << 31) { break }
                let early = later - Duration::from_nanos(1);
                prop_assert!(buckets.take(tokens, early).is_err());
                now = later;
                prop_assert_eq!(buckets.take(tokens, now), Ok(()));
            }
        }
    }

    #[test]
    fn nothing_that_is_asked_in_any_order_and_at_any_time_panics(
        limits in proptest::collection::vec(any_limit(), 1..4),
        asked in proptest::collection::vec((any::<u64>(), any::<u32>(), any::<u8>()), 1..50),
    ) {
        let start = Instant::now();
        let mut buckets = Buckets::default();
        for (tokens, at, what) in asked {
            // Also backwards.
            let now = start + Duration::from_micros(at.into());
            let limit = limits.get(usize::from(what) % limits.len()).copied();
            match what % 8 {
                0 => buckets.update(Limits { bandwidth: limit, ops: None }, now),
                1 => buckets.update(Limits { bandwidth: None, ops: limit }, now),
                2 => buckets = SavedLimiter::of(&buckets, now).buckets(now),
                _ => {
                    let before = buckets.clone();
                    if buckets.take(tokens, now).is_err() {
                        let paid = |b: &Buckets| b.ops.as_ref().map(|ops| ops.burst_left);
                        prop_assert_eq!(paid(&buckets), paid(&before));
                    }
                }
            }
        }
    }

    #[test]
    fn a_restored_limiter_goes_on_where_it_was(
        limit in any_limit(),
        asked in proptest::collection::vec((any::<u64>(), any::<u32>()), 1..20),
    ) {
        let mut now = Instant::now();
        let mut buckets = Buckets::new(bandwidth(limit), now);
        for (tokens, pause_us) in asked {
            now += Duration::from_micros(pause_us.into());
            let mut restored = SavedLimiter::of(&buckets, now).buckets(now);
            prop_assert_eq!(restored.take(tokens, now), buckets.take(tokens, now));
        }
    }
}
