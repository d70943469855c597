//! The source itself.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ram::GuestMemory;
use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};

use super::counters::{Counters, add, count};
use super::saved::SavedRng;
use crate::rate_limiter::{Limits, RateLimiter};
use crate::{
    Activation, Chain, DeviceType, Error, EventSource, Interrupt, QueueError, SavedDevice,
    VirtQueue, VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;
/// As Firecracker: a guest cannot make one request cost more than this.
const REQUEST_BYTES_MAX: usize = 64 << 10;

/// A source of random bytes.
#[derive(Debug)]
pub struct Rng {
    pub(super) limiter: RateLimiter,
    pub(super) state: State,
    counters: Arc<Counters>,
}

#[derive(Debug)]
pub(super) enum State {
    Idle,
    Live {
        memory: GuestMemory,
        queue: VirtQueue,
        interrupt: Interrupt,
    },
}

impl Rng {
    /// A source that gives as much as `limits` allows.
    ///
    /// # Errors
    /// [`Error::Host`] when there is no timer.
    pub fn new(limits: Limits) -> Result<Self, Error> {
        Ok(Self {
            limiter: RateLimiter::new(limits)?,
            state: State::Idle,
            counters: Arc::default(),
        })
    }

    /// What is counted.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Answers requests, until the limiter holds one back.
    fn serve(&mut self) -> Result<(), QueueError> {
        let served = self.serve_all();
        if served.is_err() {
            count(&self.counters.entropy_event_fails);
        }
        served
    }

    fn serve_all(&mut self) -> Result<(), QueueError> {
        let State::Live { memory, queue, .. } = &mut self.state else {
            return Ok(());
        };
        loop {
            while let Some(chain) = queue.pop(memory)? {
                let wanted = chain.writable.len().min(REQUEST_BYTES_MAX);
                if !self.limiter.allow(wanted as u64) {
                    count(&self.counters.entropy_rate_limiter_throttled);
                    queue.undo_pop();
                    return queue.signal(memory);
                }
                let head = chain.head;
                let filled = fill(chain);
                count(&self.counters.entropy_event_count);
                add(&self.counters.entropy_bytes, filled as usize);
                if (filled as usize) < wanted {
                    count(&self.counters.host_rng_fails);
                }
                queue.complete(memory, head, filled)?;
            }
            if !queue.want_kick(memory)? {
                return queue.signal(memory);
            }
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.state = match activation.queues.into_iter().next() {
            Some(queue) => State::Live {
                memory: activation.memory,
                queue,
                interrupt: activation.interrupt,
            },
            None => State::Idle,
        };
        Ok(())
    }

    fn notify(&mut self, _queue: u16) -> Result<(), QueueError> {
        self.serve()
    }

    fn reset(&mut self) {
        self.state = State::Idle;
    }

    fn save(&mut self) -> Result<SavedDevice, Error> {
        Ok(SavedDevice::Rng(SavedRng::of(self)))
    }

    fn restore(
        &mut self,
        saved: &SavedDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        match saved {
            SavedDevice::Rng(saved) => saved.put_into(self, memory, interrupt),
            other => Err(other.misplaced()),
        }
    }
}

impl EventSource for Rng {
    fn fd(&self) -> BorrowedFd<'_> {
        self.limiter.fd()
    }

    fn on_event(&mut self) {
        if self.limiter.acknowledge() {
            count(&self.counters.rate_limiter_event_count);
        }
        if let Err(error) = self.serve() {
            tracing::warn!(%error, "entropy device needs a reset");
            if let State::Live { interrupt, .. } = &self.state {
                interrupt.needs_reset();
            }
        }
    }
}

/// Fills up to [`REQUEST_BYTES_MAX`] bytes; returns how many.
fn fill(mut chain: Chain<'_>) -> u32 {
    let mut room = chain.writable.take(REQUEST_BYTES_MAX);
    let mut filled = 0;
    let mut bytes = [0; 1024];
    while !room.is_empty() {
        let wanted = room.len().min(bytes.len());
        let Some(piece) = bytes.get_mut(..wanted) else {
            break;
        };
        // vCPU threads are kicked by signals.
        let Ok(n) = retry_on_intr(|| getrandom(&mut *piece, GetRandomFlags::empty())) else {
            break;
        };
        filled += room.write(piece.get(..n).unwrap_or_default());
    }
    filled as u32
}
