//! Random programs: pieces of straight code with short branches, strewn over pages
//! and over addresses that share a jump cache entry, linked by every kind of jump.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, Register};

use x86::features::{Feature, Features};
use x86::xsave;

use crate::Random;
use crate::instruction::{Roles, general, random};
use crate::layout::{CODE, DATA, DATA_LEN, NO_VECTOR, SLOTS, State};

/// Distance of addresses that share a jump cache entry.
const CONFLICT: u64 = 0x4_0000;
const PIECES_MAX: u64 = 4;
/// Bytes of code in a piece, at most.
const PIECE_BYTES: usize = 512;
const RCX: u8 = 1;
const RDI: u8 = 7;

/// Every code that both sides execute, and that is of this CPU.
pub fn compared_codes() -> impl Iterator<Item = Code> {
    let host = Features::of_host();
    let ours = translator::interpreted_codes().filter(|code| is_vector(*code));
    translator::allowed_codes()
        .chain(ours)
        .filter(move |code| is_compared(*code) && host.has(translator::feature(*code)))
}

/// Vector instructions that the engine executes itself.
fn is_vector(code: Code) -> bool {
    matches!(
        translator::feature(code),
        Feature::Mmx | Feature::Sse | Feature::Avx | Feature::Avx2
    )
}

/// Not those that cannot be: the clock, chance, what CPL 3 may not do or leaves it by,
/// segment bases.
fn is_compared(code: Code) -> bool {
    !matches!(
        translator::feature(code),
        Feature::Tsc
            | Feature::Rdtscp
            | Feature::Rdpid
            | Feature::Rdrand
            | Feature::Rdseed
            | Feature::Fsgsbase
    ) && !matches!(
        code,
        Code::Cli
            | Code::Sti
            | Code::Swapgs
            | Code::Clac
            | Code::Stac
            | Code::Syscall
            | Code::Sysretq
    )
}

/// A program and what it starts from.
pub struct Program {
    /// Code, by linear address.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// Where it ends: the place for the last jump.
    pub end: u64,
    /// What lies at [`SLOTS`].
    pub slots: Vec<u8>,
    /// What lies at [`DATA`].
    pub data: Vec<u8>,
    /// Registers, RIP included.
    pub state: State,
    /// One line per instruction.
    pub text: String,
    /// Codes in it.
    pub codes: BTreeSet<Code>,
}

/// Makes programs.
pub struct Generator {
    random: Random,
    info: InstructionInfoFactory,
    codes: Vec<Code>,
    turn: usize,
    /// The CPU has AVX.
    avx: bool,
}

struct Draft {
    roles: Roles,
    text: String,
    used: BTreeSet<Code>,
    at: u64,
    code: Vec<u8>,
    /// Bytes on the stack above where it began.
    depth: i64,
}

