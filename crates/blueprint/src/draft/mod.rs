//! A machine as somebody asked for it: Firecracker's configuration file, with
//! the few fields that Kombi adds marked as extensions.

mod limiter;
mod machine;
mod memory;
mod network;
mod observing;
mod storage;

use serde::{Deserialize, Serialize};
use x86::cpu_template::CpuTemplate;

pub use limiter::{RateLimiter, TokenBucket};
pub use machine::{BootSourceDraft, HugePages, MachineConfigDraft, StaticCpuTemplate};
pub use memory::{BalloonDraft, MemoryHotplugDraft};
pub use network::{MmdsConfigDraft, MmdsVersion, NetworkInterfaceDraft, VsockDraft};
pub use observing::{LogLevel, LoggerDraft, MetricsDraft, SerialDraft};
pub use storage::{CacheType, DriveDraft, IoEngine, PmemDraft};

use crate::DraftError;

/// Which engine runs the guest's code. The text at each is what `--help` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// KVM where the processor runs guests, the software engine elsewhere.
    #[default]
    Auto,
    /// The software engine: needs nothing of the host but x86-64.
    Soft,
    /// The host's /dev/kvm, whatever is behind it.
    Kvm,
}

impl std::fmt::Display for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Engine::Auto => "auto",
            Engine::Soft => "soft",
            Engine::Kvm => "kvm",
        })
    }
}

/// Everything asked of one machine; [`Draft::check`] turns it into a
/// [`crate::Blueprint`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Draft {
    /// The balloon.
    #[serde(default)]
    pub balloon: Option<BalloonDraft>,
    /// Block devices in the order in which the guest finds them, the root
    /// device first wherever it stands in the list.
    #[serde(default)]
    pub drives: Vec<DriveDraft>,
    /// Kernel, initial RAM disk and command line.
    pub boot_source: BootSourceDraft,
    /// Changes to what the guest's CPU shows.
    #[serde(default)]
    pub cpu_config: Option<CpuConfigDraft>,
    /// The log.
    #[serde(default)]
    pub logger: Option<LoggerDraft>,
    /// CPUs, memory and engine.
    #[serde(default)]
    pub machine_config: MachineConfigDraft,
    /// The metrics.
    #[serde(default)]
    pub metrics: Option<MetricsDraft>,
    /// The metadata service.
    #[serde(default)]
    pub mmds_config: Option<MmdsConfigDraft>,
    /// Network interfaces in the order in which the guest finds them.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterfaceDraft>,
    /// The socket device.
    #[serde(default)]
    pub vsock: Option<VsockDraft>,
    /// The entropy device.
    #[serde(default)]
    pub entropy: Option<EntropyDraft>,
    /// Persistent memory devices.
    #[serde(default)]
    pub pmem: Vec<PmemDraft>,
    /// Memory that may be plugged in later.
    #[serde(default)]
    pub memory_hotplug: Option<MemoryHotplugDraft>,
    /// Where the serial console goes; standard output when nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialDraft>,
}

/// Changes to what the guest's CPU shows: here, or in a file of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum CpuConfigDraft {
    /// In a file; whoever reads the configuration reads it as well.
    Path(std::path::PathBuf),
    /// Here.
    Template(CpuTemplate),
}

/// The entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyDraft {
    /// Limits of what the guest takes.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl Draft {
    /// Reads a configuration file's text.
    ///
    /// # Errors
    /// [`DraftError::Json`] with line and column of what is not understood;
    /// unknown fields are refused.
    pub fn from_json(text: &[u8]) -> Result<Self, DraftError> {
        crate::from_json(text).map_err(|source| DraftError::Json { source })
    }
}
