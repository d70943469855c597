//! From the link or the neighbour into the guest's buffers.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use ram::GuestMemory;
use ram::volatile::{self, Slice};

use super::counters::{add, count};
use super::device::{BYTES_MAX, Live, STREAM, Thread, Wires};
use super::spec::{HEADER_LEN, LONG_FRAME, NUM_BUFFERS, SHORT_FRAME};
use crate::chain::Buffers;
use crate::rate_limiter::RateLimiter;
use crate::{QueueError, VirtQueue};

/// Frames given to the guest before it is told: it works on them while the next are read.
const FRAMES_MAX: usize = 64;

/// A frame that the guest does not see yet: buffers and how much of each is filled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) buffers: Vec<(u16, u32)>,
    /// All of them together.
    pub(super) bytes: usize,
}

/// Buffers of the guest that were taken from the queue, to be filled from the front.
#[derive(Debug, Default)]
struct Room<'m> {
    buffers: VecDeque<(u16, Buffers<'m>)>,
    bytes: usize,
}

impl<'m> Room<'m> {
    /// The first `bytes` of it, piece by piece.
    fn pieces(&self, bytes: usize) -> Vec<Slice<'m>> {
        let mut pieces = Vec::new();
        let mut left = bytes;
        for (_, buffer) in &self.buffers {
            if left == 0 {
                break;
            }
            pieces.extend(buffer.front(left));
            left = left.saturating_sub(buffer.len());
        }
        pieces
    }

    /// Writes `bytes` at `offset`, as much as there is room for.
    fn write(&self, offset: usize, bytes: &[u8]) {
        let (mut skip, mut left) = (offset, bytes);
        for (_, buffer) in &self.buffers {
            if let Some(behind) = skip.checked_sub(buffer.len()) {
                skip = behind;
                continue;
            }
            let mut buffer = buffer.clone();
            buffer.take(std::mem::take(&mut skip));
            let n = buffer.write(left);
            left = left.get(n..).unwrap_or_default();
            if left.is_empty() {
                return;
            }
        }
    }

    /// The first `bytes` of it.
    fn read(&self, bytes: usize) -> Vec<u8> {
        let mut all = vec![0; bytes];
        let mut left = all.as_mut_slice();
        for (_, buffer) in &self.buffers {
            let n = buffer.clone().read(left);
            left = left.split_at_mut(n).1;
        }
        all
    }

    /// Says in the frame of `bytes` in how many buffers it is.
    fn write_count(&self, bytes: usize) {
        let mut left = bytes;
        let mut buffers: u16 = 0;
        for (_, buffer) in &self.buffers {
            if left == 0 {
                break;
            }
            left = left.saturating_sub(buffer.len());
            // A queue has 256.
            buffers += 1;
        }
        self.write(NUM_BUFFERS, &buffers.to_le_bytes());
    }

    /// Takes the buffers that `bytes` fill out of it.
    fn filled(&mut self, bytes: usize) -> Held {
        let mut held = Held {
            buffers: Vec::new(),
            bytes,
        };
        let mut left = bytes;
        while left > 0
            && let Some((head, buffer)) = self.buffers.pop_front()
        {
            let here = left.min(buffer.len());
            self.bytes -= buffer.len();
            left -= here;
            held.buffers.push((head, here as u32));
        }
        held
    }
}

impl Live {
    /// Gives the guest what there is for it, as far as it has buffers and the limiter lets
    /// it, up to [`FRAMES_MAX`] and [`BYTES_MAX`].
    pub(super) fn receive(
        &mut self,
        limiter: &mut RateLimiter,
        wires: &mut Wires,
        now: Instant,
        on: Thread,
    ) -> Result<(), QueueError> {
        if let Some(held) = self.held.take() {
            if !limiter.allow(held.bytes as u64) {
                self.held = Some(held);
                return Ok(());
            }
            self.show(&held, wires)?;
        }
        let nothing =
            !wires.link_has_frames && wires.waiting.is_none() && wires.neighbour.is_none();
        if nothing {
            return self.rx.signal(&self.memory);
        }
        if on == Thread::Vcpu && wires.is_stream() {
            wires.bell.ring();
            return self.rx.signal(&self.memory);
        }
        // Holds the memory, not the device.
        let memory = self.memory.clone();
        let mut room = Room::default();
        let mut given = 0;
        for nth in 0.. {
            if nth == FRAMES_MAX || given >= BYTES_MAX {
                wires.come_back();
                break;
            }
            let Some((bytes, from)) = self.next(&mut room, &memory, wires, now)? else {
                break;
            };
            given += bytes;
            room.write_count(bytes);
            let held = room.filled(bytes);
            if from == From::Link && !limiter.allow(bytes as u64) {
                count(&wires.counters.rx_rate_limiter_throttled);
                self.held = Some(held);
                break;
            }
            self.show(&held, wires)?;
        }
        for _ in &room.buffers {
            self.rx.undo_pop();
        }
        self.rx.signal(&self.memory)
    }

