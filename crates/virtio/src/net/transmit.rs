//! From the guest to the link or the neighbour.

use std::io;
use std::time::Instant;

use ram::volatile;

use super::counters::{add, count};
use super::device::{BYTES_MAX, LOOK_BYTES, Live, Neighbour, QUEUE_SIZE, STREAM, Thread, Wires};
use super::spec::{ETHERNET_LEN, HEADER_LEN, LONG_FRAME};
use crate::rate_limiter::RateLimiter;
use crate::{Buffers, QueueError};

impl Live {
    /// Sends what the guest has to send, as far as the limiter lets it, up to one queue and
    /// [`BYTES_MAX`]. Returns whether that was all that may go now. What is left to the event loop
    /// counts: the driver need not tell of more until then.
    pub(super) fn transmit(
        &mut self,
        limiter: &mut RateLimiter,
        wires: &mut Wires,
        now: Instant,
        on: Thread,
    ) -> Result<bool, QueueError> {
        let (mut left, mut sent) = (QUEUE_SIZE, 0);
        loop {
            let Some(chain) = self.tx.pop(&self.memory)? else {
                if self.tx.want_kick(&self.memory)? {
                    continue;
                }
                self.tx.signal(&self.memory)?;
                return Ok(true);
            };
            let all = left == 0 || sent >= BYTES_MAX;
            let bytes = chain.readable.len();
            let is_frame = (HEADER_LEN + ETHERNET_LEN..=LONG_FRAME).contains(&bytes)
                && chain.writable.is_empty();
            if on == Thread::Vcpu && is_frame && bytes >= STREAM {
                self.tx.undo_pop();
                self.tx.signal(&self.memory)?;
                wires.bell.ring();
                return Ok(true);
            }
            if all || is_frame && !limiter.allow(bytes as u64) {
                count(match all {
                    true => &wires.counters.tx_remaining_reqs_count,
                    false => &wires.counters.tx_rate_limiter_throttled,
                });
                self.tx.undo_pop();
                self.tx.signal(&self.memory)?;
                return Ok(!all);
            }
            let head = chain.head;
            if !is_frame {
                count(&wires.counters.tx_malformed_frames);
            } else if !wires.send(chain.readable, now, on) {
                // The neighbour costs the network nothing.
                limiter.give_back(bytes as u64);
            }
            count(&wires.counters.tx_count);
            self.tx.complete(&self.memory, head, 0)?;
            left -= 1;
            sent += bytes;
        }
    }
}

impl Wires {
    /// Sends one frame. Returns whether it was one for the link.
    fn send(&mut self, mut frame: Buffers<'_>, now: Instant, on: Thread) -> bool {
        if let Some(neighbour) = &mut self.neighbour
            && is_for(neighbour.as_ref(), &frame)
        {
            frame.take(HEADER_LEN);
            let mut bytes = vec![0; frame.len()];
            frame.read(&mut bytes);
            neighbour.take(&bytes, now);
            return false;
        }
        if on == Thread::Vcpu && !self.is_stream() {
            self.hush();
        }
        let counters = &self.counters;
        if self.mac.is_some_and(|mac| source(&frame) != Some(mac)) {
            count(&counters.tx_spoofed_mac_count);
        }
        match volatile::write(&self.link, frame.pieces()) {
            Ok(bytes) => {
                // A host that answers does so, as a rule, before the write returns.
                self.link_has_frames |= on == Thread::EventLoop || !self.is_stream();
                count(&counters.tx_packets_count);
                add(&counters.tx_bytes_count, bytes);
            }
            // Down, full, or not what its header says: lost.
            Err(error) => {
                count(&counters.tx_fails);
                if error.kind() != io::ErrorKind::WouldBlock {
                    count(&counters.tap_write_fails);
                }
                tracing::debug!(%error, "frame of the guest is lost");
            }
        }
        true
    }
}

fn is_for(neighbour: &dyn Neighbour, frame: &Buffers<'_>) -> bool {
    let mut front = frame.clone();
    front.take(HEADER_LEN);
    let mut look = [0; LOOK_BYTES];
    let n = front.read(&mut look);
    look.get(..n).is_some_and(|look| neighbour.is_for_me(look))
}

/// The address that a frame says it is from.
fn source(frame: &Buffers<'_>) -> Option<[u8; 6]> {
    let mut front = frame.clone();
    front.take(HEADER_LEN + 6);
    front.read_array()
}
