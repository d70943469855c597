//! One interrupt line of the machine, as a device sees it.

use std::sync::Arc;

type SetLine = dyn Fn(bool) + Send + Sync;

/// A line to the interrupt controller. Clones drive the same line.
#[derive(Clone)]
pub struct IrqLine {
    set: Arc<SetLine>,
}

impl IrqLine {
    /// A line whose level changes go to `set`.
    pub fn new(set: impl Fn(bool) + Send + Sync + 'static) -> Self {
        Self { set: Arc::new(set) }
    }

    /// Drives the line; a level-triggered device holds it high until served.
    pub fn set(&self, high: bool) {
        (self.set)(high);
    }

    /// One rising edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

impl std::fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IrqLine")
    }
}