impl Generator {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let host = Features::of_host();
        let codes: Vec<_> = compared_codes().filter(|code| is_plain(*code)).collect();
        let mut random = Random::new(seed);
        let turn = random.below(codes.len() as u64) as usize;
        Self {
            random,
            info: InstructionInfoFactory::new(),
            codes,
            turn,
            avx: host.has(Feature::Avx),
        }
    }

    /// The next program.
    pub fn program(&mut self) -> Program {
        let roles = self.roles();
        let count = 1 + self.random.below(PIECES_MAX);
        let starts = self.starts(count);
        let mut slots = vec![0; 4096];
        for (slot, start) in slots.chunks_exact_mut(8).zip(&starts) {
            slot.copy_from_slice(&start.to_le_bytes());
        }
        let mut draft = Draft {
            roles,
            text: String::new(),
            used: BTreeSet::new(),
            at: 0,
            code: Vec::new(),
            depth: 0,
        };
        let mut pieces = Vec::new();
        let mut end = 0;
        for (i, start) in starts.iter().enumerate() {
            draft.at = *start;
            draft.code = Vec::new();
            for _ in 0..=self.random.below(20) {
                self.item(&mut draft);
                if draft.code.len() > PIECE_BYTES / 2 {
                    break;
                }
            }
            match starts.get(i + 1) {
                Some(next) => self.transfer(&mut draft, i as u64 + 1, *next),
                None => end = draft.at + draft.code.len() as u64,
            }
            pieces.push((*start, std::mem::take(&mut draft.code)));
        }
        let mut state = self.state(&draft.roles);
        state.rip = starts.first().copied().unwrap_or(CODE);
        let mut data = vec![0; DATA_LEN];
        for word in data.chunks_exact_mut(8) {
            word.copy_from_slice(&self.number().to_le_bytes());
        }
        Program {
            pieces,
            end,
            slots,
            data,
            state,
            text: draft.text,
            codes: draft.used,
        }
    }

    /// Where the pieces lie: in conflict for a jump cache entry, some so that an
    /// instruction crosses a page.
    fn starts(&mut self, count: u64) -> Vec<u64> {
        let random = &mut self.random;
        let page = random.below(0x3e) * 0x1000;
        let offset = if random.one_in(3) {
            0xf80 + random.below(0x80)
        } else {
            random.below(0xe00)
        };
        (0..count)
            .map(|i| {
                let near = if random.one_in(3) {
                    random.below(2) * 0x400
                } else {
                    0
                };
                CODE + i * CONFLICT + page + offset + near
            })
            .collect()
    }

    fn roles(&mut self) -> Roles {
        // RAX, RCX and RDX are written by too much.
        let mut free = vec![3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        let mut take = || free.swap_remove(self.random.below(free.len() as u64) as usize);
        Roles {
            pointers: vec![take(), take(), take()],
            index: take(),
        }
    }

    fn number(&mut self) -> u64 {
        match self.random.below(6) {
            0 => self.random.below(256),
            1 => self.random.below(300).wrapping_neg(),
            2 => (self.random.below(2000) as f64 / 3.0).to_bits(),
            3 => {
                u64::from((self.random.below(2000) as f32 / 7.0).to_bits()) << 32
                    | u64::from((self.random.below(99) as f32).to_bits())
            }
            _ => self.random.bits(),
        }
    }

    fn state(&mut self, roles: &Roles) -> State {
        let mut gpr = [0; 16];
        for register in &mut gpr {
            *register = self.number();
        }
        for pointer in &roles.pointers {
            let page = DATA + 0x1000 * (1 + self.random.below(3));
            gpr[usize::from(*pointer)] = page
                + if self.random.one_in(2) {
                    0xfc0 + 16 * self.random.below(8)
                } else {
                    0x400 + 16 * self.random.below(64)
                };
            if self.random.one_in(40) {
                // Read-only, absent or not canonical.
                let bad = [
                    DATA + 0x4ff0,
                    DATA + 0x5100,
                    DATA + 0x5ff0,
                    0x8000_0000_1000,
                ];
                gpr[usize::from(*pointer)] = self.random.pick(&bad);
            }
        }
        gpr[usize::from(roles.index)] = match self.random.below(4) {
            0 => self.random.below(48).wrapping_neg(),
            1 => self.random.below(48),
            _ => 16 * self.random.below(4),
        };
        gpr[4] = DATA
            + match self.random.below(4) {
                0 => 0x2000,
                1 => 0x2010,
                2 => 0x2008,
                _ => 0x1800,
            };
        let mut area = [0; xsave::AVX_BYTES];
        area[..2].copy_from_slice(&0x037f_u16.to_le_bytes());
        area[4] = self.random.bits() as u8;
        let masked = if self.random.one_in(8) {
            self.random.bits() as u16 & 0x1f80
        } else {
            0x1f80
        };
        let rounding = (self.random.bits() as u16 & 3) << 13;
        area[24..26].copy_from_slice(&(masked | rounding).to_le_bytes());
        for register in area[32..160].chunks_exact_mut(16) {
            register[..8].copy_from_slice(&self.number().to_le_bytes());
            let exponent = 0x3ff0_u16.wrapping_add(self.random.below(64) as u16);
            register[8..10].copy_from_slice(&exponent.to_le_bytes());
        }
        for half in area[160..416].chunks_exact_mut(8) {
            half.copy_from_slice(&self.number().to_le_bytes());
        }
        if self.avx {
            let mut there = xsave::X87 | xsave::SSE;
            // Programs without AVX in use are others to the engine.
            if !self.random.one_in(4) {
                there |= xsave::AVX;
                for half in area[xsave::YMM_HIGH].chunks_exact_mut(8) {
                    half.copy_from_slice(&self.number().to_le_bytes());
                }
            }
            area[xsave::XSTATE_BV] = there as u8;
        }
        let down = if self.random.one_in(4) { 0x400 } else { 0 };
        State {
            gpr,
            rip: 0,
            rflags: self.random.bits() & 0x8d5 | 0x202 | down,
            vector: NO_VECTOR,
            cr2: 0,
            wrote: 0,
            host_rsp: 0,
            host_mxcsr: 0,
            avx: 0,
            xsave: area,
        }
    }

    fn item(&mut self, draft: &mut Draft) {
        match self.random.below(24) {
            0 => self.string(draft),
            1 => {
                // A frame, left by LEAVE.
                if !draft.roles.pointers.contains(&5) && draft.roles.index != 5 {
                    draft.with1(Code::Push_r64, Register::RBP);
                    draft.with2(Code::Mov_r64_rm64, Register::RBP, Register::RSP);
                    draft.push(Instruction::with(Code::Leaveq));
                }
            }
            3 => {
                draft.with1(Code::Push_r64, Register::RSP);
                draft.with1(Code::Pop_r64, Register::RSP);
            }
            2 => draft.lea_rsp(if draft.depth > 0 { 8 } else { -8 }),
            _ => self.plain(draft),
        }
    }

    /// The next code's instruction, at times behind a branch over it.
    fn plain(&mut self, draft: &mut Draft) {
        let code = self.codes[self.turn % self.codes.len()];
        self.turn = self.turn.wrapping_add(1 + self.random.below(7) as usize);
        for _ in 0..20 {
            let Some(ins) = random(code, &draft.roles, &mut self.random, &mut self.info) else {
                continue;
            };
            let moves = match code {
                Code::Push_r64
                | Code::Pushq_imm8
                | Code::Pushq_imm32
                | Code::Push_rm64
                | Code::Pushfq => 8,
                Code::Pop_r64 | Code::Pop_rm64 => -8,
                _ => 0,
            };
            if (draft.depth + moves).abs() > 256 {
                return;
            }
            if !self.bring_near(draft, &ins) {
                continue;
            }
            let branch = moves == 0 && self.random.one_in(8);
            let Some(bytes) = draft.encode(ins, if branch { 2 } else { 0 }) else {
                continue;
            };
            if branch {
                self.branch_over(draft, bytes.len() as u8);
            }
            draft.take(&ins, &bytes);
            draft.depth += moves;
            return;
        }
    }

    /// Keeps the addresses of gathers in reach, mostly. Those of MASKMOVDQU always: it
    /// may or may not fault for bytes that it leaves alone. False if that cannot be.
    fn bring_near(&mut self, draft: &mut Draft, ins: &Instruction) -> bool {
        let index = ins.memory_index();
        if index.is_xmm() || index.is_ymm() {
            let bits = 18 + self.random.below(8) as u32;
            let (code, bits) = match (index.is_ymm(), self.random.one_in(2)) {
                (false, false) => (Code::VEX_Vpsrad_xmm_xmm_imm8, bits),
                (true, false) => (Code::VEX_Vpsrad_ymm_ymm_imm8, bits),
                (false, true) => (Code::VEX_Vpsrlq_xmm_xmm_imm8, bits + 32),
                (true, true) => (Code::VEX_Vpsrlq_ymm_ymm_imm8, bits + 32),
            };
            draft.try_push(Instruction::with3(code, index, index, bits));
        }
        let kept = draft.roles.pointers.contains(&RDI) || draft.roles.index == RDI;
        if ins.op0_kind() == iced_x86::OpKind::MemorySegRDI {
            if kept {
                return false;
            }
            let at = DATA + 0x1000 * (1 + self.random.below(4)) - self.random.below(20);
            draft.with_value(Code::Mov_r64_imm64, general(RDI, 8), at);
        }
        true
    }

    fn branch_over(&mut self, draft: &mut Draft, len: u8) {
        let opcode = match self.random.below(12) {
            0 => 0xe3,
            1 => 0xeb,
            _ => 0x70 | self.random.below(16) as u8,
        };
        let _ = writeln!(draft.text, "  branch {opcode:#x} over the next");
        draft.used.insert(if opcode == 0xe3 {
            Code::Jrcxz_rel8_64
        } else if opcode == 0xeb {
            Code::Jmp_rel8_64
        } else {
            let shorts = [
                Code::Jo_rel8_64,
                Code::Jno_rel8_64,
                Code::Jb_rel8_64,
                Code::Jae_rel8_64,
                Code::Je_rel8_64,
                Code::Jne_rel8_64,
                Code::Jbe_rel8_64,
                Code::Ja_rel8_64,
                Code::Js_rel8_64,
                Code::Jns_rel8_64,
                Code::Jp_rel8_64,
                Code::Jnp_rel8_64,
                Code::Jl_rel8_64,
                Code::Jge_rel8_64,
                Code::Jle_rel8_64,
                Code::Jg_rel8_64,
            ];
            shorts[usize::from(opcode & 15)]
        });
        draft.code.extend_from_slice(&[opcode, len]);
    }

    /// A string instruction, with pointers set up for it, plain or repeated.
    fn string(&mut self, draft: &mut Draft) {
        let kept = |n: u8| draft.roles.pointers.contains(&n) || draft.roles.index == n;
        if kept(6) || kept(7) {
            return self.plain(draft);
        }
        let at = |random: &mut Random| {
            let edge = if random.one_in(2) { 0xff0 } else { 0x800 };
            DATA + 0x1000 + random.below(2) * 0x1000 + edge + random.below(16)
        };
        let (from, to) = (at(&mut self.random), at(&mut self.random));
        draft.with_value(Code::Mov_r64_imm64, Register::RSI, from);
        draft.with_value(Code::Mov_r64_imm64, Register::RDI, to);
        let code = self.random.pick(&STRINGS);
        let mut ins = string(code);
        if self.random.one_in(2) {
            let count = self.random.below(40);
            draft.with_value(Code::Mov_r64_imm64, general(RCX, 8), count);
            ins.set_has_rep_prefix(true);
        }
        draft.push(ins);
    }

    /// Goes on at the next piece, whose address slot `slot` holds.
    fn transfer(&mut self, draft: &mut Draft, slot: u64, next: u64) {
        let slot = SLOTS + slot * 8;
        let memory = iced_x86::MemoryOperand::with_displ(slot, 8);
        match self.random.below(8) {
            0 => draft.jump(Code::Jmp_rel32_64, next),
            1 => {
                draft.jump(Code::Call_rel32_64, next);
                draft.depth += 8;
            }
            2 => draft.with_memory(Code::Jmp_rm64, memory),
            3 => {
                draft.with_memory(Code::Call_rm64, memory);
                draft.depth += 8;
            }
            4 => {
                draft.with_memory(Code::Push_rm64, memory);
                draft.push(Instruction::with(Code::Retnq));
            }
            5 => {
                draft.with_value(Code::Mov_r64_imm64, Register::RAX, next);
                draft.with1(Code::Jmp_rm64, Register::RAX);
            }
            6 => {
                draft.with_value(Code::Mov_r64_imm64, Register::RDX, next);
                draft.with1(Code::Call_rm64, Register::RDX);
                draft.depth += 8;
            }
            _ => {
                // Both ways of a long branch lead there.
                let branches = [
                    Code::Jo_rel32_64,
                    Code::Jno_rel32_64,
                    Code::Jb_rel32_64,
                    Code::Jae_rel32_64,
                    Code::Je_rel32_64,
                    Code::Jne_rel32_64,
                    Code::Jbe_rel32_64,
                    Code::Ja_rel32_64,
                    Code::Js_rel32_64,
                    Code::Jns_rel32_64,
                    Code::Jp_rel32_64,
                    Code::Jnp_rel32_64,
                    Code::Jl_rel32_64,
                    Code::Jge_rel32_64,
                    Code::Jle_rel32_64,
                    Code::Jg_rel32_64,
                ];
                draft.jump(self.random.pick(&branches), next);
                draft.push(Instruction::with(Code::Stc));
                draft.with_memory(Code::Push_rm64, memory);
                let ret = Instruction::with1(Code::Retnq_imm16, 8_u32);
                draft.try_push(ret);
            }
        }
    }
}

