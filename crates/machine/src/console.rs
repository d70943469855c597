//! Where the serial port's output goes, by the line rather than by the byte.
//!
//! Invariants: what is beyond the limit is lost; what does not end a line is written [`IDLE`] later at the latest;
//! a descriptor that takes nothing holds the guest up, but never a machine that
//! is ending; the last [`TAIL_BYTES`] bytes are kept for error reports.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use virtio::Counted;
use virtio::rate_limiter::{Dropping, Limit};

use crate::Error;
use crate::control::Control;

/// How long bytes wait for the rest of their line.
const IDLE: Duration = Duration::from_millis(4);
/// Bytes that are written without waiting for the end of their line. A pipe
/// that polls as writable takes so many without blocking (POSIX: PIPE_BUF).
const LINE_BYTES_MAX: usize = 4096;
/// Bytes kept for error reports.
const TAIL_BYTES: usize = 16 << 10;
/// How often a blocked write looks whether the machine is ending.
const RETRY: Duration = Duration::from_millis(50);
/// How long the rest of the output may take once the machine has ended.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The serial console's output.
pub(crate) struct Console {
    control: Arc<Control>,
    timer: OwnedFd,
    output: Mutex<Output>,
    counters: Arc<Counters>,
}

/// What happened, by Firecracker's names (its metrics' group `uart`).
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Bytes of the guest.
    write_count: AtomicU64,
    /// Bytes that the other end did not take.
    error_count: AtomicU64,
    /// Bytes beyond the limit.
    rate_limiter_dropped_bytes: AtomicU64,
}

impl Counted for Counters {
    fn counts(&self) -> Vec<(&'static str, u64)> {
        let all = [
            ("write_count", &self.write_count),
            ("error_count", &self.error_count),
            (
                "rate_limiter_dropped_bytes",
                &self.rate_limiter_dropped_bytes,
            ),
        ];
        all.map(|(name, n)| (name, n.load(Ordering::Relaxed)))
            .into()
    }
}

struct Output {
    fd: OwnedFd,
    limit: Option<Dropping>,
    line: Vec<u8>,
    tail: VecDeque<u8>,
    /// The other end is gone, or the disk is full: nothing is written any more.
    broken: bool,
}

impl Console {
    /// A console that writes to `fd`, as many bytes as `limit` allows.
    pub(crate) fn new(
        fd: OwnedFd,
        control: Arc<Control>,
        limit: Option<Limit>,
    ) -> Result<Self, Error> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, flags).map_err(|errno| Error::Host {
                doing: "make a timer",
                source: errno.into(),
            })?;
        let output = Output {
            fd,
            limit: limit.map(Dropping::new),
            line: Vec::new(),
            tail: VecDeque::new(),
            broken: false,
        };
        Ok(Self {
            control,
            timer,
            output: Mutex::new(output),
            counters: Arc::default(),
        })
    }

    /// What is counted.
    pub(crate) fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Readable when an unfinished line should be written: [`Console::on_idle`].
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Writes an unfinished line. Never waits.
    pub(crate) fn on_idle(&self) {
        let mut expirations = [0; 8];
        // Empty when somebody rearmed the timer meanwhile.
        let _ = rustix::io::read(&self.timer, &mut expirations);
        let mut output = match self.output.try_lock() {
            Ok(output) => output,
            Err(TryLockError::Poisoned(output)) => output.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if !output.write_some(Duration::ZERO) {
            self.arm(RETRY);
        }
    }

    /// Writes what is left and returns the last of all output.
    pub(crate) fn finish(&self) -> Vec<u8> {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let until = Instant::now() + LAST_WORDS;
        while !output.write_some(RETRY) && Instant::now() < until {}
        output.tail.iter().copied().collect()
    }

    fn arm(&self, after: Duration) {
        let spec = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(after.subsec_nanos()),
            },
        };
        // Fails on a bad descriptor or time only.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
    }
}

impl Output {
    /// Writes what waits, waiting at most `patience` each time. Returns whether
    /// nothing waits any more.
    fn write_some(&mut self, patience: Duration) -> bool {
        while !self.line.is_empty() {
            match write_ready(self.fd.as_fd(), &self.line, patience) {
                Ok(n) => drop(self.line.drain(..n)),
                Err(Errno::AGAIN) => return false,
                Err(Errno::INTR) => {}
                Err(_) => {
                    self.broken = true;
                    self.line.clear();
                }
            }
        }
        true
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        let excess = self.tail.len().saturating_sub(TAIL_BYTES);
        self.tail.drain(..excess);
    }
}

