//! How a machine comes to its end, whoever ends it: the guest, a vCPU, a
//! stop from outside.
//!
//! Invariant: the first ending counts; from then on every vCPU is kicked out of
//! its guest and the event loop wakes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hv::Kick;
use rustix::event::{EventfdFlags, eventfd};

use crate::Error;

/// How a machine ended that did nothing wrong itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off, or halted every CPU for good.
    PowerOff,
    /// The guest asked to be reset.
    Reset,
    /// A fault while delivering a double fault.
    TripleFault,
    /// Somebody outside stopped it.
    Stopped,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Outcome::PowerOff => "power-off",
            Outcome::Reset => "reset",
            Outcome::TripleFault => "triple-fault",
            Outcome::Stopped => "stopped",
        })
    }
}

/// Stops a machine from any thread. Clones stop the same machine.
#[derive(Clone, Debug)]
pub struct StopHandle {
    control: Arc<Control>,
}

impl StopHandle {
    pub(crate) fn new(control: Arc<Control>) -> Self {
        Self { control }
    }

    /// Asks the machine to stop; its outcome is [`Outcome::Stopped`] unless it
    /// ended by itself before.
    pub fn stop(&self) {
        self.control.end(Ok(Outcome::Stopped));
    }
}

/// Shared by the vCPU threads, the event loop and the power devices.
pub(crate) struct Control {
    ending: AtomicBool,
    wake: OwnedFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ended: Option<Result<Outcome, Error>>,
    kickers: Vec<Arc<dyn Kick>>,
    halted: usize,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("ending", &self.is_ending())
            .finish_non_exhaustive()
    }
}

impl Control {
    pub(crate) fn new() -> Result<Self, Error> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| {
            Error::Host {
                doing: "make an eventfd",
                source: errno.into(),
            }
        })?;
        Ok(Self {
            ending: AtomicBool::new(false),
            wake,
            state: Mutex::default(),
        })
    }

    /// Makes `kicker`'s vCPU one that an ending kicks.
    pub(crate) fn add(&self, kicker: Arc<dyn Kick>) {
        self.lock().kickers.push(kicker);
    }

    /// Ends the machine, unless it is ending already.
    pub(crate) fn end(&self, how: Result<Outcome, Error>) {
        let mut state = self.lock();
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(how);
        self.ending.store(true, Ordering::SeqCst);
        for kicker in &state.kickers {
            kicker.kick();
        }
        drop(state);
        // It only fails when 2^64 - 1 writes were never read: it is readable then.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// One vCPU will never run again; when none will, the machine is off.
    pub(crate) fn halted(&self) {
        let mut state = self.lock();
        state.halted += 1;
        let all = state.halted >= state.kickers.len();
        drop(state);
        if all {
            self.end(Ok(Outcome::PowerOff));
        }
    }

    /// Whether the machine is ending.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Readable once the machine is ending.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Takes how it ended; [`Outcome::Stopped`] when nothing ended it.
    pub(crate) fn take(&self) -> Result<Outcome, Error> {
        self.lock().ended.take().unwrap_or(Ok(Outcome::Stopped))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl chipset::PowerEvents for Control {
    fn reset(&self) {
        self.end(Ok(Outcome::Reset));
    }

    fn power_off(&self) {
        self.end(Ok(Outcome::PowerOff));
    }
}