    /// Puts the next frame into the room, the neighbour's before the link's; returns its
    /// length, header included.
    fn next<'m>(
        &mut self,
        room: &mut Room<'m>,
        memory: &'m GuestMemory,
        wires: &mut Wires,
        now: Instant,
    ) -> Result<Option<(usize, From)>, QueueError> {
        let merges = self.merges();
        let least = match merges {
            true => wires.expected,
            false => self.frame_room(),
        };
        let mut fill =
            |room: &mut Room<'m>, wanted| fill(room, &mut self.rx, memory, merges, wanted);
        fill(room, least)?;
        if room.bytes >= SHORT_FRAME
            && let Some(bytes) = wires.of_neighbour(room, now)
        {
            return Ok(Some((bytes, From::Neighbour)));
        }
        let waiting = wires.waiting.take();
        if waiting.is_none() && room.bytes < SHORT_FRAME {
            if wires.link_has_frames {
                count(&wires.counters.no_rx_avail_buffer);
            }
            return Ok(None);
        }
        let (front, overflow) = match &waiting {
            Some(frame) => (0, frame.as_slice()),
            None => match wires.of_link(room) {
                Some((front, over)) => (front, wires.overflow.get(..over).unwrap_or_default()),
                None => return Ok(None),
            },
        };
        let bytes = front + overflow.len();
        if bytes > room.bytes && !merges {
            count(&wires.counters.rx_fails);
            return Ok(None);
        }
        if bytes > room.bytes && !fill(room, bytes)? {
            // Until the guest has room for it.
            count(&wires.counters.no_rx_avail_buffer);
            wires.waiting = Some([room.read(front), overflow.to_vec()].concat());
            return Ok(None);
        }
        room.write(front, overflow);
        Ok(Some((bytes, From::Link)))
    }

    /// Lets the guest see a frame.
    pub(super) fn show(&mut self, held: &Held, wires: &Wires) -> Result<(), QueueError> {
        let counters = &wires.counters;
        count(&counters.rx_packets_count);
        add(&counters.rx_count, held.buffers.len());
        add(&counters.rx_bytes_count, held.bytes);
        self.rx.complete_together(&self.memory, &held.buffers)
    }
}

/// Whose frame it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Link,
    Neighbour,
}

/// Takes buffers from the queue until there is room for `wanted` bytes. Returns whether
/// there is.
fn fill<'m>(
    room: &mut Room<'m>,
    queue: &mut VirtQueue,
    memory: &'m GuestMemory,
    merges: bool,
    wanted: usize,
) -> Result<bool, QueueError> {
    while room.bytes < wanted {
        match queue.pop(memory)? {
            Some(chain) => {
                // §5.1.6.3.1 asks drivers for these sizes.
                let least = if merges { 1 } else { wanted };
                if chain.writable.len() < least {
                    let why = "a buffer for frames is too small";
                    return Err(queue.refuse(chain.head, why));
                }
                room.bytes += chain.writable.len();
                room.buffers.push_back((chain.head, chain.writable));
            }
            // Only now do we want to hear of new ones.
            None if queue.want_kick(memory)? => {}
            None => break,
        }
    }
    Ok(room.bytes >= wanted)
}

impl Wires {
    /// Whether the guest receives a stream, going by the frames that came last.
    pub(super) fn is_stream(&self) -> bool {
        self.expected >= STREAM
    }

    /// The neighbour's next frame, put into the room; its length, header included.
    fn of_neighbour(&mut self, room: &Room<'_>, now: Instant) -> Option<usize> {
        let frame = self.neighbour.as_mut()?.next_frame(now)?;
        room.write(0, &[0; HEADER_LEN]);
        room.write(HEADER_LEN, &frame);
        Some((HEADER_LEN + frame.len()).min(room.bytes))
    }

    /// Reads the link's next frame: its first bytes into as much of the room as the frames
    /// before it needed, the others into `overflow`. Returns both lengths.
    fn of_link(&mut self, room: &Room<'_>) -> Option<(usize, usize)> {
        if !self.link_has_frames {
            return None;
        }
        let front = self.expected.min(room.bytes);
        self.overflow.resize(LONG_FRAME, 0);
        match volatile::read(&self.link, &room.pieces(front), &mut self.overflow) {
            Ok(bytes) if bytes >= HEADER_LEN => {
                self.expected = bytes.max(self.expected / 2).max(SHORT_FRAME);
                return Some((bytes.min(front), bytes.saturating_sub(front)));
            }
            Ok(bytes) => {
                count(&self.counters.rx_fails);
                tracing::debug!(bytes, "frame for the guest is none");
                self.link_has_frames = false;
                if bytes > 0 {
                    self.come_back();
                }
            }
            Err(error) => {
                self.link_has_frames = false;
                if error.kind() != io::ErrorKind::WouldBlock {
                    count(&self.counters.tap_read_fails);
                    tracing::debug!(%error, "no frame from the link");
                }
            }
        }
        None
    }
}
