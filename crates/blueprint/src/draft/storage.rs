//! Drives and persistent memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::draft::RateLimiter;

/// One block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveDraft {
    /// Name, unique among the drives.
    pub drive_id: String,
    /// The partition that is mounted as `/`, in place of the whole root device.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// The guest mounts it as `/`: it becomes the first drive and the kernel is
    /// told `root=/dev/vda`.
    pub is_root_device: bool,
    /// Whether the guest is offered a cache that it can flush.
    #[serde(default)]
    pub cache_type: CacheType,
    /// The guest cannot write to it, nor does the host open it for writing.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// A file or block device on the host.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Limits of its traffic.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// How the host reads and writes.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// A vhost-user-blk back end, in place of all of the above from `is_read_only` on,
    /// which are refused beside it.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

/// Whether a guest's flush reaches the host's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// No: the guest is offered none.
    #[default]
    Unsafe,
    /// Yes.
    Writeback,
}

/// How the host reads and writes a drive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One request after the other.
    #[default]
    Sync,
    /// Through io_uring(7), up to 128 at once.
    Async,
}

/// One persistent memory device: a file that the guest sees as memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemDraft {
    /// Name, unique among these devices.
    pub id: String,
    /// The file on the host.
    pub path_on_host: PathBuf,
    /// The guest mounts it as `/`.
    #[serde(default)]
    pub root_device: bool,
    /// The guest cannot write to it.
    #[serde(default)]
    pub read_only: bool,
    /// Limits of its flushes.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}
