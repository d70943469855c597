//! Containers that outlive the command which started them: what is known of each, who holds it, what it said.
//!
//! ```text
//! ROOT/lock            held while containers are made, renamed and removed
//! ROOT/ID/record.json  what was asked; changes by renaming only
//! ROOT/ID/state.json   what became of it; written by who holds the lock
//! ROOT/ID/lock         held by the supervisor for as long as it lives; its text is the exit code
//! ROOT/ID/log.json     what the command wrote (log.json.1 is older, and so on)
//! ROOT/ID.new, ID.gone on their way in and out; removed by whoever makes a container next
//! ```
//!
//! Invariants:
//! - There is no daemon. Whether a container runs is whether its lock is held, which the kernel ends with its holder: a
//!   supervisor that is killed, or a host that restarts, leaves nothing that looks alive.
//! - Files are replaced whole: a reader, and whoever comes after a crash, sees the old one or the new one.
//! - A name belongs to at most one container.
//!
//! Left to others: what a container runs ([`Record::task`] is theirs), and doing it (the command line's supervisor).

#![forbid(unsafe_code)]

mod container;
mod error;
mod files;
pub mod log;
mod name;
mod record;
mod root;

pub use container::{Container, Supervision};
pub use error::Error;
pub use record::{Id, LogOptions, Phase, Record, State};
pub use root::{Containers, Wanted};

/// Now, as records have it: RFC 3339 in UTC with nanoseconds, as docker's.
#[must_use]
pub fn now() -> String {
    chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Nanos, true)
}
