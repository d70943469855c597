//! The disk as the driver sees it: requests are checked, copied to the back end's memory, and what it did is copied
//! back.
//!
//! ```text
//! slot:  free ──offered──▶ a request's ──done──▶ free
//!                             │ reset              ▲
//!                             └──▶ nobody's ──done─┘
//! ```
//!
//! Invariant: a request is checked before it is offered: it lies on the disk, and writes to none that is read-only. Of
//! a back end that is lost every request fails, those that it has included. A reset waits for nothing: what the back
//! end still does, it does in its own memory.
//!
//! Left to others: its memory (`shadow`), what is said to it (`session`).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use ram::ring::Piece;
use ram::{Gpa, GuestMemory};
use vm_memory::{Bytes, GuestMemoryBackend, VolatileSlice};

use super::counters::Counters;
use super::session::{Agreed, Connection, Session};
use super::shadow::{SLOT_BYTES, SLOTS, Shadow};
use crate::block::Cache;
use crate::block::flight::pieces;
use crate::block::spec::{
    Config, F_FLUSH, F_RO, F_SEG_MAX, F_SIZE_MAX, HEADER_LEN, Header, ID_LEN, Operation, SECTOR,
    Status,
};
use crate::counters::count;
use crate::poller::{Poller, Token};
use crate::{
    Activation, Chain, DeviceType, Error, EventSource, Interrupt, QueueError, SavedDevice,
    VirtQueue, VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;
/// Pieces of a request's data, and bytes of one: what a slot has room for.
const SEGMENTS_MAX: u32 = 128;
const SEGMENT_BYTES_MAX: u32 = SLOT_BYTES as u32 / SEGMENTS_MAX;
/// The back end rang.
const CALL: Token = Token(0);
/// Its socket.
const SOCKET: Token = Token(1);

/// A disk that another process serves.
#[derive(Debug)]
pub struct VhostUserBlock {
    session: Arc<Session>,
    features: u64,
    config: [u8; Config::LEN],
    shadow: Shadow,
    slots: [Slot; SLOTS],
    poller: Poller,
    counters: Arc<Counters>,
    state: State,
    /// What the queue has waits for a slot.
    full: bool,
    lost: bool,
}

#[derive(Debug)]
enum State {
    Idle,
    Live(Live),
}

/// What there is only while the driver works.
#[derive(Debug)]
struct Live {
    memory: GuestMemory,
    queue: VirtQueue,
    interrupt: Interrupt,
    /// The driver was offered a flush and knows none: each write is one.
    flushes_each_write: bool,
}

#[derive(Debug)]
enum Slot {
    Free,
    /// The back end has it, for the driver.
    Of(Request),
    /// The back end has it, for a driver that is gone.
    Nobodys,
}

#[derive(Debug)]
struct Request {
    head: u16,
    status: Gpa,
    into: Vec<Piece>,
    then_flush: bool,
}

/// A request that was looked at.
enum Looked {
    /// It is over, with so many bytes filled in.
    Over(u32),
    /// The back end is to have it: header, bytes of its data for the back end, bytes to fill in.
    For(Request, [u8; HEADER_LEN], usize, usize),
}

impl VhostUserBlock {
    /// Agrees with the back end on everything, and has it work.
    ///
    /// # Errors
    /// [`Error::BackEnd`], [`Error::BackEndSilent`], [`Error::BackEndLacks`], [`Error::Host`].
    pub fn new(connection: Connection, cache: Cache) -> Result<Self, Error> {
        let counters = Arc::<Counters>::default();
        let flush = match cache {
            Cache::Unsafe => 0,
            Cache::Writeback => F_FLUSH,
        };
        let start = Instant::now();
        let (session, agreed) = Session::agree(connection, F_RO | flush)?;
        took(&counters.init_time_us, start);
        let shadow = Shadow::new()?;
        let poller = Poller::new()?;
        let polled = poller.add(shadow.called(), CALL);
        polled
            .and_then(|()| poller.add(session.socket(), SOCKET))
            .map_err(|source| Error::Host {
                doing: "poll a back end",
                source,
            })?;
        let start = Instant::now();
        session.hand_over(&shadow)?;
        took(&counters.activate_time_us, start);
        let Agreed { features, config } = agreed;
        Ok(Self {
            session: Arc::new(session),
            features,
            config: bounded(config),
            shadow,
            slots: std::array::from_fn(|_| Slot::Free),
            poller,
            counters,
            state: State::Idle,
            full: false,
            lost: false,
        })
    }

    /// The conversation with the back end: for who asks it without the device's lock.
    pub fn session(&self) -> Arc<Session> {
        self.session.clone()
    }

    /// Takes what the back end, asked at `since`, said of its disk; tells the driver.
    ///
    /// # Errors
    /// What asking said.
    pub fn update(
        &mut self,
        said: Result<[u8; Config::LEN], Error>,
        since: Instant,
    ) -> Result<(), Error> {
        let config = said.inspect_err(|_| count(&self.counters.cfg_fails))?;
        self.config = bounded(config);
        if let State::Live(live) = &self.state {
            live.interrupt.config_changed();
        }
        took(&self.counters.config_change_time_us, since);
        Ok(())
    }

    /// What is counted.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        capacity(&self.config)
    }
}

