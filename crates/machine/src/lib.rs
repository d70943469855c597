//! One machine: boot, devices, vCPU threads, event loop; on any engine.
//!
//! ```text
//!            ┌── boot: kernel, initrd, zero page, ACPI ──▶ guest memory
//! Blueprint ─┼── devices: on ports, MMIO slots, interrupt lines ──▶ IoSpace
//!            └── engine: hv::Partition, one thread per vCPU
//! ```
//!
//! Invariant: nothing here knows which engine runs, and what the guest or a
//! kernel image does can end the machine but nothing else.
//!
//! Left to others: what a device does (`virtio`, `chipset`), guest code (engines),
//! exit codes and signals (`vmm`).
#![forbid(unsafe_code)]

mod back_ends;
mod boot;
mod console;
mod control;
mod devices;
mod error;
mod event_loop;
pub mod fuzz;
mod generation;
mod handles;
mod io_space;
mod layout;
mod machine;
mod memory;
mod memory_devices;
mod network;
mod saved;

pub use back_ends::{BackEnds, connect_back_end, connect_back_ends};
pub use chipset::{Moment, NoKeyboard};
pub use control::{Controller, Gone, Outcome, StopHandle};
pub use error::Error;
pub use generation::{Generation, SavedGeneration};
pub use handles::Handles;
pub use machine::{Confine, Ended, Machine, Outside, Running, Stdio};
pub use memory_devices::limits as device_limits;
pub use network::{MetadataService, Network, check_tap, open_taps};
pub use saved::{SavedDevices, SavedMachine, SavedRegion};
pub use tap::Tap;
