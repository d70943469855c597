//! How other threads get a vCPU's attention.
//!
//! ```text
//! ring:  requests |= bit ── sleeping? ──yes──▶ notify
//!                              └──no──▶ close the poll page
//! vCPU:  take requests, open the poll page, act ─▶ enter ─▶ poll faults ─▶ …
//! ```
//!
//! No ring is lost. Awake: the page is closed *after* the request was noted, so
//! that the next block head faults, whether the vCPU looked at the requests
//! before or not; reopening happens before they are taken. Asleep: `sleeping`
//! and the requests are both sequentially consistent, so that either the vCPU
//! sees the request before it waits or the ringer sees it sleeping and notifies
//! under the mutex.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::enter::ContextBox;
use crate::fault::{self, PollPage};

/// Somebody wants the run to end.
pub(crate) const KICK: u32 = 1;
/// The interrupt inbox has something.
pub(crate) const INTERRUPT: u32 = 2;
/// The host timer expired.
pub(crate) const TIMER: u32 = 4;
/// Another vCPU wants something: see `peers`.
pub(crate) const PEER: u32 = 8;

/// One vCPU's doorbell.
pub(crate) struct Doorbell {
    requests: AtomicU32,
    sleeping: AtomicBool,
    closed: AtomicBool,
    /// `None` once the vCPU is gone: its page must not be touched any more.
    page: Mutex<Option<PollPage>>,
    asleep: Mutex<()>,
    awake: Condvar,
}

impl Doorbell {
    pub(crate) fn new() -> Self {
        Self {
            requests: AtomicU32::new(0),
            sleeping: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            page: Mutex::new(None),
            asleep: Mutex::new(()),
            awake: Condvar::new(),
        }
    }

    /// Connects the poll page; [`Doorbell::disconnect`] comes before its end.
    pub(crate) fn connect(&self, context: &ContextBox) {
        *self.page.lock().unwrap_or_else(PoisonError::into_inner) = Some(PollPage::of(context));
    }

    pub(crate) fn disconnect(&self) {
        *self.page.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Notes a request without waking anybody. Async-signal-safe.
    pub(crate) fn note(&self, request: u32) {
        self.requests.fetch_or(request, Ordering::SeqCst);
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Gets the vCPU's attention, from any thread.
    pub(crate) fn ring(&self, request: u32) {
        if self.requests.fetch_or(request, Ordering::SeqCst) & request != 0 {
            // Whoever set it is on the way to waking the vCPU.
            return;
        }
        if fault::runs_here(self) {
            return;
        }
        if self.sleeping.load(Ordering::SeqCst) {
            let _guard = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.awake.notify_one();
        } else if let Some(page) = &*self.page.lock().unwrap_or_else(PoisonError::into_inner) {
            self.closed.store(true, Ordering::SeqCst);
            page.close();
        }
    }

    /// Whether something was requested. One relaxed load.
    #[inline]
    pub(crate) fn rung(&self) -> bool {
        self.requests.load(Ordering::Relaxed) != 0
    }

    /// Takes all requests, and opens the page again.
    pub(crate) fn take(&self) -> u32 {
        if self.closed.swap(false, Ordering::SeqCst)
            && let Some(page) = &*self.page.lock().unwrap_or_else(PoisonError::into_inner)
        {
            page.open();
        }
        self.requests.swap(0, Ordering::SeqCst)
    }

    /// Sleeps until something is requested or the time is over.
    pub(crate) fn sleep(&self, at_most: Option<Duration>) {
        let guard = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleeping.store(true, Ordering::SeqCst);
        if self.requests.load(Ordering::SeqCst) == 0 {
            // Waking early is harmless: the caller looks again.
            match at_most {
                Some(time) => drop(self.awake.wait_timeout(guard, time)),
                None => drop(self.awake.wait(guard)),
            }
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }
}
