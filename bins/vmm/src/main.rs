//! the monitor: one process per machine.

fn main() {}
