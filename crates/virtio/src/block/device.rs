//! The disk itself: what the host does from memory is done inside of the notification, from
//! guest memory to the file without a copy; from the first request that would have to wait,
//! the queue is the [`Worker`]'s until it is empty. Those that have to wait for the rate
//! limiter stay in the queue until its timer.
//!
//! ```text
//!            ┌─ done at once ─┐
//! kick ──▶ Ours ──takes time──▶ Workers ──pop──▶ in hand ──done──▶ Workers ──empty──▶ Ours
//! ```
//!
//! A drive with rings ([`Block::with_rings`]) has no worker: from the kick on, the kernel has
//! what takes time, and the queue stays ours.
//!
//! Invariant: a worker does one request at a time, in the order of the queue, so that a flush
//! covers what came before it; `rings` say how theirs do. What is in hand or in flight is done
//! without the device's lock; a snapshot taken meanwhile keeps it as not begun, and a reset
//! waits for it.
//!
//! Left to others: the file (`disk`), the thread (`worker`), the kernel (`rings`).

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use ram::GuestMemory;

use super::counters::Metrics;
use super::disk::{Disk, Patience, RANGE_SECTORS_MAX, RANGES_MAX, TakesTime, data_bytes};
use super::rings::{Closed, Rings};
use super::saved::SavedBlock;
use super::spec::{
    Config, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_WRITE_ZEROES, SECTOR,
};
use super::worker::Hand;
use crate::counters::count;
use crate::rate_limiter::{Limits, RateLimiter};
use crate::{
    Activation, Chain, DeviceType, Error, EventSource, Interrupt, QueueError, SavedDevice,
    VirtQueue, VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;
/// A request is its segments, a header and a status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// What the guest may do with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Writes fail.
    ReadOnly,
    /// Writes reach the file.
    ReadWrite,
}

/// What the guest is told of the cache between it and the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: it cannot flush, and what it wrote is as durable as the host's cache.
    Unsafe,
    /// A flush makes writes durable.
    Writeback,
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    pub(super) disk: Arc<Disk>,
    pub(super) flushing: Flushing,
    pub(super) cache: Cache,
    pub(super) limiter: RateLimiter,
    pub(super) state: State,
    /// Drivers there were so far: whoever worked for one knows whether it is there still.
    driver: u64,
    /// How to reach the worker; without one, whoever notifies waits.
    pub(super) hand: Option<Arc<Hand>>,
    /// What the kernel has, with `io_engine` `Async`.
    pub(super) rings: Option<Box<Rings>>,
    /// What the queue has waits for room in them.
    full: bool,
}

#[derive(Debug)]
pub(super) enum State {
    Idle,
    Live(Live),
}

/// What there is only while the driver works.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) memory: GuestMemory,
    pub(super) queue: VirtQueue,
    pub(super) interrupt: Interrupt,
    pub(super) turn: Turn,
}

/// Whose the queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Of who notifies.
    Ours,
    /// The worker's. Its next request has passed the limiter.
    Handed,
    /// The worker's.
    Workers,
    /// The worker's, who took the request `head` and has not given it back.
    InHand { head: u16 },
}

/// A request in the worker's hand.
pub(super) struct Job<'m> {
    pub(super) chain: Chain<'m>,
    pub(super) disk: Arc<Disk>,
    pub(super) flushing: Flushing,
}

impl Live {
    pub(super) fn new(memory: GuestMemory, queue: VirtQueue, interrupt: Interrupt) -> Self {
        Self {
            memory,
            queue,
            interrupt,
            turn: Turn::Ours,
        }
    }
}

/// When written data become durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushing {
    /// When the host likes.
    Never,
    /// When the driver asks.
    Asked,
    /// The driver was offered a flush and knows none: with each write.
    EachWrite,
}

impl Block {
    /// Opens `path`, whose length at this moment is the disk's capacity; what does
    /// not fill a sector of 512 bytes at its end is left out.
    ///
    /// # Errors
    /// [`Error::OpenDisk`], [`Error::NotADisk`], [`Error::Host`].
    pub fn open(path: &Path, access: Access, cache: Cache, limits: Limits) -> Result<Self, Error> {
        let disk = Disk::open(path, access, Arc::default())?;
        Ok(Self {
            disk: Arc::new(disk),
            flushing: Flushing::Never,
            cache,
            limiter: RateLimiter::new(limits)?,
            state: State::Idle,
            driver: 0,
            hand: None,
            rings: None,
            full: false,
        })
    }

