//! One virtqueue of an active device.
//!
//! Invariant: a queue that answered with an error answers nothing else until the
//! device is reset, as the ring cannot be trusted any more.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use ram::{Gpa, GuestMemory};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;

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
    /// The ring's next used entry when the driver was last told.
    told: Wrapping<u16>,
}

impl VirtQueue {
    /// Wraps a ring that the transport checked.
    pub(crate) fn new(ring: Queue, interrupt: Interrupt) -> Self {
        Self {
            told: Wrapping(ring.next_used()),
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

    /// Puts the queue out of service for request `head`, which is against the device's
    /// rules; returns the error to say so.
    pub(crate) fn refuse(&mut self, head: u16, why: &'static str) -> QueueError {
        self.broke(QueueError::Chain { head, why })
    }

    /// Puts the request that was popped last back, to be popped again.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Makes requests that were popped before a snapshot, and not given back, the next ones
    /// to be popped, in this order. The machine does not run yet.
    ///
    /// # Errors
    /// [`QueueError::Ring`] where the driver has more out than there are entries; the device
    /// then needs a reset.
    pub(crate) fn put_back(
        &mut self,
        memory: &GuestMemory,
        heads: &[u16],
    ) -> Result<(), QueueError> {
        if heads.is_empty() {
            return Ok(());
        }
        self.check()?;
        // What the device took of the available ring the driver does not look at again. It has
        // no more requests out than there are entries, those that wait included.
        let first = Wrapping(self.ring.next_avail()) - Wrapping(heads.len() as u16);
        let index = self.ring.avail_idx(memory, Ordering::Relaxed);
        let out = index.map(|index| index - first);
        let out = out.map_err(|_| self.broke(QueueError::Ring))?;
        if heads.len() > self.ring.size().into() || out.0 > self.ring.size() {
            return Err(self.broke(QueueError::Ring));
        }
        for (nth, head) in (0..).zip(heads) {
            let slot = (first + Wrapping(nth)).0 % self.ring.size();
            let offset = 4 + 2 * u64::from(slot);
            let at = self.ring.avail_ring().checked_add(offset).map(Gpa);
            at.and_then(|at| memory.write_slice(&head.to_le_bytes(), at).ok())
                .ok_or_else(|| self.broke(QueueError::Ring))?;
        }
        self.ring.set_next_avail(first.0);
        Ok(())
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

    /// Gives requests back, each with how many bytes of it were filled in, so that the
    /// driver sees all of them or none (virtio 1.2 §5.1.6.4.1 asks for that).
    ///
    /// # Errors
    /// [`QueueError::Ring`]; the device then needs a reset.
    pub fn complete_together(
        &mut self,
        memory: &GuestMemory,
        requests: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some((&(last, written), others)) = requests.split_last() else {
            return Ok(());
        };
        self.check()?;
        for &(head, written) in others {
            // §2.7.8: the driver's eyes are on what the index, written with the last of
            // them, covers.
            let next = self.ring.next_used();
            let slot = u64::from(next % self.ring.size());
            let entry = [u32::from(head).to_le_bytes(), written.to_le_bytes()];
            let at = self.ring.used_ring().checked_add(4 + 8 * slot).map(Gpa);
            at.and_then(|at| memory.write_slice(entry.as_flattened(), at).ok())
                .ok_or_else(|| self.broke(QueueError::Ring))?;
            self.ring.set_next_used(next.wrapping_add(1));
        }
        self.complete(memory, last, written)
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
        let used = Wrapping(self.ring.next_used());
        let told = std::mem::replace(&mut self.told, used);
        if !self.ring.event_idx_enabled() {
            self.interrupt.used_buffer();
            return Ok(());
        }
        // What was completed is to be seen before the driver's wish is read.
        fence(Ordering::SeqCst);
        // §2.7.7: `used_event` lies behind the available ring. The queue's own count does
        // not know what was completed together.
        let offset = 4 + 2 * u64::from(self.ring.size());
        let at = self.ring.avail_ring().checked_add(offset).map(Gpa);
        let event = at
            .and_then(|at| memory.load::<u16>(at, Ordering::Relaxed).ok())
            .map(|event| Wrapping(u16::from_le(event)))
            .ok_or_else(|| self.broke(QueueError::Ring))?;
        if used - event - Wrapping(1) < used - told {
            self.interrupt.used_buffer();
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

    /// As if the last completed request had not been told of.
    pub(crate) fn set_untold(&mut self) {
        self.untold = true;
        self.told = Wrapping(self.ring.next_used()) - Wrapping(1);
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
