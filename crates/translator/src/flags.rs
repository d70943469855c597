//! Which status flags a later instruction may read before they are written.
//! Where none is, a page check may use `xor` and `cmp`.
//!
//! Flags are never taken for dead at calls through registers, returns and
//! indirect jumps: Linux has functions that return a flag. At direct jumps the
//! target is looked at, across pages as well: a target page whose code changes
//! later is trusted to go on ignoring flags at this entry.
//!
//! Where flags are live but come from a comparison of registers that have not changed
//! since, a check may touch them as well: the comparison is done again behind it. The
//! same goes for AND, OR and XOR, whose flags are those of a TEST of the result.

use iced_x86::{Decoder, Instruction, Mnemonic, OpKind, RflagsBits};

use crate::access::RSP;
use crate::assembler::Assembler;
use crate::block::{Consulted, GuestCode, Kind, Request};
use crate::plan::{Step, decoder_options};
use crate::reencode::{operand_kind, operand_register, reencode};
use crate::registers::{Bank, encoding, general};
use crate::table::{Class, Row, STATUS, row};

/// Instructions looked at behind a block.
const PEEK_MAX: usize = 6;

/// Marks [`Step::flags_live`]. What it learnt that from, beside the block itself, goes
/// into `consulted` where something turned out dead: taking flags for live is right
/// with any code there.
pub(crate) fn mark(
    request: &Request,
    guest: &dyn GuestCode,
    steps: &mut [Step],
    consulted: &mut Vec<Consulted>,
) {
    if matches!(request.kind, Kind::Bounce | Kind::Step) {
        return;
    }
    let Some(last) = steps.last() else { return };
    let mut live = match last.class {
        Class::Jump | Class::Call => peek(
            request,
            guest,
            steps,
            consulted,
            last.ins.near_branch_target(),
        ),
        Class::Return
        | Class::JumpIndirect
        | Class::CallIndirect
        | Class::SystemCall
        | Class::SystemReturn
        | Class::Interpret => STATUS,
        _ => peek(request, guest, steps, consulted, last.ins.next_ip()),
    };
    for i in (0..steps.len()).rev() {
        let Some(step) = steps.get(i) else { break };
        let (class, row) = (step.class, step.row);
        if matches!(class, Class::Jcc | Class::Jrcxz) && live != STATUS {
            live |= peek(
                request,
                guest,
                steps,
                consulted,
                step.ins.near_branch_target(),
            );
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
    find_writers(steps);
}

/// The status flags as the decoder names them.
const STATUS_BITS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// Marks [`Step::again`].
fn find_writers(steps: &mut [Step]) {
    let (mut writer, mut registers) = (0, 0);
    for (i, step) in steps.iter_mut().enumerate() {
        step.again = writer;
        if step.ins.rflags_modified() & STATUS_BITS != 0 {
            (writer, registers) = match repeatable(step) {
                Some(registers) => (i as u8 + 1, registers),
                None => (0, 0),
            };
        } else if step.writes & registers != 0 {
            writer = 0;
        }
    }
}

/// The general registers, a bit each, that must keep their values for
/// [`write_again`] to write the flags that `step` wrote.
fn repeatable(step: &Step) -> Option<u16> {
    let (ins, row) = (&step.ins, step.row);
    if step.class != Class::Copy || step.memory || step.scratch_used != 0 || row.map != 0 {
        return None;
    }
    let mut registers = 0;
    for operand in 0..2 {
        if operand_kind(ins, operand) == OpKind::Register {
            registers |= 1 << general(operand_register(ins, operand))?;
        }
    }
    // Pushes and pops change RSP without naming it.
    if registers >> RSP & 1 != 0 {
        return None;
    }
    match (ins.mnemonic(), row.writes) {
        (Mnemonic::Cmp | Mnemonic::Test, 0) => Some(registers),
        (Mnemonic::And | Mnemonic::Or | Mnemonic::Xor, 1) => {
            let (bank, to) = encoding(ins.op0_register());
            (bank == Bank::General).then_some(1 << to)
        }
        _ => None,
    }
}

/// Writes the flags that `step`, which is [`repeatable`], wrote.
pub(crate) fn write_again(asm: &mut Assembler, step: &Step) {
    let row = step.row;
    if row.writes == 0 {
        return reencode(asm, row, &step.ins, None);
    }
    let (_, to) = encoding(step.ins.op0_register());
    if row.o16 {
        asm.byte(0x66);
    }
    // test to, to
    asm.bytes([
        0x40 | u8::from(row.w) << 3 | to >> 3 << 2 | to >> 3,
        0x85,
        0xc0 | (to & 7) << 3 | to & 7,
    ]);
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
fn peek(
    request: &Request,
    guest: &dyn GuestCode,
    steps: &[Step],
    consulted: &mut Vec<Consulted>,
    target: u64,
) -> u8 {
    let mut seen = Seen {
        wanted: 0,
        killed: 0,
    };
    let offset = target.wrapping_sub(request.va);
    let own = usize::from(steps.last().map_or(0, Step::next));
    if (offset as usize) < own
        && let Ok(first) = steps.binary_search_by_key(&offset, |step| u64::from(step.at))
    {
        for step in steps.iter().skip(first) {
            if seen.instruction(&step.ins, step.row) {
                break;
            }
        }
        return seen.result();
    }
    let Some(bytes) = guest.tail(target) else {
        return STATUS;
    };
    let options = decoder_options(request.features);
    let mut decoder = Decoder::with_ip(64, bytes, target, options);
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
    let result = seen.result();
    if result != STATUS {
        let len = decoder.position().min(bytes.len()) as u16;
        let new = Consulted { va: target, len };
        if !consulted.contains(&new) {
            consulted.push(new);
        }
    }
    result
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
            | Class::ZeroUpper
            | Class::ReadTsc
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use x86::features::Features;

    use super::*;
    use crate::block::Thunks;
    use crate::context::Mode;
    use crate::plan;

    const VA: u64 = 0x40_0000;

    struct Pages(Vec<u8>);

    impl GuestCode for Pages {
        fn tail(&self, va: u64) -> Option<&[u8]> {
            let offset = usize::try_from(va.checked_sub(VA)?).ok()?;
            self.0.get(offset..(offset | 0xfff) + 1)
        }
    }

    fn liveness(pages: &Pages, kind: Kind) -> Option<(Vec<bool>, Vec<Consulted>, u16)> {
        let request = Request {
            va: VA,
            mode: Mode::User,
            kind,
            features: Features::EVERYTHING,
            place: 0,
            first_exit: 2,
            thunks: Thunks::default(),
        };
        let (mut steps, mut consulted) = (Vec::new(), Vec::new());
        let decoded = plan::decode(&request, pages, &mut steps).ok()?;
        mark(&request, pages, &mut steps, &mut consulted);
        let live = steps.iter().map(|step| step.flags_live).collect();
        Some((live, consulted, decoded.guest_len))
    }

    /// Jumps near and far, and instructions that read and write flags.
    fn code() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<u8>().prop_map(|to| vec![0x74, to]),
            any::<u16>().prop_map(|to| {
                let [a, b] = (to & 0x1fff).to_le_bytes();
                vec![0x0f, 0x82, a, b, 0, 0]
            }),
            any::<u8>().prop_map(|to| vec![0xeb, to]),
            Just(vec![0x01, 0xd8]),
            Just(vec![0x48, 0x8b, 0x03]),
            Just(vec![0x11, 0xd8]),
            Just(vec![0x83, 0xf8, 0x07]),
        ];
        prop::collection::vec(piece, 1..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// What makes a kept translation right wherever its bytes are found again.
        #[test]
        fn flags_are_dead_only_because_of_bytes_that_were_consulted(
            code in code(), elsewhere in code(), near in 0_usize..600,
        ) {
            let mut one: Vec<u8> = elsewhere.iter().copied().cycle().take(0x4000).collect();
            one[..code.len()].copy_from_slice(&code);
            let pages = Pages(one.clone());
            let (live, consulted, len) = liveness(&pages, Kind::Grouped).unwrap();
            let mut other: Vec<u8> = (0..0x4000).map(|i| [0x72, 0x11, 0x90][(i + near) % 3]).collect();
            let kept = consulted.iter().map(|at| ((at.va - VA) as usize, usize::from(at.len)));
            for (at, len) in kept.chain([(0, usize::from(len))]) {
                other[at..at + len].copy_from_slice(&one[at..at + len]);
            }
            let (other, _, _) = liveness(&Pages(other), Kind::Grouped).unwrap();
            for (i, (kept, now)) in live.iter().zip(&other).enumerate() {
                prop_assert!(*kept || !now, "step {i}: {live:?} {other:?}");
            }
        }
    }
}