    /// Has what takes time be done by the kernel, up to 128 requests beside each other
    /// (`io_engine` `Async`). What the kernel has done is [`super::Completions`].
    ///
    /// # Errors
    /// [`Error::NoRing`], [`Error::Host`].
    pub fn with_rings(mut self) -> Result<Self, Error> {
        self.rings = Some(Box::new(Rings::new(&self.disk)?));
        Ok(self)
    }

    /// Puts the file at `path` in place of the one there is, or looks at its length anew if
    /// it is the same; tells the driver. What was written before may not be durable; a
    /// request [`Block::in_hand`] goes to the file before.
    ///
    /// # Errors
    /// [`Error::OpenDisk`], [`Error::NotADisk`], [`Error::NoRing`], [`Error::FilesInUse`]:
    /// nothing has changed then.
    pub fn update_path(&mut self, path: &Path) -> Result<(), Error> {
        let metrics = self.metrics();
        let new = Disk::open(path, self.disk.access, metrics.clone());
        let new = new.and_then(|new| match &mut self.rings {
            Some(rings) => rings.turn_to(&new).map(|()| new),
            None => Ok(new),
        });
        let new = new.inspect_err(|_| count(&metrics.counters.update_fails))?;
        self.disk = Arc::new(new);
        count(&metrics.counters.update_count);
        if let State::Live(live) = &self.state {
            live.interrupt.config_changed();
        }
        Ok(())
    }

    /// What is being done in another thread now, or by the kernel on a file that was
    /// replaced.
    pub fn in_hand(&self) -> Option<InHand> {
        if let Some(rings) = &self.rings {
            let replaced = rings.replaced();
            return (!replaced.is_empty()).then_some(InHand(Being::DoneOn(replaced)));
        }
        let hand = self.hand.as_ref()?;
        Some(InHand(Being::Done {
            nth: hand.at_work()?,
            by: hand.clone(),
        }))
    }

    /// Keeps the worker's thread from the guest's memory, but for the request that it is
    /// doing; or lets it go on. Whoever holds it keeps others from notifying as well, and the
    /// event loop from serving: without a worker that is all it takes.
    pub fn hold(&self, held: bool) {
        if let Some(hand) = &self.hand {
            hand.hold(held);
        }
    }

    /// What is counted.
    pub fn metrics(&self) -> Arc<Metrics> {
        self.disk.metrics.clone()
    }

    /// Replaces the limits that `limits` names; see [`RateLimiter::update`].
    pub fn update_limiter(&mut self, limits: Limits) {
        self.limiter.update(limits);
    }

    /// The limits that there are.
    pub fn limits(&self) -> Limits {
        self.limiter.limits()
    }

    /// The file behind it.
    pub fn path(&self) -> &Path {
        &self.disk.path
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let access = match self.disk.access {
            Access::ReadOnly => F_RO,
            Access::ReadWrite => F_DISCARD | F_WRITE_ZEROES,
        };
        let cache = match self.cache {
            Cache::Unsafe => 0,
            Cache::Writeback => F_FLUSH,
        };
        access | cache | F_SEG_MAX | F_BLK_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            sectors: self.disk.sectors,
            segments_max: SEGMENTS_MAX,
            block_size: SECTOR as u32,
            range_sectors_max: RANGE_SECTORS_MAX,
            ranges_max: RANGES_MAX,
        };
        crate::device::copy_config(&config.bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.flushing = match self.cache {
            Cache::Unsafe => Flushing::Never,
            Cache::Writeback if activation.features & F_FLUSH == 0 => Flushing::EachWrite,
            Cache::Writeback => Flushing::Asked,
        };
        self.driver += 1;
        let (memory, interrupt) = (activation.memory, activation.interrupt);
        self.state = match activation.queues.into_iter().next() {
            Some(queue) => State::Live(Live::new(memory, queue, interrupt)),
            None => State::Idle,
        };
        Ok(())
    }

    fn notify(&mut self, _queue: u16) -> Result<(), QueueError> {
        count(&self.disk.metrics.counters.queue_event_count);
        self.serve()
    }

