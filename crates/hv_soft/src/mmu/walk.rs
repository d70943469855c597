//! Page walks (SDM vol. 3, §4.5): linear to guest-physical, permissions, accessed
//! and dirty bits.
//!
//! Invariant: a walk changes nothing but those bits, and those only where it
//! succeeds at that level; a failed walk leaves no trace.

use std::sync::atomic::Ordering;

use translator::context::Mode;
use x86::control::{cr0, cr4, efer};
use x86::paging;

use crate::exceptions::{Fault, GP};
use crate::guest_ram::{Ram, set_bits};

/// Width of guest-physical addresses, as CPUID says.
pub(crate) const PHYSICAL_BITS: u32 = 46;
const RESERVED: u64 = paging::ADDRESS & !((1 << PHYSICAL_BITS) - 1);
const GIB_ENTRY_LOW: u64 = 0x3fff_e000;
const MIB_ENTRY_LOW: u64 = 0x001f_e000;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Loads.
    Read,
    /// Stores.
    Write,
    /// Fetches.
    Execute,
}

/// The registers that walks depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paging {
    pub(crate) cr0: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Walked {
    /// Guest-physical address.
    pub(crate) pa: u64,
    /// A write of the same privilege needs no other walk.
    pub(crate) writable: bool,
    /// Survives a load of CR3.
    pub(crate) global: bool,
}

impl Paging {
    /// Walks the tables for one access at `va`. What the CPU does on its own behalf
    /// is done in [`Mode::Kernel`], whatever EFLAGS.AC is.
    pub(crate) fn walk(
        &self,
        ram: &Ram,
        va: u64,
        access: Access,
        mode: Mode,
    ) -> Result<Walked, Fault> {
        if !paging::is_canonical(va) {
            return Err(GP);
        }
        let user = mode.is_user();
        let mut code = 0;
        if access == Access::Write {
            code |= paging::ERROR_WRITE;
        }
        if user {
            code |= paging::ERROR_USER;
        }
        let no_execute = self.efer & efer::NXE != 0;
        let smep = self.cr4 & cr4::SMEP != 0;
        if access == Access::Execute && (no_execute || smep) {
            code |= paging::ERROR_FETCH;
        }
        let reserved = if no_execute {
            RESERVED
        } else {
            RESERVED | paging::NO_EXECUTE
        };
        let mut table = self.cr3 & paging::ADDRESS;
        let mut allowed = paging::WRITABLE | paging::USER;
        let mut executable = true;
        let mut level = 4;
        loop {
            let shift = 12 + 9 * (level - 1);
            let at = table + (va >> shift & 511) * 8;
            let absent = Err(Fault::Page(va, code));
            let Some(slot) = ram.entry(at) else {
                return absent;
            };
            let entry = slot.load(Ordering::Acquire);
            if entry & paging::PRESENT == 0 {
                return absent;
            }
            let leaf = level == 1 || (level <= 3 && entry & paging::LARGE != 0);
            let low = match (leaf, level) {
                (true, 3) => GIB_ENTRY_LOW,
                (true, 2) => MIB_ENTRY_LOW,
                (false, 4) => paging::LARGE,
                _ => 0,
            };
            if entry & (reserved | low) != 0 {
                return Err(Fault::Page(
                    va,
                    code | paging::ERROR_PRESENT | paging::ERROR_RESERVED,
                ));
            }
            allowed &= entry;
            executable &= !no_execute || entry & paging::NO_EXECUTE == 0;
            if !leaf {
                if !set_bits(slot, entry, paging::ACCESSED) {
                    continue;
                }
                table = entry & paging::ADDRESS;
                level -= 1;
                continue;
            }
            let may_write = allowed & paging::WRITABLE != 0 || (!user && self.cr0 & cr0::WP == 0);
            let of_user = allowed & paging::USER != 0;
            let smap = mode == Mode::Kernel && self.cr4 & cr4::SMAP != 0;
            let refused = match access {
                Access::Read => smap && of_user,
                Access::Write => !may_write || (smap && of_user),
                Access::Execute => !executable || (smep && !user && of_user),
            } || (user && !of_user);
            if refused {
                return Err(Fault::Page(va, code | paging::ERROR_PRESENT));
            }
            let dirty = if access == Access::Write {
                paging::DIRTY
            } else {
                0
            };
            if !set_bits(slot, entry, paging::ACCESSED | dirty) {
                continue;
            }
            let size = 1u64 << shift;
            return Ok(Walked {
                pa: entry & paging::ADDRESS & !(size - 1) | va & (size - 1),
                writable: may_write && (entry | dirty) & paging::DIRTY != 0,
                global: entry & paging::GLOBAL != 0,
            });
        }
    }
}
