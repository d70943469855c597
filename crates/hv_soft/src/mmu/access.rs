//! Accesses on the guest's behalf: by the interpreter, by exceptions, by what
//! translated code could not do itself.
//!
//! Invariant: a store checks every page it touches before it changes a byte, and
//! tells `blocks` when it hits translated code.

use hv::Gpa;
use translator::context::Mode;

use crate::apic::ioapic;
use crate::cpu::{Cpu, Run};
use crate::exceptions::Fault;
use crate::mmu::tlb::tlb_index;
use crate::mmu::walk::{Access, Paging, Walked};

/// Where an access goes, within one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Memory, at a guest-physical address; in the TLB now.
    Memory(u64),
    /// Memory with translated code; asked for a write.
    Code(u64),
    /// No memory: a device, or nothing; asked for a write, also memory that takes none.
    Device(u64),
}

impl Cpu {
    pub(crate) fn paging(&self) -> Paging {
        Paging {
            cr0: self.regs.cr0,
            cr3: self.regs.cr3,
            cr4: self.regs.cr4,
            efer: self.regs.efer,
        }
    }

    pub(crate) fn walk(&mut self, va: u64, access: Access, mode: Mode) -> Result<Walked, Fault> {
        self.stats.walks += 1;
        self.paging().walk(&self.ram, va, access, mode)
    }

    /// Finds the place of an access that stays within a page; fills the TLB.
    #[inline]
    pub(crate) fn place(&mut self, va: u64, write: bool, mode: Mode) -> Result<Place, Fault> {
        let index = tlb_index(va);
        let tlb = &self.context.tlb[mode as usize];
        let tag = if write {
            tlb.write_tag[index]
        } else {
            tlb.read_tag[index]
        };
        if tag == va & !0xfff {
            return Ok(Place::Memory(
                tlb.host[index].wrapping_sub(self.ram.host(0)) | va & 0xfff,
            ));
        }
        self.place_slowly(va, write, mode)
    }

    fn place_slowly(&mut self, va: u64, write: bool, mode: Mode) -> Result<Place, Fault> {
        let access = if write { Access::Write } else { Access::Read };
        let walked = self.walk(va, access, mode)?;
        if !self.ram.contains(walked.pa, 1) {
            return Ok(Place::Device(walked.pa));
        }
        let stores = self.ram.allows(walked.pa, 1, true);
        let writable = walked.writable && stores && self.may_write(walked.pa >> 12);
        if !self.breakpoints.watches_page(va) {
            self.fill_tlb(va, walked.pa, writable, walked.global, mode);
        } else if write && stores {
            self.written.set(walked.pa >> 12);
        }
        if write && !stores {
            // As a ROM: the store goes to whoever is at that address, nobody.
            return Ok(Place::Device(walked.pa));
        }
        if write && !writable {
            self.written.set(walked.pa >> 12);
            return Ok(Place::Code(walked.pa));
        }
        Ok(Place::Memory(walked.pa))
    }

    /// Makes the TLB allow an access that may never come: true if it does now. No
    /// page gets dirty by that.
    pub(crate) fn fill_ahead(&mut self, va: u64, write: bool, mode: Mode) -> bool {
        let allows = |cpu: &Self| {
            let tlb = &cpu.context.tlb[mode as usize];
            let tags = if write { &tlb.write_tag } else { &tlb.read_tag };
            tags[tlb_index(va)] == va & !0xfff
        };
        allows(self) || (self.place_slowly(va, false, mode).is_ok() && allows(self))
    }

    /// Eight bytes as the CPU itself reads them from its tables.
    pub(crate) fn load_system(&mut self, va: u64) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.read_memory(va, &mut bytes, Mode::Kernel)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Stores as the CPU itself does to its tables.
    pub(crate) fn store_system(&mut self, va: u64, from: &[u8]) -> Result<(), Fault> {
        self.write_memory(va, from, Mode::Kernel)
    }

    /// Reads; what is not memory reads as ones.
    pub(crate) fn read_memory(
        &mut self,
        va: u64,
        into: &mut [u8],
        mode: Mode,
    ) -> Result<(), Fault> {
        for (va, piece) in pages_mut(va, into) {
            match self.place(va, false, mode)? {
                Place::Memory(pa) | Place::Code(pa) => {
                    self.ram.read(pa, piece);
                }
                Place::Device(_) => piece.fill(0xff),
            }
        }
        Ok(())
    }

    /// Writes; what is not memory is left alone.
    pub(crate) fn write_memory(&mut self, va: u64, from: &[u8], mode: Mode) -> Result<(), Fault> {
        self.check_write(va, from.len() as u64, mode)?;
        for (va, piece) in pages(va, from) {
            match self.place(va, true, mode)? {
                Place::Memory(pa) => {
                    self.ram.write(pa, piece);
                }
                Place::Code(pa) => self.write_code(pa, piece),
                Place::Device(_) => {}
            }
        }
        Ok(())
    }

    fn write_code(&mut self, pa: u64, bytes: &[u8]) {
        self.begin_code_store(pa, bytes.len() as u64);
        self.ram.write(pa, bytes);
        self.end_code_store(pa, bytes.len() as u64);
    }

    /// Faults where a store of `len` bytes would, lowest page first.
    pub(crate) fn check_write(&mut self, va: u64, len: u64, mode: Mode) -> Result<(), Fault> {
        let first = self.place(va, true, mode).map(drop);
        let last = va.wrapping_add(len.saturating_sub(1));
        if first.is_err() || (va ^ last) & !0xfff == 0 {
            return first;
        }
        self.place(last & !0xfff, true, mode).map(drop)
    }
}

