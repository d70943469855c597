//! Which status flags a later instruction may read before they are written.
//! Where none is, a page check may use `xor` and `cmp`.
//!
//! Flags are never taken for dead at calls through registers, returns and
//! indirect jumps: Linux has functions that return a flag. At direct jumps the
//! target is looked at, across pages as well: a target page whose code changes
//! later is trusted to go on ignoring flags at this entry.

use iced_x86::{Decoder, Instruction, OpKind};

use crate::block::{GuestCode, Kind, Request};
use crate::plan::{DECODER_OPTIONS, PAGE, Step};
use crate::reencode::operand_kind;
use crate::table::{Class, Row, STATUS, row};

/// Instructions looked at behind a block.
const PEEK_MAX: usize = 6;

/// Marks [`Step::flags_live`]; returns the flags that the block wants.
pub(crate) fn mark(request: &Request, guest: &dyn GuestCode, steps: &mut [Step]) -> u8 {
    if request.kind == Kind::Bounce {
        return STATUS;
    }
    let Some(last) = steps.last() else {
        return STATUS;
    };
    let mut live = match last.class {
        Class::Jump | Class::Call => peek(request, guest, steps, last.ins.near_branch_target()),
        Class::Return | Class::JumpIndirect | Class::CallIndirect | Class::Interpret => STATUS,
        _ => peek(request, guest, steps, last.ins.next_ip()),
    };
    for i in (0..steps.len()).rev() {
        let Some(step) = steps.get(i) else { break };
        let (class, row) = (step.class, step.row);
        if matches!(class, Class::Jcc | Class::Jrcxz) && live != STATUS {
            live |= peek(request, guest, steps, step.ins.near_branch_target());
        }
        if class == Class::Interpret {
            live = STATUS;
        } else {
            live = live & !kills(&step.ins, row) | row.reads;
        }
        if let Some(step) = steps.get_mut(i) {
            step.flags_live = live != 0;
        }
    }
    live
}

/// Flags that the instruction surely writes.
fn kills(ins: &Instruction, row: &Row) -> u8 {
    // A shift by an immediate that is 0 after masking writes nothing.
    let shift = row.map == 0 && matches!(row.opcode, 0xc0 | 0xc1)
        || row.map == 1 && matches!(row.opcode, 0xa4 | 0xac);
    if shift
        && operand_kind(ins, row.immediate) == OpKind::Immediate8
        && ins.immediate8() & 0x1f == 0
    {
        0
    } else {
        row.kills
    }
}

/// The flags that code at `target` may read before it writes them.
fn peek(request: &Request, guest: &dyn GuestCode, steps: &[Step], target: u64) -> u8 {
    let mut seen = Seen {
        wanted: 0,
        killed: 0,
    };
    let offset = target.wrapping_sub(request.va);
    let own = usize::from(steps.last().map_or(0, Step::next));
    if (offset as usize) < own {
        if let Ok(first) = steps.binary_search_by_key(&offset, |step| u64::from(step.at)) {
            for step in steps.iter().skip(first) {
                if seen.instruction(&step.ins, step.row) {
                    break;
                }
            }
            return seen.result();
        }
    } else if (target ^ request.va) & !(PAGE - 1) == 0
        && let Some(wanted) = guest.flags_wanted(target)
    {
        return wanted;
    }
    let Some(bytes) = guest.tail(target) else {
        return STATUS;
    };
    let mut decoder = Decoder::with_ip(64, bytes, target, DECODER_OPTIONS);
    let mut ins = Instruction::default();
    for _ in 0..PEEK_MAX {
        if !decoder.can_decode() {
            break;
        }
        decoder.decode_out(&mut ins);
        if seen.instruction(&ins, row(ins.code())) {
            break;
        }
    }
    seen.result()
}

struct Seen {
    wanted: u8,
    killed: u8,
}

impl Seen {
    /// Takes in one instruction; true when nothing more can be learnt.
    fn instruction(&mut self, ins: &Instruction, row: &Row) -> bool {
        self.wanted |= row.reads & !self.killed;
        match row.class {
            Class::Copy
            | Class::Direction
            | Class::BitString
            | Class::Nothing
            | Class::Lea
            | Class::Push
            | Class::Pop
            | Class::Leave => {
                self.killed |= kills(ins, row);
                self.wanted | self.killed == STATUS
            }
            // The row of MOVS and STOS is theirs with REP as well.
            _ => true,
        }
    }

    fn result(&self) -> u8 {
        self.wanted | STATUS & !self.killed
    }
}
