//! Boots guests and compares the engine with the real CPU.
