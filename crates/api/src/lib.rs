//! Firecracker's REST API: which requests there are, what is in them, and a server that
//! speaks it on a Unix socket.
//!
//! ```text
//! bytes ──http──▶ Request ──routes──▶ Action ──▶ Serve::act ──▶ Answer | Refusal
//!                    └── 400 and one line that says what is wrong
//! ```
//!
//! Invariant: whatever a client sends, it gets one answer for each request or its
//! connection is closed; no client makes another one wait, but for a place among
//! [`Limits::connections`].
//!
//! Left to others: what an action does (`vmm`), what a configuration may say
//! (`blueprint`).
#![forbid(unsafe_code)]

mod action;
mod bodies;
mod counters;
pub mod fuzz;
mod http;
mod routes;

pub use action::{Action, Answer, Refusal, Stage};
pub use bodies::{
    BalloonPatch, BalloonStatisticsPatch, DrivePatch, HintingStart, HotplugPatch, MemoryBackend,
    MemoryBackendType, NetworkInterfacePatch, NetworkOverride, PmemPatch, SnapshotCreate,
    SnapshotHugePages, SnapshotLoad, SnapshotType, VmPatch, VmState, VsockOverride,
};
pub use counters::Counters;
pub use http::{Answering, Limits, Server};
pub use routes::{Call, Method, RequestError, parse};

/// The API as a document, for people and for generators of clients: OpenAPI 3.
pub const OPENAPI: &str = include_str!("../openapi.json");

/// What the server asks to do the work. Called from one thread per connection.
pub trait Serve: Send + Sync {
    /// Does what was asked.
    ///
    /// # Errors
    /// [`Refusal`]: the client gets its status and its line.
    fn act(&self, action: Action) -> Result<Answer, Refusal>;
}

#[cfg(test)]
mod tests;
