//! What can go wrong between a user's wish and the end of a machine.
//!
//! Invariant: each message names its object once and leaves the cause to `source`; [`Error::way_out`] says what the
//! user can do about it, and [`Error::exit_code`] what a program should exit with. Text that came from the guest is
//! escaped before it gets here ([`crate::console::printable`]). Left to others: joining the three into one line.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use blueprint::DraftError;
use guest_wire::{StartFailure, WireError};

/// Exit code for "Kombi itself failed", as docker uses it.
pub const EXIT_KOMBI: u8 = 125;

/// Why a container did not run to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The directory for sockets could not be made, locked or removed.
    #[error("failed to {action} {path:?}")]
    RuntimeDir {
        /// The verb.
        action: &'static str,
        /// The object.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory for sockets may be in someone else's hands.
    #[error("runtime directory {path:?} {reason}")]
    RuntimeDirUnsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A Unix socket's path may have no more than 107 bytes (unix(7)).
    #[error("runtime directory {path:?} has too long a name for a socket in it")]
    RuntimeDirTooLong {
        /// The directory.
        path: PathBuf,
    },
    /// Another container of this user has the name.
    #[error("name {name:?} is in use by a running container")]
    NameInUse {
        /// The name.
        name: String,
    },
    /// Not a name that can be a directory and a host name.
    #[error("name {name:?} is not usable")]
    BadName {
        /// The name.
        name: String,
    },
    /// A file that Kombi brings along is not there.
    #[error("no {what} found: looked for {tried}")]
    AssetMissing {
        /// The asset, for the reader.
        what: &'static str,
        /// The places, for the reader.
        tried: String,
        /// What to do.
        way_out: &'static str,
    },
    /// The engine cannot do what was asked.
    #[error("engine {engine}: {cause}")]
    Engine {
        /// Its name.
        engine: &'static str,
        /// What it cannot do.
        cause: String,
        /// What to do.
        way_out: &'static str,
    },
    /// Less memory than the guest's kernel and init need.
    #[error("memory of {asked_mib} MiB is too little: a machine needs at least {least_mib} MiB")]
    TooLittleMemory {
        /// What was asked for, in MiB.
        asked_mib: u32,
        /// What is needed, in MiB.
        least_mib: u32,
    },
    /// The machine breaks a limit.
    #[error("machine cannot be as it was asked for")]
    Draft {
        /// Which.
        source: blueprint::DraftError,
    },
    /// Neither the user nor the image says what to run.
    #[error("image has neither an entrypoint nor a command")]
    NoCommand,
    /// A working directory that is not absolute.
    #[error("working directory {path:?} is not absolute")]
    RelativeCwd {
        /// The directory.
        path: String,
    },
    /// The monitor's program could not be started.
    #[error("failed to start {path:?}")]
    SpawnVmm {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The pipes to the monitor did not do as asked.
    #[error("failed to {action}")]
    Channel {
        /// What was done.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The monitor refused the machine or gave up on it.
    #[error("machine failed to {stage}: {message}")]
    VmmFailed {
        /// `start` or `go on`.
        stage: &'static str,
        /// What the monitor said, in one line.
        message: String,
    },
    /// The monitor was killed.
    #[error("kombi-vmm was killed by signal {signal} ({name})")]
    VmmKilled {
        /// Linux signal number.
        signal: i32,
        /// Its name.
        name: &'static str,
    },
    /// The monitor made a system call that its own filter forbids.
    #[error("the monitor was killed by its system call filter (SIGSYS): {message}")]
    VmmForbidden {
        /// What it said of it, in one line.
        message: String,
    },
    /// The guest's kernel gave up.
    #[error("guest kernel panicked: {line}")]
    GuestPanicked {
        /// The line of the console that says why.
        line: String,
    },
    /// The guest reset its processor by a fault within a fault within a fault.
    #[error("guest processor stopped by a triple fault{console}")]
    TripleFault {
        /// `: last console line …`, or empty.
        console: String,
    },
    /// The machine went down while its process was still running.
    #[error("machine ended ({outcome}) before its command did{console}")]
    EndedEarly {
        /// In the monitor's words.
        outcome: String,
        /// `: last console line …`, or empty.
        console: String,
    },
    /// The guest's init did not call in time.
    #[error("guest did not boot within {limit:?}{console}")]
    BootTimeout {
        /// The limit.
        limit: Duration,
        /// `: last console line …`, or empty.
        console: String,
    },
    /// What came from the guest is not what its init would say.
    #[error("failed to talk to the guest's init")]
    Wire(#[source] WireError),
    /// A message that has no place in the conversation.
    #[error("guest's init broke the protocol: {what}")]
    Protocol {
        /// What it did.
        what: &'static str,
    },
    /// The guest's init could not go on.
    #[error("guest's init failed: {message}")]
    InitFailed {
        /// In its words.
        message: String,
    },
    /// The command could not be started.
    #[error("{message}")]
    StartFailed {
        /// What kind of failure.
        kind: StartFailure,
        /// The object and the cause, in init's words.
        message: String,
    },
    /// The user's own end of the standard streams failed.
    #[error("failed to {action}")]
    Stdio {
        /// What was done.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Nobody reads our standard output or error any more.
    #[error("nobody reads {stream} any more")]
    ReaderGone {
        /// Which.
        stream: &'static str,
    },
    /// A signal ended the machine before its command did.
    #[error("stopped by signal {signal}")]
    Interrupted {
        /// Linux signal number.
        signal: u8,
    },
}

impl Error {
    /// What the user can do about it.
    #[must_use]
    pub fn way_out(&self) -> Option<&'static str> {
        Some(match self {
            Self::RuntimeDir { .. } | Self::RuntimeDirUnsafe { .. } => {
                "set XDG_RUNTIME_DIR to a directory that only you can write"
            }
            Self::RuntimeDirTooLong { .. } => "set XDG_RUNTIME_DIR to a shorter path",
            Self::NameInUse { .. } => "choose another --name",
            Self::BadName { .. } => {
                "use 1 to 64 of the characters a-z A-Z 0-9 _ . - and start with a letter or digit"
            }
            Self::AssetMissing { way_out, .. } | Self::Engine { way_out, .. } => way_out,
            Self::TooLittleMemory { .. } => "raise --memory (the default is 256M)",
            Self::Draft { source } => match source {
                DraftError::TooManyDevices { .. } => {
                    "each layer of an image is a device: squash the image"
                }
                DraftError::MemorySize { .. } => "change --memory",
                _ => return None,
            },
            Self::NoCommand => "give one after the image",
            Self::RelativeCwd { .. } => "give a path that starts with /",
            Self::SpawnVmm { .. } => "see kombi doctor",
            // The monitor names the way out by itself where it knows one.
            Self::VmmFailed { message, .. } if message.contains("; ") => return None,
            Self::VmmFailed { .. } => "see kombi doctor, or run again with -v",
            Self::VmmKilled { signal: 9, .. } => {
                "someone killed it, or the host is out of memory: see the kernel log"
            }
            Self::VmmForbidden { .. } => {
                "please report it: a guest broke out of the engine, or kombi-vmm needs a call that is not on its list"
            }
            Self::VmmKilled { .. } | Self::TripleFault { .. } | Self::EndedEarly { .. } => {
                "run again with -v to see the console and the monitor's log"
            }
            Self::GuestPanicked { .. } => "run again with -v to see the console, or raise --memory",
            Self::BootTimeout { .. } => {
                "run again with -v to see the console, or raise --boot-timeout"
            }
            Self::StartFailed { kind, .. } => match kind {
                StartFailure::NotFound => "check the command and the image's PATH",
                StartFailure::NotExecutable => "check the file's mode and format",
                StartFailure::BadUser => "check --user",
                StartFailure::BadCwd => "check --workdir",
                StartFailure::Other => return None,
            },
            Self::Wire(WireError::VersionMismatch { .. })
            | Self::Channel { .. }
            | Self::Stdio { .. }
            | Self::ReaderGone { .. }
            | Self::Interrupted { .. } => return None,
            Self::Wire(_) | Self::Protocol { .. } | Self::InitFailed { .. } => {
                "run again with -v to see the console"
            }
        })
    }

    /// What a program that ends because of this should exit with: docker's 125, 126 and 127, or 128 + signal.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::StartFailed { kind, .. } => kind.exit_code(),
            Self::Interrupted { signal } => 128_u8.saturating_add(*signal),
            // As a program does that is killed by SIGPIPE (13).
            Self::ReaderGone { .. } => 141,
            _ => EXIT_KOMBI,
        }
    }

    /// Whether there is nothing to tell: the user, or the end of a pipe, wanted it so.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        matches!(self, Self::Interrupted { .. } | Self::ReaderGone { .. })
    }
}
