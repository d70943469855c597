//! what was asked of a machine, and what was checked.
