//! One container in one machine in one monitor process, from the user's wish to the last trace removed.
//!
//! ```text
//!   Plan ──launch──▶ Booting ──wait_for_guest──▶ Ready ──run──▶ Ended
//!                       │                          │
//!                       └── dropped, at any time ──┴──▶ monitor killed and reaped, directory removed
//! ```
//!
//! Invariants:
//! - Whatever way a [`Booting`] or [`Ready`] goes (done, error, panic), no process, socket, pipe or directory stays. When
//!   this process is killed, the monitor dies with it and the next start removes the directory.
//! - The thread that calls [`Plan::launch`] must live as long as the machine: the monitor dies with it.
//! - Nothing the guest says makes this side panic, hold unbounded memory, or send control characters to a terminal
//!   other than as the command's own output.
//!
//! Left to others: preparing images (`image`), building the machine (the monitor), the container's inside (the guest's
//! init), terminals and signal handlers (the programs that use this).

#![forbid(unsafe_code)]

mod assets;
pub mod console;
mod control;
mod error;
mod exit_status;
pub mod host;
mod machine;
mod process;
mod runtime_dir;
mod session;
mod vmm_process;

pub use assets::Search;
pub use blueprint::limits::VCPU_COUNT_MAX;
pub use blueprint::{CpuModel, Engine};
pub use control::{Control, NoControl, Request};
pub use error::{EXIT_KOMBI, Error};
pub use exit_status::{Ended, signal_name};
pub use guest_wire::{ProcessSpec, TerminalSize, VERSION as GUEST_PROTOCOL};
pub use machine::{Booting, MEMORY_MIB_LEAST, Plan, Ready};
pub use process::{ImageDefaults, Overrides, process_spec};
pub use runtime_dir::{RuntimeDir, runtime_parent};
pub use session::Streams;
