//! The conversation with the guest's init while the command runs: one thread, one poll loop.
//!
//! Invariants:
//! - Nothing here waits in a read or a write: a full pipe on one side never keeps signals from the other.
//! - At most [`HELD_BYTES_MAX`] and one frame of output are held for a slow reader; then the guest has to wait. Standard
//!   input is read only as far as the guest gave credit, and at most [`HELD_BYTES_MAX`] of it are held.
//! - The command's result is given only when all its output was written.
//!
//! Left to others: signal handlers, terminal modes, the machine's end.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use guest_wire::{
    FrameDecoder, GuestMessage, HostMessage, STDIN_CREDIT_BYTES_INITIAL, STDIO_CHUNK_BYTES_MAX,
    WireError,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::Error;
use crate::control::{Control, Request};
use crate::exit_status::Ended;
use crate::vmm_process::VmmProcess;

/// Bytes held in each direction before the sender has to wait.
const HELD_BYTES_MAX: usize = 256 << 10;
/// A pipe that poll(2) calls writable takes PIPE_BUF bytes without blocking (pipe(7)). The descriptors are not ours to
/// make non-blocking: they are shared with the shell.
const PIPE_BUF: usize = 4096;
/// Bytes read from the guest at once.
const READ_BYTES: usize = 64 << 10;

/// The user's end of the standard streams.
#[derive(Clone, Copy, Debug)]
pub struct Streams<'a> {
    /// `None`: the command gets no input.
    pub stdin: Option<BorrowedFd<'a>>,
    /// Also takes a terminal's output.
    pub stdout: BorrowedFd<'a>,
    /// Never used with a terminal.
    pub stderr: BorrowedFd<'a>,
}

/// Output on its way to the user.
struct Outbox<'a> {
    name: &'static str,
    fd: BorrowedFd<'a>,
    /// Most bytes of one write that do not block.
    write_bytes_max: usize,
    bytes: Vec<u8>,
    /// Where the bytes not yet written start.
    start: usize,
}

impl<'a> Outbox<'a> {
    fn new(name: &'static str, fd: BorrowedFd<'a>) -> Self {
        let is_file = rustix::fs::fstat(fd)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        Self {
            name,
            fd,
            write_bytes_max: if is_file { usize::MAX } else { PIPE_BUF },
            bytes: Vec::new(),
            start: 0,
        }
    }

    fn pending(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// Writes what poll(2) has just allowed, and more as long as it goes on allowing it.
    fn flush(&mut self) -> Result<(), Error> {
        // Then signals have their turn.
        const WRITES_MAX: u32 = 16;
        for _ in 0..WRITES_MAX {
            self.write_once()?;
            if self.pending().is_empty() || !self.is_writable() {
                break;
            }
        }
        Ok(())
    }

    fn is_writable(&self) -> bool {
        const NOW: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::from_borrowed_fd(self.fd, PollFlags::OUT)];
        matches!(rustix::event::poll(&mut fds, Some(&NOW)), Ok(1))
    }

    fn write_once(&mut self) -> Result<(), Error> {
        let pending = self.pending();
        let chunk = pending.get(..self.write_bytes_max).unwrap_or(pending);
        match rustix::io::write(self.fd, chunk) {
            Ok(count) => {
                self.start = self.start.saturating_add(count);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(Errno::PIPE) => Err(Error::ReaderGone { stream: self.name }),
            Err(error) => Err(Error::Stdio {
                action: "write the command's output",
                source: error.into(),
            }),
        }
    }
}

struct Session<'a> {
    stream: &'a UnixStream,
    decoder: FrameDecoder,
    /// Bytes on their way to the guest.
    to_guest: Vec<u8>,
    stdin: Option<BorrowedFd<'a>>,
    stdin_credit: usize,
    stdout: Outbox<'a>,
    stderr: Outbox<'a>,
    ended: Option<Ended>,
    /// The guest's side was closed: nothing more will come.
    closed: bool,
}

