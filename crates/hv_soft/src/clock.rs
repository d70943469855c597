//! Time: the guest's TSC, which is the host's plus an offset, its rate, and the
//! pages of KVM's paravirtual clock (Linux, Documentation/virt/kvm/x86/msr.rst).

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::enter::tsc;

/// A machine's clock; clones are the same one, so that time is the same on all vCPUs.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    khz: u64,
    origin: Arc<Origin>,
}

/// Only [`Clock::set`] changes it, before anything runs.
#[derive(Debug, Default)]
struct Origin {
    /// Guest TSC less host TSC, wrapping.
    offset: AtomicU64,
    /// Guest TSC when the machine was made: KVM's clock counts from here.
    start: AtomicU64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        let clock = Self {
            khz: tsc_khz(),
            origin: Arc::default(),
        };
        clock.origin.start.store(tsc(), Relaxed);
        clock
    }

    #[cfg(test)]
    pub(crate) fn at_rate(khz: u64) -> Self {
        Self {
            khz,
            origin: Arc::default(),
        }
    }

    pub(crate) fn khz(&self) -> u64 {
        self.khz
    }

    /// Guest TSC.
    #[inline]
    pub(crate) fn now(&self) -> u64 {
        tsc().wrapping_add(self.offset())
    }

    /// Guest TSC less host TSC, wrapping.
    #[inline]
    pub(crate) fn offset(&self) -> u64 {
        self.origin.offset.load(Relaxed)
    }

    fn start(&self) -> u64 {
        self.origin.start.load(Relaxed)
    }

    /// Makes the guest's TSC read `value` now, on all vCPUs. KVM's clock goes on. Not
    /// while any of them runs.
    pub(crate) fn set(&self, value: u64) {
        let moved = value.wrapping_sub(self.now());
        self.origin.offset.fetch_add(moved, Relaxed);
        self.origin.start.fetch_add(moved, Relaxed);
    }

    /// KVM's clock.
    pub(crate) fn since_start(&self) -> u64 {
        self.nanoseconds(self.now().wrapping_sub(self.start()))
    }

    /// Has KVM's clock go on from there. Not while any vCPU runs.
    pub(crate) fn set_since_start(&self, nanoseconds: u64) {
        let start = self.now().wrapping_sub(self.ticks(nanoseconds));
        self.origin.start.store(start, Relaxed);
    }

    /// TSC ticks in so many nanoseconds.
    pub(crate) fn ticks(&self, nanoseconds: u64) -> u64 {
        (u128::from(nanoseconds) * u128::from(self.khz) / 1_000_000) as u64
    }

    /// Nanoseconds in so many ticks.
    pub(crate) fn nanoseconds(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1_000_000 / u128::from(self.khz)) as u64
    }

    /// Periodic timers fire at most this often: 20 µs, in ticks.
    pub(crate) fn min_period(&self) -> u64 {
        self.ticks(20_000)
    }

    /// The 32 bytes of pvclock_vcpu_time_info, `version` even. All vCPUs get the same,
    /// whenever they ask: rounded from another start, time would step back from one to
    /// the other.
    pub(crate) fn system_time(&self, version: u32) -> [u8; 32] {
        let (mul, shift) = scale(self.khz);
        let mut page = [0; 32];
        page[0..4].copy_from_slice(&version.to_le_bytes());
        page[8..16].copy_from_slice(&self.start().to_le_bytes());
        page[24..28].copy_from_slice(&mul.to_le_bytes());
        page[28] = shift as u8;
        page[29] = 1; // PVCLOCK_TSC_STABLE_BIT
        page
    }

    /// The 12 bytes of pvclock_wall_clock: the time of day when KVM's clock was 0.
    pub(crate) fn wall_clock(&self, version: u32) -> [u8; 12] {
        let up = Duration::from_nanos(self.nanoseconds(self.now().wrapping_sub(self.start())));
        let day = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .saturating_sub(up);
        let mut page = [0; 12];
        page[0..4].copy_from_slice(&version.to_le_bytes());
        page[4..8].copy_from_slice(&(day.as_secs() as u32).to_le_bytes());
        page[8..12].copy_from_slice(&day.subsec_nanos().to_le_bytes());
        page
    }
}

/// Nanoseconds are `(ticks << shift) * mul >> 32`, `mul` with its highest bit set.
fn scale(khz: u64) -> (u32, i8) {
    let hz = u128::from(khz.max(1)) * 1000;
    let mut shift = 0i8;
    // 32.32 fixed point with 32 bits to spare.
    let mut mul = (1_000_000_000u128 << 64) / hz;
    while mul >> 64 != 0 {
        mul >>= 1;
        shift += 1;
    }
    while mul >> 63 == 0 {
        mul <<= 1;
        shift -= 1;
    }
    ((mul >> 32) as u32, shift)
}

/// The TSC's rate: from CPUID where it says so, otherwise measured against the
/// host's monotonic clock, once.
fn tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| crate::cpuid::host_tsc_khz().unwrap_or_else(measure))
}

fn measure() -> u64 {
    // The shortest of some readings around the clock bounds the error: at 2 ms and
    // 40 ns it is 20 parts in a million.
    let read = || {
        let pairs = (0..16).map(|_| {
            let before = tsc();
            let at = Instant::now();
            let width = tsc().wrapping_sub(before);
            (width, before.wrapping_add(width / 2), at)
        });
        pairs
            .min_by_key(|(width, ..)| *width)
            .map_or_else(|| (0, Instant::now()), |(_, at, time)| (at, time))
    };
    let (first, start) = read();
    std::thread::sleep(Duration::from_millis(2));
    let (last, end) = read();
    let nanoseconds = end.duration_since(start).as_nanos().max(1);
    let khz = (u128::from(last.wrapping_sub(first)) * 1_000_000 / nanoseconds) as u64;
    // Where the nominal rate is as near as that, it is the rate.
    crate::cpuid::host_base_khz()
        .filter(|base| base.abs_diff(khz) < khz / 10_000)
        .unwrap_or(khz)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_gives_nanoseconds_for_any_rate() {
        for khz in [500_000, 999_999, 1_000_000, 1_000_001, 2_500_000, 5_100_000] {
            let (mul, shift) = scale(khz);
            let ticks = u128::from(khz) * 1000; // one second
            let scaled = if shift >= 0 {
                ticks << shift
            } else {
                ticks >> -shift
            };
            let nanoseconds = (scaled * u128::from(mul)) >> 32;
            assert!(
                nanoseconds.abs_diff(1_000_000_000) < 10,
                "{khz} kHz: {nanoseconds}"
            );
        }
    }

    #[test]
    fn measuring_agrees_with_the_clock() {
        let clock = Clock::at_rate(measure());
        let (ticks, start) = (tsc(), Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        let by_tsc = clock.nanoseconds(tsc() - ticks) as f64;
        let by_clock = start.elapsed().as_nanos() as f64;
        assert!(
            (by_tsc / by_clock - 1.0).abs() < 0.01,
            "{by_tsc} {by_clock}"
        );
    }
}
