//! From linear addresses to memory: page walks, the TLBs that translated code
//! reads, and accesses on the guest's behalf.

pub(crate) mod access;
mod bits;
pub(crate) mod spaces;
pub(crate) mod tlb;
pub(crate) mod walk;
