//! HTTP/1.1 on a Unix socket: a thread per connection, few of them.
//!
//! hyper would bring a runtime whose memory an idle monitor would have to carry, and
//! answers what it cannot parse without a word; httparse does the parsing here.

mod message;
mod server;

pub(crate) use message::{Answer, Requests};
pub use server::{Answering, Limits, Server};

#[cfg(test)]
mod tests;
