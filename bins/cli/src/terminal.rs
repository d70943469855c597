//! The user's terminal: its size, and raw mode for as long as a guest's terminal is behind it.
//!
//! Invariant: a terminal made raw is as before once its [`RawMode`] is dropped, which unwinding does as well; fatal
//! signals are caught while it exists (`signals.rs`), so only SIGKILL can leave it raw. Left to others: what flows.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use sandbox::TerminalSize;

/// A terminal in raw mode.
#[derive(Debug)]
pub(crate) struct RawMode<'a> {
    fd: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> RawMode<'a> {
    /// Makes the terminal raw: every key goes to the guest, Ctrl-C included.
    pub(crate) fn enter(fd: BorrowedFd<'a>) -> std::io::Result<Self> {
        let before = termios::tcgetattr(fd)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(fd, OptionalActions::Now, &raw)?;
        Ok(Self { fd, before })
    }
}

impl Drop for RawMode<'_> {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(self.fd, OptionalActions::Now, &self.before);
    }
}

/// A terminal that does not show what is typed.
#[derive(Debug)]
pub(crate) struct Unseen<'a> {
    fd: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> Unseen<'a> {
    /// Shows nothing but the end of the line.
    pub(crate) fn enter(fd: BorrowedFd<'a>) -> std::io::Result<Self> {
        let before = termios::tcgetattr(fd)?;
        let mut unseen = before.clone();
        unseen.local_modes.remove(LocalModes::ECHO);
        termios::tcsetattr(fd, OptionalActions::Flush, &unseen)?;
        Ok(Self { fd, before })
    }
}

impl Drop for Unseen<'_> {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(self.fd, OptionalActions::Now, &self.before);
    }
}

/// The size of whichever of our streams is a terminal.
pub(crate) fn size() -> Option<TerminalSize> {
    let of = |fd: BorrowedFd<'_>| termios::tcgetwinsize(fd).ok();
    let size = of(std::io::stdout().as_fd())
        .or_else(|| of(std::io::stdin().as_fd()))
        .or_else(|| of(std::io::stderr().as_fd()))?;
    // Serial lines and some pseudo-terminals have no size.
    (size.ws_row > 0 && size.ws_col > 0).then_some(TerminalSize {
        rows: size.ws_row,
        cols: size.ws_col,
    })
}