/// Talks until the command ended and its output was written; `None` when the guest's end of the stream closed before.
///
/// # Errors
/// What ended the conversation otherwise.
pub(crate) fn converse<'a>(
    vmm: &mut VmmProcess,
    stream: &'a UnixStream,
    decoder: FrameDecoder,
    first_words: Vec<u8>,
    streams: Streams<'a>,
    control: &mut dyn Control,
) -> Result<Option<Ended>, Error> {
    let mut session = Session {
        stream,
        decoder,
        to_guest: first_words,
        stdin: streams.stdin,
        stdin_credit: usize::try_from(STDIN_CREDIT_BYTES_INITIAL).unwrap_or(usize::MAX),
        stdout: Outbox::new("standard output", streams.stdout),
        stderr: Outbox::new("standard error", streams.stderr),
        ended: None,
        closed: false,
    };
    // What came right behind the greeting.
    session.take_messages(control)?;
    while !session.is_over() {
        session.turn(vmm, control)?;
    }
    Ok(session.ended)
}

impl Session<'_> {
    fn is_over(&self) -> bool {
        let all_written = self.stdout.pending().is_empty() && self.stderr.pending().is_empty();
        (self.ended.is_some() || self.closed) && all_written
    }

    fn wants_output(&self) -> bool {
        let held = self
            .stdout
            .pending()
            .len()
            .saturating_add(self.stderr.pending().len());
        self.ended.is_none() && !self.closed && held < HELD_BYTES_MAX
    }

    /// Waits until something can be done, and does it.
    fn turn(&mut self, vmm: &mut VmmProcess, control: &mut dyn Control) -> Result<(), Error> {
        let talks = self.ended.is_none() && !self.closed;
        let mut stream_events = PollFlags::empty();
        stream_events.set(PollFlags::IN, self.wants_output());
        stream_events.set(PollFlags::OUT, talks && !self.to_guest.is_empty());
        let wants_input = talks && self.stdin_credit > 0 && self.to_guest.len() < HELD_BYTES_MAX;
        let stdin = self.stdin.filter(|_| wants_input);

        // A descriptor without a wish is left out: poll would report its hang-up over and over.
        let mut fds = Vec::with_capacity(12);
        let mut add = |fd, events: PollFlags| {
            if events.is_empty() {
                None
            } else {
                fds.push(PollFd::from_borrowed_fd(fd, events));
                Some(fds.len().saturating_sub(1))
            }
        };
        let out_if = |outbox: &Outbox<'_>| {
            if outbox.pending().is_empty() {
                PollFlags::empty()
            } else {
                PollFlags::OUT
            }
        };
        let stream_at = add(self.stream.as_fd(), stream_events);
        let stdin_at = stdin.and_then(|fd| add(fd, PollFlags::IN));
        let stdout_at = add(self.stdout.fd, out_if(&self.stdout));
        let stderr_at = add(self.stderr.fd, out_if(&self.stderr));
        control.fd().and_then(|fd| add(fd, PollFlags::IN));
        let monitor_at = fds.len();
        fds.extend(
            vmm.fds()
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
        );
        poll_until(&mut fds, None)?;
        let ready = |at: Option<usize>| {
            at.and_then(|at| fds.get(at))
                .map_or(PollFlags::empty(), PollFd::revents)
        };
        let (stream_ready, stdin_ready) = (ready(stream_at), ready(stdin_at));
        let (stdout_ready, stderr_ready) = (ready(stdout_at), ready(stderr_at));
        let monitor_ready = fds
            .iter()
            .skip(monitor_at)
            .any(|fd| !fd.revents().is_empty());
        drop(fds);

        if monitor_ready {
            vmm.drain();
        }
        self.obey(control)?;
        if !stdout_ready.is_empty() {
            self.stdout.flush()?;
        }
        if !stderr_ready.is_empty() {
            self.stderr.flush()?;
        }
        if !stdin_ready.is_empty() {
            self.read_stdin()?;
        }
        if stream_ready.contains(PollFlags::OUT) || talks && !self.to_guest.is_empty() {
            self.write_guest();
        }
        // Any other event on it is for the read to find out.
        if self.wants_output() && !(stream_ready - PollFlags::OUT).is_empty() {
            self.read_guest(control)?;
        }
        Ok(())
    }

    fn obey(&mut self, control: &mut dyn Control) -> Result<(), Error> {
        while let Some(request) = control.take() {
            match request {
                Request::Signal(number) => self.say(&HostMessage::Signal { number })?,
                Request::Resize(size) => self.say(&HostMessage::Resize(size))?,
                Request::Kill { signal } => return Err(Error::Interrupted { signal }),
            }
        }
        Ok(())
    }

    fn say(&mut self, message: &HostMessage) -> Result<(), Error> {
        guest_wire::encode(message, &mut self.to_guest).map_err(Error::Wire)
    }

    fn read_stdin(&mut self) -> Result<(), Error> {
        let Some(fd) = self.stdin else { return Ok(()) };
        let mut bytes = vec![0; self.stdin_credit.min(STDIO_CHUNK_BYTES_MAX)];
        match rustix::io::read(fd, &mut bytes) {
            Ok(0) => {
                self.stdin = None;
                self.say(&HostMessage::StdinEof)
            }
            Ok(count) => {
                bytes.truncate(count);
                self.stdin_credit = self.stdin_credit.saturating_sub(count);
                self.say(&HostMessage::Stdin { bytes })
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            // A terminal that hung up, or that is no longer ours: its input has ended.
            Err(Errno::IO) => {
                self.stdin = None;
                self.say(&HostMessage::StdinEof)
            }
            Err(error) => Err(Error::Stdio {
                action: "read standard input",
                source: error.into(),
            }),
        }
    }

    fn write_guest(&mut self) {
        let mut stream = self.stream;
        match stream.write(&self.to_guest) {
            Ok(count) => {
                self.to_guest.drain(..count.min(self.to_guest.len()));
            }
            Err(error) => match error.kind() {
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted => {}
                // Nobody listens any more; the read finds out what was said last.
                _ => self.to_guest.clear(),
            },
        }
    }

    fn read_guest(&mut self, control: &mut dyn Control) -> Result<(), Error> {
        let mut buffer = vec![0; READ_BYTES];
        match rustix::io::read(self.stream, &mut buffer) {
            Ok(0) | Err(Errno::CONNRESET) => {
                self.closed = true;
                Ok(())
            }
            Ok(count) => {
                self.decoder.feed(buffer.get(..count).unwrap_or_default());
                self.take_messages(control)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(Error::Wire(WireError::Stream(error.into()))),
        }
    }

    fn take_messages(&mut self, control: &mut dyn Control) -> Result<(), Error> {
        while let Some(message) = self.decoder.take_message().map_err(Error::Wire)? {
            if self.ended.is_some() {
                return Err(Error::Protocol {
                    what: "it went on after the command's end",
                });
            }
            match message {
                GuestMessage::Started { pid } => {
                    tracing::debug!(pid, "command started");
                    control.started();
                }
                GuestMessage::StartFailed { kind, message } => {
                    let message = crate::console::printable(&message);
                    return Err(Error::StartFailed { kind, message });
                }
                GuestMessage::Stdout { bytes } => self.stdout.push(&bytes),
                GuestMessage::Stderr { bytes } => self.stderr.push(&bytes),
                GuestMessage::StdinCredit { bytes } => {
                    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                    self.stdin_credit = self.stdin_credit.saturating_add(bytes);
                }
                GuestMessage::Exited { code } => self.ended = Some(Ended::Exited { code }),
                GuestMessage::Signalled { number, core: _ } => {
                    self.ended = Some(Ended::Signalled { number });
                }
                GuestMessage::InitFailed { message } => {
                    let message = crate::console::printable(&message);
                    return Err(Error::InitFailed { message });
                }
            }
        }
        Ok(())
    }
}

/// Waits for one of `fds` or for `deadline` (never, when `None`); false when the deadline came first.
pub(crate) fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> Result<bool, Error> {
    loop {
        let timeout = match deadline {
            None => None,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(false);
                }
                Some(Timespec::try_from(left).unwrap_or(Timespec {
                    tv_sec: 1,
                    tv_nsec: 0,
                }))
            }
        };
        match rustix::event::poll(fds, timeout.as_ref()) {
            Ok(0) if deadline.is_some() => {}
            // A signal's handler has put something into a pipe among `fds`: the next poll returns at once.
            Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => {
                return Err(Error::Channel {
                    action: "wait for the machine",
                    source: error.into(),
                });
            }
        }
    }
}
