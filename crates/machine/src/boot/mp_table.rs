//! The MultiProcessor table (Intel MP specification 1.4): processors, IOAPIC and
//! lines for a kernel that runs without ACPI, which it ignores otherwise.
//!
//! `acpi=off` on the command line spares a guest ACPI's interpreter; devices are
//! then named there as well ([`devices`]).

use std::fmt::Write;

use ram::{Gpa, GuestMemory};
use vm_memory::Bytes;

use crate::Error;
use crate::layout::{CONVENTIONAL_END, IOAPIC, LOCAL_APIC, VirtioSlot};

/// The table lies in the last KiB below 640 KiB, where kernels look for it.
const AT: u64 = CONVENTIONAL_END;
const POINTER_LEN: usize = 16;
const PINS: u8 = 24;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// MPS 4.3.4: active high, level-triggered.
const LEVEL_HIGH: u16 = 0b1101;

/// Whether the kernel was told to leave ACPI alone.
pub(crate) fn is_needed(cmdline: &str) -> bool {
    cmdline
        .split_ascii_whitespace()
        .any(|word| word == "acpi=off")
}

/// What names the devices on the command line.
pub(crate) fn devices(virtio: &[VirtioSlot]) -> String {
    virtio.iter().fold(String::new(), |mut line, slot| {
        // Writing to a string does not fail.
        let _ = write!(line, " virtio_mmio.device=4K@{:#x}:{}", slot.base, slot.gsi);
        line
    })
}

/// Writes the table of a machine with `vcpus` CPUs and `virtio` devices.
pub(crate) fn write(memory: &GuestMemory, vcpus: u8, virtio: &[VirtioSlot]) -> Result<(), Error> {
    memory
        .write_slice(&table(vcpus, virtio), Gpa(AT))
        .map_err(|source| Error::WriteBootData { source })
}

fn table(vcpus: u8, virtio: &[VirtioSlot]) -> Vec<u8> {
    let (entries, count) = entries(vcpus, virtio);
    let mut config = b"PCMP".to_vec();
    config.extend((44 + entries.len() as u16).to_le_bytes());
    config.extend([4, 0]);
    config.extend(b"KOMBI   micro-VM    ");
    config.extend([0; 6]);
    config.extend(count.to_le_bytes());
    config.extend(LOCAL_APIC.to_le_bytes());
    config.extend([0; 4]);
    config.extend(entries);
    seal(&mut config, 7);

    let mut table = b"_MP_".to_vec();
    table.extend((AT as u32 + POINTER_LEN as u32).to_le_bytes());
    table.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    seal(&mut table, 10);
    table.extend(config);
    table
}

fn entries(vcpus: u8, virtio: &[VirtioSlot]) -> (Vec<u8>, u16) {
    // APIC ids are the vCPUs' numbers; the IOAPIC takes the next one.
    let ioapic = vcpus;
    let mut bytes = Vec::new();
    for index in 0..vcpus {
        let flags = if index == 0 { 0b11 } else { 0b01 };
        bytes.extend([0, index, APIC_VERSION, flags]);
        bytes.extend([0; 16]);
    }
    bytes.extend([1, 0]);
    bytes.extend(b"ISA   ");
    bytes.extend([2, ioapic, IOAPIC_VERSION, 1]);
    bytes.extend(IOAPIC.to_le_bytes());
    for pin in 0..PINS {
        let level = virtio.iter().any(|slot| slot.gsi == u32::from(pin));
        let [low, high] = if level { LEVEL_HIGH } else { 0 }.to_le_bytes();
        bytes.extend([3, 0, low, high, 0, pin, ioapic, pin]);
    }
    bytes.extend([4, 3, 0, 0, 0, 0, 0, 0]);
    bytes.extend([4, 1, 0, 0, 0, 0, 0xff, 1]);
    (bytes, u16::from(vcpus) + u16::from(PINS) + 4)
}

/// Makes the bytes sum to zero.
fn seal(bytes: &mut [u8], checksum_at: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(checksum_at) {
        *checksum = 0_u8.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn pointer_and_table_sum_to_zero_and_count_their_entries() {
        let slots = [VirtioSlot::nth(0), VirtioSlot::nth(1)];
        let bytes = table(2, &slots);
        let (pointer, config) = bytes.split_at(16);
        assert_eq!((&pointer[..4], sum(pointer)), (&b"_MP_"[..], 0));
        assert_eq!(pointer[4..8], 0x9_fc10_u32.to_le_bytes());
        assert_eq!((&config[..4], sum(config)), (&b"PCMP"[..], 0));
        assert_eq!(config[4..6], (config.len() as u16).to_le_bytes());
        let mut entries = Vec::new();
        let mut rest = &config[44..];
        while let Some(kind) = rest.first() {
            let (entry, after) = rest.split_at(if *kind == 0 { 20 } else { 8 });
            entries.push(entry);
            rest = after;
        }
        assert_eq!(config[34..36], (entries.len() as u16).to_le_bytes());
        let level: Vec<_> = entries
            .iter()
            .filter(|e| e[0] == 3 && e[2] == 0xd)
            .collect();
        assert_eq!(
            level,
            [&[3, 0, 0xd, 0, 0, 5, 2, 5], &[3, 0, 0xd, 0, 0, 6, 2, 6]]
        );
    }

    #[test]
    fn the_largest_table_fits_below_640_kib() {
        assert!(AT + table(32, &[]).len() as u64 <= 0xa_0000);
    }

    #[test]
    fn devices_are_named_on_the_command_line_only_without_acpi() {
        assert!(is_needed("a acpi=off b") && !is_needed("acpi=offline xacpi=off"));
        assert_eq!(
            devices(&[VirtioSlot::nth(0), VirtioSlot::nth(1)]),
            " virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
        );
    }
}
