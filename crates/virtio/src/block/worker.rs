//! The thread of one drive that waits for the disk, so that no vCPU does and neither does
//! the event loop. It starts when it is first needed, or before, to be confined.
//!
//! ```text
//! who notifies ──ring──▶ Hand ◀──wait── thread: take ─▶ do (unlocked) ─▶ give back
//!                         │ first ring: eventfd ──▶ event loop: starts the thread
//! ```
//! While it is held, as for a snapshot, the thread neither takes nor gives back.
//!
//! Invariant: who holds the device's lock and waits for what is in hand waits for the disk
//! only: the thread does not need that lock to be done. The thread is gone once its
//! [`Worker`] is.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use super::device::Block;
use super::disk::Patience;
use crate::{Bell, Error, EventSource};

/// Of the thread: it calls the host, and no more.
const STACK_BYTES: usize = 256 << 10;

/// Between a drive and its worker.
#[derive(Debug)]
pub(super) struct Hand {
    state: Mutex<HandState>,
    changed: Condvar,
    /// Rung when the thread is to be started.
    wanted: Bell,
}

#[derive(Debug, Default)]
struct HandState {
    /// There is a thread.
    started: bool,
    /// There is something to do.
    rung: bool,
    /// There will never be anything again.
    ended: bool,
    /// Nothing is to be taken or given back.
    held: bool,
    /// Something is being done: the so manieth.
    at_work: bool,
    nth: u64,
}

impl Hand {
    fn new() -> Result<Self, Error> {
        Ok(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            wanted: Bell::new()?,
        })
    }

    /// There is something to do.
    pub(super) fn ring(&self) {
        let mut state = self.lock();
        state.rung = true;
        if state.started {
            self.changed.notify_all();
        } else {
            self.wanted.ring();
        }
    }

    /// Something is being done from now on. The device is locked.
    pub(super) fn begin(&self) {
        let mut state = self.lock();
        state.at_work = true;
        state.nth += 1;
    }

    /// The number of what is being done.
    pub(super) fn at_work(&self) -> Option<u64> {
        let state = self.lock();
        state.at_work.then_some(state.nth)
    }

    /// Returns once the `nth` is done.
    pub(super) fn wait_for(&self, nth: u64) {
        let mut state = self.lock();
        while state.at_work && state.nth == nth {
            state = self.wait(state);
        }
    }

    /// Keeps the thread from guest memory, but for what it is doing. The device is locked.
    pub(super) fn hold(&self, held: bool) {
        self.lock().held = held;
        self.changed.notify_all();
    }

    fn is_held(&self) -> bool {
        self.lock().held
    }

    /// On the thread: returns once it is held no more. The device must not be locked.
    fn wait_while_held(&self) {
        let mut state = self.lock();
        while state.held {
            state = self.wait(state);
        }
    }

    /// On the thread: returns when there is something to do, or with `false` when there
    /// never will be.
    fn wait_for_ring(&self) -> bool {
        let mut state = self.lock();
        while !state.rung && !state.ended {
            state = self.wait(state);
        }
        state.rung = false;
        !state.ended
    }

    fn wait<'a>(&self, state: MutexGuard<'a, HandState>) -> MutexGuard<'a, HandState> {
        let waited = self.changed.wait(state);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, HandState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends what is in hand, also when doing it panicked.
struct AtWork<'h>(&'h Hand);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.lock().at_work = false;
        self.0.changed.notify_all();
    }
}

/// The worker of one drive, as the event loop knows it. Dropping it waits for what is in
/// hand, and leaves the drive one that keeps whoever notifies waiting.
#[derive(Debug)]
pub struct Worker {
    drive: Arc<Mutex<Block>>,
    hand: Arc<Hand>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Has what takes time on `drive` be done by a thread of its own, which the event loop
    /// starts by serving this.
    ///
    /// # Errors
    /// [`Error::Host`]: no descriptor.
    pub fn of(drive: &Arc<Mutex<Block>>) -> Result<Self, Error> {
        let hand = Arc::new(Hand::new()?);
        lock(drive).hand = Some(hand.clone());
        Ok(Self {
            drive: drive.clone(),
            hand,
            thread: None,
        })
    }

    /// Starts the thread now, as long as the caller may: it calls `confine` before it does
    /// anything.
    ///
    /// # Errors
    /// No thread, or what `confine` says.
    pub fn start_confined(
        &mut self,
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        self.thread = Some(self.start(confine)?);
        self.hand.lock().started = true;
        Ok(())
    }

    /// A thread that is confined and waits for rings.
    fn start(
        &self,
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let (drive, hand) = (self.drive.clone(), self.hand.clone());
        let (tell, told) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("disk".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let confined = confine();
                let may_run = confined.is_ok();
                let _ = tell.send(confined);
                drop(tell);
                while may_run && hand.wait_for_ring() {
                    work(&drive, &hand);
                }
            })?;
        // A thread that is gone without a word panicked.
        told.recv().unwrap_or(Ok(()))?;
        Ok(thread)
    }
}

impl EventSource for Worker {
    fn fd(&self) -> BorrowedFd<'_> {
        self.hand.wanted.as_fd()
    }

    fn on_event(&mut self) {
        self.hand.wanted.silence();
        if self.thread.is_some() {
            return;
        }
        match self.start(|| Ok(())) {
            Ok(thread) => {
                self.thread = Some(thread);
                self.hand.lock().started = true;
            }
            Err(error) => {
                // Slow is better than never; the next ring tries again.
                tracing::warn!(%error, "no thread for a drive: the event loop waits for it");
                work(&self.drive, &self.hand);
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        lock(&self.drive).hand = None;
        self.hand.lock().ended = true;
        self.hand.changed.notify_all();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::warn!("the thread of a drive panicked");
        }
        lock(&self.drive).take_back();
    }
}

/// Serves the queue as long as it is the worker's.
fn work(drive: &Mutex<Block>, hand: &Hand) {
    let Some((memory, driver)) = lock(drive).begin() else {
        return;
    };
    loop {
        let Some(job) = lock_unheld(drive, hand).take(driver, &memory) else {
            return;
        };
        let head = job.chain.head;
        let done = {
            let _at_work = AtWork(hand);
            job.disk.serve(job.chain, job.flushing, Patience::Endless)
        };
        // It has all the time of the world.
        let written = done.unwrap_or(0);
        lock_unheld(drive, hand).give_back(driver, head, written);
    }
}

/// The drive, when nobody holds its worker.
fn lock_unheld<'d>(drive: &'d Mutex<Block>, hand: &Hand) -> MutexGuard<'d, Block> {
    loop {
        let locked = lock(drive);
        if !hand.is_held() {
            return locked;
        }
        drop(locked);
        hand.wait_while_held();
    }
}

/// A drive is consistent between calls even if one panicked.
fn lock(drive: &Mutex<Block>) -> MutexGuard<'_, Block> {
    drive.lock().unwrap_or_else(PoisonError::into_inner)
}