const STRINGS: [Code; 12] = [
    Code::Movsb_m8_m8,
    Code::Movsw_m16_m16,
    Code::Movsd_m32_m32,
    Code::Movsq_m64_m64,
    Code::Stosb_m8_AL,
    Code::Stosw_m16_AX,
    Code::Stosd_m32_EAX,
    Code::Stosq_m64_RAX,
    Code::Lodsb_AL_m8,
    Code::Lodsw_AX_m16,
    Code::Lodsd_EAX_m32,
    Code::Lodsq_RAX_m64,
];

fn string(code: Code) -> Instruction {
    let none = Register::None;
    let rep = iced_x86::RepPrefixKind::None;
    let made = match code {
        Code::Movsb_m8_m8 => Instruction::with_movsb(64, none, rep),
        Code::Movsw_m16_m16 => Instruction::with_movsw(64, none, rep),
        Code::Movsd_m32_m32 => Instruction::with_movsd(64, none, rep),
        Code::Movsq_m64_m64 => Instruction::with_movsq(64, none, rep),
        Code::Stosb_m8_AL => Instruction::with_stosb(64, rep),
        Code::Stosw_m16_AX => Instruction::with_stosw(64, rep),
        Code::Stosd_m32_EAX => Instruction::with_stosd(64, rep),
        Code::Stosq_m64_RAX => Instruction::with_stosq(64, rep),
        Code::Lodsb_AL_m8 => Instruction::with_lodsb(64, none, rep),
        Code::Lodsw_AX_m16 => Instruction::with_lodsw(64, none, rep),
        Code::Lodsd_EAX_m32 => Instruction::with_lodsd(64, none, rep),
        _ => Instruction::with_lodsq(64, none, rep),
    };
    made.unwrap_or_else(|_| Instruction::with(Code::Nopd))
}

