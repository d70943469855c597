//! Errors with their exit code, and how they are told: one line with the object,
//! the causes and the way out.

use std::path::PathBuf;

use blueprint::DraftError;
use machine::Error as MachineError;

/// Exit codes; those of Firecracker where it has one. docs/exit-codes.md.
pub(crate) mod exit {
    /// Any other error.
    pub(crate) const ERROR: u8 = 1;
    /// The guest triple-faulted.
    pub(crate) const TRIPLE_FAULT: u8 = 140;
    /// The engine failed.
    pub(crate) const ENGINE: u8 = 141;
    /// A system call that the filter forbids.
    pub(crate) const FORBIDDEN_CALL: u8 = 148;
    /// A field of the configuration, or a file that it names.
    pub(crate) const BAD_CONFIGURATION: u8 = 152;
    /// The command line.
    pub(crate) const BAD_ARGUMENTS: u8 = 153;
}

/// Why the machine did not run, or did not run on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("failed to read configuration {path:?}")]
    ReadConfig {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("configuration {path:?} has more than {most} bytes")]
    LongConfig { path: PathBuf, most: u64 },
    #[error("configuration {path:?} is refused")]
    Config { path: PathBuf, source: DraftError },
    #[error("the machine cannot be built")]
    Engine { source: hv::Error },
    #[error("the machine cannot be built")]
    Build { source: MachineError },
    #[error("the snapshot cannot be loaded: {why}")]
    Load { why: String },
    #[error("{source}")]
    Describe { source: snapshot::Error },
    #[error("the machine stopped")]
    Run { source: MachineError },
    #[error("failed to open log {path:?}")]
    OpenLog {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("failed to open {path:?} for {what}")]
    OpenOutput {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("filters {path:?} are refused: {why}")]
    Filter { path: PathBuf, why: String },
    #[error("{why}")]
    Metrics { why: String },
    #[error("failed to take metadata from {path:?}: {why}")]
    Metadata { path: PathBuf, why: String },
    #[error("failed to serve the API at {path:?}")]
    ApiSocket {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("failed to use --status-fd {number}")]
    StatusFd { number: u32, source: std::io::Error },
    #[error("failed to {doing}")]
    Host {
        doing: &'static str,
        source: std::io::Error,
    },
}

impl Failure {
    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::ReadConfig { .. }
            | Failure::LongConfig { .. }
            | Failure::Config { .. }
            | Failure::Metadata { .. }
            | Failure::Load { .. }
            | Failure::Describe { .. }
            | Failure::Engine { .. } => exit::BAD_CONFIGURATION,
            Failure::OpenLog { .. }
            | Failure::Filter { .. }
            | Failure::OpenOutput { .. }
            | Failure::Metrics { .. }
            | Failure::ApiSocket { .. }
            | Failure::StatusFd { .. } => exit::BAD_ARGUMENTS,
            Failure::Build { source } | Failure::Run { source } => match source {
                // Not the engine's failure, but more than it was made for.
                MachineError::Engine {
                    source: hv::Error::TooManyVcpus { .. } | hv::Error::HostLacks { .. },
                } => exit::BAD_CONFIGURATION,
                MachineError::Engine { .. } => exit::ENGINE,
                source if source.is_asked_for() => exit::BAD_CONFIGURATION,
                _ => exit::ERROR,
            },
            Failure::Host { .. } => exit::ERROR,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Failure::ReadConfig { .. } => Some("give a readable file, or - for standard input"),
            Failure::Metadata { .. } => Some("give a file of JSON, or a larger --mmds-size-limit"),
            Failure::Filter { .. } => {
                Some("give JSON as seccompiler reads it, not what seccompiler compiled")
            }
            Failure::Build { source } | Failure::Run { source } => source.hint(),
            Failure::OpenLog { .. } | Failure::OpenOutput { .. } | Failure::Metrics { .. } => {
                Some("give a path that can be written")
            }
            Failure::ApiSocket { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse => {
                Some("remove what is there, or give another --api-sock")
            }
            Failure::ApiSocket { .. } => Some("give another --api-sock, or --no-api"),
            Failure::StatusFd { .. } => Some("give the number of an open descriptor"),
            // Engines name the way out themselves.
            Failure::Engine { .. }
            | Failure::Load { .. }
            | Failure::Describe { .. }
            | Failure::LongConfig { .. }
            | Failure::Config { .. }
            | Failure::Host { .. } => None,
        }
    }

    /// Object, causes and hint in one line.
    pub(crate) fn line(&self) -> String {
        let mut line = chain(self);
        if let Some(hint) = self.hint() {
            line.push_str("; ");
            line.push_str(hint);
        }
        line.replace(['\n', '\r'], " ")
    }
}

/// An error and its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_of_object_causes_and_way_out() {
        let source = std::io::Error::from_raw_os_error(2);
        let source = MachineError::OpenKernel {
            path: "/no".into(),
            source,
        };
        assert_eq!(
            Failure::Build { source }.line(),
            "the machine cannot be built: failed to open kernel \"/no\": \
             No such file or directory (os error 2); give the path of a readable vmlinux or bzImage"
        );
    }

    #[test]
    fn exit_codes_tell_configuration_engine_and_host_apart() {
        let build = |source| Failure::Build { source }.exit_code();
        let refused = std::io::Error::from_raw_os_error(13);
        assert_eq!(build(MachineError::KernelEmpty { path: "k".into() }), 152);
        assert_eq!(
            build(MachineError::Host {
                doing: "x",
                source: refused
            }),
            1
        );
        let source = hv::Error::NoSuchVcpu { index: 1 };
        assert_eq!(build(MachineError::Engine { source }), 141);
        let source = hv::Error::TooManyVcpus {
            engine: "soft",
            asked: 9,
            most: 8,
        };
        assert_eq!(build(MachineError::Engine { source }), 152);
    }
}
