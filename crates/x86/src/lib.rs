//! x86-64 as data: the names and bit layouts that the architecture defines, and
//! the state of one virtual CPU in a form that no engine owns.
//!
//! Nothing here executes or translates anything. Names are those of the Intel
//! Software Developer's Manual (SDM).
#![forbid(unsafe_code)]

pub mod control;
pub mod cpuid;
pub mod descriptor;
pub mod msr;
pub mod paging;
pub mod registers;
pub mod state;

pub use state::VcpuState;