impl Run<'_> {
    /// Loads 1, 2, 4 or 8 bytes in the present privilege.
    pub(crate) fn load(&mut self, va: u64, size: usize) -> Result<u64, Fault> {
        let mode = self.mode();
        self.breakpoints.accessed(va, size, false);
        if (va & 0xfff) as usize + size <= 4096
            && let Place::Memory(pa) = self.place(va, false, mode)?
            && let Some(value) = self.ram.load(pa, size)
        {
            return Ok(value);
        }
        let mut bytes = [0; 8];
        self.read_bytes(va, &mut bytes[..size.min(8)])?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Stores 1, 2, 4 or 8 bytes in the present privilege.
    pub(crate) fn store(&mut self, va: u64, size: usize, value: u64) -> Result<(), Fault> {
        let mode = self.mode();
        self.breakpoints.accessed(va, size, true);
        let bytes = &value.to_le_bytes()[..size.min(8)];
        if (va & 0xfff) as usize + size <= 4096 {
            match self.place(va, true, mode)? {
                Place::Memory(pa) if self.ram.store(pa, size, value) => return Ok(()),
                Place::Code(pa) => {
                    self.write_code(pa, bytes);
                    return Ok(());
                }
                Place::Memory(_) | Place::Device(_) => {}
            }
        }
        self.write_bytes(va, bytes)
    }

    /// Reads any number of bytes in the present privilege, devices included.
    pub(crate) fn read_bytes(&mut self, va: u64, into: &mut [u8]) -> Result<(), Fault> {
        let mode = self.mode();
        self.breakpoints.accessed(va, into.len(), false);
        for (va, piece) in pages_mut(va, into) {
            match self.place(va, false, mode)? {
                Place::Memory(pa) | Place::Code(pa) => {
                    self.ram.read(pa, piece);
                }
                Place::Device(pa) => self.read_device(pa, piece),
            }
        }
        Ok(())
    }

    /// Writes any number of bytes in the present privilege, devices included.
    pub(crate) fn write_bytes(&mut self, va: u64, from: &[u8]) -> Result<(), Fault> {
        let mode = self.mode();
        self.breakpoints.accessed(va, from.len(), true);
        if (va & 0xfff) as usize + from.len() > 4096 {
            self.check_write(va, from.len() as u64, mode)?;
        }
        for (va, piece) in pages(va, from) {
            match self.place(va, true, mode)? {
                Place::Memory(pa) => {
                    self.ram.write(pa, piece);
                }
                Place::Code(pa) => self.write_code(pa, piece),
                Place::Device(pa) => self.write_device(pa, piece),
            }
        }
        Ok(())
    }

    fn read_device(&mut self, pa: u64, into: &mut [u8]) {
        let mut at = pa;
        for piece in device_pieces_mut(into) {
            self.stats.mmio += 1;
            if self.apic.answers(at) {
                let value = self.apic_read(at);
                for (byte, from) in piece
                    .iter_mut()
                    .zip(value.to_le_bytes().into_iter().chain([0; 4]))
                {
                    *byte = from;
                }
            } else if at & !0xfff == ioapic::BASE {
                let value = self.chips.ioapic().read(at);
                for (byte, from) in piece
                    .iter_mut()
                    .zip(value.to_le_bytes().into_iter().chain([0; 4]))
                {
                    *byte = from;
                }
            } else {
                piece.fill(0xff);
                self.outside(|io| io.mmio_read(Gpa(at), piece));
            }
            at += piece.len() as u64;
        }
    }

    fn write_device(&mut self, pa: u64, from: &[u8]) {
        let mut at = pa;
        for piece in device_pieces(from) {
            self.stats.mmio += 1;
            let mut word = [0; 4];
            for (to, byte) in word.iter_mut().zip(piece) {
                *to = *byte;
            }
            let word = u32::from_le_bytes(word);
            if self.apic.answers(at) {
                self.apic_write(at, word);
            } else if at & !0xfff == ioapic::BASE {
                self.chips.ioapic_write(at, word);
            } else {
                self.outside(|io| io.mmio_write(Gpa(at), piece));
            }
            at += piece.len() as u64;
        }
    }
}

/// Pieces of 8 bytes, then of 4, 2 and 1: what a device may be given.
fn device_piece(len: usize) -> usize {
    match len {
        8.. => 8,
        4..=7 => 4,
        2..=3 => 2,
        0..=1 => len,
    }
}

fn device_pieces(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (piece, rest) = bytes.split_at(device_piece(bytes.len()));
        bytes = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

fn device_pieces_mut(mut bytes: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    std::iter::from_fn(move || {
        let whole = std::mem::take(&mut bytes);
        let (piece, rest) = whole.split_at_mut(device_piece(whole.len()));
        bytes = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Splits at page borders.
fn pages(mut va: u64, mut bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    std::iter::from_fn(move || {
        let room = 4096 - (va & 0xfff) as usize;
        let (piece, rest) = bytes.split_at(room.min(bytes.len()));
        let at = va;
        bytes = rest;
        va = va.wrapping_add(piece.len() as u64);
        (!piece.is_empty()).then_some((at, piece))
    })
}

fn pages_mut(mut va: u64, mut bytes: &mut [u8]) -> impl Iterator<Item = (u64, &mut [u8])> {
    std::iter::from_fn(move || {
        let room = 4096 - (va & 0xfff) as usize;
        let whole = std::mem::take(&mut bytes);
        let (piece, rest) = whole.split_at_mut(room.min(whole.len()));
        let at = va;
        bytes = rest;
        va = va.wrapping_add(piece.len() as u64);
        (!piece.is_empty()).then_some((at, piece))
    })
}
