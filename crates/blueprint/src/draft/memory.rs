//! Memory that comes and goes: balloon and hot-plug.

use serde::{Deserialize, Serialize};

/// The balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonDraft {
    /// MiB that the guest is asked to give up.
    pub amount_mib: u64,
    /// The guest takes memory back when it runs out of it.
    pub deflate_on_oom: bool,
    /// Seconds between two looks at the guest's statistics; 0 for never.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// The guest can be asked once for all of its free pages.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// The guest reports free pages as they become free.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Memory that may be plugged into the running guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugDraft {
    /// MiB at most.
    pub total_size_mib: u64,
    /// MiB of the smallest piece that the guest plugs.
    #[serde(default = "block_size_mib")]
    pub block_size_mib: u64,
    /// MiB of the smallest piece that the host makes accessible.
    #[serde(default = "slot_size_mib")]
    pub slot_size_mib: u64,
}

fn block_size_mib() -> u64 {
    crate::limits::HOTPLUG_BLOCK_MIB_MIN
}

fn slot_size_mib() -> u64 {
    crate::limits::HOTPLUG_SLOT_MIB_MIN
}
