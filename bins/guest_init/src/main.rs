//! kombi-init: PID 1 of every Kombi machine.
//!
//! It greets the host over vsock, makes the root that the host describes, starts one process in it, carries its standard
//! streams and signals, reports how it ended, and powers off. One thread, one poll loop.
//!
//! Invariant: as PID 1 it never returns; whatever fails, the machine powers off after one line on the console.
//!
//! Every instruction that runs here for the first time costs translation on the software engine: no work ahead of need,
//! and no formatting on the good path.
//!
//! As an ordinary process it serves one session over its standard input, without mounts: so the tests run it.
//!
//! Left to others: the messages themselves (`guest_wire`), the host's end of them (`sandbox`).
#![cfg_attr(not(test), no_main)]
#![deny(unsafe_code)]

mod control;
mod descendants;
#[cfg(not(test))]
#[allow(
    unsafe_code,
    reason = "exports the C entry point: Rust's own aborts when a machine has no console"
)]
mod entry;
mod environment;
mod error;
mod launch;
mod loopback;
mod pid1;
mod root;
mod session;
#[allow(unsafe_code, reason = "fork, exec and signals have no safe interface")]
mod spawn;
mod stdio;
mod users;

/// Runs as what the process is: PID 1 of a machine, or a session for tests.
#[cfg_attr(
    test,
    allow(dead_code, reason = "the test harness has its own entry point")
)]
fn run() -> i32 {
    if rustix::process::getpid().is_init() {
        pid1::run()
    } else {
        session::run_as_ordinary_process()
    }
}
