//! Instructions that the engine executes itself: whatever translated code must
//! not, cannot, or need not do.
//!
//! Invariant: an instruction either completes and moves RIP, or faults and leaves
//! every register as it was (but what the manual says is done: a REP that got
//! part of the way). What is not handled here is #UD.

mod data;
mod environment;
mod io;
mod segment;
mod stack;
mod string;
mod system;
mod vector;
mod xsave;

pub(crate) use segment::segment_index;
pub(crate) use system::{CR0_KNOWN, CR4_KNOWN};

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::cpu::{Cpu, Run};
use crate::exceptions::{Fault, UD};

pub(crate) use xsave::xcr0_is_valid;

/// Where control goes after an instruction.
pub(crate) enum Flow {
    /// To the next one.
    Next,
    /// RIP is set.
    Jumped,
}

impl Run<'_> {
    /// Executes `ins`, which is at RIP.
    pub(crate) fn execute(&mut self, ins: &Instruction) -> Result<(), Fault> {
        self.stats.interpreted += 1;
        let locked = is_locked(ins);
        if locked {
            self.begin_alone();
        }
        let flow = self.dispatch(ins);
        if locked {
            self.end_alone();
        }
        match flow? {
            Flow::Next => self.context.rip = ins.next_ip(),
            Flow::Jumped => {}
        }
        Ok(())
    }

    fn dispatch(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        if ins.has_lock_prefix() && !data::may_lock(ins.mnemonic()) {
            return Err(UD);
        }
        // Some EVEX-encoded ones share a mnemonic with others.
        let encoding = ins.code().encoding();
        if !matches!(encoding, EncodingKind::Legacy | EncodingKind::VEX) {
            return Err(UD);
        }
        self.check_executable(ins.code())?;
        match ins.mnemonic() {
            M::Movsb
            | M::Movsw
            | M::Movsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsq => self.string(ins),
            M::Movsd | M::Cmpsd if ins.is_string_instruction() => self.string(ins),
            M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => {
                self.port(ins)
            }
            M::Push
            | M::Pop
            | M::Pushfq
            | M::Pushf
            | M::Popfq
            | M::Popf
            | M::Call
            | M::Ret
            | M::Retf
            | M::Leave
            | M::Enter
            | M::Jmp
            | M::Iretq
            | M::Iretd
            | M::Iret
            | M::Loop
            | M::Loope
            | M::Loopne
            | M::Jrcxz
            | M::Jecxz => self.stack_or_jump(ins),
            _ if ins.is_jcc_short_or_near() => self.stack_or_jump(ins),
            M::Syscall | M::Sysretq | M::Sysret | M::Int3 | M::Int | M::Int1 => {
                self.system_call(ins)
            }
            M::Lgdt
            | M::Lidt
            | M::Sgdt
            | M::Sidt
            | M::Ltr
            | M::Lldt
            | M::Str
            | M::Sldt
            | M::Lsl
            | M::Lar
            | M::Verr
            | M::Verw
            | M::Lfs
            | M::Lgs
            | M::Lss => self.segment(ins),
            M::Mov if touches_segment(ins) => self.segment(ins),
            M::Mov if touches_control(ins) => self.move_control(ins),
            M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Movbe
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Lea
            | M::Xlatb
            | M::Xchg
            | M::Cmpxchg
            | M::Cmpxchg8b
            | M::Cmpxchg16b
            | M::Sahf
            | M::Lahf => self.data(ins),
            M::Xgetbv
            | M::Xsetbv
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xrstor
            | M::Xrstor64 => self.extended_state(ins),
            M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor => self.environment(ins),
            M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq
            | M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Maskmovq => self.vector(ins),
            _ => self.system(ins),
        }
    }

    /// Offset of the memory operand in its segment.
    pub(crate) fn offset(&self, ins: &Instruction) -> u64 {
        if ins.is_ip_rel_memory_operand() {
            return ins.ip_rel_memory_address();
        }
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let mut at = ins.memory_displacement64();
        if base != Register::None {
            at = at.wrapping_add(self.register(base));
        }
        if index != Register::None {
            let scale = u64::from(ins.memory_index_scale());
            at = at.wrapping_add(self.register(index).wrapping_mul(scale));
        }
        if base.is_gpr32() || index.is_gpr32() {
            at & 0xffff_ffff
        } else {
            at
        }
    }

    /// Linear address of the memory operand.
    pub(crate) fn address(&self, ins: &Instruction) -> u64 {
        self.offset(ins)
            .wrapping_add(self.segment_base(ins.memory_segment()))
    }

    /// Base of a segment: only FS and GS have one in 64-bit mode.
    pub(crate) fn segment_base(&self, segment: Register) -> u64 {
        match segment {
            Register::FS => self.context.fs_base,
            Register::GS => self.context.gs_base,
            _ => 0,
        }
    }

    /// Operand `k` as a number of `size` bytes.
    pub(crate) fn operand(&mut self, ins: &Instruction, k: u32, size: usize) -> Result<u64, Fault> {
        match ins.op_kind(k) {
            OpKind::Register => Ok(self.register(ins.op_register(k))),
            OpKind::Memory => {
                let at = self.address(ins);
                let stack = on_stack(ins);
                self.load(at, size).map_err(|fault| fault.on_stack(stack))
            }
            _ => Ok(ins.try_immediate(k).unwrap_or(0)),
        }
    }

    /// Writes operand `k`.
    pub(crate) fn set_operand(
        &mut self,
        ins: &Instruction,
        k: u32,
        size: usize,
        value: u64,
    ) -> Result<(), Fault> {
        if ins.op_kind(k) == OpKind::Register {
            self.set_register(ins.op_register(k), value);
            return Ok(());
        }
        let at = self.address(ins);
        let stack = on_stack(ins);
        self.store(at, size, value)
            .map_err(|fault| fault.on_stack(stack))
    }
}

