//! What can be wrong with a jail, told in one line.

use std::io;
use std::path::PathBuf;

/// Why the monitor was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("failed to close the descriptors that were left open")]
    CloseInherited { source: io::Error },
    #[error("id {id:?} is not 1 to {most} letters, digits or hyphens")]
    Id { id: String, most: usize },
    #[error("failed to {doing} {path:?}")]
    Path {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path:?} is not a {wanted}")]
    OtherKind { path: PathBuf, wanted: &'static str },
    #[error("{path:?} has other names (hard links), one of them outside the jail perhaps")]
    HardLink { path: PathBuf },
    #[error("resource limit {asked:?} is not {wanted}")]
    Limit { asked: String, wanted: &'static str },
    #[error("failed to set the resource limit {name} to {value}")]
    SetLimit {
        name: &'static str,
        value: u64,
        source: io::Error,
    },
    #[error("parent cgroup {path:?} is not a relative path without . and ..")]
    ParentCgroup { path: PathBuf },
    #[error("cgroup {asked:?} is not of the form CONTROLLER.PROPERTY=VALUE")]
    CgroupForm { asked: String },
    #[error("no cgroup hierarchy of version {version} is mounted")]
    NoHierarchy { version: u8 },
    #[error("cgroup controller {controller:?} is not available")]
    NoController { controller: String },
    #[error("cgroup file {path:?} is empty and so are those above it")]
    NothingToInherit { path: PathBuf },
    #[error("failed to move this process to cgroup {path:?}")]
    JoinParent { path: PathBuf, source: io::Error },
    #[error("failed to {doing}")]
    Host {
        doing: &'static str,
        source: io::Error,
    },
    #[error("failed to become {path:?} in the jail")]
    Exec { path: PathBuf, source: io::Error },
}

impl Error {
    fn hint(&self) -> Option<&'static str> {
        match self {
            Error::HardLink { .. } => Some("remove it, or choose another --id"),
            Error::NoHierarchy { .. } => Some("mount one, or choose the other --cgroup-version"),
            Error::NoController { .. } => Some("see /proc/mounts and cgroup.controllers"),
            Error::NothingToInherit { .. } => Some("write a value into the parent cgroup's file"),
            Error::JoinParent { .. } => {
                Some("with any --cgroup a child of that cgroup is made in its place")
            }
            Error::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => Some(
                "a program that is not linked statically needs its libraries in the jail's folder",
            ),
            // An ordinary user gets one of these two at the first privileged step.
            Error::Path { source, .. } | Error::Host { source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Some("kombi-jailer is to be started as root")
            }
            Error::CloseInherited { .. }
            | Error::Id { .. }
            | Error::Path { .. }
            | Error::OtherKind { .. }
            | Error::Limit { .. }
            | Error::SetLimit { .. }
            | Error::ParentCgroup { .. }
            | Error::CgroupForm { .. }
            | Error::Host { .. }
            | Error::Exec { .. } => None,
        }
    }

    /// Object, causes and way out in one line.
    pub(crate) fn line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        if let Some(hint) = self.hint() {
            line.push_str("; ");
            line.push_str(hint);
        }
        line.replace(['\n', '\r'], " ")
    }
}

/// For `map_err`: the error of doing something to a path.
pub(crate) fn at(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Path {
        doing,
        path,
        source,
    }
}

/// For `map_err`: the error of asking the kernel for something without a path.
pub(crate) fn host<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Host {
        doing,
        source: source.into(),
    }
}
