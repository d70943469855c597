//! Our signals, on their way to the command in the guest.
//!
//! The first SIGINT is the command's; a second one ends the machine, so that Ctrl-C Ctrl-C always helps. What we were
//! told to ignore (nohup, a shell's background job) stays ignored.
//!
//! Invariant: from [`Signals::catch`] on, none of [`FORWARDED`] ends this process. Left to others: what comes of it.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use sandbox::{Control, Request};
use signal_hook::consts::{SIGALRM, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::terminal;

/// What reaches the command.
const FORWARDED: [i32; 7] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM];

/// Signals as requests to a container.
#[derive(Debug)]
pub(crate) struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    waiting: Vec<i32>,
    policy: Policy,
}

impl Signals {
    /// Catches them from now on; window sizes only `with_terminal`.
    pub(crate) fn catch(with_terminal: bool) -> std::io::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let wanted = FORWARDED
            .into_iter()
            .filter(|&signal| !is_ignored(&status, signal))
            .chain(with_terminal.then_some(SIGWINCH));
        let (read, write) = UnixStream::pair()?;
        Ok(Self {
            delivery: SignalDelivery::with_pipe(read, write, SignalOnly, wanted)?,
            waiting: Vec::new(),
            policy: Policy::default(),
        })
    }
}

impl Control for Signals {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.delivery.get_read().as_fd())
    }

    fn take(&mut self) -> Option<Request> {
        if self.waiting.is_empty() {
            self.waiting.extend(self.delivery.pending());
        }
        while let Some(signal) = self.waiting.pop() {
            let request = if signal == SIGWINCH {
                terminal::size().map(Request::Resize)
            } else {
                Some(self.policy.request(signal))
            };
            if request.is_some() {
                return request;
            }
        }
        None
    }
}

/// When a signal is no longer the command's.
#[derive(Debug, Default)]
struct Policy {
    interrupted: bool,
}

impl Policy {
    fn request(&mut self, signal: i32) -> Request {
        // All of FORWARDED are below 32.
        let number = u8::try_from(signal).unwrap_or(u8::MAX);
        if signal != SIGINT {
            return Request::Signal(number);
        }
        if std::mem::replace(&mut self.interrupted, true) {
            Request::Kill { signal: number }
        } else {
            Request::Signal(number)
        }
    }
}

/// Whether `/proc/self/status` says that `signal` is ignored (proc_pid_status(5): SigIgn, bit 0 is signal 1).
fn is_ignored(status: &str, signal: i32) -> bool {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let bit = u32::try_from(signal.saturating_sub(1)).unwrap_or(u32::MAX);
    mask.checked_shr(bit).is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_interrupt_ends_the_machine() {
        let mut policy = Policy::default();
        assert_eq!(policy.request(SIGINT), Request::Signal(2));
        assert_eq!(policy.request(SIGTERM), Request::Signal(15));
        assert_eq!(policy.request(SIGINT), Request::Kill { signal: 2 });
        assert_eq!(policy.request(SIGINT), Request::Kill { signal: 2 });
    }

    #[test]
    fn what_nohup_ignores_is_known() {
        let status = "Name:\tx\nSigIgn:\t0000000000001001\n";
        assert!(is_ignored(status, SIGHUP));
        assert!(is_ignored(status, 13));
        assert!(!is_ignored(status, SIGINT));
        assert!(!is_ignored("", SIGHUP));
    }

    #[test]
    fn a_caught_signal_arrives_as_a_request() {
        let mut signals = Signals::catch(false).expect("caught");
        assert_eq!(signals.take(), None);
        signal_hook::low_level::raise(SIGUSR1).expect("raised");
        assert_eq!(signals.take(), Some(Request::Signal(10)));
        assert_eq!(signals.take(), None);
    }
}