/// Is it made from operands alone? The others have a form of their own above.
fn is_plain(code: Code) -> bool {
    use iced_x86::FlowControl::Next;
    code.flow_control() == Next && !STRINGS.contains(&code) && code != Code::Leaveq
}

impl Draft {
    fn here(&self) -> u64 {
        self.at + self.code.len() as u64
    }

    fn encode(&self, ins: Instruction, ahead: u64) -> Option<Vec<u8>> {
        let mut encoder = Encoder::new(64);
        encoder.encode(&ins, self.here() + ahead).ok()?;
        Some(encoder.take_buffer())
    }

    fn take(&mut self, ins: &Instruction, bytes: &[u8]) {
        let _ = writeln!(self.text, "{:8x}  {ins}", self.here());
        self.used.insert(ins.code());
        self.code.extend_from_slice(bytes);
    }

    fn push(&mut self, ins: Instruction) {
        if let Some(bytes) = self.encode(ins, 0) {
            self.take(&ins, &bytes);
        }
    }

    fn try_push(&mut self, ins: Result<Instruction, iced_x86::IcedError>) {
        if let Ok(ins) = ins {
            self.push(ins);
        }
    }

    fn with1(&mut self, code: Code, register: Register) {
        self.try_push(Instruction::with1(code, register));
    }

    fn with2(&mut self, code: Code, to: Register, from: Register) {
        self.try_push(Instruction::with2(code, to, from));
    }

    fn with_value(&mut self, code: Code, register: Register, value: u64) {
        self.try_push(Instruction::with2(code, register, value));
    }

    fn with_memory(&mut self, code: Code, memory: iced_x86::MemoryOperand) {
        self.try_push(Instruction::with1(code, memory));
    }

    fn jump(&mut self, code: Code, target: u64) {
        self.try_push(Instruction::with_branch(code, target));
    }

    fn lea_rsp(&mut self, by: i64) {
        self.depth -= by;
        let memory = iced_x86::MemoryOperand::with_base_displ(Register::RSP, by);
        self.try_push(Instruction::with2(Code::Lea_r64_m, Register::RSP, memory));
    }
}
