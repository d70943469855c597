//! ACPI tables: hardware-reduced, no more AML than names the devices, as a
//! guest pays for each byte of it with interpreter time at boot.
//!
//! ```text
//! RSDP ─▶ XSDT ─▶ FADT ─▶ DSDT    \_S5, COM1, keyboard, one LNRO0005 per virtio device,
//!              │                  generation identifier and VM clock with their events
//!              └▶ MADT            local APICs, IOAPIC
//! ```

use acpi_tables::aml::{
    self, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed,
    Method, Name, Notify, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use chipset::{
    I8042_FIRST_PORT, I8042_PORTS, RESET_OFFSET, RESET_VALUE, SERIAL_PORTS, SLEEP_CONTROL_OFFSET,
    SLEEP_STATUS_OFFSET, SLEEP_TYPE_S5, VMCLOCK_LEN,
};
use ram::GuestMemory;
use vm_memory::Bytes;

use crate::Error;
use crate::layout::{
    ACPI, ACPI_END, ACPI_PORT, IOAPIC, KEYBOARD_GSI, LOCAL_APIC, SERIAL_GSI, SERIAL_PORT,
    VIRTIO_MMIO_LEN, VMCLOCK, VMCLOCK_GSI, VMGENID, VMGENID_GSI, VirtioSlot,
};

const OEM: [u8; 6] = *b"KOMBI ";
const OEM_TABLE: [u8; 8] = *b"KOMBIVM ";
const OEM_REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;
/// Bytes of a table's header.
const TABLE_HEADER: u32 = 36;
/// What a device is notified with when its page changed: both specifications say 0x80.
const PAGE_CHANGED: u8 = 0x80;

/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.11): a keyboard controller; no VGA, no MSI, no CMOS
/// clock.
const BOOT_ARCH: u16 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5;

/// Writes the tables of a machine with `vcpus` CPUs and `virtio` devices.
pub(crate) fn write(memory: &GuestMemory, vcpus: u8, virtio: &[VirtioSlot]) -> Result<(), Error> {
    let tables = tables(vcpus, virtio);
    debug_assert!(ACPI.0 + tables.len() as u64 <= ACPI_END);
    memory
        .write_slice(&tables, ACPI)
        .map_err(|source| Error::WriteBootData { source })
}

/// All tables, to be placed at [`ACPI`], the RSDP first.
fn tables(vcpus: u8, virtio: &[VirtioSlot]) -> Vec<u8> {
    let mut area = Area(vec![0; Rsdp::len()]);
    let dsdt = area.place(&dsdt(virtio));
    let fadt = area.place(&fadt(dsdt));
    let madt = area.place(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    area.0.splice(..rsdp.len(), rsdp);
    area.0
}

/// The tables so far.
struct Area(Vec<u8>);

impl Area {
    /// Appends `table` and returns its guest-physical address.
    fn place(&mut self, table: &dyn Aml) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(16), 0);
        let at = ACPI.0 + self.0.len() as u64;
        table.to_aml_bytes(&mut self.0);
        at
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |offset| {
        let port = u64::from(ACPI_PORT + offset);
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_OFFSET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_OFFSET);
    fadt.sleep_status_reg = port(SLEEP_STATUS_OFFSET);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Kombi   ").into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let address = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, address);
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(
            index,
            index,
            EnabledStatus::Enabled,
        ));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    madt
}

fn dsdt(virtio: &[VirtioSlot]) -> impl Aml {
    let mut dsdt = Sdt::new(
        *b"DSDT",
        TABLE_HEADER,
        DSDT_REVISION,
        OEM,
        OEM_TABLE,
        OEM_REVISION,
    );
    let mut aml = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5])).to_aml_bytes(&mut aml);
    let mut devices = Devices::default();
    devices.serial();
    devices.keyboard();
    for (index, slot) in virtio.iter().enumerate() {
        devices.virtio(index, *slot);
    }
    devices.generation_id();
    devices.clock();
    devices.events();
    Scope::new("_SB_".into(), vec![&devices]).to_aml_bytes(&mut aml);
    dsdt.append_slice(&aml);
    dsdt
}

/// AML of devices, one after the other.
#[derive(Default)]
struct Devices(Vec<u8>);

impl Devices {
    fn serial(&mut self) {
        let interrupt = Interrupt::new(true, true, false, false, SERIAL_GSI);
        let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORTS as u8);
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0_u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&interrupt, &ports]),
                ),
            ],
        )
        .to_aml_bytes(&mut self.0);
    }

    fn keyboard(&mut self) {
        let interrupt = Interrupt::new(true, true, false, false, KEYBOARD_GSI);
        let data = IO::new(I8042_FIRST_PORT, I8042_FIRST_PORT, 1, 1);
        let last = I8042_FIRST_PORT + I8042_PORTS as u16 - 1;
        let command = IO::new(last, last, 1, 1);
        Device::new(
            "KBD0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0303")),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&interrupt, &data, &command]),
                ),
            ],
        )
        .to_aml_bytes(&mut self.0);
    }

    fn virtio(&mut self, index: usize, slot: VirtioSlot) {
        // Bases lie below 4 GiB by layout.
        let registers = Memory32Fixed::new(true, slot.base as u32, VIRTIO_MMIO_LEN as u32);
        let interrupt = Interrupt::new(true, false, false, false, slot.gsi);
        Device::new(
            format!("V{index:03}").as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &(index as u8)),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&registers, &interrupt]),
                ),
            ],
        )
        .to_aml_bytes(&mut self.0);
    }

    /// Microsoft, "Virtual Machine Generation ID": found by its _CID.
    fn generation_id(&mut self) {
        let (low, high) = (VMGENID.0 as u32, (VMGENID.0 >> 32) as u32);
        Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"VMGENCTR"),
                &Name::new("_CID".into(), &"VM_Gen_Counter"),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
            ],
        )
        .to_aml_bytes(&mut self.0);
    }

    /// As Linux's ptp_vmclock looks for it.
    fn clock(&mut self) {
        let page = aml::AddressSpace::new_memory(
            AddressSpaceCacheable::Cacheable,
            false,
            VMCLOCK.0,
            VMCLOCK.0 + VMCLOCK_LEN - 1,
            None,
        );
        Device::new(
            "VCLK".into(),
            vec![
                &Name::new("_HID".into(), &"AMZNC10C"),
                &Name::new("_CID".into(), &"VMCLOCK"),
                &Name::new("_DDN".into(), &"VMCLOCK"),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&page])),
            ],
        )
        .to_aml_bytes(&mut self.0);
    }

    /// The generic event device (ACPI 6.5 §5.6.9): an interrupt is a notification.
    fn events(&mut self) {
        let line = |gsi| Interrupt::new(true, true, false, false, gsi);
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&line(VMGENID_GSI), &line(VMCLOCK_GSI)]),
                ),
                &Method::new(
                    "_EVT".into(),
                    1,
                    true,
                    vec![
                        &If::new(
                            &Equal::new(&Arg(0), &VMGENID_GSI),
                            vec![&Notify::new(&Path::new("VGEN"), &PAGE_CHANGED)],
                        ),
                        &If::new(
                            &Equal::new(&Arg(0), &VMCLOCK_GSI),
                            vec![&Notify::new(&Path::new("VCLK"), &PAGE_CHANGED)],
                        ),
                    ],
                ),
            ],
        )
        .to_aml_bytes(&mut self.0);
    }
}

impl Aml for Devices {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests;