fn capacity(config: &[u8; Config::LEN]) -> u64 {
    let first = config.first_chunk::<8>();
    first.map_or(0, |sectors| u64::from_le_bytes(*sectors))
}

/// A configuration with our bounds of a request in place of the back end's.
fn bounded(mut config: [u8; Config::LEN]) -> [u8; Config::LEN] {
    // §5.2.4: size_max, seg_max
    let ours = [SEGMENT_BYTES_MAX.to_le_bytes(), SEGMENTS_MAX.to_le_bytes()];
    let places = config.iter_mut().skip(8);
    places
        .zip(ours.as_flattened())
        .for_each(|(to, from)| *to = *from);
    config
}

fn took(time: &std::sync::atomic::AtomicU64, since: Instant) {
    // 2^64 microseconds are longer than a machine lives.
    time.store(since.elapsed().as_micros() as u64, Ordering::Relaxed);
}

impl VirtioDevice for VhostUserBlock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        self.features | F_SIZE_MAX | F_SEG_MAX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        if self.lost {
            count(&self.counters.activate_fails);
        }
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        self.state = match queues.into_iter().next() {
            Some(queue) => State::Live(Live {
                memory,
                queue,
                interrupt,
                flushes_each_write: self.features & !features & F_FLUSH != 0,
            }),
            None => State::Idle,
        };
        Ok(())
    }

    fn notify(&mut self, _queue: u16) -> Result<(), QueueError> {
        let served = self.serve();
        self.shadow.kick();
        served
    }

    fn reset(&mut self) {
        self.state = State::Idle;
        self.full = false;
        for slot in &mut self.slots {
            if let Slot::Of(_) = slot {
                *slot = Slot::Nobodys;
            }
        }
    }

    fn save(&mut self) -> Result<SavedDevice, Error> {
        Err(Error::NotSaved)
    }

    fn restore(
        &mut self,
        _saved: &SavedDevice,
        _memory: &GuestMemory,
        _interrupt: &Interrupt,
    ) -> Result<(), Error> {
        Err(Error::NotSaved)
    }
}

impl EventSource for VhostUserBlock {
    fn fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    fn on_event(&mut self) {
        // Edges: neither the eventfd nor the socket, both of which the other end has as well, needs to be read.
        let (ready, _) = self.poller.take();
        let gone = ready.iter().any(|one| one.token == SOCKET && one.hung_up);
        let reaped = self.reap();
        let reaped = match gone {
            true => reaped.and_then(|()| self.lose("it is gone")),
            false => reaped,
        };
        self.shadow.kick();
        let Err(error) = reaped else {
            return;
        };
        tracing::warn!(%error, "disk needs a reset");
        if let State::Live(live) = &self.state {
            live.interrupt.needs_reset();
        }
    }
}

impl VhostUserBlock {
    /// Offers what the queue has, as long as there are slots.
    fn serve(&mut self) -> Result<(), QueueError> {
        let State::Live(live) = &mut self.state else {
            return Ok(());
        };
        let Live {
            memory,
            queue,
            flushes_each_write,
            ..
        } = live;
        self.full = false;
        loop {
            while let Some(chain) = queue.pop(memory)? {
                let head = chain.head;
                if self.lost {
                    let written = answer(chain, Status::IoError);
                    queue.complete(memory, head, written)?;
                    continue;
                }
                let mut slots = self.slots.iter_mut().enumerate();
                let free = slots.find(|(_, slot)| matches!(slot, Slot::Free));
                let free = free.and_then(|(index, slot)| {
                    Some((index, slot, self.shadow.data(index, SLOT_BYTES)?))
                });
                let Some((index, slot, room)) = free else {
                    // What is done next brings us back.
                    self.full = true;
                    queue.undo_pop();
                    return queue.signal(memory);
                };
                let sectors = capacity(&self.config);
                match look(chain, room, self.features, sectors, *flushes_each_write) {
                    Looked::Over(written) => queue.complete(memory, head, written)?,
                    Looked::For(request, header, from, into) => {
                        *slot = Slot::Of(request);
                        self.shadow.offer(index, header, from, into);
                    }
                }
            }
            if !queue.want_kick(memory)? {
                return queue.signal(memory);
            }
        }
    }

    /// Gives back what the back end has done, and goes on with what waited for that.
    fn reap(&mut self) -> Result<(), QueueError> {
        while !self.lost {
            match self.shadow.take_done() {
                Ok(Some(index)) => self.end(index)?,
                Ok(None) => break,
                Err(lie) => return self.lose(&lie.to_string()),
            }
        }
        if let State::Live(live) = &mut self.state {
            live.queue.signal(&live.memory)?;
        }
        match self.full {
            true => self.serve(),
            false => Ok(()),
        }
    }

