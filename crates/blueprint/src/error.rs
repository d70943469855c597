//! Why a machine that was asked for cannot be.

use std::path::PathBuf;

use crate::draft::StaticCpuTemplate;
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
    /// Two threads a core, and an odd number of them.
    #[error("vcpu_count {asked} is odd, with smt it must be 1 or even")]
    OddVcpuCount {
        /// What was asked for.
        asked: u8,
    },
    /// Memory that is no whole number of the pages asked for.
    #[error("mem_size_mib {asked} is odd, with huge_pages it must be even")]
    OddMemorySize {
        /// What was asked for, in MiB.
        asked: u64,
    },
    /// One of the named CPU templates that Firecracker deprecated.
    #[error("cpu_template {asked:?} is not supported: give a template of your own to cpu-config")]
    StaticCpuTemplate {
        /// What was asked for.
        asked: StaticCpuTemplate,
    },
    /// A CPU template in a file that nobody has read.
    #[error("cpu-config names the file {path:?}: give the template itself")]
    CpuConfigUnread {
        /// The file.
        path: PathBuf,
    },
    /// A drive without a file.
    #[error("drive {id:?} has no path_on_host")]
    DrivePath {
        /// The drive.
        id: String,
    },
    /// A drive with a back end in another process, and what only a file has.
    #[error("drive {id:?} has both socket and {field}: its back end decides, leave {field} out")]
    BesideSocket {
        /// The drive.
        id: String,
        /// The field that is one too many.
        field: &'static str,
    },
    /// A back end's socket path that does not fit into a socket address.
    #[error(
        "drive {id:?}: socket {path:?} is longer than the {most} bytes of a socket address",
        most = limits::SOCKET_PATH_BYTES_MAX
    )]
    BackEndPathLength {
        /// The drive.
        id: String,
        /// The path.
        path: PathBuf,
    },
    /// A partition's name that would mean something else to the kernel.
    #[error("drive {id:?}: partuuid {asked:?} is not letters, digits and hyphens")]
    Partuuid {
        /// The drive.
        id: String,
        /// What was asked for.
        asked: String,
    },
    /// A TAP device that Linux would not name so.
    #[error(
        "interface {id:?}: host_dev_name {asked:?} is not a network device's name of 1 to {most} bytes",
        most = limits::TAP_NAME_BYTES_MAX
    )]
    TapName {
        /// The interface.
        id: String,
        /// What was asked for.
        asked: String,
    },
    /// Not an Ethernet address.
    #[error("interface {id:?}: guest_mac {asked:?} is not an address such as 06:00:ac:10:00:02")]
    Mac {
        /// The interface.
        id: String,
        /// What was asked for.
        asked: String,
    },
    /// Two interfaces of one TAP device.
    #[error("interfaces {first:?} and {second:?} have the same host_dev_name {tap:?}")]
    TapTwice {
        /// The one that came first.
        first: String,
        /// The other.
        second: String,
        /// The device.
        tap: String,
    },
    /// Two interfaces of one address.
    #[error("interfaces {first:?} and {second:?} have the same guest_mac")]
    MacTwice {
        /// The first one.
        first: String,
        /// The second one.
        second: String,
    },
    /// `mtu` out of bounds.
    #[error(
        "interface {id:?}: mtu {asked} is not between {least} and 65535",
        least = limits::MTU_MIN
    )]
    Mtu {
        /// The interface.
        id: String,
        /// What was asked for.
        asked: u64,
    },
    /// A metadata service that nobody reaches.
    #[error("mmds-config names no network interface: name at least one in network_interfaces")]
    MmdsWithoutInterface,
    /// A metadata service behind an interface that is not there.
    #[error("mmds-config names interface {id:?}, which is not configured")]
    MmdsInterface {
        /// The interface.
        id: String,
    },
    /// Not an address that the metadata service may have.
    #[error("mmds-config: ipv4_address {asked} is not between 169.254.1.0 and 169.254.254.255")]
    MmdsAddress {
        /// What was asked for.
        asked: std::net::Ipv4Addr,
    },
    /// A balloon larger than the machine.
    #[error("balloon: amount_mib {asked} is more than the machine's {memory_mib}")]
    BalloonSize {
        /// What was asked for, in MiB.
        asked: u64,
        /// The machine's memory, in MiB.
        memory_mib: u32,
    },
    /// Sizes of memory hot-plug that do not fit each other.
    #[error("memory-hotplug: {field} {asked} is not {what}")]
    Hotplug {
        /// The field.
        field: &'static str,
        /// What was asked for, in MiB.
        asked: u64,
        /// What it must be.
        what: String,
    },
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
        "{field} {id:?} is not 1 to {most} letters, digits or underscores",
        most = limits::ID_BYTES_MAX
    )]
    Id {
        /// The field that holds it.
        field: &'static str,
        /// The id.
        id: String,
    },
    /// Two devices of one kind and one name.
    #[error("{field} {id:?} is given twice")]
    IdTwice {
        /// The field that holds it.
        field: &'static str,
        /// The id.
        id: String,
    },
    /// More than one root device.
    #[error("{first:?} and {second:?} both claim to be the root device")]
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
