//! The device: one queue of flushes.

use std::fs::File;

use ram::{GuestMemory, Kind, Region};

use super::SavedPmem;
use super::spec::{Answer, FLUSH, config};
use crate::{
    Activation, Buffers, DeviceType, Error, Interrupt, QueueError, VirtQueue, VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;

/// Persistent memory.
#[derive(Debug)]
pub struct Pmem {
    file: File,
    pub(super) region: Region,
    flushes: u64,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
    Idle,
    Live {
        memory: GuestMemory,
        queue: VirtQueue,
    },
}

impl Pmem {
    /// The memory in `region`, which is `file`.
    pub fn new(file: File, region: Region) -> Self {
        Self {
            file,
            region,
            flushes: 0,
            state: State::Idle,
        }
    }

    /// How often the file was made durable.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedPmem {
        SavedPmem::of(self)
    }

    /// The device as it was saved; `file` and `region` are as for [`Pmem::new`].
    ///
    /// # Errors
    /// [`Error::Saved`] where the region is not at the saved place, or not as long.
    pub fn restore(
        saved: &SavedPmem,
        file: File,
        region: Region,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<Self, Error> {
        let mut device = Self::new(file, region);
        device.state = saved.state(&region, memory, interrupt)?;
        Ok(device)
    }

    fn flush(&mut self) -> Answer {
        if self.region.kind == (Kind::File { read_only: true }) {
            return Answer::Done;
        }
        self.flushes += 1;
        match self.file.sync_data() {
            Ok(()) => Answer::Done,
            Err(error) => {
                tracing::warn!(%error, "failed to flush persistent memory");
                Answer::Failed
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
            },
            None => State::Idle,
        };
        Ok(())
    }

    fn notify(&mut self, _queue: u16) -> Result<(), QueueError> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => Ok(()),
            State::Live { memory, mut queue } => {
                let served = self.serve(&memory, &mut queue);
                self.state = State::Live { memory, queue };
                served
            }
        }
    }

    fn reset(&mut self) {
        self.state = State::Idle;
    }
}
