//! The PC parts that a Linux guest still expects: a serial port, the keyboard
//! controller's reset line, and ACPI's sleep and reset registers; and what tells a guest
//! that it was copied: generation identifier and VM clock. Besides, the boot timer.
//!
//! Invariant: no guest access panics or blocks on the host for longer than the
//! serial sink's own `write`.
//!
//! Left to others: port numbers, interrupt lines and ACPI tables (`machine`).
#![forbid(unsafe_code)]

mod boot_timer;
mod i8042;
mod power;
mod saved;
mod serial;
mod sleep;
mod vmclock;
mod vmgenid;

pub use boot_timer::{BOOT_TIMER_LEN, BootTimer, Moment};
pub use i8042::{I8042, I8042_FIRST_PORT, I8042_PORTS, NoKeyboard};
pub use power::PowerEvents;
pub use saved::{SavedI8042, SavedSerial};
pub use serial::{SERIAL_PORTS, Serial};
pub use sleep::{
    RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET, SLEEP_PORTS, SLEEP_STATUS_OFFSET,
    SLEEP_TYPE_S5, SleepRegisters,
};
pub use vmclock::{SavedVmClock, VMCLOCK_LEN, VmClock};
pub use vmgenid::{SavedVmGenId, VMGENID_LEN, VmGenId};

/// Why a device could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host gave no random bytes.
    #[error("failed to read random bytes for the generation identifier")]
    Random {
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A saved state that no device of this kind can have.
    #[error("the saved state of the {device} device is not one that it can have")]
    Saved {
        /// Which device.
        device: &'static str,
    },
    /// A device's page is not in guest memory.
    #[error("failed to write the page of {device} into guest memory")]
    GuestMemory {
        /// Whose page.
        device: &'static str,
        /// What `vm_memory` says.
        source: vm_memory::GuestMemoryError,
    },
}