    fn reset(&mut self) {
        self.state = State::Idle;
        self.driver += 1;
        self.full = false;
        // The next driver's memory is none of this one's business.
        if let Some(rings) = &mut self.rings {
            rings.forget_all();
        } else if let Some(in_hand) = self.in_hand() {
            in_hand.wait();
        }
    }

    fn save(&mut self) -> Result<SavedDevice, Error> {
        let ended = self.end_what_is_done();
        self.give_up_after(ended);
        if let Some(rings) = self.rings.as_ref().filter(|_| self.full) {
            // There may be room for what waits, but this thread may not begin it.
            rings.wake();
        }
        Ok(SavedDevice::Block(SavedBlock::of(self)))
    }

    fn restore(
        &mut self,
        saved: &SavedDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        match saved {
            SavedDevice::Block(saved) => {
                self.driver += 1;
                saved.put_into(self, memory, interrupt)
            }
            other => Err(other.misplaced()),
        }
    }
}

impl EventSource for Block {
    fn fd(&self) -> BorrowedFd<'_> {
        self.limiter.fd()
    }

    fn on_event(&mut self) {
        if !self.limiter.acknowledge() {
            return;
        }
        count(&self.disk.metrics.counters.rate_limiter_event_count);
        let served = self.serve();
        self.give_up_after(served);
    }
}

impl Block {
    /// Does what can be done at once; hands the queue over at the first request that cannot,
    /// or has the kernel do it and those that follow.
    fn serve(&mut self) -> Result<(), QueueError> {
        let served = self.serve_queue();
        if let Some(rings) = &mut self.rings {
            rings.submit();
            // What the kernel had in memory after all is done already.
            return served.and(self.end_what_is_done());
        }
        served
    }

    fn serve_queue(&mut self) -> Result<(), QueueError> {
        let State::Live(Live {
            memory,
            queue,
            turn,
            ..
        }) = &mut self.state
        else {
            return Ok(());
        };
        if *turn != Turn::Ours {
            return Ok(());
        }
        let counters = &self.disk.metrics.counters;
        let patience = match (&self.hand, &self.rings) {
            (None, None) => Patience::Endless,
            (Some(_), None) => Patience::Little,
            (_, Some(_)) => Patience::None,
        };
        let mut found = false;
        self.full = false;
        loop {
            while let Some(chain) = queue.pop(memory)? {
                found = true;
                if self.rings.as_ref().is_some_and(|rings| !rings.has_room()) {
                    // What is done next brings us back.
                    count(&counters.io_engine_throttled_events);
                    self.full = true;
                    queue.undo_pop();
                    return queue.signal(memory);
                }
                if !self.limiter.allow(data_bytes(&chain)) {
                    // The timer brings us back; until then no kick is of use.
                    count(&counters.rate_limiter_throttled_events);
                    queue.undo_pop();
                    return queue.signal(memory);
                }
                let head = chain.head;
                match (
                    self.disk.serve(chain, self.flushing, patience),
                    &mut self.rings,
                ) {
                    (Ok(written), _) => queue.complete(memory, head, written)?,
                    (Err(TakesTime), Some(rings)) => {
                        count(&counters.handed_over_count);
                        queue.undo_pop();
                        if let Some(chain) = queue.pop(memory)? {
                            let head = chain.head;
                            let over = rings.begin(chain, &self.disk, self.flushing, memory);
                            if let Some(written) = over {
                                queue.complete(memory, head, written)?;
                            }
                        }
                    }
                    (Err(TakesTime), None) => {
                        queue.undo_pop();
                        *turn = Turn::Handed;
                        count(&counters.handed_over_count);
                        queue.signal(memory)?;
                        if let Some(hand) = &self.hand {
                            hand.ring();
                        }
                        return Ok(());
                    }
                }
            }
            if !queue.want_kick(memory)? {
                if !found {
                    count(&counters.no_avail_buffer);
                }
                return queue.signal(memory);
            }
        }
    }

    /// The kernel has done something.
    pub(super) fn on_completions(&mut self) {
        let reaped = self.reap();
        self.give_up_after(reaped);
        if let Some(rings) = &mut self.rings {
            rings.close_unused();
        }
    }

    /// Gives back what the kernel has done, and goes on with what waited for that.
    fn reap(&mut self) -> Result<(), QueueError> {
        self.end_what_is_done()?;
        while self.full && self.rings.as_ref().is_some_and(|rings| rings.has_room()) {
            self.serve()?;
        }
        Ok(())
    }

