//! What boots, and on how much of a machine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use x86::features::CpuModel;

use crate::draft::Engine;

/// What boots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSourceDraft {
    /// An uncompressed ELF kernel or a bzImage, on the host.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk on the host.
    #[serde(default)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
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
    /// Two threads of each core are shown to the guest; not when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// A named set of CPU features; deprecated, only `None` is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<StaticCpuTemplate>,
    /// Which pages the guest writes is recorded, for differential snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// The pages of the host that hold the guest's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
    /// Extension: which engine runs the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<Engine>,
    /// Extension: the guest's CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<CpuModel>,
}

impl MachineConfigDraft {
    /// Takes over what `update` says, and leaves the rest as it is.
    pub fn merge(&mut self, update: Self) {
        fn take<T>(to: &mut Option<T>, from: Option<T>) {
            if from.is_some() {
                *to = from;
            }
        }
        take(&mut self.vcpu_count, update.vcpu_count);
        take(&mut self.mem_size_mib, update.mem_size_mib);
        take(&mut self.smt, update.smt);
        take(&mut self.cpu_template, update.cpu_template);
        take(&mut self.track_dirty_pages, update.track_dirty_pages);
        take(&mut self.huge_pages, update.huge_pages);
        take(&mut self.engine, update.engine);
        take(&mut self.cpu_model, update.cpu_model);
    }
}

/// The pages of the host that hold a guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// What the host does by itself.
    #[default]
    None,
    /// Large ones where the host finds some (madvise(2), `MADV_HUGEPAGE`).
    Transparent,
    /// Reserved ones of 2 MiB (hugetlbfs).
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// Firecracker's named CPU templates, which it deprecated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "names of EC2 instance types")]
pub enum StaticCpuTemplate {
    #[default]
    None,
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
}
