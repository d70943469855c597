//! The boot timer: a register to which the guest's init writes once it runs, so that
//! the log says how long the boot took. Firecracker's, at its address, with its line.

use bus::{Lifecycle, MmioDevice};
use rustix::time::{ClockId, Timespec, clock_gettime};

/// Bytes of the register's range.
pub const BOOT_TIMER_LEN: u64 = 0x1000;
/// What the guest writes.
const MAGIC: u8 = 123;

/// A moment: on the host's clock and in this process's processor time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Microseconds of CLOCK_MONOTONIC.
    pub wall_us: u64,
    /// Microseconds of CLOCK_PROCESS_CPUTIME_ID.
    pub cpu_us: u64,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        Self {
            wall_us: micros(clock_gettime(ClockId::Monotonic)),
            cpu_us: micros(clock_gettime(ClockId::ProcessCPUTime)),
        }
    }

    /// The line that says how long after `self` `now` is, if the guest's boot ends then.
    fn boot_ended(self, now: Self) -> String {
        let wall = now.wall_us.saturating_sub(self.wall_us);
        let cpu = now.cpu_us.saturating_sub(self.cpu_us);
        format!(
            "Guest-boot-time = {wall:>6} us {} ms, {cpu:>6} CPU us {} CPU ms",
            wall / 1000,
            cpu / 1000
        )
    }
}

fn micros(time: Timespec) -> u64 {
    // Neither clock is ever negative.
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000
        + u64::try_from(time.tv_nsec).unwrap_or(0) / 1000
}

/// The register.
#[derive(Debug)]
pub struct BootTimer {
    started: Moment,
}

impl BootTimer {
    /// Counts from `started`.
    pub fn new(started: Moment) -> Self {
        Self { started }
    }
}

impl MmioDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (offset, data) == (0, &[MAGIC]) {
            tracing::info!("{}", self.started.boot_ended(Moment::now()));
        }
    }
}

impl Lifecycle for BootTimer {
    fn pause(&mut self) {}
    fn resume(&mut self) {}
    /// It counts from the process's start, not the guest's.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_line_is_firecrackers() {
        let started = Moment {
            wall_us: 1_000_000,
            cpu_us: 5000,
        };
        let now = Moment {
            wall_us: 1_098_765,
            cpu_us: 5999,
        };
        assert_eq!(
            started.boot_ended(now),
            "Guest-boot-time =  98765 us 98 ms,    999 CPU us 0 CPU ms"
        );
        assert_eq!(
            now.boot_ended(started),
            "Guest-boot-time =      0 us 0 ms,      0 CPU us 0 CPU ms"
        );
    }

    #[test]
    fn only_the_magic_byte_at_the_first_address_is_logged() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let log = tracing_subscriber::fmt()
            .with_writer(std::sync::Mutex::new(writer))
            .finish();
        tracing::subscriber::with_default(log, || {
            let mut timer = BootTimer::new(Moment::now());
            for value in (0..=255).filter(|&value| value != MAGIC) {
                timer.write(0, &[value]);
            }
            timer.write(1, &[MAGIC]);
            timer.write(0, &[MAGIC, 0]);
            timer.write(0, &[MAGIC]);
        });
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text.matches("Guest-boot-time = ").count(), 1, "{text}");
    }

    #[test]
    fn time_goes_on_between_two_moments() {
        let before = Moment::now();
        let after = Moment::now();
        assert!(after.wall_us >= before.wall_us && after.cpu_us >= before.cpu_us);
        assert!(before.wall_us > 0);
    }
}
