//! What a drive with `io_engine` `Async` has the kernel do: requests beside each other, each ended when it is done.
//!
//! ```text
//!             ┌─ a flush, writes before it in flight ─▶ held ─┐ those are done
//! begin ──────┴──────────────────────────────────────────────┴▶ ring ──▶ reap: more to do, or over
//! ```
//!
//! Invariant: a flush begins when every write that was begun before it is over; nothing else waits for anything. No
//! more than [`IN_FLIGHT_MAX`] requests are here. A request ends on the file that it was begun on.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use ram::GuestMemory;
use ram::ring::{Done, FILES_MAX, Ready, Ring};

use super::device::{Block, Flushing};
use super::disk::{Disk, Failed};
use super::flight::{Begun, Flight};
use crate::{Bell, Chain, Error, EventSource};

/// Requests of a drive in flight at once; as many as Firecracker's.
pub(super) const IN_FLIGHT_MAX: u32 = 128;

/// All that the kernel has of one drive.
#[derive(Debug)]
pub(super) struct Rings {
    /// Rung by the kernel when something is done.
    bell: Bell,
    ring: Ring<Flight>,
    /// The last one is the drive's, the others were replaced and are not closed yet.
    files: Vec<OfRing>,
    /// Flushes that wait for writes, in their order.
    held: VecDeque<Flight>,
    /// Writes in flight, by number.
    writes: BTreeSet<u64>,
    /// Requests that were begun so far.
    nth: u64,
    /// [`IN_FLIGHT_MAX`], but for tests.
    pub(super) most: usize,
    #[cfg(test)]
    pub(super) rig: super::slow_rings::Rigged,
}

/// A file of the ring.
#[derive(Debug)]
struct OfRing {
    place: u32,
    closed: Arc<Closed>,
}

/// Whether the ring has a file no more.
#[derive(Debug, Default)]
pub(super) struct Closed {
    is: Mutex<bool>,
    changed: Condvar,
}

