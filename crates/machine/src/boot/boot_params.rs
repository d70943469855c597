//! The zero page: what the kernel is told about memory, command line, initial
//! RAM disk and ACPI (Linux, Documentation/arch/x86/boot.rst, zero-page.rst).

use linux_loader::loader::bootparam::{
    LOADED_HIGH, SETUP_RNG_SEED, boot_e820_entry, boot_params, setup_header,
};
use ram::GuestMemory;
use vm_memory::Bytes;

use super::initrd::Initrd;
use super::kernel::Kernel;
use crate::Error;
use crate::layout::{
    ACPI, ACPI_END, CMDLINE, CONVENTIONAL_END, HIMEM_START, SETUP_DATA, ZERO_PAGE,
};

/// e820 types (ACPI 6.5, table 15.4).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// "Undefined" boot loader.
const LOADER_TYPE: u8 = 0xff;
const PROTOCOL: u16 = 0x020f;
/// Alignment of an ELF kernel.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
/// Bytes of random seed.
const SEED_LEN: usize = 32;

/// Where memory is: the low region's end and the high region, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryMap {
    /// End of the region that starts at 0.
    pub(crate) low_end: u64,
    /// Start and length of the region above 4 GiB.
    pub(crate) high: Option<(u64, u64)>,
}

/// Writes command line, random seed and zero page.
pub(crate) fn write(
    memory: &GuestMemory,
    map: MemoryMap,
    kernel: &Kernel,
    cmdline: &str,
    initrd: Option<Initrd>,
) -> Result<(), Error> {
    let write_failed = |source| Error::WriteBootData { source };
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    memory.write_slice(&line, CMDLINE).map_err(write_failed)?;
    let seed = setup_data_with_seed().map_err(|source| Error::RandomSeed { source })?;
    memory
        .write_slice(&seed, SETUP_DATA)
        .map_err(write_failed)?;

    let params = params(map, kernel, cmdline.len(), initrd);
    memory.write_obj(params, ZERO_PAGE).map_err(write_failed)
}

fn params(
    map: MemoryMap,
    kernel: &Kernel,
    cmdline_len: usize,
    initrd: Option<Initrd>,
) -> boot_params {
    let mut params = boot_params {
        hdr: kernel.header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: PROTOCOL,
            loadflags: LOADED_HIGH,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..setup_header::default()
        }),
        acpi_rsdp_addr: ACPI.0,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_TYPE;
    // Both lie below 4 GiB by layout.
    params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    params.hdr.cmdline_size = u32::try_from(cmdline_len).unwrap_or(0);
    params.hdr.setup_data = SETUP_DATA.0;
    // Whatever the image's own header says.
    let (start, len) = initrd.map_or((0, 0), |initrd| (initrd.start.0 as u32, initrd.len));
    params.hdr.ramdisk_image = start;
    params.hdr.ramdisk_size = len;
    let e820 = e820(map);
    params.e820_entries = e820.len() as u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(e820) {
        *slot = entry;
    }
    params
}

fn e820(map: MemoryMap) -> Vec<boot_e820_entry> {
    let entry = |addr, size, r#type| boot_e820_entry { addr, size, r#type };
    let mut entries = vec![
        entry(0, CONVENTIONAL_END, E820_RAM),
        entry(ACPI.0, ACPI_END - ACPI.0, E820_ACPI),
        entry(ACPI_END, HIMEM_START - ACPI_END, E820_RESERVED),
        entry(
            HIMEM_START,
            map.low_end.saturating_sub(HIMEM_START),
            E820_RAM,
        ),
    ];
    entries.extend(map.high.map(|(start, len)| entry(start, len, E820_RAM)));
    entries
}

/// A `setup_data` node of type SETUP_RNG_SEED: a guest without RDRAND has its
/// random numbers at once. The kernel wipes it after reading.
fn setup_data_with_seed() -> std::io::Result<Vec<u8>> {
    let mut seed = [0; SEED_LEN];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
    let mut node = Vec::with_capacity(16 + SEED_LEN);
    node.extend_from_slice(&0_u64.to_le_bytes()); // next
    node.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    node.extend_from_slice(&(SEED_LEN as u32).to_le_bytes());
    node.extend_from_slice(&seed);
    Ok(node)
}

/// Reads back what [`write`] wrote.
#[cfg(test)]
pub(crate) fn read(memory: &GuestMemory) -> boot_params {
    memory
        .read_obj(ZERO_PAGE)
        .expect("the zero page is in memory")
}
