//! Guest memory: addresses, memfd-backed regions, page epochs.

pub use vm_memory::GuestAddress as Gpa;
/// Guest memory.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
