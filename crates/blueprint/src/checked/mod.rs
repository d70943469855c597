//! A machine whose every limit was checked.

mod memory;
mod network;
mod storage;

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use x86::cpu_template::CpuTemplate;
use x86::features::CpuModel;

pub use memory::{Balloon, MemoryHotplug};
pub use network::{MmdsConfig, NetworkInterface, Vsock};
pub use storage::{Drive, Pmem, Store};

use crate::draft::{
    CpuConfigDraft, Draft, Engine, HugePages, RateLimiter, StaticCpuTemplate, TokenBucket,
};
use crate::{DraftError, limits};

/// What the kernel is told when nothing was said: what Firecracker tells it.
const BOOT_ARGS_DEFAULT: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                                 i8042.dumbkbd swiotlb=noforce";

/// A machine that can be built. Comes out of [`Draft::check`] only, hence every
/// limit in [`limits`] holds for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blueprint {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    vcpus: u8,
    memory_mib: u32,
    engine: Engine,
    cpu_model: CpuModel,
    cpu_template: CpuTemplate,
    smt: bool,
    track_dirty_pages: bool,
    huge_pages: HugePages,
    drives: Vec<Drive>,
    pmem: Vec<Pmem>,
    network_interfaces: Vec<NetworkInterface>,
    mmds: Option<MmdsConfig>,
    vsock: Option<Vsock>,
    balloon: Option<Balloon>,
    memory_hotplug: Option<MemoryHotplug>,
    entropy: Option<RateLimiter>,
    serial_out: Option<PathBuf>,
    serial_limiter: Option<TokenBucket>,
}

impl Blueprint {
    /// The kernel's path on the host.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The initial RAM disk's path on the host.
    pub fn initrd(&self) -> Option<&Path> {
        self.initrd.as_deref()
    }

    /// The kernel's command line, what the root device needs included; shorter
    /// than [`limits::CMDLINE_BYTES_MAX`], no control characters.
    pub fn cmdline(&self) -> &str {
        &self.cmdline
    }

    /// Virtual CPUs, 1 to [`limits::VCPU_COUNT_MAX`].
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }

    /// Memory in MiB.
    pub fn memory_mib(&self) -> u32 {
        self.memory_mib
    }

    /// Memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// The engine that was asked for.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// The guest's CPU.
    pub fn cpu_model(&self) -> CpuModel {
        self.cpu_model
    }

    /// Changes to what the guest's CPU shows.
    pub fn cpu_template(&self) -> &CpuTemplate {
        &self.cpu_template
    }

    /// Whether two threads of each core are shown to the guest.
    pub fn smt(&self) -> bool {
        self.smt
    }

    /// Whether it is recorded which pages the guest writes.
    pub fn track_dirty_pages(&self) -> bool {
        self.track_dirty_pages
    }

    /// The pages of the host that hold the guest's memory.
    pub fn huge_pages(&self) -> HugePages {
        self.huge_pages
    }

    /// Block devices in the guest's order: the root device, if one is a drive, first.
    pub fn drives(&self) -> &[Drive] {
        &self.drives
    }

    /// Persistent memory devices in the guest's order.
    pub fn pmem(&self) -> &[Pmem] {
        &self.pmem
    }

    /// Network interfaces in the guest's order.
    pub fn network_interfaces(&self) -> &[NetworkInterface] {
        &self.network_interfaces
    }

    /// The metadata service.
    pub fn mmds(&self) -> Option<&MmdsConfig> {
        self.mmds.as_ref()
    }

    /// The socket device.
    pub fn vsock(&self) -> Option<&Vsock> {
        self.vsock.as_ref()
    }

    /// The balloon.
    pub fn balloon(&self) -> Option<&Balloon> {
        self.balloon.as_ref()
    }

    /// Memory that may be plugged in later.
    pub fn memory_hotplug(&self) -> Option<&MemoryHotplug> {
        self.memory_hotplug.as_ref()
    }

    /// The limits of the entropy device, if there is one.
    pub fn entropy(&self) -> Option<&RateLimiter> {
        self.entropy.as_ref()
    }

    /// The file for the console's output; standard output when `None`.
    pub fn serial_out(&self) -> Option<&Path> {
        self.serial_out.as_deref()
    }

    /// Console output beyond it is dropped.
    pub fn serial_limiter(&self) -> Option<&TokenBucket> {
        self.serial_limiter.as_ref()
    }
}

