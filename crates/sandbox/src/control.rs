//! What reaches a running container from outside its standard streams.
//!
//! Invariant: none. Left to others: where requests come from (a program's signal handlers, a runtime's calls) and the
//! policy of when to kill.

use std::os::fd::BorrowedFd;

use guest_wire::TerminalSize;

/// A wish about a running container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Send this Linux signal to the process; before there is one, end the machine.
    Signal(u8),
    /// The terminal has a new size.
    Resize(TerminalSize),
    /// End the machine now; the container's result is as if this signal had ended it.
    Kill {
        /// Linux signal number.
        signal: u8,
    },
}

/// A source of requests.
pub trait Control {
    /// A descriptor that is readable when [`Control::take`] has something; `None` when there will never be anything.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// The next request, without waiting.
    fn take(&mut self) -> Option<Request>;
    /// Is told that the command runs.
    fn started(&mut self) {}
}

/// Never asks for anything.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoControl;

impl Control for NoControl {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn take(&mut self) -> Option<Request> {
        None
    }
}
