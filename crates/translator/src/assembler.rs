//! Writes host instructions into a buffer. Positions are byte offsets from the
//! place where the code will run.

use crate::context::{Context, S2};
use crate::relocation::{Relocation, Target};

/// No register.
pub(crate) const NONE: u8 = 0xff;

/// A memory operand: base + (index << scale) + displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub base: u8,
    pub index: u8,
    pub scale: u8,
    pub disp: i32,
}

impl Memory {
    /// `[base + disp]`
    pub(crate) const fn at(base: u8, disp: i32) -> Self {
        Self {
            base,
            index: NONE,
            scale: 0,
            disp,
        }
    }

    /// `[base + index + disp]`
    pub(crate) const fn sum(base: u8, index: u8, disp: i32) -> Self {
        Self {
            base,
            index,
            scale: 0,
            disp,
        }
    }

    /// REX.X and REX.B.
    pub(crate) const fn rex(self) -> u8 {
        let x = if self.index == NONE {
            0
        } else {
            self.index >> 3
        };
        let b = if self.base == NONE { 0 } else { self.base >> 3 };
        x << 1 | b
    }
}

/// Offset of a field of [`Context`], as displacement from GS.
macro_rules! context {
    ($($field:tt)*) => {
        core::mem::offset_of!(Context, $($field)*) as i32
    };
}
pub(crate) use context;

/// Offset of guest register `n`'s home in the context.
pub(crate) const fn guest_register(n: u8) -> i32 {
    context!(gpr) + n as i32 * 8
}

/// The operation byte of `mov r, m` and others.
pub(crate) mod op {
    pub(crate) const LOAD: u8 = 0x8b;
    pub(crate) const STORE: u8 = 0x89;
    pub(crate) const XOR: u8 = 0x33;
    pub(crate) const CMP: u8 = 0x3b;
    pub(crate) const ADD: u8 = 0x03;
    pub(crate) const LEA: u8 = 0x8d;
    pub(crate) const MOVSXD: u8 = 0x63;
}

#[derive(Default)]
pub(crate) struct Assembler {
    pub code: Vec<u8>,
    pub relocations: Vec<Relocation>,
    pub place: u64,
}

impl Assembler {
    pub(crate) fn here(&self) -> u32 {
        self.code.len() as u32
    }

    #[inline]
    pub(crate) fn bytes<const N: usize>(&mut self, bytes: [u8; N]) {
        self.code.extend_from_slice(&bytes);
    }

    #[inline]
    pub(crate) fn byte(&mut self, byte: u8) {
        self.code.push(byte);
    }

    #[inline]
    pub(crate) fn i32(&mut self, value: i32) {
        self.code.extend_from_slice(&value.to_le_bytes());
    }

    /// ModRM, SIB and displacement of a memory operand.
    #[inline]
    pub(crate) fn modrm(&mut self, reg: u8, m: Memory) {
        let reg = (reg & 7) << 3;
        if m.base == NONE {
            let index = if m.index == NONE { 4 } else { m.index & 7 };
            self.bytes([reg | 4, m.scale << 6 | index << 3 | 5]);
            self.i32(m.disp);
            return;
        }
        let short = i8::try_from(m.disp);
        let mode = match (m.disp, short) {
            (0, _) if m.base & 7 != 5 => 0,
            (_, Ok(_)) => 0x40,
            _ => 0x80,
        };
        if m.index != NONE {
            self.bytes([
                mode | reg | 4,
                m.scale << 6 | (m.index & 7) << 3 | m.base & 7,
            ]);
        } else if m.base & 7 == 4 {
            self.bytes([mode | reg | 4, 0x20 | m.base & 7]);
        } else {
            self.byte(mode | reg | m.base & 7);
        }
        match mode {
            0 => {}
            0x40 => self.byte(m.disp as u8),
            _ => self.i32(m.disp),
        }
    }

    /// `op r64, gs:[disp]`
    #[inline]
    pub(crate) fn gs(&mut self, op: u8, r: u8, disp: i32) {
        let d = disp.to_le_bytes();
        let (rex, modrm) = (0x48 | r >> 3 << 2, (r & 7) << 3 | 4);
        self.bytes([0x65, rex, op, modrm, 0x25, d[0], d[1], d[2], d[3]]);
    }

    pub(crate) fn load(&mut self, r: u8, disp: i32) {
        self.gs(op::LOAD, r, disp);
    }

    pub(crate) fn store(&mut self, r: u8, disp: i32) {
        self.gs(op::STORE, r, disp);
    }

    /// `op r64, gs:[index * 8 + disp]`
    #[inline]
    pub(crate) fn gs_indexed(&mut self, op: u8, r: u8, index: u8, disp: i32) {
        let d = disp.to_le_bytes();
        let rex = 0x48 | r >> 3 << 2 | index >> 3 << 1;
        let (modrm, sib) = ((r & 7) << 3 | 4, 0xc0 | (index & 7) << 3 | 5);
        self.bytes([0x65, rex, op, modrm, sib, d[0], d[1], d[2], d[3]]);
    }

    /// `mov qword gs:[disp], imm32`
    pub(crate) fn store_immediate(&mut self, disp: i32, value: i32) {
        self.bytes([0x65, 0x48, 0xc7, 0x04, 0x25]);
        self.i32(disp);
        self.i32(value);
    }

    /// `pext dst, src, gs:[mask]`
    #[inline]
    pub(crate) fn pext(&mut self, dst: u8, src: u8, mask: i32) {
        let d = mask.to_le_bytes();
        let (v1, v2) = ((!dst >> 3 & 1) << 7 | 0x62, 0x80 | (!src & 15) << 3 | 2);
        let modrm = (dst & 7) << 3 | 4;
        self.bytes([
            0x65, 0xc4, v1, v2, 0xf5, modrm, 0x25, d[0], d[1], d[2], d[3],
        ]);
    }

