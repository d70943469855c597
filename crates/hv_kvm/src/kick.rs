//! Ending a run from any thread.
//!
//! ```text
//! kick:  kicked = true ─▶ immediate_exit = 1 ─▶ signal, if a thread runs the vCPU
//! run:   KVM_RUN ─interrupted─▶ immediate_exit = 0 ─▶ kicked? end : on
//! ```
//!
//! Invariant: none is lost. A kick between two calls of the kernel is seen by the next,
//! which looks at `immediate_exit` first; one during a call interrupts it. Of several
//! kicks, each ends the run that goes on when it is made, or the next one.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VcpuFd;

use crate::ioctl::{self, SharedPage};

/// One vCPU's.
#[derive(Debug)]
pub(crate) struct Kicks {
    kicked: AtomicBool,
    page: SharedPage,
    /// The thread that runs the vCPU.
    thread: Mutex<Option<i32>>,
}

impl Kicks {
    pub(crate) fn new(fd: &VcpuFd) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            kicked: AtomicBool::new(false),
            page: SharedPage::map(fd)?,
            thread: Mutex::new(None),
        }))
    }

    /// A run begins on this thread; it ends when the guard goes.
    pub(crate) fn enter(&self) -> io::Result<Listening<'_>> {
        let id = ioctl::listen_for_kicks()?;
        *self.thread() = Some(id);
        Ok(Listening(self))
    }

    /// After an interruption: whether it was a kick, which is then over.
    pub(crate) fn take(&self) -> bool {
        self.page.set_immediate_exit(false);
        self.kicked.swap(false, Ordering::SeqCst)
    }

    fn thread(&self) -> MutexGuard<'_, Option<i32>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl hv::Kick for Kicks {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.page.set_immediate_exit(true);
        // The lock keeps the thread from ending its run, and its life, meanwhile.
        if let Some(id) = *self.thread() {
            ioctl::interrupt(id);
        }
    }
}

/// While a thread runs the vCPU.
pub(crate) struct Listening<'a>(&'a Kicks);

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        *self.0.thread() = None;
    }
}
