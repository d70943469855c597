//! What a snapshot keeps of an interface: frames in its buffers, not those on the cable.

use ram::GuestMemory;
use serde::{Deserialize, Serialize};

use super::device::{Live, Net, Offloads, State};
use crate::rate_limiter::SavedLimiter;
use crate::{Error, Interrupt, SavedQueue, VirtQueue};

/// An interface in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedNet {
    /// Its address.
    pub mac: Option<[u8; 6]>,
    /// The largest packet.
    pub mtu: Option<u16>,
    /// Of what the guest receives.
    pub rx_limiter: SavedLimiter,
    /// Of what it sends.
    pub tx_limiter: SavedLimiter,
    /// What there is only while the driver works.
    pub live: Option<SavedLive>,
}

/// What there is only while the driver works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedLive {
    /// What was negotiated.
    pub features: u64,
    /// For frames to the guest, then of the guest.
    pub queues: [SavedQueue; 2],
}

impl SavedNet {
    /// Makes a new interface, with the cable that it has, the one that was saved.
    pub(super) fn put_into(
        &self,
        net: &mut Net,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        let bad = || Error::Saved { device: "net" };
        if (self.mac, self.mtu) != (net.wires.mac, net.mtu) {
            return Err(bad());
        }
        net.rx_limiter.put_back(&self.rx_limiter);
        net.tx_limiter.put_back(&self.tx_limiter);
        let Some(live) = &self.live else {
            return Ok(());
        };
        let queues = live
            .queues
            .iter()
            .map(|queue| VirtQueue::restore(queue, interrupt.clone()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| bad())?;
        net.set_offloads(Offloads::of(live.features))?;
        let live = Live::new(memory.clone(), interrupt.clone(), live.features, queues);
        net.state = State::Live(live.ok_or_else(bad)?);
        Ok(())
    }
}

impl Net {
    /// What a snapshot is to keep. A frame that the limiter held back reaches the guest
    /// now; the vCPUs stand still.
    ///
    /// # Errors
    /// [`Error::Saved`]: the driver's ring is broken, and it was not told yet.
    pub fn save(&mut self) -> Result<SavedNet, Error> {
        if let State::Live(live) = &mut self.state
            && let Some(held) = live.held.take()
        {
            live.show(&held, &self.wires)
                .map_err(|_| Error::Saved { device: "net" })?;
        }
        Ok(SavedNet {
            mac: self.wires.mac,
            mtu: self.mtu,
            rx_limiter: self.rx_limiter.save(),
            tx_limiter: self.tx_limiter.save(),
            live: match &self.state {
                State::Idle => None,
                State::Live(live) => Some(SavedLive {
                    features: live.features,
                    queues: [live.rx.save(), live.tx.save()],
                }),
            },
        })
    }
}
