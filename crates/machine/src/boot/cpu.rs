//! The boot CPU as the 64-bit boot protocol wants it: long mode, the first 4 GiB
//! mapped one to one, flat segments, RSI at the zero page, interrupts off.

use hv::VcpuState;
use ram::{Gpa, GuestMemory};
use vm_memory::Bytes;
use x86::control::{cr0, cr4, efer};
use x86::registers::{RSI, rflags};
use x86::state::{DescriptorTable, Segment};

use crate::Error;
use crate::layout::{GDT, PAGE_TABLES, ZERO_PAGE};

/// Selectors `__BOOT_CS` and `__BOOT_DS` of the boot protocol.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;
/// Null, unused, 64-bit code, flat data, 64-bit TSS (two entries; SDM vol. 3, §3.4.5).
const DESCRIPTORS: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];

/// Present, writable, page of 2 MiB (SDM vol. 3, §4.5).
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 0x80;
const PAGE: u64 = 4096;
const DIRECTORIES: u64 = 4;

/// x2APIC mode in IA32_APIC_BASE: the guest needs no MMIO for its local APIC.
const APIC_BASE_X2APIC: u64 = 1 << 10;

/// Writes descriptor and page tables and returns the state that enters the
/// kernel at `entry`.
pub(crate) fn prepare(memory: &GuestMemory, entry: Gpa) -> Result<VcpuState, Error> {
    let write_failed = |source| Error::WriteBootData { source };
    memory
        .write_slice(&words(DESCRIPTORS), GDT)
        .map_err(write_failed)?;
    memory
        .write_slice(&page_tables(), PAGE_TABLES)
        .map_err(write_failed)?;

    let mut state = VcpuState::after_reset();
    state.rip = entry.0;
    state.rflags = rflags::FIXED;
    state.gpr[RSI] = ZERO_PAGE.0;
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    state.cr3 = PAGE_TABLES.0;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA;
    let data = Segment {
        selector: BOOT_DS,
        base: 0,
        limit: u32::MAX,
        rights: 0xc093,
    };
    state.segments = [data; 6];
    state.segments[VcpuState::CS] = Segment {
        selector: BOOT_CS,
        base: 0,
        limit: u32::MAX,
        rights: 0xa09b,
    };
    state.tr = Segment {
        selector: BOOT_TSS,
        base: 0,
        limit: 0x67,
        rights: 0x008b,
    };
    let limit = (size_of_val(&DESCRIPTORS) - 1) as u16;
    state.gdt = DescriptorTable { base: GDT.0, limit };
    state.idt = DescriptorTable { base: 0, limit: 0 };
    state.apic.base |= APIC_BASE_X2APIC;
    Ok(state)
}

fn page_tables() -> Vec<u8> {
    let (pdpt, directories) = (PAGE_TABLES.0 + PAGE, PAGE_TABLES.0 + 2 * PAGE);
    let mut pml4 = [0_u64; 512];
    pml4[0] = pdpt | PRESENT_WRITABLE;
    let mut pointers = [0_u64; 512];
    for (gib, pointer) in (0..DIRECTORIES).zip(&mut pointers) {
        *pointer = (directories + gib * PAGE) | PRESENT_WRITABLE;
    }
    let large = (0..DIRECTORIES * 512).map(|page| (page << 21) | LARGE | PRESENT_WRITABLE);
    words(pml4.into_iter().chain(pointers).chain(large))
}

fn words(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}
