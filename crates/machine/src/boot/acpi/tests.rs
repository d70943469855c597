//! The tables read back by offsets from the ACPI specification (6.5, chapter 5),
//! not with the crate that wrote them.

use super::*;

const BASE: usize = ACPI.0 as usize;

/// The tables of one machine, as the guest finds them.
struct Tables(Vec<u8>);

impl Tables {
    fn new(vcpus: u8, devices: u8) -> Self {
        let slots: Vec<_> = (0..devices).map(VirtioSlot::nth).collect();
        Self(tables(vcpus, &slots))
    }

    fn at(&self, address: u64) -> &[u8] {
        &self.0[usize::try_from(address).unwrap() - BASE..]
    }

    /// The table at `address`, cut to its length, its checksum verified.
    fn table(&self, address: u64, signature: &[u8; 4]) -> &[u8] {
        let bytes = self.at(address);
        assert_eq!(&bytes[..4], signature);
        assert_eq!(address % 16, 0);
        let table = &bytes[..word(bytes, 4) as usize];
        assert_eq!(sum(table), 0, "checksum");
        table
    }

    fn xsdt(&self) -> Vec<u64> {
        let rsdp = self.at(ACPI.0);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp[..36]), rsdp[15]), (0, 0, 2));
        let xsdt = self.table(long(rsdp, 24), b"XSDT");
        xsdt[36..]
            .chunks_exact(8)
            .map(|entry| long(entry, 0))
            .collect()
    }

    fn fadt(&self) -> &[u8] {
        self.table(self.xsdt()[0], b"FACP")
    }

    fn madt(&self) -> &[u8] {
        self.table(self.xsdt()[1], b"APIC")
    }

    fn dsdt(&self) -> &[u8] {
        self.table(long(self.fadt(), 140), b"DSDT")
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn count(haystack: &[u8], needle: &[u8]) -> usize {
    haystack
        .windows(needle.len())
        .filter(|window| *window == needle)
        .count()
}

#[test]
fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
    let tables = Tables::new(1, 3);
    assert_eq!(tables.xsdt().len(), 2);
    assert_eq!(tables.madt()[8], 1);
    assert_eq!(
        tables.dsdt()[8],
        6,
        "64-bit integers need a revision of at least 2"
    );
}

#[test]
fn the_fadt_is_hardware_reduced_and_its_registers_are_the_chipsets() {
    let tables = Tables::new(1, 0);
    let fadt = tables.fadt();
    assert_eq!(fadt.len(), 276);
    let flags = word(fadt, 112);
    assert_eq!((flags >> 20 & 1, flags >> 10 & 1, flags & 1), (1, 1, 1));
    // GAS: system I/O, 8 bits, offset 0, byte access, port.
    let register = |at: usize| (fadt[at..at + 4].to_vec(), long(fadt, at + 4));
    let port = |offset: u16| (vec![1, 8, 0, 1], u64::from(ACPI_PORT + offset));
    assert_eq!(register(116), port(RESET_OFFSET));
    assert_eq!(fadt[128], RESET_VALUE);
    assert_eq!(register(244), port(SLEEP_CONTROL_OFFSET));
    assert_eq!(register(256), port(SLEEP_STATUS_OFFSET));
    assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b10_1110);
}

#[test]
fn the_madt_has_one_local_apic_per_vcpu_and_the_ioapic() {
    let tables = Tables::new(3, 0);
    let madt = tables.madt();
    assert_eq!((word(madt, 36), word(madt, 40)), (LOCAL_APIC, 0), "no 8259");
    let mut entries = Vec::new();
    let mut rest = &madt[44..];
    while let [kind, len, ..] = *rest {
        entries.push((kind, rest[..len.into()].to_vec()));
        rest = &rest[len.into()..];
    }
    assert!(rest.is_empty());
    for (index, (kind, entry)) in (0_u8..3).zip(&entries) {
        assert_eq!(
            (*kind, &entry[..]),
            (0, &[0, 8, index, index, 1, 0, 0, 0][..])
        );
    }
    let (kind, ioapic) = &entries[3];
    assert_eq!((*kind, word(ioapic, 4), word(ioapic, 8)), (1, IOAPIC, 0));
    assert_eq!(entries.len(), 4);
}

