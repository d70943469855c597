//! A machine whose every limit was checked.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use x86::features::CpuModel;

use crate::draft::{Draft, DriveDraft, Engine, VsockDraft};
use crate::{DraftError, limits};

/// What the kernel is told when nothing was said: what Firecracker tells it.
const BOOT_ARGS_DEFAULT: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 swiotlb=noforce";

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
    drives: Vec<Drive>,
    vsock: Option<Vsock>,
    entropy: bool,
    serial_out: Option<PathBuf>,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// Its name.
    pub id: String,
    /// A file or block device on the host.
    pub path: PathBuf,
    /// Neither guest nor host writes to it.
    pub read_only: bool,
}

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vsock {
    /// The guest's context id.
    pub guest_cid: u32,
    /// The Unix socket on the host.
    pub uds_path: PathBuf,
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

    /// Block devices in the guest's order.
    pub fn drives(&self) -> &[Drive] {
        &self.drives
    }

    /// The socket device.
    pub fn vsock(&self) -> Option<&Vsock> {
        self.vsock.as_ref()
    }

    /// Whether there is an entropy device.
    pub fn entropy(&self) -> bool {
        self.entropy
    }

    /// The file for the console's output; standard output when `None`.
    pub fn serial_out(&self) -> Option<&Path> {
        self.serial_out.as_deref()
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
        let vcpus = check_vcpus(config.vcpu_count.unwrap_or(1), engine)?;
        let memory_mib = check_memory(
            config
                .mem_size_mib
                .unwrap_or(limits::MEMORY_MIB_DEFAULT.into()),
        )?;
        if config.smt == Some(true) {
            return Err(DraftError::Smt);
        }

        let (drives, root) = check_drives(self.drives)?;
        let vsock = self.vsock.map(check_vsock).transpose()?;
        let entropy = self.entropy.is_some();
        let devices = drives.len() + usize::from(vsock.is_some()) + usize::from(entropy);
        if devices > limits::VIRTIO_DEVICES_MAX {
            return Err(DraftError::TooManyDevices { asked: devices });
        }

        let boot = self.boot_source;
        let mut cmdline = boot
            .boot_args
            .unwrap_or_else(|| BOOT_ARGS_DEFAULT.to_owned());
        if let Some(root) = root {
            cmdline.push_str(if root.read_only {
                " root=/dev/vda ro"
            } else {
                " root=/dev/vda rw"
            });
        }
        check_cmdline(&cmdline)?;

        let serial_out = self.serial.and_then(|serial| serial.serial_out_path);
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
            drives,
            vsock,
            entropy,
            serial_out: serial_out
                .map(|path| check_path("serial_out_path", path))
                .transpose()?,
        })
    }
}

fn check_vcpus(asked: u64, engine: Engine) -> Result<u8, DraftError> {
    let vcpus = u8::try_from(asked)
        .ok()
        .filter(|count| (1..=limits::VCPU_COUNT_MAX).contains(count))
        .ok_or(DraftError::VcpuCount { asked })?;
    if engine == Engine::Soft && vcpus > limits::SOFT_VCPU_COUNT_MAX {
        return Err(DraftError::SoftVcpuCount { asked: vcpus });
    }
    Ok(vcpus)
}

fn check_memory(asked: u64) -> Result<u32, DraftError> {
    u32::try_from(asked)
        .ok()
        .filter(|mib| (limits::MEMORY_MIB_MIN..=limits::MEMORY_MIB_MAX).contains(mib))
        .ok_or(DraftError::MemorySize { asked })
}

/// Drives with the root device first, as Firecracker orders them.
fn check_drives(asked: Vec<DriveDraft>) -> Result<(Vec<Drive>, Option<Drive>), DraftError> {
    let mut ids = HashSet::new();
    let mut drives = Vec::new();
    let mut root: Option<Drive> = None;
    for draft in asked {
        let id = draft.drive_id;
        let named = id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !named || id.is_empty() || id.len() > limits::ID_BYTES_MAX {
            return Err(DraftError::Id { id });
        }
        if !ids.insert(id.clone()) {
            return Err(DraftError::IdTwice { id });
        }
        let path = check_path("path_on_host", draft.path_on_host)?;
        let drive = Drive {
            id,
            path,
            read_only: draft.is_read_only,
        };
        if !draft.is_root_device {
            drives.push(drive);
        } else if let Some(first) = root {
            return Err(DraftError::TwoRoots {
                first: first.id,
                second: drive.id,
            });
        } else {
            drives.insert(0, drive.clone());
            root = Some(drive);
        }
    }
    Ok((drives, root))
}

fn check_vsock(asked: VsockDraft) -> Result<Vsock, DraftError> {
    // u32::MAX is VMADDR_CID_ANY.
    let guest_cid = u32::try_from(asked.guest_cid)
        .ok()
        .filter(|cid| (limits::GUEST_CID_MIN..u32::MAX).contains(cid))
        .ok_or(DraftError::GuestCid {
            asked: asked.guest_cid,
        })?;
    let uds_path = check_path("uds_path", asked.uds_path)?;
    if uds_path.as_os_str().len() > limits::SOCKET_PATH_BYTES_MAX {
        return Err(DraftError::SocketPathLength { path: uds_path });
    }
    Ok(Vsock {
        guest_cid,
        uds_path,
    })
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
