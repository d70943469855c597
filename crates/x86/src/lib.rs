//! x86-64 as data: the names and bit layouts that the architecture defines, and
//! the state of one virtual CPU in a form that no engine owns.
//!
//! Nothing here translates or runs guest code. Names are those of the Intel
//! Software Developer's Manual (SDM).
#![forbid(unsafe_code)]

pub mod control;
pub mod cpu_template;
pub mod cpuid;
pub mod descriptor;
pub mod features;
pub mod guest_cpuid;
pub mod msr;
pub mod paging;
pub mod registers;
pub mod state;
pub mod xsave;

pub use state::VcpuState;
