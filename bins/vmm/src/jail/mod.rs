//! The jail that needs no root: what this process gives up before it looks at anything
//! that a stranger made (kernel, disks, guest).
//!
//! ```text
//! own user, mounts, network, IPC (where the host lets users have them)
//!   → a root with this machine's files only → no capability → Landlock
//! ```
//!
//! Invariant: entered by a process of one thread. Whatever the host forbids is said and
//! left out; the rest holds all the same.
//!
//! Left to others: TAP devices and back ends of drives, which are opened before, as they stay
//! behind in the old network and among its files; filters of system calls (`filter`); a PID namespace, which would need
//! a second process: this one sees no /proc, and neither Landlock's scope nor the
//! filters let it send signals; `kombi-jailer` gives one.

mod namespaces;
mod rules;

use std::path::{Path, PathBuf};

use blueprint::{Blueprint, Draft, Engine, Store};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use translations::Place;

use crate::args::Args;
use crate::failure::Failure;

const KVM: &str = "/dev/kvm";

/// What stays within reach, under the paths that it has outside.
#[derive(Debug, Default)]
pub(crate) struct Visible {
    /// Files for reading.
    read: Vec<PathBuf>,
    /// Files for reading and writing, devices included.
    write: Vec<PathBuf>,
    /// Folders to make and remove files and sockets in.
    folders: Vec<PathBuf>,
}

impl Visible {
    /// What a machine of `blueprint`, which came from `draft`, needs.
    ///
    /// # Errors
    /// [`Failure::OpenOutput`] for files that it is to write and
    /// that are not there and cannot be made.
    pub(crate) fn of(args: &Args, draft: &Draft, blueprint: &Blueprint) -> Result<Self, Failure> {
        let mut visible = Self::default();
        visible.read.push(blueprint.kernel().to_owned());
        visible.read.extend(blueprint.initrd().map(Path::to_owned));
        visible.read.extend(args.metadata.clone());
        let drives = blueprint
            .drives()
            .iter()
            .filter_map(|drive| match &drive.store {
                Store::File {
                    path, read_only, ..
                } => Some((path, *read_only)),
                // It was connected to before.
                Store::BackEnd { .. } => None,
            });
        let pmem = blueprint
            .pmem()
            .iter()
            .map(|pmem| (&pmem.path, pmem.read_only));
        for (path, read_only) in drives.chain(pmem) {
            let files = if read_only {
                &mut visible.read
            } else {
                &mut visible.write
            };
            files.push(path.clone());
        }
        // It connects to sockets beside its own.
        let vsock = blueprint.vsock().and_then(|vsock| vsock.uds_path.parent());
        visible
            .folders
            .extend(vsock.map(|folder| match folder.as_os_str().is_empty() {
                true => PathBuf::from("."),
                false => folder.to_owned(),
            }));
        if let Place::Folder(folder) = Place::choose(args.translation_cache.as_deref()) {
            // Made before there is no place for it any more. Without one, a machine only
            // starts more slowly.
            if translations::Folder::open(&folder).is_ok() {
                visible.folders.push(folder);
            }
        }
        if blueprint.engine() != Engine::Soft {
            visible.write.push(KVM.into());
        }
        let outputs = [
            ("serial output", blueprint.serial_out()),
            ("metrics", args.metrics_path.as_deref()),
            (
                "metrics",
                draft.metrics.as_ref().map(|to| to.metrics_path.as_path()),
            ),
            (
                "log",
                draft.logger.as_ref().and_then(|to| to.log_path.as_deref()),
            ),
            ("the engine's trace", args.engine_trace.as_deref()),
        ];
        for (what, path) in outputs {
            let Some(path) = path else {
                continue;
            };
            // A FIFO would be waited for.
            if !path.exists() {
                let made = std::fs::File::options()
                    .append(true)
                    .create(true)
                    .open(path);
                made.map_err(|source| Failure::OpenOutput {
                    what,
                    path: path.to_owned(),
                    source,
                })?;
            }
            visible.write.push(path.to_owned());
        }
        Ok(visible)
    }

    fn all(&self) -> impl Iterator<Item = &Path> {
        let files = self.read.iter().chain(&self.write).chain(&self.folders);
        files.map(PathBuf::as_path)
    }
}

/// What holds now: each part, or why not.
#[derive(Debug)]
pub(crate) struct Jailed {
    /// Own user, mounts, network and IPC.
    pub(crate) namespaces: Result<(), String>,
    /// No capability, and no way to get one.
    pub(crate) privileges: Result<(), String>,
    /// Landlock.
    pub(crate) landlock: Result<(), String>,
}

impl Jailed {
    /// Each part by its name.
    pub(crate) fn parts(&self) -> [(&'static str, &Result<(), String>); 3] {
        [
            ("namespaces", &self.namespaces),
            ("privileges", &self.privileges),
            ("landlock", &self.landlock),
        ]
    }

    /// Says what does not hold.
    pub(crate) fn log(&self) {
        for (part, outcome) in self.parts() {
            match outcome {
                Ok(()) => tracing::debug!(part, "jailed"),
                Err(why) => tracing::warn!("the jail is without {part}: {why}; see kombi doctor"),
            }
        }
    }
}

/// Gives up everything else.
///
/// # Errors
/// [`Failure::Host`] when this process stands between two roots: it must not go on.
pub(crate) fn enter(visible: &Visible) -> Result<Jailed, Failure> {
    let entered = namespaces::enter(&visible.all().collect::<Vec<_>>());
    let namespaces = match entered {
        Ok(()) => Ok(()),
        Err(namespaces::Error::Forbidden { doing, source }) => {
            Err(format!("failed to {doing}: {source}"))
        }
        Err(namespaces::Error::Lost { doing, source }) => {
            return Err(Failure::Host { doing, source });
        }
    };
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    let privileges = set_no_new_privs(true)
        .and_then(|()| set_capabilities(None, none))
        .map_err(|error| std::io::Error::from(error).to_string());
    Ok(Jailed {
        namespaces,
        privileges,
        landlock: rules::restrict(visible),
    })
}

/// For `kombi doctor`: one JSON object that says what a jail on this host has.
pub(crate) fn probe() -> Result<String, Failure> {
    let jailed = enter(&Visible::default())?;
    let parts = jailed.parts().map(|(part, outcome)| {
        let why = outcome.as_ref().err();
        (
            part.to_owned(),
            serde_json::json!({"holds": why.is_none(), "why": why}),
        )
    });
    Ok(serde_json::Value::Object(parts.into_iter().collect()).to_string())
}