    fn end_what_is_done(&mut self) -> Result<(), QueueError> {
        let (Some(rings), State::Live(live)) = (&mut self.rings, &mut self.state) else {
            return Ok(());
        };
        let Live { memory, queue, .. } = live;
        let mut told = Ok(());
        rings.submit();
        rings.reap(memory, |head, written| {
            if told.is_ok() && !queue.broken {
                told = queue.complete(memory, head, written);
            }
        });
        if queue.broken {
            return told;
        }
        told.and_then(|()| queue.signal(memory))
    }

    /// What the worker needs to begin: the memory that requests are in, and whose they are.
    pub(super) fn begin(&self) -> Option<(GuestMemory, u64)> {
        match &self.state {
            State::Live(live) if live.turn != Turn::Ours => {
                Some((live.memory.clone(), self.driver))
            }
            State::Live(_) | State::Idle => None,
        }
    }

    /// The worker's next request, of this driver's; none when there is none, or none that
    /// may pass: the queue is not the worker's any more then.
    pub(super) fn take<'m>(&mut self, driver: u64, memory: &'m GuestMemory) -> Option<Job<'m>> {
        let mut job = None;
        let taken = self.try_to_take(driver, memory, &mut job);
        self.give_up_after(taken);
        job
    }

    fn try_to_take<'m>(
        &mut self,
        driver: u64,
        memory: &'m GuestMemory,
        job: &mut Option<Job<'m>>,
    ) -> Result<(), QueueError> {
        let (State::Live(Live { queue, turn, .. }), Some(hand)) = (&mut self.state, &self.hand)
        else {
            return Ok(());
        };
        if self.driver != driver {
            return Ok(());
        }
        // Whatever happens but a job, it is not the worker's turn any more.
        let before = std::mem::replace(turn, Turn::Ours);
        let chain = loop {
            if let Some(chain) = queue.pop(memory)? {
                break chain;
            }
            if !queue.want_kick(memory)? {
                return queue.signal(memory);
            }
        };
        if before != Turn::Handed && !self.limiter.allow(data_bytes(&chain)) {
            count(&self.disk.metrics.counters.rate_limiter_throttled_events);
            queue.undo_pop();
            return queue.signal(memory);
        }
        *turn = Turn::InHand { head: chain.head };
        hand.begin();
        *job = Some(Job {
            chain,
            disk: self.disk.clone(),
            flushing: self.flushing,
        });
        Ok(())
    }

    /// The worker did request `head` of this driver's, and filled in `written` bytes.
    pub(super) fn give_back(&mut self, driver: u64, head: u16, written: u32) {
        let State::Live(Live {
            memory,
            queue,
            turn,
            ..
        }) = &mut self.state
        else {
            return;
        };
        if self.driver != driver {
            return;
        }
        *turn = Turn::Workers;
        let told = queue.complete(memory, head, written);
        let told = told.and_then(|()| queue.signal(memory));
        self.give_up_after(told);
    }

    /// There is no worker any more.
    pub(super) fn take_back(&mut self) {
        if let State::Live(live) = &mut self.state {
            live.turn = Turn::Ours;
        }
    }

    /// After an error of the ring, the driver is asked for a reset.
    fn give_up_after(&mut self, served: Result<(), QueueError>) {
        let Err(error) = served else {
            return;
        };
        tracing::warn!(%error, "disk needs a reset");
        count(&self.disk.metrics.counters.event_fails);
        if let State::Live(live) = &mut self.state {
            live.turn = Turn::Ours;
            live.interrupt.needs_reset();
        }
    }
}

/// What was being done when [`Block::in_hand`] was asked.
#[derive(Debug)]
#[must_use = "it is for waiting"]
pub struct InHand(Being);

#[derive(Debug)]
enum Being {
    /// By the worker: a request.
    Done { by: Arc<Hand>, nth: u64 },
    /// By the kernel: what there is on files that were replaced.
    DoneOn(Vec<Arc<Closed>>),
}

impl InHand {
    /// Returns once it is done. The device needs not be locked, and the event loop runs.
    pub fn wait(self) {
        match self.0 {
            Being::Done { by, nth } => by.wait_for(nth),
            Being::DoneOn(files) => files.iter().for_each(|file| file.wait()),
        }
    }
}