impl Closed {
    /// Returns once it is so.
    pub(super) fn wait(&self) {
        let is = self.is.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_while(is, |is| !*is);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for OfRing {
    fn drop(&mut self) {
        *self
            .closed
            .is
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.closed.changed.notify_all();
    }
}

impl Rings {
    pub(super) fn new(disk: &Disk) -> Result<Self, Error> {
        let bell = Bell::new()?;
        let ring = Ring::new(IN_FLIGHT_MAX, bell.as_fd());
        let ring = ring.map_err(|(doing, source)| Error::NoRing {
            path: disk.path.clone(),
            doing,
            source,
        })?;
        let mut rings = Self {
            bell,
            ring,
            files: Vec::new(),
            held: VecDeque::new(),
            writes: BTreeSet::new(),
            nth: 0,
            most: IN_FLIGHT_MAX as usize,
            #[cfg(test)]
            rig: Default::default(),
        };
        rings.turn_to(disk)?;
        Ok(rings)
    }

    /// What is begun from now on is done on `disk`.
    pub(super) fn turn_to(&mut self, disk: &Disk) -> Result<(), Error> {
        self.close_unused();
        let taken = |place| self.files.iter().any(|one| one.place == place);
        let Some(place) = (0..FILES_MAX).find(|place| !taken(*place)) else {
            return Err(Error::FilesInUse {
                path: disk.path.clone(),
                files: self.files.len(),
            });
        };
        let set = self.ring.set_file(place, Some(&disk.file));
        set.map_err(|source| Error::NoRing {
            path: disk.path.clone(),
            doing: "give a file to the io_uring",
            source,
        })?;
        self.files.push(OfRing {
            place,
            closed: Arc::default(),
        });
        self.close_unused();
        Ok(())
    }

    /// Closes files that were replaced and that nothing is in flight on. Not for a vCPU's thread, which may not.
    pub(super) fn close_unused(&mut self) {
        let Some(last) = self.files.last().map(|file| file.place) else {
            return;
        };
        let (ring, held) = (&mut self.ring, &self.held);
        self.files.retain(|file| {
            let mut all = ring.begun().chain(held);
            let used = file.place == last || all.any(|flight| flight.place == file.place);
            drop(all);
            used || ring.set_file(file.place, None).is_err()
        });
    }

    /// Whether one more may be begun.
    pub(super) fn has_room(&self) -> bool {
        self.len() < self.most
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    fn len(&self) -> usize {
        self.ring.in_flight() + self.held.len()
    }

    /// Begins what `chain` asks of `disk`; returns how many bytes were filled in, if it is over.
    pub(super) fn begin(
        &mut self,
        chain: Chain<'_>,
        disk: &Arc<Disk>,
        flushing: Flushing,
        memory: &GuestMemory,
    ) -> Option<u32> {
        self.nth += 1;
        let place = self.files.last().map_or(0, |file| file.place);
        let flight = match Flight::begin(self.nth, place, chain, disk, flushing) {
            Begun::Over(written) => return Some(written),
            Begun::Flight(flight) => flight,
        };
        if flight.is_flush() && !self.writes.is_empty() {
            self.held.push_back(flight);
            return None;
        }
        if flight.changes() {
            self.writes.insert(flight.nth);
        }
        self.push(flight, memory).map(|(_, written)| written)
    }

    /// Makes the next call of `flight`. Where that cannot be the request is over: its name, and how many bytes were
    /// filled in.
    fn push(&mut self, flight: Flight, memory: &GuestMemory) -> Option<(u16, u32)> {
        let pushed = match Ready::new(flight.place, memory, flight.call()) {
            // It has room for all that is here.
            Ok(ready) => (self.ring.push(ready, flight))
                .map_err(|flight| (flight, std::io::ErrorKind::OutOfMemory.into())),
            Err(error) => Err((flight, error)),
        };
        let (flight, error) = pushed.err()?;
        Some(self.end(&flight, Err(error.into()), memory))
    }

    fn end(
        &mut self,
        flight: &Flight,
        done: Result<(), Failed>,
        memory: &GuestMemory,
    ) -> (u16, u32) {
        self.writes.remove(&flight.nth);
        (flight.head, flight.end(done, memory))
    }

    /// Has the kernel begin what was.
    pub(super) fn submit(&mut self) {
        if let Err(error) = self.ring.submit() {
            // It has no memory for a moment: the event loop tries again.
            tracing::debug!(%error, "a ring was not submitted");
            self.bell.ring();
        }
    }

    /// Goes on with what is done; `over` gets the names of requests that are, and how many bytes were filled in.
    pub(super) fn reap(&mut self, memory: &GuestMemory, mut over: impl FnMut(u16, u32)) {
        loop {
            let done = self.take();
            if done.is_empty() {
                break;
            }
            for Done { mut of, result } in done {
                let ended = match of.advance(result) {
                    Some(done) => Some(self.end(&of, done, memory)),
                    None => self.push(of, memory),
                };
                if let Some((head, written)) = ended {
                    over(head, written);
                }
            }
            let first = |writes: &BTreeSet<u64>| writes.first().copied().unwrap_or(u64::MAX);
            while let Some(flight) = self
                .held
                .pop_front_if(|flight| flight.nth < first(&self.writes))
            {
                if let Some((head, written)) = self.push(flight, memory) {
                    over(head, written);
                }
            }
            self.submit();
        }
    }

    fn take(&mut self) -> Vec<Done<Flight>> {
        #[cfg(test)]
        if self.rig.holds_back() {
            return Vec::new();
        }
        #[cfg_attr(not(test), expect(unused_mut))]
        let mut all: Vec<_> = std::iter::from_fn(|| self.ring.take_done()).collect();
        #[cfg(test)]
        self.rig.reorder(&mut all);
        all
    }

    /// Has the event loop look at what is done, and begin what waits for room.
    pub(super) fn wake(&self) {
        self.bell.ring();
    }

    /// Returns once the kernel has nothing any more, and nobody is told of it.
    pub(super) fn forget_all(&mut self) {
        #[cfg(test)]
        if self.len() > 0 {
            self.rig.pass();
        }
        self.held.clear();
        self.writes.clear();
        while self.ring.in_flight() > 0 {
            self.ring.wait();
            while self.ring.take_done().is_some() {}
        }
        if self.files.len() > 1 {
            // The event loop may close them.
            self.bell.ring();
        }
    }

    /// The names of all that was begun and is not over, in the order of the driver's.
    pub(super) fn heads(&self) -> Vec<u16> {
        let all = self.ring.begun().chain(&self.held);
        let mut all: Vec<_> = all.map(|flight| (flight.nth, flight.head)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, head)| head).collect()
    }

    /// Files that were replaced and that the kernel is not done with.
    pub(super) fn replaced(&self) -> Vec<Arc<Closed>> {
        let replaced = self.files.iter().rev().skip(1);
        replaced.map(|file| file.closed.clone()).collect()
    }

    /// Requests that were begun so far.
    #[cfg(test)]
    pub(super) fn begun(&self) -> u64 {
        self.nth
    }

    /// How many files it has open.
    #[cfg(test)]
    pub(super) fn open_files(&self) -> usize {
        self.files.len()
    }
}

/// What the event loop serves of a drive with a ring: what the kernel has done.
#[derive(Debug)]
pub struct Completions {
    drive: Arc<Mutex<Block>>,
    bell: Bell,
}

impl Completions {
    /// Those of `drive`, if it has a ring.
    pub fn of(drive: &Arc<Mutex<Block>>) -> Option<Self> {
        let locked = drive.lock().unwrap_or_else(PoisonError::into_inner);
        let bell = locked.rings.as_ref()?.bell.clone();
        drop(locked);
        Some(Self {
            drive: drive.clone(),
            bell,
        })
    }
}

impl EventSource for Completions {
    fn fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn on_event(&mut self) {
        // Before looking: what is done later rings again.
        self.bell.silence();
        let mut drive = self.drive.lock().unwrap_or_else(PoisonError::into_inner);
        drive.on_completions();
    }
}