    /// The back end is done with a slot.
    fn end(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let (mut request, live) = match (std::mem::replace(slot, Slot::Free), &mut self.state) {
            (Slot::Of(request), State::Live(live)) => (request, live),
            (Slot::Of(_) | Slot::Free | Slot::Nobodys, State::Live(_) | State::Idle) => {
                return Ok(());
            }
        };
        let mut status = match self.shadow.status(index) {
            said @ 0..=2 => said,
            _ => Status::IoError as u8,
        };
        if status == Status::Ok as u8 && std::mem::take(&mut request.then_flush) {
            *slot = Slot::Of(request);
            self.shadow.offer(index, Header::FLUSH, 0, 0);
            return Ok(());
        }
        let len = request.into.iter().map(|piece| piece.len).sum();
        let mut written = 1;
        if status == Status::Ok as u8 && len > 0 {
            let filled = self.shadow.data(index, len);
            match filled.and_then(|from| fill(&live.memory, &request.into, from)) {
                Some(()) => written += len as u32,
                None => status = Status::IoError as u8,
            }
        }
        give(live, &request, status, written)
    }

    /// There is no back end any more.
    fn lose(&mut self, why: &str) -> Result<(), QueueError> {
        if std::mem::replace(&mut self.lost, true) {
            return Ok(());
        }
        let socket = self.session.path();
        tracing::warn!(
            ?socket,
            why,
            "a drive lost its vhost-user back end: its requests fail"
        );
        self.session.end();
        for slot in &mut self.slots {
            let slot = std::mem::replace(slot, Slot::Free);
            if let (Slot::Of(request), State::Live(live)) = (slot, &mut self.state) {
                give(live, &request, Status::IoError as u8, 1)?;
            }
        }
        self.serve()
    }
}

/// Gives a request back.
fn give(live: &mut Live, request: &Request, status: u8, written: u32) -> Result<(), QueueError> {
    if let Ok(byte) = live.memory.get_slice(request.status, 1)
        && byte.bitmap().allows(1, true)
    {
        let _ = byte.write(&[status], 0);
    }
    live.queue.complete(&live.memory, request.head, written)
}

/// Copies `from` into `pieces`; none when one of them may not be reached any more.
fn fill(memory: &GuestMemory, pieces: &[Piece], from: VolatileSlice<'_, ()>) -> Option<()> {
    let mut from = from;
    for piece in pieces {
        for to in memory.get_slices(piece.at, piece.len) {
            let to = to.ok().filter(|to| to.bitmap().allows(to.len(), true))?;
            from.copy_to_volatile_slice(to);
            from = from.offset(to.len()).ok()?;
        }
    }
    Some(())
}

/// Answers without the back end; returns how many bytes were filled in.
fn answer(mut chain: Chain<'_>, status: Status) -> u32 {
    let data = chain.writable.len().saturating_sub(1);
    drop(chain.writable.take(data));
    chain.writable.write(&[status as u8]) as u32
}

/// Looks at a request; what it has for the back end is copied into `room`.
fn look(
    mut chain: Chain<'_>,
    room: VolatileSlice<'_, ()>,
    features: u64,
    sectors: u64,
    flushes_each_write: bool,
) -> Looked {
    let header = match chain.readable.read_array::<HEADER_LEN>() {
        Some(header) if !chain.writable.is_empty() => header,
        Some(_) | None => return Looked::Over(answer(chain, Status::IoError)),
    };
    let Header { operation, sector } = Header::parse(header);
    let over = |chain, status| Looked::Over(answer(chain, status));
    let (output, input) = (chain.readable.len(), chain.writable.len() - 1);
    let on_disk = |len: usize| {
        let end = sector.checked_add(len as u64 / SECTOR);
        len <= room.len()
            && (len as u64).is_multiple_of(SECTOR)
            && end.is_some_and(|end| end <= sectors)
    };
    let (from, into) = match operation {
        Operation::Read if on_disk(input) => (0, input),
        Operation::Write if on_disk(output) && features & F_RO == 0 => (output, 0),
        Operation::Flush if features & F_FLUSH == 0 => return over(chain, Status::Ok),
        Operation::Flush => (0, 0),
        Operation::GetId if input >= ID_LEN => (0, ID_LEN),
        Operation::Read | Operation::Write | Operation::GetId => {
            return over(chain, Status::IoError);
        }
        Operation::Discard | Operation::WriteZeroes | Operation::Other => {
            return over(chain, Status::Unsupported);
        }
    };
    if from == 0 && into == 0 && operation != Operation::Flush {
        return over(chain, Status::Ok);
    }
    let mut data = chain.writable.take(input);
    let mut to = room;
    for piece in chain.readable.pieces().iter().filter(|_| from > 0) {
        piece.copy_to_volatile_slice(to);
        to = match to.offset(piece.len()) {
            Ok(rest) => rest,
            Err(_) => return over(chain, Status::IoError),
        };
    }
    let request = Request {
        head: chain.head,
        // One byte is left.
        status: pieces(&mut chain.writable)
            .first()
            .map_or(Gpa(0), |piece| piece.at),
        into: pieces(&mut data.take(into)),
        then_flush: operation == Operation::Write && flushes_each_write,
    };
    Looked::For(request, header, from, into)
}
