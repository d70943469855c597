//! virtio 1.2 devices and their MMIO transport.
//!
//! ```text
//! vCPU thread ──MMIO──▶ MmioTransport ──notify──▶ VirtioDevice (behind a mutex)
//!                            └─ busy ──ring──▶ Bell ──▶ event loop
//! event loop  ──fd ready──────────────▶ EventSource (the same device)
//!                                         │
//!                 virtqueues in guest memory, then Interrupt ──▶ IrqLine
//! ```
//!
//! Invariant: whatever the guest writes into registers, rings and buffers, a
//! device answers, fails the request, or asks to be reset; nothing here panics
//! or touches memory outside of the guest's.
//!
//! Left to others: addresses, interrupt numbers, the event loop (`machine`).
#![forbid(unsafe_code)]

pub mod balloon;
mod bell;
pub mod block;
mod chain;
mod counters;
mod device;
mod interrupt;
pub mod mem;
pub mod net;
pub mod pmem;
mod poller;
mod queue;
pub mod rate_limiter;
pub mod rng;
mod saved;
pub mod transport;
pub mod vsock;

#[cfg(test)]
mod fake_driver;

pub use bell::Bell;
pub use chain::{Buffers, Chain};
pub use counters::{Counted, Latency};
pub use device::{Activation, DeviceType, EventSource, VirtioDevice, feature};
pub use interrupt::{Interrupt, SavedInterrupt};
pub use queue::{QueueError, VirtQueue};
pub use saved::{SavedDevice, SavedQueue};

/// Why a device could not be made or could not start to work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A disk's file could not be opened or examined.
    #[error("failed to open disk {path:?}")]
    OpenDisk {
        /// Path on the host.
        path: std::path::PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A disk's file is something that cannot be one.
    #[error("disk {path:?} is neither a file nor a block device")]
    NotADisk {
        /// Path on the host.
        path: std::path::PathBuf,
    },
    /// The host's kernel gives no io_uring.
    #[error("failed to {doing} for disk {path:?}, whose io_engine is Async")]
    NoRing {
        /// Path on the host.
        path: std::path::PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A drive with an io_uring was given new files faster than its disk answers.
    #[error(
        "disk {path:?} has to wait, as requests are in flight on {files} files before it; try again when those are done"
    )]
    FilesInUse {
        /// Path on the host.
        path: std::path::PathBuf,
        /// How many.
        files: usize,
    },
    /// Nobody listens on a back end's socket, or it takes no one more now.
    #[error("failed to connect to the vhost-user back end at {path:?}")]
    ConnectBackEnd {
        /// The socket.
        path: std::path::PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A back end that did not do what it was asked.
    #[error("the vhost-user back end at {path:?} did not {doing}")]
    BackEnd {
        /// The socket.
        path: std::path::PathBuf,
        /// What it was asked.
        doing: &'static str,
        /// What happened.
        source: vhost::Error,
    },
    /// A back end that did not answer.
    #[error("the vhost-user back end at {path:?} did not {doing} within {seconds} s")]
    BackEndSilent {
        /// The socket.
        path: std::path::PathBuf,
        /// What it was asked.
        doing: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A back end that cannot do what is needed.
    #[error("the vhost-user back end at {path:?} does not offer {what}")]
    BackEndLacks {
        /// The socket.
        path: std::path::PathBuf,
        /// What is needed.
        what: &'static str,
    },
    /// A device that no snapshot keeps.
    #[error("a vhost-user drive is not kept in a snapshot")]
    NotSaved,
    /// A live process already serves the vsock path.
    #[error("vsock path {path:?} is in use by another process")]
    VsockInUse {
        /// Path on the host.
        path: std::path::PathBuf,
    },
    /// Something that is not a socket is in the way.
    #[error("vsock path {path:?} exists and is not a socket")]
    VsockBlocked {
        /// Path on the host.
        path: std::path::PathBuf,
    },
    /// The vsock path cannot be listened on.
    #[error("failed to listen on vsock path {path:?}")]
    VsockListen {
        /// Path on the host.
        path: std::path::PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A context identifier that the specification reserves.
    #[error("vsock context identifier {cid} is reserved: use 3 to 4294967294")]
    ReservedCid {
        /// The identifier asked for.
        cid: u64,
    },
    /// A saved state that no device of this kind can have.
    #[error("the saved state of the {device} device is not one that it can have")]
    Saved {
        /// Which device.
        device: &'static str,
    },
    /// The host lacks epoll, timerfd or descriptors.
    #[error("failed to {doing} for a virtio device")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
}
