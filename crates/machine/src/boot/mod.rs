//! What a firmware would leave behind: kernel, initial RAM disk, zero page,
//! ACPI tables in guest memory, and the boot CPU's state.
//!
//! Invariant: after [`load`] the machine runs without firmware; nothing of it
//! was copied through a buffer of ours.

pub(crate) mod acpi;
mod boot_params;
mod cpu;
mod initrd;
mod kernel;
mod mp_table;

use blueprint::Blueprint;
use blueprint::limits::CMDLINE_BYTES_MAX;
use boot_params::MemoryMap;
use hv::VcpuState;
use ram::{GuestRam, Kind};

use crate::Error;
use crate::layout::VirtioSlot;

/// Highest initial RAM disk end that a kernel without an opinion takes
/// (`initrd_addr_max` of every 64-bit Linux).
const INITRD_END_MAX: u64 = 0x8000_0000;

/// Fills guest memory and returns the state of the boot CPU.
pub(crate) fn load(
    ram: &GuestRam,
    blueprint: &Blueprint,
    virtio: &[VirtioSlot],
) -> Result<VcpuState, Error> {
    let memory = ram.memory();
    let map = memory_map(ram);
    let kernel = kernel::load(memory, map.low_end, blueprint.kernel())?;
    let initrd_end = kernel
        .header
        .map_or(INITRD_END_MAX, |header| match header.initrd_addr_max {
            0 => INITRD_END_MAX,
            last => u64::from(last) + 1,
        });
    let initrd = blueprint
        .initrd()
        .map(|path| initrd::load(memory, kernel.end, initrd_end.min(map.low_end), path))
        .transpose()?;
    let mut cmdline = blueprint.cmdline().to_owned();
    if mp_table::is_needed(&cmdline) {
        cmdline.push_str(&mp_table::devices(virtio));
        mp_table::write(memory, blueprint.vcpus(), virtio)?;
    } else {
        acpi::write(memory, blueprint.vcpus(), virtio)?;
    }
    if cmdline.len() >= CMDLINE_BYTES_MAX {
        return Err(Error::CommandLineLength { len: cmdline.len() });
    }
    boot_params::write(memory, map, &kernel, &cmdline, initrd)?;
    cpu::prepare(memory, kernel.entry)
}

fn memory_map(ram: &GuestRam) -> MemoryMap {
    let mut map = MemoryMap {
        low_end: 0,
        high: None,
    };
    for region in ram.regions().filter(|region| region.kind == Kind::Memory) {
        if region.start.0 == 0 {
            map.low_end = region.len;
        } else {
            map.high = Some((region.start.0, region.len));
        }
    }
    map
}

#[cfg(test)]
pub(crate) mod tests;
