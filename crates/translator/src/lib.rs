//! Guest x86-64 code in, host x86-64 code out. Pure: no guest memory is written,
//! nothing is executed, no unsafe code.
//!
//! ```text
//! guest bytes ─plan─▶ steps ─flags─▶ liveness ─groups─▶ shared checks ─emitter─▶ Block
//!               │                                           │
//!        table + allowed                     access, copy, stack, strings,
//!     (what may be executed)                 control_flow ─reencode, assembler
//! ```
//!
//! Most guest instructions are emitted again as they are, with their memory operand
//! redirected behind a page check. What is not on the allow-list ([`Exit::Interpret`])
//! is the engine's, as are all page faults: at an exit the guest's registers are
//! those before the instruction. Status flags that nothing can read any more may be
//! wrong at an exit, and with them in the frame of a page fault.
//!
//! Known differences from a CPU: an operand that runs from the last canonical page
//! into the hole behind it raises the fault of its first page; the time stamp counter
//! is the host's.
//!
//! The host must have BMI2 (`pext`, `rorx`, `shlx`).
#![forbid(unsafe_code)]

mod access;
mod allowed;
mod assembler;
pub mod block;
pub mod context;
mod control_flow;
mod copy;
mod emitter;
mod flags;
mod groups;
mod homes;
mod plan;
mod reencode;
#[cfg(test)]
mod reencode_tests;
mod registers;
pub mod relocation;
mod stack;
mod strings;
mod stubs;
mod system_calls;
mod table;
mod translate;

pub use allowed::{allowed_codes, feature, interpreted_codes};
pub use block::{Block, Consulted, Exit, GuestCode, Kind, Refused, Request, Thunks};
pub use plan::decoder_options;
pub use relocation::{Placing, Relocation, Target};
pub use stubs::{Stubs, cross_jump_stub, stubs};
pub use translate::{Options, Translator};
pub use x86::features::Features;

/// Stands for everything in this build that shapes the translator's output, as 16
/// hexadecimal digits: builds with the same one translate alike.
pub const SOURCES: &str = env!("TRANSLATOR_SOURCES");
