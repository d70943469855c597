//! The source itself.

use ram::GuestMemory;
use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::{Activation, Chain, DeviceType, Error, QueueError, VirtQueue, VirtioDevice};

const QUEUE_SIZE: u16 = 256;
/// As Firecracker: a guest cannot make one request cost more than this.
const REQUEST_BYTES_MAX: usize = 64 << 10;

/// A source of random bytes.
#[derive(Debug, Default)]
pub struct Rng {
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Live {
        memory: GuestMemory,
        queue: VirtQueue,
    },
}

impl Rng {
    /// A source; all of them are alike.
    pub fn new() -> Self {
        Self::default()
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
            },
            None => State::Idle,
        };
        Ok(())
    }

    fn notify(&mut self, _queue: u16) -> Result<(), QueueError> {
        match &mut self.state {
            State::Idle => Ok(()),
            State::Live { memory, queue } => queue.serve(memory, fill),
        }
    }

    fn reset(&mut self) {
        self.state = State::Idle;
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
