//! Guest x86-64 code in, host x86-64 code out. Pure: no guest memory is written,
//! nothing is executed, no unsafe code.
#![forbid(unsafe_code)]

pub mod block;
pub mod context;

pub use block::{Block, Exit, GuestCode, Kind, Refused, Request, Thunks};
