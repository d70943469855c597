//! The devices of a machine that can be asked and changed while it runs.
//!
//! Invariant: whoever locks a device does not keep it locked for long: its guest waits.

use std::sync::{Arc, Mutex};

use chipset::I8042;
use virtio::Counted;
use virtio::balloon::Balloon;
use virtio::block::Block;
use virtio::block::vhost_user::VhostUserBlock;
use virtio::mem::Mem;
use virtio::net::Net;
use virtio::pmem::Pmem;

use crate::generation::Generation;
use crate::saved::Whole;

/// Handles of one machine's devices. Clones are handles of the same devices.
#[derive(Clone, Debug, Default)]
pub struct Handles {
    /// What tells the guest that it was copied. There in every machine that was built.
    pub generation: Option<Arc<Mutex<Generation>>>,
    /// What the host can type on. There in every machine that was built.
    pub(crate) keyboard: Option<Arc<Mutex<I8042>>>,
    /// Drives by id, in the guest's order.
    pub drives: Vec<(String, Arc<Mutex<Block>>)>,
    /// Drives that other processes serve by id, in the guest's order.
    pub back_ends: Vec<(String, Arc<Mutex<VhostUserBlock>>)>,
    /// Network interfaces by id, in the guest's order.
    pub interfaces: Vec<(String, Arc<Mutex<Net>>)>,
    /// The balloon, if there is one.
    pub balloon: Option<Arc<Mutex<Balloon>>>,
    /// Memory that can be plugged, if there is any.
    pub mem: Option<Arc<Mutex<Mem>>>,
    /// Persistent memory by id, in the guest's order.
    pub pmem: Vec<(String, Arc<Mutex<Pmem>>)>,
    /// What counts, by the name of its group of metrics: devices that are not above by id,
    /// the serial port (`uart`), the vCPUs' accesses (`vcpu`).
    pub counted: Vec<(String, Arc<dyn Counted>)>,
    /// What a snapshot is made of. There in every machine that was built.
    pub(crate) whole: Option<Arc<Whole>>,
}

impl Handles {
    pub(crate) fn count(&mut self, group: &str, counted: Arc<dyn Counted>) {
        self.counted.push((group.to_owned(), counted));
    }
}
