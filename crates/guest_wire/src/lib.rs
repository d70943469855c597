//! The versioned messages between Kombi's host side and the guest's init.
//!
//! One stream carries them: the guest connects from inside the machine to [`HOST_CID`], port [`CONTROL_PORT`]
//! (on the host: the Unix socket `<uds_path>_1024`, Firecracker's convention).
//!
//! ```text
//!   guest (kombi-init)                          host (sandbox)
//!   Hello ────────────────────────────────────▶
//!         ◀──────────────────────────────────── Hello          each side checks the other's version
//!         ◀──────────────────────────────────── Start
//!   Started | StartFailed ────────────────────▶                or InitFailed at any time
//!   Stdout, Stderr, StdinCredit ──────────────▶
//!         ◀──────────────────────────────────── Stdin, StdinEof, Resize, Signal
//!   Exited ───────────────────────────────────▶
//!         ◀──────────────────────────────────── Shutdown, or the end of the stream
//!   (kills what is left, syncs, powers off)
//! ```
//!
//! A frame is a little-endian `u32` length and that many bytes; the first frame in each direction is a [`Hello`], whose
//! layout never changes, every later one a postcard-encoded [`HostMessage`] or [`GuestMessage`].
//!
//! Invariant: bytes from the peer never panic and never make a decoder hold more than one frame
//! ([`FRAME_BYTES_MAX`]) plus what its caller fed it at once. A [`GuestMessage`] is no larger than its frame (it has no
//! lists, and must not get any).
//!
//! Left to others: opening the stream (`guest_init`, `sandbox`), and what the messages do.
#![forbid(unsafe_code)]

mod codec;
mod error;
mod hello;
mod message;

pub use codec::{FrameDecoder, encode, read_hello, read_message, write_hello, write_message};
pub use error::WireError;
pub use hello::{Hello, VERSION, Version};
pub use message::{
    GuestMessage, HostMessage, MachineSpec, Message, ProcessSpec, StartFailure, StartSpec,
    TerminalSize, layer_device_name,
};

/// Vsock context id of the host, as every guest sees it (`VMADDR_CID_HOST`, vsock(7)).
pub const HOST_CID: u32 = 2;

/// Vsock port on which the host side listens for the guest's init.
pub const CONTROL_PORT: u32 = 1024;

/// Largest frame body, in bytes; a longer one ends the conversation.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// Most bytes that one [`GuestMessage::Stdout`], [`GuestMessage::Stderr`] or [`HostMessage::Stdin`] may carry.
pub const STDIO_CHUNK_BYTES_MAX: usize = 64 << 10;

/// Bytes of standard input that the host may send before the first [`GuestMessage::StdinCredit`].
pub const STDIN_CREDIT_BYTES_INITIAL: u32 = 256 << 10;

/// Most read-only layers that a root may have (one less than Docker's limit of 128, which counts the writable one).
pub const LAYERS_MAX: u16 = 127;
