//! The PC parts that a Linux guest still expects: a serial port, the keyboard
//! controller's reset line, and ACPI's sleep and reset registers.
//!
//! Invariant: no guest access panics or blocks on the host for longer than the
//! serial sink's own `write`.
//!
//! Left to others: port numbers, interrupt lines and ACPI tables (`machine`).
#![forbid(unsafe_code)]

mod i8042;
mod power;
mod serial;
mod sleep;

pub use i8042::{I8042, I8042_FIRST_PORT, I8042_PORTS};
pub use power::PowerEvents;
pub use serial::{SERIAL_PORTS, Serial};
pub use sleep::{
    RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET, SLEEP_PORTS, SLEEP_STATUS_OFFSET,
    SLEEP_TYPE_S5, SleepRegisters,
};