/// Writes once, when `fd` takes bytes within `patience`; `EAGAIN` when not.
fn write_ready(fd: BorrowedFd<'_>, bytes: &[u8], patience: Duration) -> Result<usize, Errno> {
    let patience = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    if poll(&mut polled, Some(&patience))? == 0 {
        return Err(Errno::AGAIN);
    }
    rustix::io::write(fd, bytes.get(..LINE_BYTES_MAX).unwrap_or(bytes))
}

/// The serial port's end of a [`Console`].
pub(crate) struct Sink(pub(crate) Arc<Console>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let console = &*self.0;
        let mut output = console
            .output
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let add = |counter: &AtomicU64| counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let counters = &console.counters;
        add(&counters.write_count);
        if output
            .limit
            .as_mut()
            .is_some_and(|limit| !limit.allow(bytes.len() as u64))
        {
            add(&counters.rate_limiter_dropped_bytes);
            return Ok(bytes.len());
        }
        output.keep(bytes);
        if output.broken {
            add(&counters.error_count);
            return Ok(bytes.len());
        }
        let first = output.line.is_empty();
        output.line.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || output.line.len() >= LINE_BYTES_MAX {
            while !console.control.is_ending() && !output.write_some(RETRY) {}
            // Whoever does not read loses what an ending machine still says.
            output.line.truncate(LINE_BYTES_MAX);
        } else if first {
            console.arm(IDLE);
        }
        Ok(bytes.len())
    }

    /// Nothing: the serial port flushes after each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::control::Outcome;

    fn console() -> (Arc<Console>, UnixStream, Arc<Control>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let control = Arc::new(Control::new().unwrap());
        let console = Console::new(ours.into(), control.clone(), None).unwrap();
        (Arc::new(console), theirs, control)
    }

    fn send(console: &Arc<Console>, text: &str) {
        for byte in text.bytes() {
            Sink(console.clone()).write_all(&[byte]).unwrap();
        }
    }

    fn received(stream: &mut UnixStream) -> String {
        stream.set_nonblocking(true).unwrap();
        let mut bytes = vec![0; 1 << 16];
        let n = stream.read(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    }

    #[test]
    fn lines_are_written_whole_and_prompts_when_idle() {
        let (console, mut theirs, _) = console();
        send(&console, "one\ntwo");
        assert_eq!(received(&mut theirs), "one\n");
        let mut polled = [PollFd::from_borrowed_fd(console.fd(), PollFlags::IN)];
        assert_eq!(
            poll(
                &mut polled,
                Some(&Timespec {
                    tv_sec: 5,
                    tv_nsec: 0
                })
            ),
            Ok(1)
        );
        console.on_idle();
        assert_eq!(received(&mut theirs), "two");
    }

    #[test]
    fn what_is_left_is_written_at_the_end_and_the_tail_is_bounded() {
        let (console, mut theirs, _) = console();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            theirs.read_to_string(&mut text).unwrap();
            text
        });
        send(&console, &"0123456\n".repeat(5000));
        send(&console, "end");
        let tail = console.finish();
        assert_eq!(tail.len(), TAIL_BYTES);
        assert!(tail.ends_with(b"\nend"));
        drop(console);
        assert_eq!(reader.join().unwrap().len(), 40_003);
    }

    #[test]
    fn a_reader_that_is_gone_does_not_stop_the_guest() {
        let (console, theirs, _) = console();
        drop(theirs);
        send(&console, "one\ntwo\n");
        assert_eq!(console.finish(), b"one\ntwo\n");
    }

    #[test]
    fn a_reader_that_does_not_read_does_not_hold_up_the_end() {
        let (console, _theirs, control) = console();
        let guest = {
            let console = console.clone();
            std::thread::spawn(move || send(&console, &"0123456\n".repeat(1 << 17)))
        };
        std::thread::sleep(Duration::from_millis(20));
        control.end(Ok(Outcome::Stopped));
        let before = Instant::now();
        guest.join().unwrap();
        assert!(before.elapsed() < Duration::from_secs(30));
    }
}
