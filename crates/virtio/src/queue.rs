//! One virtqueue of an active device.
//!
//! Invariant: a queue that answered with an error answers nothing else until the
//! device is reset, as the ring cannot be trusted any more.

use ram::GuestMemory;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use crate::{Chain, Interrupt};

/// The driver broke the rules of the ring; the device needs a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// A ring index or address that cannot be.
    #[error("the driver left a virtqueue's ring in a state that cannot be")]
    Ring,
    /// A descriptor chain against the rules.
    #[error("descriptor chain {head} is malformed: {why}")]
    Chain {
        /// First descriptor.
        head: u16,
        /// Which rule.
        why: &'static str,
    },
    /// An earlier error.
    #[error("the virtqueue is out of service until the device is reset")]
    OutOfService,
}

/// A virtqueue together with the interrupt that tells its driver of used buffers.
#[derive(Debug)]
pub struct VirtQueue {
    pub(crate) ring: Queue,
    interrupt: Interrupt,
    pub(crate) broken: bool,
    /// Something was completed since the driver was last told.
    pub(crate) untold: bool,
}

impl VirtQueue {
    /// Wraps a ring that the transport checked.
    pub(crate) fn new(ring: Queue, interrupt: Interrupt) -> Self {
        Self {
            ring,
            interrupt,
            broken: false,
            untold: false,
        }
    }

    /// Takes the next request, if there is one.
    ///
    /// # Errors
    /// [`QueueError`]; the device then needs a reset.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueError> {
        self.check()?;
        let popped = match self.ring.iter(memory) {
            Ok(mut available) => available.next(),
            Err(_) => return Err(self.broke(QueueError::Ring)),
        };
        let Some(descriptors) = popped else {
            return Ok(None);
        };
        Chain::new(descriptors, memory)
            .map(Some)
            .map_err(|error| self.broke(error))
    }

    /// Puts the request that was popped last back, to be popped again.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives request `head` back with `written` bytes filled in. The driver
    /// learns of it with [`VirtQueue::signal`].
    ///
    /// # Errors
    /// [`QueueError::Ring`]; the device then needs a reset.
    pub fn complete(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.check()?;
        self.untold = true;
        self.ring
            .add_used(memory, head, written)
            .map_err(|_| self.broke(QueueError::Ring))
    }

    /// Interrupts the driver, if something was completed and it wants to know.
    ///
    /// # Errors
    /// [`QueueError::Ring`]; the device then needs a reset.
    pub fn signal(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        self.check()?;
        if !std::mem::take(&mut self.untold) {
            return Ok(());
        }
        match self.ring.needs_notification(memory) {
            Ok(true) => self.interrupt.used_buffer(),
            Ok(false) => {}
            Err(_) => return Err(self.broke(QueueError::Ring)),
        }
        Ok(())
    }

    /// Asks the driver to notify when it adds the next request. True when it has
    /// done so meanwhile and will not notify: look again.
    ///
    /// # Errors
    /// [`QueueError::Ring`]; the device then needs a reset.
    pub fn want_kick(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        self.check()?;
        self.ring
            .enable_notification(memory)
            .map_err(|_| self.broke(QueueError::Ring))
    }

    /// Answers every request there is, by `answer`, which returns how many bytes it
    /// filled in; then tells the driver and asks for the next notification.
    ///
    /// # Errors
    /// [`QueueError`]; the device then needs a reset.
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        mut answer: impl FnMut(Chain<'_>) -> u32,
    ) -> Result<(), QueueError> {
        loop {
            while let Some(chain) = self.pop(memory)? {
                let head = chain.head;
                let written = answer(chain);
                self.complete(memory, head, written)?;
            }
            if !self.want_kick(memory)? {
                return self.signal(memory);
            }
        }
    }

    fn check(&self) -> Result<(), QueueError> {
        if self.broken {
            Err(QueueError::OutOfService)
        } else {
            Ok(())
        }
    }

    fn broke(&mut self, error: QueueError) -> QueueError {
        self.broken = true;
        error
    }
}
