//! Where everything of a machine lies: guest-physical addresses, ports, lines.
//!
//! ```text
//! 0x0000_0500  GDT                      0x000f_f000  VM clock
//! 0x0000_7000  zero page                0x0010_0000  kernel (ELF: where it says)
//! 0x0000_9000  page tables (6 pages)    top of low   initial RAM disk
//! 0x0001_0000  setup data: random seed  0xc000_0000  boot timer, if any
//! 0x0002_0000  command line             0xd000_0000  virtio-mmio, 4 KiB each
//! 0x0009_fc00  MP table, if any         0xfec0_0000  IOAPIC (the engine's)
//! 0x000e_0000  RSDP, then ACPI tables   0xfee0_0000  local APIC (the engine's)
//! 0x000f_e000  generation identifier
//! ```
//!
//! Invariant: what boot writes lies below [`HIMEM_START`] and never overlaps;
//! kernels and initial RAM disks lie above.

use ram::Gpa;

/// The boot CPU's descriptor table.
pub(crate) const GDT: Gpa = Gpa(0x500);
/// `boot_params` (Linux, Documentation/arch/x86/boot.rst).
pub(crate) const ZERO_PAGE: Gpa = Gpa(0x7000);
/// PML4, PDPT, then four page directories: 4 GiB in pages of 2 MiB.
pub(crate) const PAGE_TABLES: Gpa = Gpa(0x9000);
/// `setup_data` with the random seed.
pub(crate) const SETUP_DATA: Gpa = Gpa(0x1_0000);
/// The kernel's command line.
pub(crate) const CMDLINE: Gpa = Gpa(0x2_0000);
/// End of conventional RAM: the kilobyte before 640 KiB is a BIOS's.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;
/// RSDP and ACPI tables, inside the area that old kernels search for it.
pub(crate) const ACPI: Gpa = Gpa(0xe_0000);
/// End of the area for ACPI tables. What follows, up to [`HIMEM_START`], the guest
/// must leave alone for good.
pub(crate) const ACPI_END: u64 = 0xf_e000;
/// The generation identifier.
pub(crate) const VMGENID: Gpa = Gpa(0xf_e000);
/// The VM clock's page.
pub(crate) const VMCLOCK: Gpa = Gpa(0xf_f000);
/// Start of what kernels use.
pub(crate) const HIMEM_START: u64 = 0x10_0000;

/// The boot timer, where Firecracker has it.
pub(crate) const BOOT_TIMER: u64 = 0xc000_0000;
/// First virtio-mmio device.
pub(crate) const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio device's registers.
pub(crate) const VIRTIO_MMIO_LEN: u64 = 0x1000;
/// Interrupt line of the first virtio device.
pub(crate) const VIRTIO_GSI: u32 = 5;
/// The engine's IOAPIC.
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// First port of the serial console.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt line of the serial console.
pub(crate) const SERIAL_GSI: u32 = 4;
/// Event of the generation identifier, an edge.
pub(crate) const VMGENID_GSI: u32 = 22;
/// Event of the VM clock, an edge.
pub(crate) const VMCLOCK_GSI: u32 = 23;
/// Interrupt line of the keyboard controller, edge-triggered as a PC's.
pub(crate) const KEYBOARD_GSI: u32 = 1;
/// First port of ACPI's sleep and reset registers.
pub(crate) const ACPI_PORT: u16 = 0x600;

/// Where a virtio device sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VirtioSlot {
    /// First register.
    pub(crate) base: u64,
    /// Interrupt line, level-triggered and active high.
    pub(crate) gsi: u32,
}

impl VirtioSlot {
    /// The slot of the `index`-th device.
    pub(crate) fn nth(index: u8) -> Self {
        Self {
            base: VIRTIO_MMIO + VIRTIO_MMIO_LEN * u64::from(index),
            gsi: VIRTIO_GSI + u32::from(index),
        }
    }
}
