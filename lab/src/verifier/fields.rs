//! What translated code may do with each field of the context. A field that is not
//! listed is out of reach: the host's stack pointer, where to resume, the masks'
//! values, the tables' contents.

use std::mem::{offset_of, size_of};

use translator::context::{Context, JumpCache, Mode, TLB_ENTRIES, Tlb};

use super::value::Tag;

/// A field, as translated code sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    /// Keeps a value: the index of a cell.
    Cell(usize),
    /// To be read; the guest may know it.
    Plain,
    /// The guest's, to be read and written.
    Guest,
    /// 0 or 1.
    Bit,
    /// RFLAGS.AC in its place, or 0.
    AlignmentCheck,
    /// DF's mirror.
    Direction,
    /// `bounce_at`.
    Bounce,
    /// Masks for `pext`.
    TlbMask,
    PageMask,
    JumpMask,
    /// Of the mode's TLB: the stack's slot, or entry 0 of an array.
    StackTag,
    StackAddend,
    Tags(Tag),
    Hosts,
    Addends,
    /// Entry 0 of the mode's jump cache.
    Jumps,
}

/// Cells of [`Field::Cell`], by offset.
const CELLS: [usize; super::state::CELLS] = {
    let mut cells = [0; super::state::CELLS];
    cells[0] = offset_of!(Context, gpr) + 14 * 8;
    cells[1] = offset_of!(Context, gpr) + 15 * 8;
    cells[2] = offset_of!(Context, temp);
    cells[3] = offset_of!(Context, temp) + 8;
    cells[4] = offset_of!(Context, temp) + 16;
    cells[5] = offset_of!(Context, temp) + 24;
    cells[6] = offset_of!(Context, saved_rcx);
    let mut base = 0;
    while base < 14 {
        cells[7 + base] = offset_of!(Context, group_addend) + base * 8;
        base += 1;
    }
    cells
};

const SINGLE: [(usize, Field); 16] = [
    (offset_of!(Context, direction), Field::Direction),
    (offset_of!(Context, fs_base), Field::Plain),
    (offset_of!(Context, tsc_aux), Field::Plain),
    (offset_of!(Context, tsc_offset), Field::Plain),
    (offset_of!(Context, upper_live), Field::Bit),
    (offset_of!(Context, gs_base), Field::Guest),
    (offset_of!(Context, kernel_gs_base), Field::Guest),
    (offset_of!(Context, interrupts_enabled), Field::Bit),
    (offset_of!(Context, pending), Field::Plain),
    (offset_of!(Context, rflags_high), Field::Plain),
    (offset_of!(Context, bounce_at), Field::Bounce),
    (offset_of!(Context, poll), Field::Plain),
    (offset_of!(Context, tlb_mask), Field::TlbMask),
    (offset_of!(Context, page_mask), Field::PageMask),
    (offset_of!(Context, alignment_check), Field::AlignmentCheck),
    (offset_of!(Context, shadow), Field::Guest),
];

/// The field at an offset from GS, for a block of `mode`, and the index of the entry
/// if it is one of an array.
pub(crate) fn field(offset: u64, mode: Mode) -> Option<(Field, usize)> {
    let offset = usize::try_from(offset).ok()?;
    if let Some(cell) = CELLS.iter().position(|cell| *cell == offset) {
        return Some((Field::Cell(cell), 0));
    }
    if let Some((_, field)) = SINGLE.iter().find(|(at, _)| *at == offset) {
        return Some((*field, 0));
    }
    if offset == offset_of!(Context, instructions) + usize::from(mode.is_user()) * 8 {
        return Some((Field::Guest, 0));
    }
    let mask = match mode {
        Mode::Kernel | Mode::User => offset_of!(Context, jump_mask),
        Mode::KernelUserAccess => offset_of!(Context, user_access_jump_mask),
    };
    if offset == mask {
        return Some((Field::JumpMask, 0));
    }
    let tlb = offset_of!(Context, tlb) + mode as usize * size_of::<Tlb>();
    if let Some(at) = offset.checked_sub(tlb) {
        let arrays = [
            (offset_of!(Tlb, read_tag), Field::Tags(Tag::Read)),
            (offset_of!(Tlb, write_tag), Field::Tags(Tag::Write)),
            (offset_of!(Tlb, host), Field::Hosts),
            (offset_of!(Tlb, addend), Field::Addends),
        ];
        for (start, field) in arrays {
            if let Some(index) = entry(at, start, TLB_ENTRIES) {
                return Some((field, index));
            }
        }
        if at == offset_of!(Tlb, stack_tag) {
            return Some((Field::StackTag, 0));
        }
        if at == offset_of!(Tlb, stack_addend) {
            return Some((Field::StackAddend, 0));
        }
    }
    jump(offset, mode)
}

/// The jump cache entry that STAC or CLAC goes on through: of the other kernel mode.
pub(crate) fn switch(offset: u64, mode: Mode) -> Option<(Field, usize)> {
    let to = match mode {
        Mode::Kernel => Mode::KernelUserAccess,
        Mode::KernelUserAccess => Mode::Kernel,
        Mode::User => return None,
    };
    jump(usize::try_from(offset).ok()?, to)
}

fn jump(offset: usize, mode: Mode) -> Option<(Field, usize)> {
    let jumps = offset_of!(Context, jumps) + mode as usize * size_of::<JumpCache>();
    entry(offset, jumps, mode.jump_entries()).map(|index| (Field::Jumps, index))
}

fn entry(offset: usize, start: usize, entries: usize) -> Option<usize> {
    let at = offset.checked_sub(start)?;
    (at % 8 == 0 && at / 8 < entries).then_some(at / 8)
}