#[test]
fn the_dsdt_names_soft_off_the_serial_port_and_each_virtio_device() {
    let tables = Tables::new(1, 2);
    let dsdt = tables.dsdt();
    // Name (_S5_, Package (1) { 5 })
    assert_eq!(count(dsdt, b"\x08_S5_\x12\x04\x01\x0a\x05"), 1);
    // EISAID ("PNP0501"), port 0x3f8..0x400
    assert_eq!(count(dsdt, b"\x41\xd0\x05\x01"), 1);
    assert_eq!(count(dsdt, &[0x47, 1, 0xf8, 0x03, 0xf8, 0x03, 1, 8]), 1);
    // Interrupt (edge, high, exclusive) 4
    assert_eq!(count(dsdt, &[0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0]), 1);
    assert_eq!(count(dsdt, b"LNRO0005\0"), 2);
    for index in 0..2_u8 {
        // Memory32Fixed (ReadWrite, 0xd000_i000, 0x1000), Interrupt (level, high) 5 + i
        assert_eq!(
            count(
                dsdt,
                &[0x86, 9, 0, 1, 0, index << 4, 0, 0xd0, 0, 0x10, 0, 0]
            ),
            1
        );
        assert_eq!(count(dsdt, &[0x89, 6, 0, 0b0001, 1, 5 + index, 0, 0, 0]), 1);
    }
}

#[test]
fn the_dsdt_names_identifier_and_clock_and_the_events_that_notify_them() {
    let tables = Tables::new(1, 0);
    let dsdt = tables.dsdt();
    // Name (ADDR, Package (2) { 0x000fe000, 0 })
    let at = b"ADDR\x12\x08\x02\x0c\x00\xe0\x0f\x00\x00";
    assert_eq!(count(dsdt, b"VM_Gen_Counter\0"), 2);
    assert_eq!(count(dsdt, at), 1, "{dsdt:02x?}");
    // QWordMemory (…, 0xff000 to 0xfffff)
    let mut page = VMCLOCK.0.to_le_bytes().to_vec();
    page.extend(0xf_ffff_u64.to_le_bytes());
    assert_eq!(count(dsdt, b"AMZNC10C\0"), 1);
    assert_eq!(count(dsdt, &page), 1);
    for gsi in [VMGENID_GSI, VMCLOCK_GSI] {
        // Interrupt (edge, high, exclusive) gsi
        assert_eq!(count(dsdt, &[0x89, 6, 0, 0b0011, 1, gsi as u8, 0, 0, 0]), 1);
    }
    // Method (_EVT, 1, Serialized); Notify (VGEN, 0x80), Notify (VCLK, 0x80)
    assert_eq!(count(dsdt, b"_EVT\x09"), 1);
    assert_eq!(count(dsdt, b"\x86VGEN\x0a\x80"), 1);
    assert_eq!(count(dsdt, b"\x86VCLK\x0a\x80"), 1);
}

#[test]
fn the_largest_machine_fits_into_the_area() {
    let tables = Tables::new(32, 17);
    assert!(ACPI.0 + (tables.0.len() as u64) < ACPI_END);
    assert_eq!(count(tables.dsdt(), b"LNRO0005\0"), 17);
}

#[test]
fn every_virtio_slot_has_a_pin_of_the_ioapic_and_lies_below_it() {
    for index in 0..blueprint::limits::VIRTIO_DEVICES_MAX {
        let slot = VirtioSlot::nth(index as u8);
        assert!(slot.gsi < 24);
        assert!(![SERIAL_GSI, VMGENID_GSI, VMCLOCK_GSI].contains(&slot.gsi));
        assert!(slot.base + VIRTIO_MMIO_LEN <= u64::from(IOAPIC));
    }
}
