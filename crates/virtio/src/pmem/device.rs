//! The device: one queue of flushes.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ram::{GuestMemory, Kind, Region};

use super::SavedPmem;
use super::counters::{Counters, count};
use super::spec::{Answer, FLUSH, config};
use crate::rate_limiter::{Limits, RateLimiter};
use crate::{
    Activation, Buffers, DeviceType, Error, EventSource, Interrupt, QueueError, SavedDevice,
    VirtQueue, VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;

/// Persistent memory.
#[derive(Debug)]
pub struct Pmem {
    file: File,
    pub(super) region: Region,
    counters: Arc<Counters>,
    limiter: RateLimiter,
    pub(super) state: State,
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

impl Pmem {
    /// The memory in `region`, which is `file`. A flush is one operation of as many bytes
    /// as the region has.
    ///
    /// # Errors
    /// [`Error::Host`] when there is no timer.
    pub fn new(file: File, region: Region, limits: Limits) -> Result<Self, Error> {
        Ok(Self {
            file,
            region,
            counters: Arc::default(),
            limiter: RateLimiter::new(limits)?,
            state: State::Idle,
        })
    }

    /// Limits flushes anew; a bucket that is not named stays.
    pub fn update_limits(&mut self, limits: Limits) {
        self.limiter.update(limits);
    }

    /// What is counted.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedPmem {
        SavedPmem::of(self)
    }

    /// The device as it was saved; `file`, `region` and `limits` are as for [`Pmem::new`].
    ///
    /// # Errors
    /// [`Error::Saved`] where the region is not at the saved place, or not as long.
    pub fn restore(
        saved: &SavedPmem,
        file: File,
        region: Region,
        limits: Limits,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<Self, Error> {
        // Its buckets start full.
        let mut device = Self::new(file, region, limits)?;
        device.state = saved.state(&region, memory, interrupt)?;
        Ok(device)
    }

    fn flush(&mut self) -> Answer {
        if self.region.kind == (Kind::File { read_only: true }) {
            return Answer::Done;
        }
        match self.file.sync_data() {
            Ok(()) => {
                count(&self.counters.flush_count);
                Answer::Done
            }
            Err(error) => {
                count(&self.counters.flush_fails);
                tracing::warn!(%error, "failed to flush persistent memory");
                Answer::Failed
            }
        }
    }

    fn serve_live(&mut self) -> Result<(), QueueError> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => Ok(()),
            State::Live {
                memory,
                mut queue,
                interrupt,
            } => {
                let served = self.serve(&memory, &mut queue);
                self.state = State::Live {
                    memory,
                    queue,
                    interrupt,
                };
                if served.is_err() {
                    count(&self.counters.event_fails);
                }
                served
            }
        }
    }

    /// Answers every request there is: one flush for all that came before it.
    fn serve(&mut self, memory: &GuestMemory, queue: &mut VirtQueue) -> Result<(), QueueError> {
        loop {
            let mut waiting = Vec::new();
            // Bounded: a driver that adds requests as fast as they are taken waits.
            while waiting.len() < usize::from(QUEUE_SIZE)
                && let Some(mut chain) = queue.pop(memory)?
            {
                if waiting.is_empty() && !self.limiter.allow(self.region.len) {
                    count(&self.counters.rate_limiter_throttled_events);
                    queue.undo_pop();
                    return queue.signal(memory);
                }
                let flush = chain.readable.read_array().map(u32::from_le_bytes) == Some(FLUSH);
                waiting.push((chain.head, flush, chain.writable));
            }
            if waiting.is_empty() {
                if queue.want_kick(memory)? {
                    continue;
                }
                return queue.signal(memory);
            }
            let flushed = match waiting.iter().any(|(_, flush, _)| *flush) {
                true => self.flush(),
                false => Answer::Failed,
            };
            for (head, flush, room) in waiting {
                let answer = if flush { flushed } else { Answer::Failed };
                queue.complete(memory, head, put(room, answer))?;
            }
            queue.signal(memory)?;
        }
    }
}

/// Writes the answer; returns how many bytes that were.
fn put(mut room: Buffers<'_>, answer: Answer) -> u32 {
    if room.len() < 4 {
        return 0;
    }
    room.write(&(answer as u32).to_le_bytes()) as u32
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Pmem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let bytes = config(self.region.start.0, self.region.len);
        crate::device::copy_config(&bytes, offset, data);
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
        count(&self.counters.queue_event_count);
        self.serve_live()
    }

    fn save(&mut self) -> Result<SavedDevice, Error> {
        Ok(SavedDevice::Pmem(Pmem::save(self)))
    }

    fn restore(
        &mut self,
        saved: &SavedDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        match saved {
            SavedDevice::Pmem(saved) => {
                self.state = saved.state(&self.region, memory, interrupt)?;
                Ok(())
            }
            other => Err(other.misplaced()),
        }
    }

    fn reset(&mut self) {
        self.state = State::Idle;
    }
}

impl EventSource for Pmem {
    fn fd(&self) -> BorrowedFd<'_> {
        self.limiter.fd()
    }

    fn on_event(&mut self) {
        if self.limiter.acknowledge() {
            count(&self.counters.rate_limiter_event_count);
        }
        if let Err(error) = self.serve_live() {
            tracing::warn!(%error, "persistent memory needs a reset");
            if let State::Live { interrupt, .. } = &self.state {
                interrupt.needs_reset();
            }
        }
    }
}
