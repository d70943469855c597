//! A machine becomes two files, and two files a machine again: what clients say of it.
//!
//! Invariant: a request that is refused before its files are looked at changed nothing; one
//! that fails while the machine is put together ends the process, as in Firecracker.

use std::fs::File;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use api::{
    Answer, MemoryBackendType, Refusal, SnapshotCreate, SnapshotHugePages, SnapshotLoad,
    SnapshotType,
};
use blueprint::{Blueprint, Draft};
use machine::{Controller, SavedMachine};
use ram::GuestRam;
use serde::{Deserialize, Serialize};
use snapshot::NewFile;

use crate::failure::chain;
use crate::frontend::{lock, refuse};

/// What is in the state file.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// The configuration, as JSON: what it says may be absent has no place in the format.
    draft: String,
    machine: SavedMachine,
}

/// A machine that was read and is not there yet.
pub(crate) struct Loaded {
    /// Its configuration.
    pub(crate) draft: Draft,
    /// The same, checked.
    pub(crate) blueprint: Blueprint,
    /// What it was.
    pub(crate) machine: SavedMachine,
    /// Its memory.
    pub(crate) image: File,
    /// It is to run at once.
    pub(crate) resume: bool,
}

/// Writes the machine, which is paused, into the files that `asked` names. `changing` is
/// locked until what devices and `draft` are is known, and not while memory is written.
pub(super) fn create(
    controller: &Controller,
    asked: &SnapshotCreate,
    changing: &Mutex<()>,
    draft: &Mutex<Draft>,
) -> Result<Answer, Refusal> {
    match asked.snapshot_type {
        SnapshotType::Full => {}
        SnapshotType::Diff => {
            return Err(refuse(
                "snapshot_type Diff is not there yet: leave it out for a full snapshot",
            ));
        }
    }
    if !controller.is_paused() {
        return Err(refuse("the machine runs: pause it with PATCH /vm first"));
    }
    if asked.snapshot_path == asked.mem_file_path {
        return Err(refuse(
            "snapshot_path and mem_file_path are the same: state and memory are two files",
        ));
    }
    let said = |error: snapshot::Error| chain(&error);
    let state = NewFile::create(&asked.snapshot_path).map_err(said);
    let memory = NewFile::create(&asked.mem_file_path).map_err(said);
    let (state, memory) = (
        state.map_err(|e| refuse(&e))?,
        memory.map_err(|e| refuse(&e))?,
    );
    let changing = lock(changing);
    let written = controller.snapshot(|machine, ram| {
        let draft = lock(draft).clone();
        drop(changing);
        let draft = serde_json::to_string(&Draft {
            logger: None,
            metrics: None,
            ..draft
        });
        let draft = draft.map_err(|error| chain(&error))?;
        snapshot::write(&state, &State { draft, machine }).map_err(said)?;
        write_memory(ram, &memory)
    });
    written
        .map_err(|error| chain(&error))
        .flatten()
        // The state last: where it is, the memory is.
        .and_then(|()| memory.finish().map_err(said))
        .and_then(|()| state.finish().map_err(said))
        .map(|()| Answer::Done)
        .map_err(|line| refuse(&line))
}

fn write_memory(ram: &GuestRam, file: &NewFile) -> Result<(), String> {
    let written = ram
        .write_image(file.file())
        .map_err(|error| format!("failed to write {:?}: {}", file.path(), chain(&error)))?;
    tracing::info!(bytes = written, of = ram.image_bytes(), "memory written");
    Ok(())
}

/// Refuses what is asked for and not there; nothing was tried then.
pub(super) fn check(asked: &SnapshotLoad) -> Result<(), Refusal> {
    let missing = match (asked.memory(), asked.huge_pages) {
        (Some(memory), _) if memory.backend_type == MemoryBackendType::Uffd => {
            "backend_type Uffd is not there yet: use File"
        }
        (None, _) => "name the memory with mem_backend",
        (_, SnapshotHugePages::Transparent | SnapshotHugePages::Hugetlbfs2M) => {
            "huge_pages of a snapshot are not there yet: leave them out"
        }
        (Some(_), SnapshotHugePages::Snapshot | SnapshotHugePages::None) => return Ok(()),
    };
    Err(refuse(missing))
}

/// Reads what `asked` names.
pub(super) fn read(asked: &SnapshotLoad) -> Result<Loaded, String> {
    let state: State = snapshot::read(&asked.snapshot_path).map_err(|error| chain(&error))?;
    let path = asked
        .memory()
        .unwrap_or_else(|| unnamed(asked))
        .backend_path;
    let failed = |error| format!("failed to open memory file {path:?}: {error}");
    // Opening a FIFO would wait.
    if !std::fs::metadata(&path).map_err(failed)?.is_file() {
        return Err(format!("memory file {path:?} is not a file"));
    }
    let image = File::open(&path).map_err(failed)?;
    let mut draft = Draft::from_json(state.draft.as_bytes()).map_err(|error| chain(&error))?;
    override_outside(&mut draft, asked)?;
    let blueprint = draft.clone().check().map_err(|error| chain(&error))?;
    let mut machine = state.machine;
    if asked.clock_realtime {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
        let shared = &mut machine.shared;
        let away = now.saturating_sub(shared.time_of_day);
        shared.clock = shared.clock.saturating_add(away);
    }
    if asked.track_dirty_pages || asked.enable_diff_snapshots {
        tracing::warn!("track_dirty_pages is not there yet: the machine runs without it");
    }
    Ok(Loaded {
        draft,
        blueprint,
        machine,
        image,
        resume: asked.resume_vm,
    })
}

/// No request that was understood comes here.
fn unnamed(asked: &SnapshotLoad) -> api::MemoryBackend {
    api::MemoryBackend {
        backend_type: MemoryBackendType::File,
        backend_path: asked.snapshot_path.clone(),
    }
}

/// Puts what is to be used of the host in place of what was.
fn override_outside(draft: &mut Draft, asked: &SnapshotLoad) -> Result<(), String> {
    for other in &asked.network_overrides {
        let mut interfaces = draft.network_interfaces.iter_mut();
        match interfaces.find(|one| one.iface_id == other.iface_id) {
            Some(interface) => interface.host_dev_name = other.host_dev_name.clone(),
            None => {
                return Err(format!(
                    "network_overrides: the snapshot has no interface {:?}",
                    other.iface_id
                ));
            }
        }
    }
    match (&mut draft.vsock, &asked.vsock_override) {
        (Some(vsock), Some(other)) => vsock.uds_path = other.uds_path.clone(),
        (None, Some(_)) => return Err("vsock_override: the snapshot has no vsock".to_owned()),
        (_, None) => {}
    }
    Ok(())
}
