//! What a drive with `io_engine` `Async` has the kernel do: requests beside each other, each ended when it is done.
//!
//! ```text
//!             ┌─ a flush, writes before it in flight ─▶ held ─┐ those are done
//! begin ──────┴──────────────────────────────────────────────┴▶ ring ──▶ reap: more to do, or over
//! ```
//!
//! Invariant: a flush begins when every write that was begun before it is over; nothing else waits for anything. No
//! more than [`IN_FLIGHT_MAX`] requests are here. A file that was replaced keeps its ring until that is empty.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use ram::GuestMemory;
use ram::ring::{Done, Ready, Ring};

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
    /// The last one is that of the drive's file, the others' files were replaced.
    rings: Vec<OfFile>,
    /// Flushes that wait for writes, in their order, each with the number of its ring.
    held: VecDeque<(u64, Flight)>,
    /// Writes in flight, by number.
    writes: BTreeSet<u64>,
    /// Requests that were begun so far.
    nth: u64,
    /// Files there were so far.
    files: u64,
    /// [`IN_FLIGHT_MAX`], but for tests.
    pub(super) most: usize,
    #[cfg(test)]
    pub(super) rig: super::slow_rings::Rigged,
}

/// A ring of one file.
#[derive(Debug)]
struct OfFile {
    nth: u64,
    ring: Ring<Flight>,
    gone: Arc<Gone>,
}

/// Whether a file is done with.
#[derive(Debug, Default)]
pub(super) struct Gone {
    is: Mutex<bool>,
    changed: Condvar,
}

impl Gone {
    /// Returns once it is.
    pub(super) fn wait(&self) {
        let is = self.is.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_while(is, |is| !*is);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for OfFile {
    fn drop(&mut self) {
        *self.gone.is.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.gone.changed.notify_all();
    }
}

impl Rings {
    pub(super) fn new(disk: &Disk) -> Result<Self, Error> {
        let mut rings = Self {
            bell: Bell::new()?,
            rings: Vec::new(),
            held: VecDeque::new(),
            writes: BTreeSet::new(),
            nth: 0,
            files: 0,
            most: IN_FLIGHT_MAX as usize,
            #[cfg(test)]
            rig: Default::default(),
        };
        rings.turn_to(disk)?;
        Ok(rings)
    }

    /// What is begun from now on is done on `disk`.
    pub(super) fn turn_to(&mut self, disk: &Disk) -> Result<(), Error> {
        use std::os::fd::AsFd;
        let ring = Ring::new(&disk.file, IN_FLIGHT_MAX, self.bell.as_fd());
        let ring = ring.map_err(|(doing, source)| Error::NoRing {
            path: disk.path.clone(),
            doing,
            source,
        })?;
        self.files += 1;
        self.rings.push(OfFile {
            nth: self.files,
            ring,
            gone: Arc::default(),
        });
        self.forget_files();
        Ok(())
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
        let in_flight = self.rings.iter().map(|one| one.ring.in_flight());
        in_flight.sum::<usize>() + self.held.len()
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
        let flight = match Flight::begin(self.nth, chain, disk, flushing) {
            Begun::Over(written) => return Some(written),
            Begun::Flight(flight) => flight,
        };
        let file = self.files;
        if flight.is_flush() && !self.writes.is_empty() {
            self.held.push_back((file, flight));
            return None;
        }
        if flight.changes() {
            self.writes.insert(flight.nth);
        }
        self.push(file, flight, memory).map(|(_, written)| written)
    }

    /// Has the ring of file `nth` make the next call of `flight`. Where it cannot the request is over: its name, and how
    /// many bytes were filled in.
    fn push(&mut self, nth: u64, flight: Flight, memory: &GuestMemory) -> Option<(u16, u32)> {
        let refused = match Ready::new(memory, flight.call()) {
            Ok(ready) => {
                let file = self.rings.iter_mut().find(|one| one.nth == nth);
                // There is: files are kept for what is in flight, rings have room for all.
                let full = std::io::ErrorKind::OutOfMemory;
                match file {
                    Some(OfFile { ring, .. }) => {
                        ring.push(ready, flight).map_err(|of| (of, full.into()))
                    }
                    None => Err((flight, full.into())),
                }
            }
            Err(error) => Err((flight, error)),
        };
        let (flight, error) = refused.err()?;
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
        for OfFile { ring, .. } in &mut self.rings {
            if let Err(error) = ring.submit() {
                // It has no memory for a moment: the event loop tries again.
                tracing::debug!(%error, "a ring was not submitted");
                self.bell.ring();
            }
        }
    }

    /// Goes on with what is done; `over` gets the names of requests that are, and how many bytes were filled in.
    pub(super) fn reap(&mut self, memory: &GuestMemory, mut over: impl FnMut(u16, u32)) {
        loop {
            let done = self.take();
            if done.is_empty() {
                break;
            }
            for (file, Done { mut of, result }) in done {
                let ended = match of.advance(result) {
                    Some(done) => Some(self.end(&of, done, memory)),
                    None => self.push(file, of, memory),
                };
                if let Some((head, written)) = ended {
                    over(head, written);
                }
            }
            let first = |writes: &BTreeSet<u64>| writes.first().copied().unwrap_or(u64::MAX);
            while let Some((file, flight)) = self
                .held
                .pop_front_if(|(_, flight)| flight.nth < first(&self.writes))
            {
                if let Some((head, written)) = self.push(file, flight, memory) {
                    over(head, written);
                }
            }
            self.submit();
        }
        self.forget_files();
    }

    fn take(&mut self) -> Vec<(u64, Done<Flight>)> {
        #[cfg(test)]
        if self.rig.holds_back() {
            return Vec::new();
        }
        let mut all = Vec::new();
        for OfFile { nth, ring, .. } in &mut self.rings {
            all.extend(std::iter::from_fn(|| ring.take_done()).map(|done| (*nth, done)));
        }
        #[cfg(test)]
        self.rig.reorder(&mut all);
        all
    }

    /// Drops the rings of replaced files that nothing is left of.
    fn forget_files(&mut self) {
        let (files, held) = (self.files, &self.held);
        self.rings.retain(|one| {
            let held = held.iter().any(|(file, _)| *file == one.nth);
            one.nth == files || one.ring.in_flight() > 0 || held
        });
    }

    /// Returns once the kernel has nothing any more, and nobody is told of it.
    pub(super) fn forget_all(&mut self) {
        #[cfg(test)]
        if self.len() > 0 {
            self.rig.pass();
        }
        self.held.clear();
        self.writes.clear();
        for OfFile { ring, .. } in &mut self.rings {
            while ring.in_flight() > 0 {
                ring.wait();
                while ring.take_done().is_some() {}
            }
        }
        self.forget_files();
    }

    /// The names of all that was begun and is not over, in the order of the driver's.
    pub(super) fn heads(&self) -> Vec<u16> {
        let begun = self.rings.iter().flat_map(|one| one.ring.begun());
        let all = begun.chain(self.held.iter().map(|(_, flight)| flight));
        let mut all: Vec<_> = all.map(|flight| (flight.nth, flight.head)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, head)| head).collect()
    }

    /// Files that were replaced and that the kernel is not done with.
    pub(super) fn before(&self) -> Vec<Arc<Gone>> {
        let before = self.rings.iter().filter(|one| one.nth != self.files);
        before.map(|one| one.gone.clone()).collect()
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
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.bell.as_fd()
    }

    fn on_event(&mut self) {
        // Before looking: what is done later rings again.
        self.bell.silence();
        let mut drive = self.drive.lock().unwrap_or_else(PoisonError::into_inner);
        drive.on_completions();
    }
}
