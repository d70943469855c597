//! Boots guests ([`initramfs`] and `tests/boots.rs`), and compares the software engine with the real CPU: the same code from the same
//! state, once in a forked child ([`oracle`]), once in a guest ([`engine`]), must
//! leave the same registers, flags and memory, or fault alike. What the engine emits
//! is proved harmless besides, from the host code alone ([`verifier`]).
//!
//! Unsafe code is in `oracle` only.
#![deny(unsafe_code)]

pub mod difference;
pub mod engine;
pub mod initramfs;
mod instruction;
pub mod layout;
pub mod oracle;
pub mod private_network;
pub mod program;
mod random;
pub mod verifier;

pub use random::Random;

/// Why a comparison could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host's kernel refused.
    #[error("failed to {doing}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The child that runs code natively died or hung.
    #[error("the native child {how}")]
    Child {
        /// What became of it.
        how: &'static str,
    },
    /// The engine refused.
    #[error("the engine failed to {doing}")]
    Engine {
        /// What was being done.
        doing: &'static str,
        /// Its answer.
        source: hv::Error,
    },
    /// Guest memory could not be made.
    #[error("failed to make guest memory")]
    Memory(#[from] ram::Error),
    /// Guest memory could not be reached.
    #[error("failed to reach guest memory")]
    Access(#[from] vm_memory::GuestMemoryError),
    /// The guest ended in a way that no program should.
    #[error("the guest ended by {0:?} rather than at its end or in a handler")]
    Ended(hv::Exit),
}
