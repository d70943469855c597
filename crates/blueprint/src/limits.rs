//! What a machine may ask for at most and at least.

/// Virtual CPUs of one machine, as Firecracker limits them.
pub const VCPU_COUNT_MAX: u8 = 32;
/// Virtual CPUs that the software engine runs at most.
pub const SOFT_VCPU_COUNT_MAX: u8 = 8;
/// Least memory, in MiB: below it no Linux kernel unpacks itself.
pub const MEMORY_MIB_MIN: u32 = 32;
/// Most memory, in MiB: 1 TiB, what a 40-bit physical address space holds.
pub const MEMORY_MIB_MAX: u32 = 1 << 20;
/// Memory when nothing is said, in MiB, as in Firecracker.
pub const MEMORY_MIB_DEFAULT: u32 = 128;
/// Bytes of kernel command line with its terminating NUL (Linux on x86:
/// `COMMAND_LINE_SIZE`).
pub const CMDLINE_BYTES_MAX: usize = 2048;
/// virtio devices that have an interrupt pin and an MMIO slot: IOAPIC pins 5 to
/// 21, so that two of its 24 stay free.
pub const VIRTIO_DEVICES_MAX: usize = 17;
/// Bytes of a device id.
pub const ID_BYTES_MAX: usize = 64;
/// Lowest context id that a guest may have (virtio 1.2 §5.10.4: 0 to 2 are
/// reserved).
pub const GUEST_CID_MIN: u32 = 3;
/// Bytes of a Unix socket path without its NUL (`sun_path` holds 108).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Bytes of a network device's name without its NUL (netdevice(7), `IFNAMSIZ`).
pub const TAP_NAME_BYTES_MAX: usize = 15;
/// Bytes of the smallest packet that every IPv4 host takes (RFC 791), the least MTU.
pub const MTU_MIN: u16 = 68;
/// Where the metadata service is when nothing is said.
pub const MMDS_ADDRESS_DEFAULT: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 169, 254);
/// MiB of the smallest piece of memory that a guest plugs.
pub const HOTPLUG_BLOCK_MIB_MIN: u64 = 2;
/// MiB of the smallest piece of hot-plugged memory that the host makes accessible.
pub const HOTPLUG_SLOT_MIB_MIN: u64 = 128;
