//! Bodies of requests that change a running machine; those that describe one before it
//! starts are `blueprint`'s.

use std::path::PathBuf;

use blueprint::RateLimiter;
use serde::{Deserialize, Serialize};

/// `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    /// What the machine shall be.
    pub state: VmState,
}

/// What a machine shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// No vCPU runs.
    Paused,
    /// They run.
    Resumed,
}

/// `PATCH /drives/{drive_id}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// The drive.
    pub drive_id: String,
    /// A new file behind it, or the same one of another size.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// New limits; those that are left out stay.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    /// The interface.
    pub iface_id: String,
    /// New limits of what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// New limits of what the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// `PATCH /pmem/{id}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    /// The device.
    pub id: String,
    /// New limits of its flushes.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /balloon`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// MiB that the guest is asked to give up.
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsPatch {
    /// Seconds between two looks.
    pub stats_polling_interval_s: u16,
}

/// `PATCH /balloon/hinting/start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    /// The run ends by itself when the guest has named its last page.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

fn yes() -> bool {
    true
}

impl Default for HintingStart {
    fn default() -> Self {
        Self {
            acknowledge_on_stop: true,
        }
    }
}

/// `PATCH /hotplug/memory`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HotplugPatch {
    /// MiB that the guest is asked to have plugged in.
    pub requested_size_mib: u32,
}

/// `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// All of the memory, or what was written since the last one.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Where the state goes.
    pub snapshot_path: PathBuf,
    /// Where the memory goes.
    pub mem_file_path: PathBuf,
}

/// Which memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All.
    #[default]
    Full,
    /// What was written since the last one.
    Diff,
}

/// `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// Where the state is.
    pub snapshot_path: PathBuf,
    /// Deprecated: where the memory is.
    #[serde(default)]
    pub mem_file_path: Option<PathBuf>,
    /// Where the memory is.
    #[serde(default)]
    pub mem_backend: Option<MemoryBackend>,
    /// Deprecated: as `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Which pages the guest writes is recorded.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// The machine runs at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other TAP devices than those of the snapshot.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another Unix socket than that of the snapshot.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
    /// The guest's clock goes on from the host's.
    #[serde(default)]
    pub clock_realtime: bool,
    /// The pages of the host that hold the guest's memory.
    #[serde(default)]
    pub huge_pages: SnapshotHugePages,
}

impl SnapshotLoad {
    /// Where the memory is, by whichever field says so. `None` if both or neither do,
    /// which no request that was understood does.
    pub fn memory(&self) -> Option<MemoryBackend> {
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(backend), None) => Some(backend.clone()),
            (None, Some(path)) => Some(MemoryBackend {
                backend_type: MemoryBackendType::File,
                backend_path: path.clone(),
            }),
            (Some(_), Some(_)) | (None, None) => None,
        }
    }
}

/// Where a snapshot's memory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// What answers.
    pub backend_type: MemoryBackendType,
    /// Its path.
    pub backend_path: PathBuf,
}

/// What answers a restored machine's page faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBackendType {
    /// A file.
    File,
    /// A process behind a Unix socket (userfaultfd(2)).
    Uffd,
}

/// Another TAP device than that of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// Its TAP device.
    pub host_dev_name: String,
}

/// Another Unix socket than that of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockOverride {
    /// Its path.
    pub uds_path: PathBuf,
}

/// The pages of the host that hold a restored guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotHugePages {
    /// As when the snapshot was made.
    #[default]
    Snapshot,
    /// What the host does by itself.
    None,
    /// Large ones where the host finds some.
    Transparent,
    /// Reserved ones of 2 MiB.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}