impl Draft {
    /// Checks every limit.
    ///
    /// # Errors
    /// [`DraftError`] names the first field that is out of bounds.
    pub fn check(self) -> Result<Blueprint, DraftError> {
        let config = self.machine_config;
        let engine = config.engine.unwrap_or_default();
        let smt = config.smt.unwrap_or_default();
        let vcpus = check_vcpus(config.vcpu_count.unwrap_or(1), smt, engine)?;
        let huge_pages = config.huge_pages.unwrap_or_default();
        let memory_mib = memory::check_size(
            config
                .mem_size_mib
                .unwrap_or(limits::MEMORY_MIB_DEFAULT.into()),
            huge_pages,
        )?;
        match config.cpu_template.unwrap_or_default() {
            StaticCpuTemplate::None => {}
            asked => return Err(DraftError::StaticCpuTemplate { asked }),
        }

        let cpu_template = match self.cpu_config {
            None => CpuTemplate::default(),
            Some(CpuConfigDraft::Template(template)) => template,
            Some(CpuConfigDraft::Path(path)) => return Err(DraftError::CpuConfigUnread { path }),
        };

        let drives = storage::check_drives(self.drives)?;
        let root = drives.first().filter(|drive| drive.is_root);
        let pmem = storage::check_pmem(self.pmem, root.map(|drive| drive.id.clone()))?;
        let (network_interfaces, mmds) =
            network::check_network(self.network_interfaces, self.mmds_config)?;
        let vsock = self.vsock.map(network::check_vsock).transpose()?;
        let balloon = self
            .balloon
            .map(|balloon| memory::check_balloon(&balloon, memory_mib))
            .transpose()?;
        let memory_hotplug = self
            .memory_hotplug
            .map(|hotplug| memory::check_hotplug(&hotplug))
            .transpose()?;
        let devices = drives.len()
            + pmem.len()
            + network_interfaces.len()
            + usize::from(vsock.is_some())
            + usize::from(balloon.is_some())
            + usize::from(memory_hotplug.is_some())
            + usize::from(self.entropy.is_some());
        if devices > limits::VIRTIO_DEVICES_MAX {
            return Err(DraftError::TooManyDevices { asked: devices });
        }

        let boot = self.boot_source;
        let mut cmdline = boot
            .boot_args
            .unwrap_or_else(|| BOOT_ARGS_DEFAULT.to_owned());
        if let Some(root) = storage::root_arguments(&drives, &pmem) {
            cmdline.push(' ');
            cmdline.push_str(&root);
        }
        check_cmdline(&cmdline)?;

        let serial = self.serial.unwrap_or_default();
        Ok(Blueprint {
            kernel: check_path("kernel_image_path", boot.kernel_image_path)?,
            initrd: boot
                .initrd_path
                .map(|path| check_path("initrd_path", path))
                .transpose()?,
            cmdline,
            vcpus,
            memory_mib,
            engine,
            cpu_model: config.cpu_model.unwrap_or_default(),
            cpu_template,
            smt,
            track_dirty_pages: config.track_dirty_pages.unwrap_or_default(),
            huge_pages,
            drives,
            pmem,
            network_interfaces,
            mmds,
            vsock,
            balloon,
            memory_hotplug,
            entropy: self
                .entropy
                .map(|entropy| entropy.rate_limiter.unwrap_or_default()),
            serial_out: serial
                .serial_out_path
                .map(|path| check_path("serial_out_path", path))
                .transpose()?,
            serial_limiter: serial.rate_limiter.filter(TokenBucket::limits),
        })
    }
}

fn check_vcpus(asked: u64, smt: bool, engine: Engine) -> Result<u8, DraftError> {
    let vcpus = u8::try_from(asked)
        .ok()
        .filter(|count| (1..=limits::VCPU_COUNT_MAX).contains(count))
        .ok_or(DraftError::VcpuCount { asked })?;
    if smt && vcpus > 1 && vcpus % 2 == 1 {
        return Err(DraftError::OddVcpuCount { asked: vcpus });
    }
    if engine == Engine::Soft && vcpus > limits::SOFT_VCPU_COUNT_MAX {
        return Err(DraftError::SoftVcpuCount { asked: vcpus });
    }
    Ok(vcpus)
}

fn check_cmdline(line: &str) -> Result<(), DraftError> {
    if line.len() >= limits::CMDLINE_BYTES_MAX {
        return Err(DraftError::CommandLineLength { len: line.len() });
    }
    match line
        .bytes()
        .enumerate()
        .find(|(_, byte)| byte.is_ascii_control())
    {
        Some((at, byte)) => Err(DraftError::CommandLineCharacter { byte, at }),
        None => Ok(()),
    }
}

fn check_path(field: &'static str, path: PathBuf) -> Result<PathBuf, DraftError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(DraftError::Path { field, path });
    }
    Ok(path)
}

/// A name: 1 to [`limits::ID_BYTES_MAX`] letters, digits and underscores.
fn check_id(field: &'static str, id: String) -> Result<String, DraftError> {
    let named = id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if !named || id.is_empty() || id.len() > limits::ID_BYTES_MAX {
        return Err(DraftError::Id { field, id });
    }
    Ok(id)
}
