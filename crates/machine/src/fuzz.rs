//! The entry point for fuzzing: any files as kernel and initial RAM disk.
//!
//! Invariant: no panic, whatever is in the files. Left to others: making them (`fuzz/`).

use blueprint::Blueprint;
use hv::VcpuState;
use ram::GuestRam;

use crate::Error;
use crate::layout::VirtioSlot;

/// Fills `ram` as for a machine with three devices, and returns the boot CPU's state.
///
/// # Errors
/// Why the machine cannot start.
pub fn load(ram: &GuestRam, blueprint: &Blueprint) -> Result<VcpuState, Error> {
    let slots: Vec<_> = (0..3).map(VirtioSlot::nth).collect();
    crate::boot::load(ram, blueprint, &slots)
}
