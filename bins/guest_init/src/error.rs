//! What can go wrong in init, and what the host hears of it.

use std::{error::Error, io};

use guest_wire::{LAYERS_MAX, StartFailure, WireError};

/// An error of init.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    /// A system call on a named object failed.
    #[error("failed to {action} {object}")]
    System {
        /// In the infinitive: "mount", "open".
        action: &'static str,
        /// What it was done to.
        object: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The control stream could not be opened.
    #[error("no vsock connection to the host")]
    NoHost(#[source] io::Error),
    /// The control stream failed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The host closed the stream before the process ended.
    #[error("host closed the control stream")]
    HostGone,
    /// A message came at a time that the protocol does not allow.
    #[error("host sent {message} {when}")]
    OutOfOrder {
        /// The message's name.
        message: &'static str,
        /// "before Start", "twice".
        when: &'static str,
    },
    /// More standard input than credited.
    #[error("host sent {surplus} bytes of standard input beyond its credit")]
    CreditExceeded {
        /// Bytes beyond the credit.
        surplus: usize,
    },
    /// A number of layers that no root can have.
    #[error("root of {count} layers is not possible; it must have 1 to {LAYERS_MAX}")]
    LayerCount {
        /// As the host said.
        count: u16,
    },
    /// An argument, variable or path with a NUL byte.
    #[error("{what} holds a NUL byte")]
    Nul {
        /// Which.
        what: &'static str,
    },
    /// There is nothing to execute.
    #[error("no command given")]
    NoCommand,
    /// The user or group is not in the image.
    #[error("unable to find {what} {name:?}: no matching entry in {file}")]
    UnknownUser {
        /// "user" or "group".
        what: &'static str,
        /// As the host gave it.
        name: String,
        /// The file that was searched.
        file: &'static str,
    },
    /// The working directory cannot be used.
    #[error("cannot use working directory {path:?}")]
    Cwd {
        /// As the host gave it.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program is in no directory of PATH.
    #[error("executable {program:?} not found in PATH")]
    NotInPath {
        /// As the host gave it.
        program: String,
    },
    /// The program cannot be executed.
    #[error("failed to execute {program:?}")]
    Exec {
        /// As the host gave it.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl InitError {
    /// For `map_err`: names what was done to which object.
    pub(crate) fn system<E: Into<io::Error>>(
        action: &'static str,
        object: &str,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            action,
            object: String::from(object),
            source: source.into(),
        }
    }

    /// What kind of failure the host is told when this kept the process from starting.
    pub(crate) fn start_failure(&self) -> StartFailure {
        match self {
            Self::UnknownUser { .. } => StartFailure::BadUser,
            Self::Cwd { .. } => StartFailure::BadCwd,
            Self::NotInPath { .. } => StartFailure::NotFound,
            Self::Exec { source, .. } => match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => StartFailure::NotFound,
                Some(libc::E2BIG | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EAGAIN) => {
                    StartFailure::Other
                }
                Some(_) | None => StartFailure::NotExecutable,
            },
            Self::System { .. }
            | Self::NoHost(_)
            | Self::Wire(_)
            | Self::HostGone
            | Self::OutOfOrder { .. }
            | Self::CreditExceeded { .. }
            | Self::LayerCount { .. }
            | Self::Nul { .. }
            | Self::NoCommand => StartFailure::Other,
        }
    }

    /// This error and its causes in one line.
    pub(crate) fn line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        line
    }
}
