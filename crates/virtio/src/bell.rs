//! How a vCPU's thread leaves work to the event loop.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use crate::Error;

/// Rung when there is work for the event loop. Clones are the same bell.
///
/// Poll it edge-triggered: each ring is an edge, and nothing needs to be read. Or
/// level-triggered, and silence it.
#[derive(Clone, Debug)]
pub struct Bell(Arc<OwnedFd>);

impl Bell {
    pub(crate) fn new() -> Result<Self, Error> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = eventfd(0, flags).map_err(|errno| Error::Host {
            doing: "make an eventfd",
            source: errno.into(),
        })?;
        Ok(Self(Arc::new(fd)))
    }

    /// Wakes the event loop. From any thread; never waits.
    pub fn ring(&self) {
        // It only fails after 2^64 rings.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Takes all rings so far; whether there were any.
    pub(crate) fn silence(&self) -> bool {
        // It only fails when there were none.
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
