//! The devices of a machine that can be asked and changed while it runs.
//!
//! Invariant: whoever locks a device does not keep it locked for long: its guest waits.

use std::sync::{Arc, Mutex};

use virtio::balloon::Balloon;

use crate::generation::Generation;

/// Handles of one machine's devices. Clones are handles of the same devices.
#[derive(Clone, Debug, Default)]
pub struct Handles {
    /// What tells the guest that it was copied. There in every machine that was built.
    pub generation: Option<Arc<Mutex<Generation>>>,
    /// The balloon, if there is one.
    pub balloon: Option<Arc<Mutex<Balloon>>>,
}
