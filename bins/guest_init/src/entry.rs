//! The C entry point.
//!
//! Rust's runtime would open /dev/null for missing standard streams, and abort without it: which is how a machine without
//! a console starts. It would also install handlers that cost time at boot and are of no use here.

use std::ffi::{c_char, c_int};

// SAFETY: no other symbol is called `main`: the crate is built with `no_main`, and this is C's signature of it.
#[unsafe(no_mangle)]
extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    crate::run()
}
