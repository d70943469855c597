//! kombi: containers in micro-VMs from the command line.

fn main() {}
