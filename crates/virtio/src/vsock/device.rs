//! The device: its three queues, fed from and drained into the connections.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use ram::GuestMemory;

use super::counters::{Counters, add, count};
use super::listener::Listener;
use super::muxer::Muxer;
use super::saved::SavedVsock;
use super::spec::{HEADER_LEN, HOST_CID, Header};
use crate::poller::Poller;
use crate::{
    Activation, DeviceType, Error, EventSource, Interrupt, QueueError, SavedDevice, VirtQueue,
    VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;
/// The queue of buffers for the guest.
const RX: u16 = 0;
/// The queue of events.
const EVENTS: u16 = 2;
/// §5.10.6.7: VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const EVENT_TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// Sockets between host and guest. Wants a place in the event loop
/// ([`EventSource`]) as well as a transport.
#[derive(Debug)]
pub struct Vsock {
    pub(super) guest_cid: u32,
    pub(super) muxer: Muxer,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
    Idle,
    Live(Box<Live>),
}

#[derive(Debug)]
pub(super) struct Live {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    /// Buffers that the guest wants filled.
    pub(super) rx: VirtQueue,
    /// Packets of the guest.
    pub(super) tx: VirtQueue,
    /// For events.
    pub(super) events: VirtQueue,
    /// The guest has to take packets before its own are looked at.
    pub(super) clogged: bool,
    /// The guest is to learn that its connections broke, and has no room for it.
    pub(super) reset_is_due: bool,
}

impl Vsock {
    /// A device for the guest known as `guest_cid` (3 to 2^32 - 2) that listens on
    /// `uds_path` and connects to `uds_path_<port>`. The path is removed with the
    /// device. Connections of the host wait until the guest's driver is ready.
    ///
    /// # Errors
    /// [`Error::ReservedCid`]; [`Error::VsockInUse`] when another process listens
    /// there; [`Error::VsockBlocked`] when it is not a socket;
    /// [`Error::VsockListen`]; [`Error::Host`].
    pub fn new(guest_cid: u32, uds_path: &Path) -> Result<Self, Error> {
        // §5.10.4: 0, 1, 2 and 2^32 - 1 are taken.
        if u64::from(guest_cid) <= HOST_CID || guest_cid == u32::MAX {
            return Err(Error::ReservedCid {
                cid: guest_cid.into(),
            });
        }
        let poller = Poller::new()?;
        let listener = Listener::bind(uds_path)?;
        let muxer = Muxer::new(guest_cid.into(), listener, poller);
        Ok(Self {
            guest_cid,
            muxer,
            state: State::Idle,
        })
    }

    fn open(&mut self) -> Result<(), Error> {
        self.muxer.open().map_err(|source| Error::Host {
            doing: "poll the vsock socket",
            source,
        })
    }

    /// Goes on with queues that were there before, and tells the guest that its
    /// connections are not.
    pub(super) fn revive(&mut self, live: Live) -> Result<(), Error> {
        self.open()?;
        let interrupt = live.interrupt.clone();
        self.state = State::Live(Box::new(live));
        if let Err(error) = self.with_queues(|live, _| live.tell_of_reset()) {
            // The guest broke its ring before it was saved.
            tracing::warn!(%error, "vsock needs a reset");
            interrupt.needs_reset();
        }
        Ok(())
    }

    /// What is counted.
    pub fn counters(&self) -> Arc<Counters> {
        self.muxer.counters().clone()
    }

    #[cfg(test)]
    pub(super) fn connection_count(&self) -> usize {
        self.muxer.connection_count()
    }

    /// Works with the queues; a broken ring ends every connection.
    fn with_queues(
        &mut self,
        work: impl FnOnce(&mut Live, &mut Muxer) -> Result<(), QueueError>,
    ) -> Result<(), QueueError> {
        let State::Live(live) = &mut self.state else {
            return Ok(());
        };
        let worked = work(live, &mut self.muxer);
        if worked.is_err() {
            self.muxer.close();
            self.state = State::Idle;
        }
        worked
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        // §5.10.3: without feature bits, streams are what there is.
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::copy_config(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        let Activation {
            memory,
            queues,
            interrupt,
            features: _,
        } = activation;
        let Ok([rx, tx, events]) = <[VirtQueue; 3]>::try_from(queues) else {
            return Ok(());
        };
        self.open()?;
        self.state = State::Live(Box::new(Live {
            memory,
            interrupt,
            rx,
            tx,
            events,
            clogged: false,
            reset_is_due: false,
        }));
        Ok(())
    }

    fn notify(&mut self, queue: u16) -> Result<(), QueueError> {
        let counters = self.counters();
        let (events, fails) = match queue {
            RX => (
                Some(&counters.rx_queue_event_count),
                &counters.rx_queue_event_fails,
            ),
            EVENTS => (None, &counters.ev_queue_event_fails),
            _ => (
                Some(&counters.tx_queue_event_count),
                &counters.tx_queue_event_fails,
            ),
        };
        events.into_iter().for_each(count);
        let served = match queue {
            EVENTS => self.with_queues(|live, _| live.tell_of_reset()),
            _ => self.with_queues(Live::exchange),
        };
        served.inspect_err(|_| count(fails))
    }

    fn reset(&mut self) {
        self.muxer.close();
        self.state = State::Idle;
    }

    fn save(&mut self) -> Result<SavedDevice, Error> {
        Ok(SavedDevice::Vsock(SavedVsock::of(self)))
    }

    fn restore(
        &mut self,
        saved: &SavedDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        match saved {
            SavedDevice::Vsock(saved) => saved.put_into(self, memory, interrupt),
            other => Err(other.misplaced()),
        }
    }
}

impl EventSource for Vsock {
    fn fd(&self) -> BorrowedFd<'_> {
        self.muxer.poller().as_fd()
    }

    fn on_event(&mut self) {
        self.muxer.on_event();
        let interrupt = match &self.state {
            State::Idle => return,
            State::Live(live) => live.interrupt.clone(),
        };
        if let Err(error) = self.with_queues(Live::after_events) {
            tracing::warn!(%error, "vsock needs a reset");
            count(&self.muxer.counters().muxer_event_fails);
            interrupt.needs_reset();
        }
    }
}

impl Live {
    /// Tells the guest that its connections broke, if they did and it has room for that.
    fn tell_of_reset(&mut self) -> Result<(), QueueError> {
        while self.reset_is_due {
            let Some(mut chain) = self.events.pop(&self.memory)? else {
                if self.events.want_kick(&self.memory)? {
                    continue;
                }
                break;
            };
            let written = chain.writable.write(&EVENT_TRANSPORT_RESET);
            self.reset_is_due = written < EVENT_TRANSPORT_RESET.len();
            // Four bytes at most.
            self.events
                .complete(&self.memory, chain.head, written as u32)?;
        }
        self.events.signal(&self.memory)
    }

    /// Takes what the guest sent, gives what there is for it.
    fn exchange(&mut self, muxer: &mut Muxer) -> Result<(), QueueError> {
        loop {
            self.take(muxer)?;
            self.give(muxer)?;
            if !self.clogged || muxer.is_clogged() {
                return Ok(());
            }
        }
    }

    fn after_events(&mut self, muxer: &mut Muxer) -> Result<(), QueueError> {
        self.give(muxer)?;
        if self.clogged && !muxer.is_clogged() {
            self.exchange(muxer)
        } else {
            Ok(())
        }
    }

    fn take(&mut self, muxer: &mut Muxer) -> Result<(), QueueError> {
        self.clogged = false;
        loop {
            if muxer.is_clogged() {
                self.clogged = true;
                break;
            }
            let Some(mut chain) = self.tx.pop(&self.memory)? else {
                if self.tx.want_kick(&self.memory)? {
                    continue;
                }
                break;
            };
            count(&muxer.counters().tx_packets_count);
            match chain.readable.read_array::<HEADER_LEN>() {
                Some(bytes) => muxer.guest_sent(&Header::parse(&bytes), chain.readable),
                None => tracing::debug!(head = chain.head, "vsock packet without a header"),
            }
            self.tx.complete(&self.memory, chain.head, 0)?;
        }
        self.tx.signal(&self.memory)
    }

    fn give(&mut self, muxer: &mut Muxer) -> Result<(), QueueError> {
        while muxer.has_packet() {
            let Some(mut chain) = self.rx.pop(&self.memory)? else {
                // Only now do we want to hear of new buffers.
                if self.rx.want_kick(&self.memory)? {
                    continue;
                }
                break;
            };
            let mut header_room = chain.writable.take(HEADER_LEN);
            if chain.writable.is_empty() {
                // No room for a header and a byte: useless, but the guest's to keep.
                self.rx.complete(&self.memory, chain.head, 0)?;
                continue;
            }
            let Some(header) = muxer.next_packet(&chain.writable) else {
                drop(chain);
                self.rx.undo_pop();
                break;
            };
            count(&muxer.counters().rx_packets_count);
            add(&muxer.counters().rx_bytes_count, header.len as usize);
            header_room.write(&header.bytes());
            self.rx
                .complete(&self.memory, chain.head, HEADER_LEN as u32 + header.len)?;
        }
        self.rx.signal(&self.memory)
    }
}
