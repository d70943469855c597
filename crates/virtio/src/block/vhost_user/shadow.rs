//! The memory that a back end gets: a ring, and a slot for each request that it may have at once.
//!
//! ```text
//! 0      descriptors │ available ring │ used ring │ headers and statuses
//! 64 KiB data of slot 0 │ 1 │ … │ 31, 1 MiB each
//! ```
//!
//! Slot `n` has the descriptors from `4 n` on: header, data for the back end, data of the back end's, status.
//!
//! Invariant: what the back end writes there is never trusted: of its used ring the names of requests are taken, each
//! once and only while the back end has it; descriptors are written and never read. The file cannot change its
//! length, so no access to it faults.
//!
//! Left to others: what requests mean (`device`).

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::num::Wrapping;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::Error;
use crate::block::spec::HEADER_LEN;

/// Requests that a back end may have at once.
pub(super) const SLOTS: usize = 32;
/// Bytes of data of one.
pub(super) const SLOT_BYTES: usize = 1 << 20;
/// Entries of the ring: those of all slots.
pub(super) const RING_SIZE: u16 = (SLOTS * PER_SLOT) as u16;
/// Where the back end is told that the memory is.
pub(super) const BASE: u64 = 1 << 20;

pub(super) const DESCRIPTORS_AT: usize = 0;
pub(super) const AVAILABLE_AT: usize = 0x1000;
pub(super) const USED_AT: usize = 0x2000;
const HEADERS_AT: usize = 0x3000;
const DATA_AT: usize = 0x1_0000;

const PER_SLOT: usize = 4;
/// Bytes between headers; the status comes 16 behind its header.
const HEADER_STRIDE: usize = 32;

// virtio 1.2 §2.7.5, §2.7.8
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NO_NOTIFY: u16 = 1;

/// The back end broke the rules of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Lie {
    /// More answers than requests.
    #[error("it answered more requests than it had")]
    TooMany,
    /// An answer to what was not asked.
    #[error("it answered a request that it did not have")]
    Name,
}

#[derive(Debug)]
pub(super) struct Shadow {
    memory: MmapRegion<()>,
    file: File,
    kick: EventFd,
    call: EventFd,
    /// The same as `call`.
    called: OwnedFd,
    /// Which slots the back end has.
    away: [bool; SLOTS],
    available: Wrapping<u16>,
    used: Wrapping<u16>,
    /// Something became available since the last kick.
    unkicked: bool,
}

impl Shadow {
    /// Bytes of the memory.
    pub(super) const LEN: usize = DATA_AT + SLOTS * SLOT_BYTES;

    pub(super) fn new() -> Result<Self, Error> {
        let host = |doing| move |source: io::Error| Error::Host { doing, source };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("vhost-user", flags)
            .map_err(|errno| host("make memory for a back end")(errno.into()))?;
        let file = File::from(file);
        file.set_len(Self::LEN as u64)
            .map_err(host("size memory for a back end"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)
            .map_err(|errno| host("seal memory for a back end")(errno.into()))?;
        let mapped = file.try_clone().map_err(host("duplicate a descriptor"))?;
        let memory = MmapRegion::from_file(FileOffset::new(mapped, 0), Self::LEN);
        let memory =
            memory.map_err(|error| host("map memory for a back end")(io::Error::other(error)))?;
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("make an eventfd"));
        let call = event()?;
        Ok(Self {
            memory,
            file,
            kick: event()?,
            called: owned(&call).map_err(host("duplicate an eventfd"))?,
            call,
            away: [false; SLOTS],
            available: Wrapping(0),
            used: Wrapping(0),
            unkicked: false,
        })
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn call(&self) -> &EventFd {
        &self.call
    }

    /// Has an edge whenever the back end rings.
    pub(super) fn called(&self) -> BorrowedFd<'_> {
        self.called.as_fd()
    }

    pub(super) fn kick_event(&self) -> &EventFd {
        &self.kick
    }

