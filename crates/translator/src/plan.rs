//! From guest bytes to steps: decodes one block's instructions, finds each one's
//! class and what the later passes ask of it again and again.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};

use x86::features::{Feature, Features};

use crate::block::{GuestCode, Kind, Refused, Request};
use crate::context::Mode;
use crate::reencode::{operand_kind, operand_register};
use crate::registers::{Bank, encoding};
use crate::table::{Class, Row, row};

/// Most instructions in a block; sets of steps are bits of a u64.
pub(crate) const STEPS_MAX: usize = 64;
/// Most conditional jumps in a block.
const JCC_MAX: usize = 4;
/// Longest instruction in bytes (SDM vol. 2, 2.3.11).
const INSTRUCTION_BYTES_MAX: usize = 15;
pub(crate) const PAGE: u64 = 4096;

/// How to decode for a guest with `features`: REP BSF and REP BSR are BSF and BSR
/// without BMI1 and LZCNT, and the hint space is NOPs without CET and MPX.
pub fn decoder_options(features: Features) -> u32 {
    let mut options = DecoderOptions::FORCE_RESERVED_NOP;
    if !features.has(Feature::Bmi1) {
        options |= DecoderOptions::NO_MPFX_0FBC;
    }
    if !features.has(Feature::Lzcnt) {
        options |= DecoderOptions::NO_MPFX_0FBD;
    }
    options
}

/// One instruction of a block.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub ins: Instruction,
    pub row: &'static Row,
    pub class: Class,
    /// Bytes from the block's start.
    pub at: u16,
    /// It has a memory operand, of `size` bytes, which it writes if `write`.
    pub memory: bool,
    pub size: u8,
    pub write: bool,
    /// Guest r14 (bit 0) and r15 (bit 1) as register operands.
    pub scratch_used: u8,
    /// Likewise, written.
    pub scratch_written: u8,
    /// General registers that it writes, a bit each.
    pub writes: u16,
    /// It may set bits in the upper half of a YMM register.
    pub dirties_upper: bool,
    /// AH, BH, CH or DH is an operand.
    pub high_byte: bool,
    /// Some status flag may be read before it is written from here on.
    pub flags_live: bool,
    /// All status flags here are what the instruction with this number less one
    /// would write if it were executed again; 0: no such instruction.
    pub again: u8,
}

impl Step {
    /// A check here must not touch flags: they are live, and nothing can bring them
    /// back.
    pub(crate) fn keeps_flags(&self) -> bool {
        self.flags_live && self.again == 0
    }

    /// Its memory operand must be at a host address in RSI: the scratch registers are
    /// taken, or may not be named.
    pub(crate) fn wants_low_address(&self) -> bool {
        self.high_byte || self.scratch_used == 3
    }

    pub(crate) fn next(&self) -> u16 {
        self.at + self.ins.len() as u16
    }

    /// The base register if the memory operand is base + displacement, with a base
    /// that has its guest value in a host register.
    pub(crate) fn plain_base(&self) -> Option<u8> {
        let base = crate::registers::general64(self.ins.memory_base())?;
        (base < 14
            && self.ins.memory_index() == Register::None
            && !matches!(self.ins.memory_segment(), Register::FS | Register::GS))
        .then_some(base)
    }
}

/// What decoding found beside the steps.
pub(crate) struct Decoded {
    pub crosses_page: bool,
    pub guest_len: u16,
}

/// Decodes the block that `request` wants.
pub(crate) fn decode(
    request: &Request,
    guest: &dyn GuestCode,
    steps: &mut Vec<Step>,
) -> Result<Decoded, Refused> {
    steps.clear();
    let tail = guest.tail(request.va).ok_or(Refused::Fetch(request.va))?;
    let most = match request.kind {
        Kind::Bounce | Kind::Step => 1,
        Kind::Grouped | Kind::PerAccess => STEPS_MAX,
    };
    let options = decoder_options(request.features);
    let mut decoder = Decoder::with_ip(64, tail, request.va, options);
    let stops = guest.stops();
    let mut jumps = 0;
    let mut at = 0;
    while steps.len() < most && decoder.can_decode() {
        steps.push(Step::default());
        let Some(step) = steps.last_mut() else { break };
        decoder.decode_out(&mut step.ins);
        if step.ins.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
            steps.pop();
            if steps.is_empty() {
                return decode_across(request, guest, tail, steps);
            }
            break;
        }
        if at != 0 && !stops.is_empty() && stops.contains(&step.ins.ip()) {
            steps.pop();
            break;
        }
        step.at = at;
        step.examine(request);
        at = step.next();
        let class = step.class;
        if class == Class::Jcc {
            jumps += 1;
            if jumps == JCC_MAX {
                break;
            }
        } else if ends_block(class) {
            break;
        }
    }
    Ok(Decoded {
        crosses_page: false,
        guest_len: at,
    })
}

