//! Drives and persistent memory that were checked.

use std::collections::HashSet;
use std::path::PathBuf;

use crate::DraftError;
use crate::checked::{check_id, check_path};
use crate::draft::{CacheType, DriveDraft, IoEngine, PmemDraft, RateLimiter};
use crate::limits;

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// Its name.
    pub id: String,
    /// Where its data are.
    pub store: Store,
    /// The guest mounts it, or a partition of it, as `/`.
    pub is_root: bool,
    /// The partition that the guest mounts as `/`.
    pub partuuid: Option<String>,
    /// Whether the guest is offered a cache that it can flush.
    pub cache: CacheType,
}

/// Where a drive's data are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Store {
    /// In a file or block device on the host.
    File {
        /// Its path.
        path: PathBuf,
        /// Neither guest nor host writes to it.
        read_only: bool,
        /// How the host reads and writes.
        io_engine: IoEngine,
        /// Limits of its traffic.
        limiter: RateLimiter,
    },
    /// With another process, which serves it by the vhost-user protocol.
    BackEnd {
        /// Its socket.
        socket: PathBuf,
    },
}

/// One persistent memory device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pmem {
    /// Its name.
    pub id: String,
    /// The file on the host.
    pub path: PathBuf,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// The guest mounts it as `/`.
    pub is_root: bool,
    /// Limits of its flushes.
    pub limiter: RateLimiter,
}

/// Drives with the root device first, as Firecracker orders them.
pub(super) fn check_drives(asked: Vec<DriveDraft>) -> Result<Vec<Drive>, DraftError> {
    let mut ids = HashSet::new();
    let mut drives: Vec<Drive> = Vec::new();
    for draft in asked {
        let drive = check_drive(draft)?;
        if !ids.insert(drive.id.clone()) {
            return Err(DraftError::IdTwice {
                field: "drive_id",
                id: drive.id,
            });
        }
        match drives.first().filter(|first| first.is_root) {
            Some(first) if drive.is_root => {
                return Err(DraftError::TwoRoots {
                    first: first.id.clone(),
                    second: drive.id,
                });
            }
            None if drive.is_root => drives.insert(0, drive),
            Some(_) | None => drives.push(drive),
        }
    }
    Ok(drives)
}

fn check_drive(asked: DriveDraft) -> Result<Drive, DraftError> {
    let id = check_id("drive_id", asked.drive_id)?;
    if let Some(partuuid) = &asked.partuuid {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if partuuid.is_empty() || !partuuid.bytes().all(plain) {
            return Err(DraftError::Partuuid {
                id,
                asked: partuuid.clone(),
            });
        }
    }
    Ok(Drive {
        store: match asked.socket {
            None => {
                let path = asked.path_on_host;
                let path = path.ok_or_else(|| DraftError::DrivePath { id: id.clone() })?;
                Store::File {
                    path: check_path("path_on_host", path)?,
                    read_only: asked.is_read_only.unwrap_or_default(),
                    io_engine: asked.io_engine.unwrap_or_default(),
                    limiter: asked.rate_limiter.unwrap_or_default(),
                }
            }
            Some(socket) => {
                // What the back end has to say, and what is said of files only.
                let others = [
                    ("path_on_host", asked.path_on_host.is_some()),
                    ("is_read_only", asked.is_read_only.is_some()),
                    ("rate_limiter", asked.rate_limiter.is_some()),
                    ("io_engine", asked.io_engine.is_some()),
                ];
                if let Some((field, _)) = others.into_iter().find(|(_, given)| *given) {
                    return Err(DraftError::BesideSocket { id, field });
                }
                let socket = check_path("socket", socket)?;
                if socket.as_os_str().len() > limits::SOCKET_PATH_BYTES_MAX {
                    return Err(DraftError::BackEndPathLength { id, path: socket });
                }
                Store::BackEnd { socket }
            }
        },
        id,
        is_root: asked.is_root_device,
        partuuid: asked.partuuid,
        cache: asked.cache_type,
    })
}

/// `root` is the drive that is the root device already.
pub(super) fn check_pmem(
    asked: Vec<PmemDraft>,
    mut root: Option<String>,
) -> Result<Vec<Pmem>, DraftError> {
    let mut ids = HashSet::new();
    let mut devices = Vec::new();
    for draft in asked {
        let id = check_id("id", draft.id)?;
        if !ids.insert(id.clone()) {
            return Err(DraftError::IdTwice { field: "id", id });
        }
        if draft.root_device {
            if let Some(first) = root {
                return Err(DraftError::TwoRoots { first, second: id });
            }
            root = Some(id.clone());
        }
        devices.push(Pmem {
            path: check_path("path_on_host", draft.path_on_host)?,
            id,
            read_only: draft.read_only,
            is_root: draft.root_device,
            limiter: draft.rate_limiter.unwrap_or_default(),
        });
    }
    Ok(devices)
}

/// What the kernel is told about its root device.
pub(super) fn root_arguments(drives: &[Drive], pmem: &[Pmem]) -> Option<String> {
    let mode = |read_only| if read_only { "ro" } else { "rw" };
    if let Some(drive) = drives.first().filter(|drive| drive.is_root) {
        // Linux mounts what turns out to be read-only so.
        let mode = mode(matches!(
            drive.store,
            Store::File {
                read_only: true,
                ..
            }
        ));
        return Some(match &drive.partuuid {
            Some(uuid) => format!("root=PARTUUID={uuid} {mode}"),
            None => format!("root=/dev/vda {mode}"),
        });
    }
    let (index, device) = pmem.iter().enumerate().find(|(_, device)| device.is_root)?;
    Some(format!("root=/dev/pmem{index} {}", mode(device.read_only)))
}
