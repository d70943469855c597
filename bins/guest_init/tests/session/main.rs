//! Sessions of the real kombi-init, as an ordinary process, over a socket pair: what the host sees of a machine.

mod failures;
mod host;
mod processes;
mod streams;
mod terminals;