    /// `mov r64, value` in the shortest way that keeps flags.
    pub(crate) fn constant(&mut self, r: u8, value: u64) {
        if let Ok(low) = u32::try_from(value) {
            if r >= 8 {
                self.byte(0x41);
            }
            self.byte(0xb8 | r & 7);
            self.i32(low as i32);
        } else if let Ok(low) = i32::try_from(value as i64) {
            self.bytes([0x48 | r >> 3, 0xc7, 0xc0 | r & 7]);
            self.i32(low);
        } else {
            self.bytes([0x48 | r >> 3, 0xb8 | r & 7]);
            self.bytes(value.to_le_bytes());
        }
    }

    /// `mov d, s`
    pub(crate) fn mov(&mut self, d: u8, s: u8) {
        self.bytes([
            0x48 | s >> 3 << 2 | d >> 3,
            0x89,
            0xc0 | (s & 7) << 3 | d & 7,
        ]);
    }

    /// `op r64, m`
    #[inline]
    pub(crate) fn memory(&mut self, op: u8, r: u8, m: Memory) {
        self.bytes([0x48 | r >> 3 << 2 | m.rex(), op]);
        self.modrm(r, m);
    }

    /// `lea d, m`
    pub(crate) fn lea(&mut self, d: u8, m: Memory) {
        self.memory(op::LEA, d, m);
    }

    /// `lea d, [d + s]`: an addition that keeps flags.
    pub(crate) fn add(&mut self, d: u8, s: u8) {
        self.lea(d, Memory::sum(d, s, 0));
    }

    /// `d -= s` that keeps flags and leaves `s` inverted.
    pub(crate) fn subtract(&mut self, d: u8, s: u8) {
        self.not(s);
        self.lea(d, Memory::sum(d, s, 1));
    }

    pub(crate) fn not(&mut self, r: u8) {
        self.bytes([0x48 | r >> 3, 0xf7, 0xd0 | r & 7]);
    }

    /// `rorx d, s, count`
    pub(crate) fn rotate_right(&mut self, d: u8, s: u8, count: u8) {
        let v1 = (!d >> 3 & 1) << 7 | 0x40 | (!s >> 3 & 1) << 5 | 3;
        self.bytes([0xc4, v1, 0xfb, 0xf0, 0xc0 | (d & 7) << 3 | s & 7, count]);
    }

    /// `cmp r64, imm32`
    pub(crate) fn compare_immediate(&mut self, r: u8, value: i32) {
        let v = value.to_le_bytes();
        self.bytes([0x48 | r >> 3, 0x81, 0xf8 | r & 7, v[0], v[1], v[2], v[3]]);
    }

    /// Five bytes that do nothing, in one instruction.
    pub(crate) fn nop5(&mut self) {
        self.bytes([0x0f, 0x1f, 0x44, 0x00, 0x00]);
    }

    /// Makes what is emitted from `start` on at least `len` bytes, at most five, by
    /// putting something that does nothing before it: not behind, where a comparison
    /// and its jump would no longer be one for the CPU. What is so short has no
    /// relocation and no label in it.
    pub(crate) fn lengthen(&mut self, start: u32, len: u32) {
        let nop: &[u8] = match (start + len).saturating_sub(self.here()) {
            0 => return,
            1 => &[0x90],
            2 => &[0x66, 0x90],
            3 => &[0x0f, 0x1f, 0x00],
            4 => &[0x0f, 0x1f, 0x40, 0x00],
            _ => &[0x0f, 0x1f, 0x44, 0x00, 0x00],
        };
        let at = start as usize;
        self.code.splice(at..at, nop.iter().copied());
    }

    /// `jcc rel32`; returns the position of the rel32.
    pub(crate) fn jcc(&mut self, condition: u8) -> u32 {
        self.bytes([0x0f, 0x80 | condition & 15, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// `jmp rel32`; returns the position of the rel32.
    pub(crate) fn jmp(&mut self) -> u32 {
        self.bytes([0xe9, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// `jmp` to an absolute host address.
    pub(crate) fn jmp_to(&mut self, target: u64) {
        let end = self.place.wrapping_add(u64::from(self.here()) + 5);
        let d = (target.wrapping_sub(end) as i32).to_le_bytes();
        self.bytes([0xe9, d[0], d[1], d[2], d[3]]);
    }

    /// `jmp` to a thunk.
    pub(crate) fn jmp_to_thunk(&mut self, thunk: Target, address: u64) {
        self.relocations.push(Relocation {
            at: self.here() + 1,
            target: thunk,
        });
        self.jmp_to(address);
    }

    /// Leaves through exit `number`: six bytes and five.
    pub(crate) fn exit(&mut self, number: u32, thunk: u64) {
        self.relocations.push(Relocation {
            at: self.here() + 2,
            target: Target::Exit,
        });
        self.constant(S2, u64::from(number));
        self.jmp_to(thunk);
    }

    /// `jrcxz` over a `jmp rel32`, whose rel32's position is returned.
    pub(crate) fn jmp_unless_rcx_zero(&mut self) -> u32 {
        self.bytes([0xe3, 5]);
        self.jmp()
    }

    /// Lets the rel32 at `at` lead to position `target`.
    pub(crate) fn patch(&mut self, at: u32, target: u32) {
        let relative = (target as i32).wrapping_sub(at as i32 + 4);
        if let Some(place) = self.code.get_mut(at as usize..at as usize + 4) {
            place.copy_from_slice(&relative.to_le_bytes());
        }
    }
}
