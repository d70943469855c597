//! one container in one vmm process.
