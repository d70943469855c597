//! Why a machine that was asked for cannot be.

use std::path::PathBuf;

use crate::limits;

/// Why a [`crate::Draft`] is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DraftError {
    /// Not JSON, or not of the configuration's shape.
    #[error("failed to read the machine configuration")]
    Json {
        /// What the parser says, with line and column.
        source: serde_json::Error,
    },
    /// `vcpu_count` out of bounds.
    #[error("vcpu_count {asked} is not between 1 and {most}", most = limits::VCPU_COUNT_MAX)]
    VcpuCount {
        /// What was asked for.
        asked: u64,
    },
    /// More CPUs than the software engine runs.
    #[error(
        "vcpu_count {asked} is more than the software engine's {most}",
        most = limits::SOFT_VCPU_COUNT_MAX
    )]
    SoftVcpuCount {
        /// What was asked for.
        asked: u8,
    },
    /// `mem_size_mib` out of bounds.
    #[error(
        "mem_size_mib {asked} is not between {least} and {most}",
        least = limits::MEMORY_MIB_MIN,
        most = limits::MEMORY_MIB_MAX
    )]
    MemorySize {
        /// What was asked for, in MiB.
        asked: u64,
    },
    /// `smt: true`.
    #[error("smt is not supported")]
    Smt,
    /// A path that names nothing, or could never be opened.
    #[error("{field} {path:?} is empty or holds a NUL byte")]
    Path {
        /// The field that holds it.
        field: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A command line longer than the kernel reads.
    #[error(
        "the kernel command line has {len} bytes, the kernel reads at most {most}",
        most = limits::CMDLINE_BYTES_MAX - 1
    )]
    CommandLineLength {
        /// Bytes, with what Kombi adds for the root device.
        len: usize,
    },
    /// A control character in the command line.
    #[error("the kernel command line holds the control character {byte:#04x} at byte {at}")]
    CommandLineCharacter {
        /// The character.
        byte: u8,
        /// Where.
        at: usize,
    },
    /// A device id that is empty, too long or has other characters than
    /// letters, digits and `_`.
    #[error(
        "drive_id {id:?} is not 1 to {most} letters, digits or underscores",
        most = limits::ID_BYTES_MAX
    )]
    Id {
        /// The id.
        id: String,
    },
    /// Two drives of one name.
    #[error("drive_id {id:?} is given twice")]
    IdTwice {
        /// The id.
        id: String,
    },
    /// More than one root device.
    #[error("drives {first:?} and {second:?} both claim to be the root device")]
    TwoRoots {
        /// The first one's id.
        first: String,
        /// The second one's id.
        second: String,
    },
    /// More virtio devices than interrupt pins.
    #[error(
        "{asked} virtio devices are asked for, a machine has room for {most}",
        most = limits::VIRTIO_DEVICES_MAX
    )]
    TooManyDevices {
        /// How many were asked for.
        asked: usize,
    },
    /// A context id that no guest may have.
    #[error("guest_cid {asked} is not between {least} and 4294967294", least = limits::GUEST_CID_MIN)]
    GuestCid {
        /// What was asked for.
        asked: u64,
    },
    /// A socket path that does not fit into a socket address.
    #[error(
        "uds_path {path:?} is longer than the {most} bytes of a socket address",
        most = limits::SOCKET_PATH_BYTES_MAX
    )]
    SocketPathLength {
        /// The path.
        path: PathBuf,
    },
}
