//! The device: one queue of requests, and what its owner may ask.

use std::sync::Arc;

use ram::{Gpa, GuestMemory, GuestRam, Kind, Region};

use super::counters::{Counters, add, count};
use super::spec::{Blocks, Config, F_UNPLUGGED_INACCESSIBLE, Request, Response};
use super::{MemError, SavedMem};
use crate::{
    Activation, Chain, DeviceType, Error, Interrupt, QueueError, SavedDevice, VirtQueue,
    VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;

/// Pluggable memory.
#[derive(Debug)]
pub struct Mem {
    pub(super) plug: Plug,
    pub(super) state: State,
}

/// The memory, without its driver.
#[derive(Debug)]
pub(super) struct Plug {
    pub(super) ram: GuestRam,
    pub(super) region: Region,
    pub(super) block: u64,
    /// What becomes usable does so in pieces of this size.
    slot: u64,
    /// Bytes, from the region's start, in which the guest may plug.
    pub(super) usable: u64,
    pub(super) plugged: u64,
    pub(super) requested: u64,
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

/// How much memory there is, in MiB, as the API tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Of a block.
    pub block_mib: u64,
    /// Of a slot.
    pub slot_mib: u64,
    /// At most.
    pub total_mib: u64,
    /// That is plugged.
    pub plugged_mib: u64,
    /// That the guest is asked to have.
    pub requested_mib: u64,
}

impl Mem {
    /// The pluggable memory in `region` of `ram`, `slot` bytes of which become usable at
    /// a time. `None` if the region is something else.
    pub fn new(ram: &GuestRam, region: Region, slot: u64) -> Option<Self> {
        let Kind::Pluggable { block } = region.kind else {
            return None;
        };
        Some(Self {
            plug: Plug {
                ram: ram.clone(),
                region,
                block,
                slot: slot.max(block),
                usable: 0,
                plugged: 0,
                requested: 0,
                counters: Arc::default(),
            },
            state: State::Idle,
        })
    }

    /// What is counted.
    pub fn counters(&self) -> Arc<Counters> {
        self.plug.counters.clone()
    }

    /// How much there is.
    pub fn status(&self) -> Status {
        let plug = &self.plug;
        Status {
            block_mib: plug.block >> 20,
            slot_mib: plug.slot >> 20,
            total_mib: plug.region.len >> 20,
            plugged_mib: plug.plugged >> 20,
            requested_mib: plug.requested >> 20,
        }
    }

    /// Asks the guest to plug or unplug until it has `mib`.
    ///
    /// # Errors
    /// [`MemError`].
    pub fn request(&mut self, mib: u32) -> Result<(), MemError> {
        let State::Live { interrupt, .. } = &self.state else {
            return Err(MemError::Inactive);
        };
        let plug = &mut self.plug;
        let asked = u64::from(mib) << 20;
        if asked > plug.region.len || !asked.is_multiple_of(plug.block) {
            return Err(MemError::Size {
                asked: mib,
                block: plug.block >> 20,
                total: plug.region.len >> 20,
            });
        }
        // §5.15.4: it shrinks only when the guest unplugs everything.
        let usable = asked.next_multiple_of(plug.slot).min(plug.region.len);
        plug.usable = plug.usable.max(usable);
        plug.requested = asked;
        interrupt.config_changed();
        Ok(())
    }

    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedMem {
        SavedMem::of(self)
    }

    /// The device as it was saved, in a `region` of which nothing is plugged; plugs what
    /// was.
    ///
    /// # Errors
    /// [`Error::Saved`] where the region is not at the saved place, or not like it.
    pub fn restore(
        saved: &SavedMem,
        ram: &GuestRam,
        region: Region,
        interrupt: &Interrupt,
    ) -> Result<Self, Error> {
        let bad = || Error::Saved { device: "mem" };
        let mut device = Self::new(ram, region, saved.slot).ok_or_else(bad)?;
        saved
            .put_into(&mut device, interrupt)
            .ok_or_else(bad)
            .map(|()| device)
    }
}

impl Plug {
    /// Bytes of `blocks` blocks at `at`, if the guest may speak of them.
    fn range(&self, at: u64, blocks: u16) -> Option<(Gpa, u64)> {
        let len = u64::from(blocks) * self.block;
        let from = at.checked_sub(self.region.start.0)?;
        let end = from.checked_add(len)?;
        (len > 0 && from.is_multiple_of(self.block) && end <= self.usable).then_some((Gpa(at), len))
    }

    fn execute(&mut self, request: Request) -> Response {
        let response = self.answer(request);
        let counters = &self.counters;
        let done = matches!(response, Response::Done | Response::State(_));
        let (granted, refused, bytes) = match request {
            Request::Plug { blocks, .. } => (
                &counters.plug_count,
                Some(&counters.plug_fails),
                Some((&counters.plug_bytes, blocks)),
            ),
            Request::Unplug { blocks, .. } => (
                &counters.unplug_count,
                Some(&counters.unplug_fails),
                Some((&counters.unplug_bytes, blocks)),
            ),
            Request::State { .. } => (&counters.state_count, Some(&counters.state_fails), None),
            Request::UnplugAll => (&counters.unplug_all_count, None, None),
            Request::Other => return response,
        };
        match (done, refused) {
            (true, _) => count(granted),
            (false, Some(refused)) => count(refused),
            (false, None) => {}
        }
        if let Some((bytes, blocks)) = bytes.filter(|_| done) {
            add(bytes, usize::from(blocks) * self.block as usize);
        }
        response
    }

    fn answer(&mut self, request: Request) -> Response {
        match request {
            Request::Plug { at, blocks } => match self.range(at, blocks) {
                Some((_, len)) if self.plugged + len > self.requested => Response::Refused,
                Some((at, len)) => self.plug(at, len),
                None => Response::Error,
            },
            Request::Unplug { at, blocks } => match self.range(at, blocks) {
                Some((at, len)) => self.unplug(at, len),
                None => Response::Error,
            },
            Request::State { at, blocks } => match self.range(at, blocks) {
                Some((at, len)) => Response::State(match self.ram.plugged(at, len) {
                    Some(true) => Blocks::Plugged,
                    Some(false) => Blocks::Unplugged,
                    None => Blocks::Mixed,
                }),
                None => Response::Error,
            },
            Request::UnplugAll => {
                for (at, len) in self.plugged_runs() {
                    self.unplug(at, len);
                }
                // For as much as is requested still.
                self.usable = self.requested.next_multiple_of(self.slot);
                self.usable = self.usable.min(self.region.len);
                Response::Done
            }
            Request::Other => Response::Error,
        }
    }

    pub(super) fn plug(&mut self, at: Gpa, len: u64) -> Response {
        if self.ram.plug(at, len).is_err() {
            return Response::Error;
        }
        self.plugged += len;
        Response::Done
    }

    fn unplug(&mut self, at: Gpa, len: u64) -> Response {
        match self.ram.unplug(at, len) {
            Ok(()) => {}
            Err(error @ ram::Error::Host { .. }) => {
                // It is unplugged, but the host has not got it.
                tracing::warn!(%error, "unplugged memory was not given back");
                count(&self.counters.unplug_discard_fails);
            }
            Err(_) => return Response::Error,
        }
        self.plugged -= len;
        Response::Done
    }

    /// What is plugged, in runs of blocks.
    pub(super) fn plugged_runs(&self) -> Vec<(Gpa, u64)> {
        let mut runs: Vec<(Gpa, u64)> = Vec::new();
        let mut at = self.region.start;
        while at < self.region.end() {
            if self.ram.plugged(at, self.block) == Some(true) {
                match runs.last_mut() {
                    Some((start, len)) if start.0 + *len == at.0 => *len += self.block,
                    Some(_) | None => runs.push((at, self.block)),
                }
            }
            at = Gpa(at.0 + self.block);
        }
        runs
    }

    /// Answers one request; returns how many bytes were filled in.
    fn serve(&mut self, mut chain: Chain<'_>) -> u32 {
        let request = chain.readable.read_array().map(Request::parse);
        let response = request.map_or(Response::Error, |request| self.execute(request));
        tracing::debug!(?request, ?response, "hotplug memory");
        chain.writable.write(&response.bytes()) as u32
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let plug = &self.plug;
        let config = Config {
            block: plug.block,
            at: plug.region.start.0,
            size: plug.region.len,
            usable: plug.usable,
            plugged: plug.plugged,
            requested: plug.requested,
        };
        crate::device::copy_config(&config.bytes(), offset, data);
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
        let State::Live { memory, queue, .. } = &mut self.state else {
            return Ok(());
        };
        count(&self.plug.counters.queue_event_count);
        let served = queue.serve(memory, |chain| self.plug.serve(chain));
        served.inspect_err(|_| count(&self.plug.counters.queue_event_fails))
    }

    /// Keeps what is plugged (§5.15.5.2): the guest's new driver asks for its state.
    fn save(&mut self) -> Result<SavedDevice, Error> {
        Ok(SavedDevice::Mem(Mem::save(self)))
    }

    fn restore(
        &mut self,
        saved: &SavedDevice,
        _memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        match saved {
            SavedDevice::Mem(saved) => {
                let (ram, region) = (self.plug.ram.clone(), self.plug.region);
                let counters = self.counters();
                *self = Mem::restore(saved, &ram, region, interrupt)?;
                // Somebody reads these.
                self.plug.counters = counters;
                Ok(())
            }
            other => Err(other.misplaced()),
        }
    }

    fn reset(&mut self) {
        self.state = State::Idle;
    }
}