impl Cpu {
    /// A general register.
    pub(crate) fn register(&self, register: Register) -> u64 {
        if let Some(high) = high_byte(register) {
            return self.context.gpr[high] >> 8 & 0xff;
        }
        let Some(number) = number(register) else {
            return 0;
        };
        let value = self.context.gpr[number];
        match register.size() {
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }

    /// Writes a general register as an instruction does.
    pub(crate) fn set_register(&mut self, register: Register, value: u64) {
        if let Some(high) = high_byte(register) {
            let slot = &mut self.context.gpr[high];
            *slot = *slot & !0xff00 | (value & 0xff) << 8;
            return;
        }
        let Some(number) = number(register) else {
            return;
        };
        let slot = &mut self.context.gpr[number];
        *slot = match register.size() {
            1 => *slot & !0xff | value & 0xff,
            2 => *slot & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }
}

/// Whether the engine executes a memory access of this instruction itself rather
/// than through a bounce block: what the translator cannot bounce, and plain moves,
/// which device registers see most.
pub(crate) fn prefers(ins: &Instruction) -> bool {
    use Mnemonic as M;
    match ins.mnemonic() {
        M::Mov | M::Movzx | M::Movsx | M::Movsxd => !touches_segment(ins) && !touches_control(ins),
        M::Push
        | M::Pop
        | M::Pushfq
        | M::Popfq
        | M::Call
        | M::Ret
        | M::Leave
        | M::Enter
        | M::Jmp
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Bt
        | M::Bts
        | M::Btr
        | M::Btc => true,
        _ => ins.is_string_instruction(),
    }
}

/// Whether the instruction's access to memory is one for all other CPUs.
pub(crate) fn is_locked(ins: &Instruction) -> bool {
    ins.has_lock_prefix()
        || (ins.mnemonic() == Mnemonic::Xchg && (0..2).any(|k| ins.op_kind(k) == OpKind::Memory))
}

fn on_stack(ins: &Instruction) -> bool {
    matches!(
        ins.memory_base(),
        Register::RSP | Register::RBP | Register::ESP | Register::EBP
    ) && matches!(ins.memory_segment(), Register::SS)
}

fn touches_segment(ins: &Instruction) -> bool {
    (0..2).any(|k| ins.op_kind(k) == OpKind::Register && ins.op_register(k).is_segment_register())
}

fn touches_control(ins: &Instruction) -> bool {
    (0..2).any(|k| {
        let register = ins.op_register(k);
        ins.op_kind(k) == OpKind::Register && (register.is_cr() || register.is_dr())
    })
}

fn high_byte(register: Register) -> Option<usize> {
    match register {
        Register::AH => Some(0),
        Register::CH => Some(1),
        Register::DH => Some(2),
        Register::BH => Some(3),
        _ => None,
    }
}

fn number(register: Register) -> Option<usize> {
    register
        .is_gpr()
        .then(|| register.full_register() as usize - Register::RAX as usize)
}
