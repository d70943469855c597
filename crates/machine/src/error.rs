//! Why a machine could not be built or did not run on.

use std::path::PathBuf;
use std::sync::Arc;

/// Why a machine could not be built or did not run on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host has no room for the guest's memory.
    #[error("failed to make the guest's memory")]
    Memory {
        /// What went wrong.
        source: ram::Error,
    },
    /// The kernel's file cannot be opened or read.
    #[error("failed to open kernel {path:?}")]
    OpenKernel {
        /// Path on the host.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The kernel's file has no bytes.
    #[error("kernel {path:?} is empty")]
    KernelEmpty {
        /// Path on the host.
        path: PathBuf,
    },
    /// Neither of the formats that boot.
    #[error("kernel {path:?} is neither an ELF file nor a bzImage")]
    KernelFormat {
        /// Path on the host.
        path: PathBuf,
    },
    /// A header that no kernel for this machine has.
    #[error("kernel {path:?} cannot be booted: {fault}")]
    KernelHeader {
        /// Path on the host.
        path: PathBuf,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// Headers that speak of bytes beyond the file's end.
    #[error("kernel {path:?} is truncated: its headers want more than its {len} bytes")]
    KernelTruncated {
        /// Path on the host.
        path: PathBuf,
        /// Length of the file in bytes.
        len: u64,
    },
    /// A kernel that does not fit into memory.
    #[error("kernel {path:?} needs memory up to {end:#x}, the guest's ends at {memory:#x}")]
    KernelTooLarge {
        /// Path on the host.
        path: PathBuf,
        /// First guest-physical address that it does not need.
        end: u64,
        /// End of the guest's low memory.
        memory: u64,
    },
    /// The loader refused what passed the checks.
    #[error("failed to load kernel {path:?}")]
    LoadKernel {
        /// Path on the host.
        path: PathBuf,
        /// The loader's reason.
        source: linux_loader::loader::Error,
    },
    /// The initial RAM disk's file cannot be opened.
    #[error("failed to open initial RAM disk {path:?}")]
    OpenInitrd {
        /// Path on the host.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The initial RAM disk's file has no bytes.
    #[error("initial RAM disk {path:?} is empty")]
    InitrdEmpty {
        /// Path on the host.
        path: PathBuf,
    },
    /// An initial RAM disk that does not fit above the kernel.
    #[error(
        "initial RAM disk {path:?} has {len} bytes, memory has room for {room} beside the kernel"
    )]
    InitrdTooLarge {
        /// Path on the host.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Bytes that are free for it.
        room: u64,
    },
    /// The initial RAM disk could not be read.
    #[error("failed to load initial RAM disk {path:?}")]
    LoadInitrd {
        /// Path on the host.
        path: PathBuf,
        /// What went wrong.
        source: vm_memory::GuestMemoryError,
    },
    /// A command line that names its devices and got too long by it.
    #[error("the kernel command line has {len} bytes with its devices, too many for the kernel")]
    CommandLineLength {
        /// Bytes.
        len: usize,
    },
    /// Zero page, tables or command line did not fit into memory.
    #[error("failed to write boot data into the guest's memory")]
    WriteBootData {
        /// What went wrong.
        source: vm_memory::GuestMemoryError,
    },
    /// The host gives no random numbers.
    #[error("failed to draw the guest's random seed")]
    RandomSeed {
        /// The host's answer.
        source: std::io::Error,
    },
    /// A block device could not be made.
    #[error("failed to make drive {id:?}")]
    Drive {
        /// Its id.
        id: String,
        /// What went wrong.
        source: virtio::Error,
    },
    /// A change of a drive that is not there.
    #[error("there is no drive {id:?}")]
    NoDrive {
        /// The id asked for.
        id: String,
    },
    /// A change of what only a drive with a file has.
    #[error(
        "drive {id:?} is served by another process, which decides about {field}: name drive_id only, and it is asked anew"
    )]
    NoFile {
        /// The drive.
        id: String,
        /// The field that it does not have.
        field: &'static str,
    },
    /// A change of a drive that changes nothing.
    #[error("drive {id:?} is a file: give path_on_host, rate_limiter or both")]
    NoBackEnd {
        /// The drive.
        id: String,
    },
    /// A snapshot of drives that another process serves.
    #[error("devices without snapshot support are present: vhost-user drives {ids}")]
    BackEndsInSnapshot {
        /// Their names.
        ids: String,
    },
    /// A drive whose file could not be changed.
    #[error("failed to change drive {id:?}")]
    ChangeDrive {
        /// Its id.
        id: String,
        /// What went wrong.
        source: virtio::Error,
    },
    /// The TAP device of an interface cannot be used.
    #[error("interface {id:?}")]
    Tap {
        /// The interface.
        id: String,
        /// What is the matter with it.
        source: tap::Error,
    },
    /// An interface could not be made.
    #[error("failed to make interface {id:?}")]
    Interface {
        /// The interface.
        id: String,
        /// What went wrong.
        source: virtio::Error,
    },
    /// A change of an interface that is not there.
    #[error("there is no interface {id:?}")]
    NoInterface {
        /// The id asked for.
        id: String,
    },
    /// The socket device could not be made.
    #[error("failed to make the vsock device")]
    Vsock {
        /// What went wrong.
        source: virtio::Error,
    },
    /// The file for persistent memory cannot be opened or mapped.
    #[error("failed to open the file of pmem {id:?}")]
    Pmem {
        /// Its id.
        id: String,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A rate limiter could not be made.
    #[error("failed to make a rate limiter")]
    Limiter {
        /// What went wrong.
        source: virtio::Error,
    },
    /// No descriptor for a device's kicks.
    #[error("failed to make a doorbell")]
    Doorbell {
        /// What went wrong.
        source: virtio::Error,
    },
    /// The balloon could not be made.
    #[error("failed to make the balloon")]
    Balloon {
        /// What went wrong.
        source: virtio::Error,
    },
    /// The file for the serial console cannot be opened.
    #[error("failed to open {path:?} for the serial console")]
    SerialOut {
        /// Path on the host.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// Generation identifier or VM clock could not be written.
    #[error("failed to tell the guest of its generation")]
    Generation {
        /// What went wrong.
        source: chipset::Error,
    },
    /// Two devices in one place: a mistake of ours.
    #[error("failed to place a device")]
    Place {
        /// Where.
        source: bus::BusError,
    },
    /// The engine refused or failed.
    #[error("the engine failed")]
    Engine {
        /// What it says.
        source: hv::Error,
    },
    /// The host lacks threads, descriptors or the like.
    #[error("failed to {doing}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A snapshot of a machine that runs.
    #[error("the machine runs: pause it first")]
    NotPaused,
    /// Two snapshots at once.
    #[error("a snapshot is being written: ask again when it is done")]
    Saving,
    /// The machine has ended.
    #[error("the machine has ended")]
    Gone,
    /// A device that cannot be saved now.
    #[error("failed to save device {index}; it can be once the guest has reset it")]
    SaveDevice {
        /// Its place, from 0.
        index: usize,
        /// What went wrong.
        source: virtio::Error,
    },
    /// A vCPU that cannot be saved.
    #[error("failed to save a vCPU")]
    VcpuState {
        /// What the engine says.
        source: Arc<hv::Error>,
    },
    /// A snapshot that is not one of a machine with this configuration.
    #[error("the snapshot's state does not fit its configuration: {what}")]
    Mismatch {
        /// What differs.
        what: &'static str,
    },
    /// A virtio device of a snapshot that cannot be restored.
    #[error("failed to restore device {index}")]
    RestoreDevice {
        /// Its place, from 0.
        index: usize,
        /// What went wrong.
        source: virtio::Error,
    },
    /// Another device of a snapshot that cannot be restored.
    #[error("failed to restore a device")]
    RestoreChipset {
        /// What went wrong.
        source: chipset::Error,
    },
    /// The state of a vCPU, or what they share, of a snapshot.
    #[error("failed to restore the processors")]
    RestoreVcpu {
        /// What the engine says.
        source: hv::Error,
    },
    /// A vCPU's thread panicked: a mistake of ours.
    #[error("the thread of vCPU {index} panicked")]
    VcpuPanicked {
        /// Which one.
        index: u8,
    },
}

impl Error {
    /// What whoever asked for the machine could do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::Memory {
                source: ram::Error::Image { .. },
            } => Some("name the memory file that was made with this snapshot"),
            // It names the way out itself.
            Error::Memory {
                source: ram::Error::HugePages { .. },
            } => None,
            Error::Memory { .. } => Some("ask for less memory"),
            Error::OpenKernel { .. } => Some("give the path of a readable vmlinux or bzImage"),
            Error::KernelEmpty { .. } | Error::KernelTruncated { .. } => {
                Some("build or copy the kernel again")
            }
            Error::KernelFormat { .. } | Error::KernelHeader { .. } => {
                Some("give an uncompressed ELF vmlinux or a bzImage for x86-64")
            }
            Error::KernelTooLarge { .. } => Some("give the machine more memory"),
            Error::OpenInitrd { .. } => Some("give the path of a readable initial RAM disk"),
            Error::InitrdEmpty { .. } => Some("build it again, or boot without one"),
            Error::InitrdTooLarge { .. } => {
                Some("give the machine more memory or a smaller initial RAM disk")
            }
            Error::CommandLineLength { .. } => Some("shorten it, or boot without acpi=off"),
            Error::Drive { source, .. } | Error::ChangeDrive { source, .. }
                if matches!(source, virtio::Error::NoRing { .. }) =>
            {
                Some(
                    "use io_engine Sync, or allow io_uring here: Linux 5.10 or newer, sysctl \
                     kernel.io_uring_disabled, filters of system calls",
                )
            }
            Error::Drive { source, .. } | Error::ChangeDrive { source, .. }
                if matches!(
                    source,
                    virtio::Error::ConnectBackEnd { .. }
                        | virtio::Error::BackEnd { .. }
                        | virtio::Error::BackEndSilent { .. }
                        | virtio::Error::BackEndLacks { .. }
                ) =>
            {
                Some("start a vhost-user-blk back end there that serves nobody else, and ask again")
            }
            Error::ChangeDrive {
                source: virtio::Error::FilesInUse { .. },
                ..
            } => None,
            Error::Drive { .. } | Error::ChangeDrive { .. } => {
                Some("give the path of a readable file or block device")
            }
            Error::Pmem { .. } => {
                Some("give the path of a readable file, writable unless read-only")
            }
            Error::Vsock { .. } => Some("give a path that no other machine uses"),
            Error::SerialOut { .. } => Some("give the path of a writable file"),
            Error::RestoreVcpu { .. } => {
                Some("load it with the engine and on a host like those it was made with")
            }
            // They name the way out themselves.
            Error::NotPaused
            | Error::Saving
            | Error::Gone
            | Error::SaveDevice { .. }
            | Error::VcpuState { .. }
            | Error::Mismatch { .. }
            | Error::RestoreDevice { .. }
            | Error::RestoreChipset { .. }
            | Error::Tap { .. }
            | Error::Interface { .. }
            | Error::NoInterface { .. }
            | Error::NoDrive { .. }
            | Error::NoFile { .. }
            | Error::NoBackEnd { .. }
            | Error::BackEndsInSnapshot { .. }
            | Error::LoadKernel { .. }
            | Error::LoadInitrd { .. }
            | Error::WriteBootData { .. }
            | Error::RandomSeed { .. }
            | Error::Balloon { .. }
            | Error::Limiter { .. }
            | Error::Doorbell { .. }
            | Error::Generation { .. }
            | Error::Place { .. }
            | Error::Engine { .. }
            | Error::Host { .. }
            | Error::VcpuPanicked { .. } => None,
        }
    }

    /// Whether the blueprint asked for what cannot be had: a file that it names,
    /// or sizes that do not go together.
    pub fn is_asked_for(&self) -> bool {
        match self {
            Error::Memory {
                source: ram::Error::Image { .. } | ram::Error::HugePages { .. },
            }
            | Error::NotPaused
            | Error::Saving
            | Error::Mismatch { .. }
            | Error::RestoreDevice { .. }
            | Error::RestoreChipset { .. }
            | Error::RestoreVcpu { .. }
            | Error::Tap { .. }
            | Error::NoInterface { .. }
            | Error::OpenKernel { .. }
            | Error::KernelEmpty { .. }
            | Error::KernelFormat { .. }
            | Error::KernelHeader { .. }
            | Error::KernelTruncated { .. }
            | Error::KernelTooLarge { .. }
            | Error::LoadKernel { .. }
            | Error::OpenInitrd { .. }
            | Error::InitrdEmpty { .. }
            | Error::InitrdTooLarge { .. }
            | Error::LoadInitrd { .. }
            | Error::CommandLineLength { .. }
            | Error::Drive { .. }
            | Error::NoDrive { .. }
            | Error::NoFile { .. }
            | Error::NoBackEnd { .. }
            | Error::BackEndsInSnapshot { .. }
            | Error::ChangeDrive { .. }
            | Error::Vsock { .. }
            | Error::Pmem { .. }
            | Error::SerialOut { .. } => true,
            Error::Gone
            | Error::SaveDevice { .. }
            | Error::VcpuState { .. }
            | Error::Memory { .. }
            | Error::Interface { .. }
            | Error::WriteBootData { .. }
            | Error::RandomSeed { .. }
            | Error::Balloon { .. }
            | Error::Limiter { .. }
            | Error::Doorbell { .. }
            | Error::Generation { .. }
            | Error::Place { .. }
            | Error::Engine { .. }
            | Error::Host { .. }
            | Error::VcpuPanicked { .. } => false,
        }
    }
}