    /// The first `len` bytes of a slot's data.
    pub(super) fn data(&self, slot: usize, len: usize) -> Option<VolatileSlice<'_, ()>> {
        let at = DATA_AT + slot * SLOT_BYTES;
        (len <= SLOT_BYTES)
            .then(|| self.memory.get_slice(at, len).ok())
            .flatten()
    }

    /// What the back end said of a slot's request.
    pub(super) fn status(&self, slot: usize) -> u8 {
        self.get::<u8>(HEADERS_AT + slot * HEADER_STRIDE + HEADER_LEN)
    }

    /// Gives the back end a request in `slot`, which it does not have: `from` bytes of its data are for it, then it
    /// is to fill in `into` bytes.
    pub(super) fn offer(
        &mut self,
        slot: usize,
        header: [u8; HEADER_LEN],
        from: usize,
        into: usize,
    ) {
        let header_at = HEADERS_AT + slot * HEADER_STRIDE;
        for (nth, byte) in header.iter().chain(&[u8::MAX]).enumerate() {
            self.put(header_at + nth, *byte);
        }
        let data_at = DATA_AT + slot * SLOT_BYTES;
        let pieces = [
            (header_at, HEADER_LEN, 0),
            (data_at, from, 0),
            (data_at + from, into, WRITE),
            (header_at + HEADER_LEN, 1, WRITE),
        ];
        let first = slot * PER_SLOT;
        let pieces = pieces.into_iter().filter(|(_, len, _)| *len > 0);
        let pieces: Vec<_> = pieces.zip(first..).collect();
        for (nth, ((at, len, flags), index)) in pieces.iter().enumerate() {
            let more = if nth + 1 < pieces.len() { NEXT } else { 0 };
            let descriptor = DESCRIPTORS_AT + index * 16;
            self.put(descriptor, (BASE + *at as u64).to_le());
            self.put(descriptor + 8, (*len as u32).to_le());
            self.put(descriptor + 12, (flags | more).to_le());
            self.put(descriptor + 14, (*index as u16 + 1).to_le());
        }
        let entry = usize::from(self.available.0 % RING_SIZE);
        self.put(AVAILABLE_AT + 4 + 2 * entry, (first as u16).to_le());
        self.available += 1;
        // §2.7.13: what is available is there before it is said to be.
        let stored = self.memory.as_volatile_slice().store(
            self.available.0.to_le(),
            AVAILABLE_AT + 2,
            Ordering::Release,
        );
        debug_assert!(stored.is_ok(), "the ring lies in the memory");
        if let Some(away) = self.away.get_mut(slot) {
            *away = true;
        }
        self.unkicked = true;
    }

    /// Tells the back end of what became available, if it wants to know.
    pub(super) fn kick(&mut self) {
        if !std::mem::take(&mut self.unkicked) {
            return;
        }
        fence(Ordering::SeqCst);
        if u16::from_le(self.get(USED_AT)) & NO_NOTIFY == 0 {
            // It only fails when the back end read none of 2^64 kicks.
            let _ = self.kick.write(1);
        }
    }

    /// The slot of the next request that the back end is done with.
    pub(super) fn take_done(&mut self) -> Result<Option<usize>, Lie> {
        let index = self.memory.as_volatile_slice();
        let index = index.load::<u16>(USED_AT + 2, Ordering::Acquire);
        let done = Wrapping(u16::from_le(index.unwrap_or_default())) - self.used;
        if done.0 == 0 {
            return Ok(None);
        }
        let away = self.away.iter().filter(|away| **away).count();
        if usize::from(done.0) > away {
            return Err(Lie::TooMany);
        }
        let entry = usize::from(self.used.0 % RING_SIZE);
        self.used += 1;
        let name = u32::from_le(self.get(USED_AT + 4 + 8 * entry)) as usize;
        let slot = name / PER_SLOT;
        match self.away.get_mut(slot) {
            Some(away) if *away && name.is_multiple_of(PER_SLOT) => {
                *away = false;
                Ok(Some(slot))
            }
            Some(_) | None => Err(Lie::Name),
        }
    }

    fn put<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        let stored = self
            .memory
            .as_volatile_slice()
            .store(value, at, Ordering::Relaxed);
        debug_assert!(stored.is_ok(), "{at:#x} lies in the memory");
    }

    fn get<T: vm_memory::AtomicAccess + Default>(&self, at: usize) -> T {
        let whole = self.memory.as_volatile_slice();
        whole.load(at, Ordering::Relaxed).unwrap_or_default()
    }
}

/// The library's eventfds lend no descriptor: one that was sent to oneself is owned.
fn owned(event: &EventFd) -> io::Result<OwnedFd> {
    let (to, from) = UnixStream::pair()?;
    to.send_with_fd(&[0][..], event.as_raw_fd())?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let into = &mut [IoSliceMut::new(&mut byte)];
    recvmsg(&from, into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.ok_or_else(|| io::ErrorKind::InvalidData.into())
}
