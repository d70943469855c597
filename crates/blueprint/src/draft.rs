//! A machine as somebody asked for it: Firecracker's configuration file, with
//! the few fields that Kombi adds marked as extensions.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use x86::features::CpuModel;

use crate::DraftError;

/// Which engine runs the guest's code. The text at each is what `--help` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The best one that this host offers.
    #[default]
    Auto,
    /// The software engine: needs nothing of the host but x86-64.
    Soft,
    /// The host's /dev/kvm.
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
    /// Kernel, initial RAM disk and command line.
    pub boot_source: BootSourceDraft,
    /// CPUs, memory and engine.
    #[serde(default)]
    pub machine_config: MachineConfigDraft,
    /// Block devices in the order in which the guest finds them, the root
    /// device first wherever it stands in the list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<DriveDraft>,
    /// The socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockDraft>,
    /// The entropy device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<EntropyDraft>,
    /// Where the serial console goes; standard output when nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialDraft>,
}

/// What boots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSourceDraft {
    /// An uncompressed ELF kernel or a bzImage, on the host.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// CPUs, memory and engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigDraft {
    /// Virtual CPUs; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u64>,
    /// Memory in MiB; [`crate::limits::MEMORY_MIB_DEFAULT`] when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    /// Threads of one core shown to the guest; only `false` is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// Extension: which engine runs the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<Engine>,
    /// Extension: the guest's CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<CpuModel>,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveDraft {
    /// Name, unique among the drives.
    pub drive_id: String,
    /// A file or block device on the host.
    pub path_on_host: PathBuf,
    /// The guest mounts it as `/`: it becomes the first drive and the kernel is
    /// told `root=/dev/vda`.
    #[serde(default)]
    pub is_root_device: bool,
    /// The guest cannot write to it, nor does the host open it for writing.
    #[serde(default)]
    pub is_read_only: bool,
}

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockDraft {
    /// The guest's context id.
    pub guest_cid: u64,
    /// The Unix socket on the host through which the guest is reached.
    pub uds_path: PathBuf,
}

/// The entropy device; it has nothing to configure yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyDraft {}

/// The serial console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialDraft {
    /// A file that takes the console's output in place of standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
}

impl Draft {
    /// Reads a configuration file's text.
    ///
    /// # Errors
    /// [`DraftError::Json`] with line and column of what is not understood;
    /// unknown fields are refused.
    pub fn from_json(text: &[u8]) -> Result<Self, DraftError> {
        serde_json::from_slice(text).map_err(|source| DraftError::Json { source })
    }
}