fn decode_across(
    request: &Request,
    guest: &dyn GuestCode,
    tail: &[u8],
    steps: &mut Vec<Step>,
) -> Result<Decoded, Refused> {
    let next = (request.va | (PAGE - 1)).wrapping_add(1);
    let more = guest.tail(next).ok_or(Refused::Fetch(next))?;
    let mut bytes = [0; 2 * INSTRUCTION_BYTES_MAX];
    let mut len = 0;
    for (to, from) in bytes.iter_mut().zip(tail.iter().chain(more)) {
        *to = *from;
        len += 1;
    }
    let bytes = bytes.get(..len).unwrap_or_default();
    let options = decoder_options(request.features);
    let mut decoder = Decoder::with_ip(64, bytes, request.va, options);
    let step = step(&decoder.decode(), 0, request);
    steps.push(step);
    Ok(Decoded {
        crosses_page: true,
        guest_len: step.next(),
    })
}

/// Does control never simply run on behind an instruction of this class?
pub(crate) fn ends_block(class: Class) -> bool {
    matches!(
        class,
        Class::Interpret
            | Class::Jrcxz
            | Class::Jump
            | Class::JumpIndirect
            | Class::Call
            | Class::CallIndirect
            | Class::Return
            | Class::InterruptsOn
            | Class::UserAccessOn
            | Class::UserAccessOff
            | Class::SystemCall
            | Class::SystemReturn
            | Class::RepString
    )
}

/// May an instruction of this class go on elsewhere than behind itself?
pub(crate) fn jumps(class: Class) -> bool {
    class == Class::Jcc || ends_block(class)
}

/// Everything about one instruction.
pub(crate) fn step(ins: &Instruction, at: u16, request: &Request) -> Step {
    let mut step = Step {
        ins: *ins,
        at,
        ..Step::default()
    };
    step.examine(request);
    step
}

impl Default for Step {
    fn default() -> Self {
        Self {
            ins: Instruction::default(),
            row: row(Code::INVALID),
            class: Class::Interpret,
            at: 0,
            memory: false,
            size: 0,
            write: false,
            scratch_used: 0,
            scratch_written: 0,
            writes: 0,
            dirties_upper: false,
            high_byte: false,
            flags_live: true,
            again: 0,
        }
    }
}

impl Step {
    /// Finds out all that follows from `ins`, in a fresh step.
    #[inline]
    fn examine(&mut self, request: &Request) {
        let row = row(self.ins.code());
        self.row = row;
        self.class = row.class;
        if !request.features.has(row.feature) {
            self.class = Class::Interpret;
        }
        if self.class == Class::Interpret {
            return;
        }
        self.writes = u16::from(row.clobbers);
        for operand in [row.reg, row.rm, row.low, row.vvvv, row.is4] {
            if operand < 4 {
                match operand_kind(&self.ins, operand) {
                    OpKind::Register => self.examine_register(operand),
                    OpKind::Memory => {
                        self.memory = true;
                        self.write = row.writes >> operand & 1 != 0;
                        self.size = self.ins.memory_size().size() as u8;
                    }
                    _ => {}
                }
            }
        }
        self.class = class(self, request.mode);
    }

    fn examine_register(&mut self, operand: u8) {
        let (bank, number) = encoding(operand_register(&self.ins, operand));
        let written = self.row.writes >> operand & 1;
        match bank {
            Bank::General | Bank::Byte | Bank::RexByte => {
                self.writes |= u16::from(written) << number;
            }
            Bank::HighByte => {
                self.writes |= u16::from(written) << (number & 3);
                self.high_byte = true;
            }
            Bank::Vector => {
                let wide = operand_register(&self.ins, operand).is_ymm();
                self.dirties_upper |= written != 0 && wide;
            }
            Bank::Other | Bank::Stack => {}
        }
        if number >= 14 && matches!(bank, Bank::General | Bank::Byte) {
            self.scratch_used |= 1 << (number - 14);
            self.scratch_written |= written << (number - 14);
        }
    }
}

fn class(step: &Step, mode: Mode) -> Class {
    let (ins, row) = (&step.ins, step.row);
    match row.class {
        Class::Copy if step.memory && step.size == 0 => Class::Interpret,
        Class::BitString if !step.memory => Class::Copy,
        // The bit offset would have to wrap with the address.
        Class::BitString if has_address32(ins) => Class::Interpret,
        Class::InterruptsOff
        | Class::InterruptsOn
        | Class::UserAccessOn
        | Class::UserAccessOff
        | Class::SwapGs
            if mode == Mode::User =>
        {
            Class::Interpret
        }
        Class::SystemCall if mode != Mode::User => Class::Interpret,
        Class::SystemReturn if mode != Mode::Kernel => Class::Interpret,
        Class::UserAccessOn if mode == Mode::KernelUserAccess => Class::Nothing,
        Class::UserAccessOff if mode == Mode::Kernel => Class::Nothing,
        Class::String => string_class(ins),
        class => class,
    }
}

fn has_address32(ins: &Instruction) -> bool {
    crate::registers::is_general32(ins.memory_base())
        || crate::registers::is_general32(ins.memory_index())
        || ins.memory_base() == Register::EIP
}

fn string_class(ins: &Instruction) -> Class {
    let plain = (0..2).all(|operand| {
        matches!(
            operand_kind(ins, operand),
            OpKind::Register | OpKind::MemorySegRSI | OpKind::MemoryESRDI
        )
    });
    if !plain || ins.segment_prefix() != Register::None || ins.has_repne_prefix() {
        Class::Interpret
    } else if !ins.has_rep_prefix() {
        Class::String
    } else if operand_kind(ins, 0) == OpKind::MemoryESRDI {
        Class::RepString
    } else {
        Class::Interpret
    }
}
