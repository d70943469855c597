//! What a snapshot keeps of a socket device. No connection: their other ends are sockets of
//! a process that may be gone. The guest is told that all of them broke (virtio 1.2
//! §5.10.6.7).

use ram::GuestMemory;
use serde::{Deserialize, Serialize};

use super::device::{Live, State, Vsock};
use crate::{Error, Interrupt, SavedQueue, VirtQueue};

/// A socket device in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedVsock {
    /// The guest's context identifier.
    pub guest_cid: u32,
    /// The host's port of the next connection that the host makes: the guest may still
    /// remember those before.
    pub next_host_port: u32,
    /// To the guest, from it, events; while the driver works.
    pub queues: Option<[SavedQueue; 3]>,
}

impl SavedVsock {
    pub(super) fn of(device: &Vsock) -> Self {
        Self {
            guest_cid: device.guest_cid,
            next_host_port: device.muxer.next_host_port(),
            queues: match &device.state {
                State::Idle => None,
                State::Live(live) => Some([live.rx.save(), live.tx.save(), live.events.save()]),
            },
        }
    }

    pub(super) fn put_into(
        &self,
        device: &mut Vsock,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        let bad = || Error::Saved { device: "vsock" };
        if self.guest_cid != device.guest_cid {
            return Err(bad());
        }
        device.muxer.set_next_host_port(self.next_host_port);
        let Some(queues) = &self.queues else {
            device.state = State::Idle;
            return Ok(());
        };
        let queue = |saved| VirtQueue::restore(saved, interrupt.clone()).map_err(|_| bad());
        let [rx, tx, events] = queues;
        let live = Live {
            memory: memory.clone(),
            interrupt: interrupt.clone(),
            rx: queue(rx)?,
            tx: queue(tx)?,
            events: queue(events)?,
            clogged: false,
            reset_is_due: true,
        };
        device.revive(live)
    }
}
