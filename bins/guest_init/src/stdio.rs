//! The process's standard streams: pipes or a terminal, and what is on its way through them.
//!
//! Invariant: nothing here ever waits, and no more standard input is held than the host had credit for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use guest_wire::{STDIN_CREDIT_BYTES_INITIAL, TerminalSize};
use rustix::{
    buffer::spare_capacity,
    fs::{Mode, OFlags, fchown, open},
    io::{Errno, fcntl_dupfd_cloexec, ioctl_fionbio, ioctl_fionread},
    pipe::{PipeFlags, pipe_with},
    process::{Gid, Uid},
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::error::InitError;

/// Standard input taken by the process and not yet credited to the host, beyond which it is.
const CREDIT_BYTES_MIN: u32 = 64 << 10;

/// The character that ends input on a terminal with its default settings (termios(3), VEOF).
const END_OF_FILE: u8 = 4;

/// Descriptors for both sides, before the process starts.
#[derive(Debug)]
pub(crate) struct Wiring {
    pub(crate) input: Input,
    pub(crate) output: Output,
    /// Absent on a terminal.
    pub(crate) error: Option<Output>,
    pub(crate) child: ChildSide,
}

/// The process's side.
#[derive(Debug)]
pub(crate) enum ChildSide {
    Terminal(OwnedFd),
    Pipes([OwnedFd; 3]),
}

impl ChildSide {
    pub(crate) fn stdio(&self) -> [BorrowedFd<'_>; 3] {
        match self {
            Self::Terminal(terminal) => [terminal.as_fd(), terminal.as_fd(), terminal.as_fd()],
            Self::Pipes([input, output, error]) => [input.as_fd(), output.as_fd(), error.as_fd()],
        }
    }

    /// Gives the streams to the user, who may want to open them anew by /dev/stdout, as runc does.
    pub(crate) fn give_to(&self, uid: u32) {
        for fd in self.stdio() {
            // What cannot be given (to whom it already belongs, /dev/null on a read-only file system) works all the same.
            let _refused = fchown(fd, Some(Uid::from_raw(uid)), None::<Gid>);
        }
    }
}

impl Wiring {
    /// A terminal of this size.
    pub(crate) fn terminal(size: TerminalSize, stdin: bool) -> Result<Self, InitError> {
        let failed = || InitError::system("open", "a terminal");
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let main = openpt(flags).map_err(failed())?;
        unlockpt(&main).map_err(failed())?;
        let peer = ioctl_tiocgptpeer(&main, flags).map_err(failed())?;
        tcsetwinsize(&main, winsize(size)).map_err(failed())?;
        ioctl_fionbio(&main, true).map_err(failed())?;
        let typing = if stdin {
            Some(fcntl_dupfd_cloexec(&main, 3).map_err(failed())?)
        } else {
            None
        };
        Ok(Self {
            input: Input::new(typing, true),
            output: Output::new(main, true),
            error: None,
            child: ChildSide::Terminal(peer),
        })
    }

    /// Pipes; without `stdin` the process reads /dev/null.
    pub(crate) fn pipes(stdin: bool) -> Result<Self, InitError> {
        let failed = || InitError::system("open", "standard streams");
        let (input, child_input) = if stdin {
            let (child, ours) = pipe_with(PipeFlags::CLOEXEC).map_err(failed())?;
            ioctl_fionbio(&ours, true).map_err(failed())?;
            (Some(ours), child)
        } else {
            let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
                .map_err(InitError::system("open", "/dev/null"))?;
            (None, null)
        };
        let (output, child_output) = pipe_with(PipeFlags::CLOEXEC).map_err(failed())?;
        let (error, child_error) = pipe_with(PipeFlags::CLOEXEC).map_err(failed())?;
        ioctl_fionbio(&output, true).map_err(failed())?;
        ioctl_fionbio(&error, true).map_err(failed())?;
        Ok(Self {
            input: Input::new(input, false),
            output: Output::new(output, false),
            error: Some(Output::new(error, false)),
            child: ChildSide::Pipes([child_input, child_output, child_error]),
        })
    }
}

fn winsize(size: TerminalSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Standard input on its way from the host to the process.
#[derive(Debug)]
pub(crate) struct Input {
    /// Gone when the process has closed its side, and when everything was delivered.
    fd: Option<OwnedFd>,
    terminal: bool,
    pending: Vec<u8>,
    /// Bytes of `pending` that the process's pipe took already.
    taken: usize,
    ended: bool,
    /// Bytes that the host may still send.
    credit: u32,
    /// Bytes taken and not yet credited.
    owed: u32,
}

impl Input {
    fn new(fd: Option<OwnedFd>, terminal: bool) -> Self {
        Self {
            fd,
            terminal,
            pending: Vec::new(),
            taken: 0,
            ended: false,
            credit: STDIN_CREDIT_BYTES_INITIAL,
            owed: 0,
        }
    }

    /// Takes bytes from the host.
    pub(crate) fn accept(&mut self, bytes: &[u8]) -> Result<(), InitError> {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let Some(credit) = self.credit.checked_sub(length) else {
            let surplus = usize::try_from(length.saturating_sub(self.credit)).unwrap_or(usize::MAX);
            return Err(InitError::CreditExceeded { surplus });
        };
        self.credit = credit;
        if self.fd.is_none() || self.ended {
            self.owed = self.owed.saturating_add(length);
        } else {
            self.pending.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// No more bytes will come.
    pub(crate) fn finish(&mut self) {
        if !self.ended && self.terminal && self.fd.is_some() {
            self.pending.push(END_OF_FILE);
        }
        self.ended = true;
    }

    /// What to poll, if anything waits to be delivered.
    pub(crate) fn waiting(&self) -> Option<BorrowedFd<'_>> {
        let fd = self.fd.as_ref()?;
        (self.taken < self.pending.len()).then_some(fd.as_fd())
    }

    /// Delivers what the process takes now.
    pub(crate) fn deliver(&mut self) {
        let Some(fd) = &self.fd else { return };
        while let Some(rest) = self
            .pending
            .get(self.taken..)
            .filter(|rest| !rest.is_empty())
        {
            match rustix::io::write(fd, rest) {
                Ok(count) => {
                    self.taken = self.taken.saturating_add(count);
                    self.owed = self
                        .owed
                        .saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                // The process closed its standard input: what is still to come goes nowhere.
                Err(_) => {
                    let lost = self.pending.len().saturating_sub(self.taken);
                    self.owed = self
                        .owed
                        .saturating_add(u32::try_from(lost).unwrap_or(u32::MAX));
                    self.fd = None;
                    break;
                }
            }
        }
        self.pending.clear();
        self.taken = 0;
        // A terminal stays: hanging it up would kill the process. A pipe ends by being closed.
        if self.ended && !self.terminal {
            self.fd = None;
        }
    }

    /// The credit to send to the host, when it is worth a message.
    pub(crate) fn credit_due(&mut self) -> Option<u32> {
        if self.owed < CREDIT_BYTES_MIN {
            return None;
        }
        let due = std::mem::take(&mut self.owed);
        self.credit = self.credit.saturating_add(due);
        Some(due)
    }
}

/// One stream of output on its way from the process to the host.
#[derive(Debug)]
pub(crate) struct Output {
    /// Gone when the stream ended.
    fd: Option<OwnedFd>,
    terminal: bool,
    /// Once the process ended: bytes that it left in its pipe. Those of others that still hold the pipe do not count.
    left: Option<usize>,
}

impl Output {
    fn new(fd: OwnedFd, terminal: bool) -> Self {
        Self {
            fd: Some(fd),
            terminal,
            left: None,
        }
    }

    /// What to poll, while the stream lasts.
    pub(crate) fn open(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(|fd| fd.as_fd())
    }

    /// Reads once into `chunk`, up to its capacity, replacing what it held; leaves it empty when there is nothing.
    pub(crate) fn read(&mut self, chunk: &mut Vec<u8>) {
        chunk.clear();
        let Some(fd) = &self.fd else { return };
        match rustix::io::read(fd, spare_capacity(chunk)) {
            Ok(0) => self.fd = None,
            Ok(count) => {
                if let Some(left) = &mut self.left {
                    *left = left.saturating_sub(count);
                    if *left == 0 {
                        self.fd = None;
                    }
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A terminal says EIO when nobody has its other side open any more.
            Err(_) => self.fd = None,
        }
    }

    /// The process ended. All that it wrote is in its pipe by now: what others write later is not waited for. A terminal
    /// is hung up when its session's leader ends, and ends by itself; it cannot say how much is left.
    pub(crate) fn process_ended(&mut self) {
        if self.terminal {
            return;
        }
        let Some(fd) = &self.fd else { return };
        match ioctl_fionread(fd) {
            Ok(0) | Err(_) => self.fd = None,
            Ok(left) => self.left = Some(usize::try_from(left).unwrap_or(usize::MAX)),
        }
    }

    /// Gives up on what might still come.
    pub(crate) fn close(&mut self) {
        self.fd = None;
    }

    /// Sets the terminal's size; nothing without one.
    pub(crate) fn resize(&self, size: TerminalSize) {
        if let Some(fd) = self.fd.as_ref().filter(|_| self.terminal) {
            // Refused only when the terminal is hung up, and then nobody looks at it.
            let _refused = tcsetwinsize(fd, winsize(size));
        }
    }
}
