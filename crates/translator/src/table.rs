//! The table behind the allow-list: per instruction code what class it is of, how
//! it is encoded, and what it does to flags and registers. Built at compile time
//! from the lines in `allowed/`, so that starting costs nothing.

use iced_x86::Code;
use x86::features::Feature;

use crate::allowed::LISTS;

/// How the translator treats an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Class {
    /// The engine executes it, or raises #UD.
    Interpret,
    /// Emitted again, with its memory operand redirected.
    Copy,
    /// CLD and STD: copied, and mirrored in the context.
    Direction,
    /// BT and relatives with a bit index in a register: with a memory operand the
    /// address depends on the index.
    BitString,
    /// Does nothing.
    Nothing,
    Lea,
    Jcc,
    Jrcxz,
    Jump,
    JumpIndirect,
    Call,
    CallIndirect,
    Return,
    Push,
    Pop,
    Leave,
    PushFlags,
    InterruptsOff,
    InterruptsOn,
    /// STAC.
    UserAccessOn,
    /// CLAC.
    UserAccessOff,
    SwapGs,
    /// VZEROUPPER and VZEROALL.
    ZeroUpper,
    /// RDTSC: the guest's is not the host's.
    ReadTsc,
    /// RDTSCP and RDPID: the host's own IA32_TSC_AUX must not show.
    ReadTscAux,
    /// RDFSBASE and RDGSBASE.
    ReadBase,
    /// SYSCALL at CPL 3.
    SystemCall,
    /// SYSRET to 64-bit code at CPL 0.
    SystemReturn,
    /// MOVS, STOS and LODS, without a prefix.
    String,
    /// REP MOVS and REP STOS; no line has it, `plan.rs` finds it.
    RepString,
}

/// CF, as bit of flag sets here and in `flags.rs`.
pub(crate) const CF: u8 = 0x01;
/// PF.
pub(crate) const PF: u8 = 0x04;
/// OF, at a position that RFLAGS leaves free.
pub(crate) const OF: u8 = 0x08;
/// AF.
pub(crate) const AF: u8 = 0x10;
/// ZF.
pub(crate) const ZF: u8 = 0x40;
/// SF.
pub(crate) const SF: u8 = 0x80;
/// All six.
pub(crate) const STATUS: u8 = CF | PF | OF | AF | ZF | SF;

/// No operand is encoded in this place.
pub(crate) const NO_OPERAND: u8 = 0xff;
/// A digit (low three bits) is in this place rather than an operand.
pub(crate) const DIGIT: u8 = 0x10;

/// How an instruction's prefixes are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vex {
    /// Legacy prefixes and REX.
    No,
    /// VEX with L = 0.
    L0,
    /// VEX with L = 1.
    L1,
}

/// One instruction code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub class: Class,
    /// Who lacks it does not get the instruction.
    pub feature: Feature,
    pub vex: Vex,
    pub opcode: u8,
    /// 0: one byte; 1: 0F; 2: 0F 38; 3: 0F 3A.
    pub map: u8,
    /// 0, 66, F2 or F3.
    pub mandatory: u8,
    /// The operand size prefix selects this form.
    pub o16: bool,
    /// REX.W selects this form.
    pub w: bool,
    /// Which operand is in ModRM.reg, or [`DIGIT`].
    pub reg: u8,
    /// Which operand is in ModRM.rm, [`DIGIT`], or [`NO_OPERAND`] without ModRM.
    pub rm: u8,
    /// Which operand is in the opcode's low three bits, or [`NO_OPERAND`].
    pub low: u8,
    /// Which operand is in VEX.vvvv, or [`NO_OPERAND`].
    pub vvvv: u8,
    /// Which operand is in the upper half of an immediate byte, or [`NO_OPERAND`].
    pub is4: u8,
    /// Which operand is the immediate.
    pub immediate: u8,
    /// Its size in bytes, or 0.
    pub immediate_size: u8,
    /// Status flags that it reads.
    pub reads: u8,
    /// Status flags that it always writes. Flags that the manual calls undefined
    /// count only where hardware is known to write them whatever they were.
    pub kills: u8,
    /// Operands that it writes, a bit each.
    pub writes: u8,
    /// Implied general registers 0 to 7 that it writes, a bit each.
    pub clobbers: u8,
}

/// A line of the allow-list.
pub(crate) struct Entry {
    pub code: Code,
    pub row: Row,
}

/// See [`Row::new`].
pub(crate) const fn entry(
    code: Code,
    class: Class,
    encoding: &str,
    operands: &str,
    flags: &str,
    clobbers: &str,
) -> Entry {
    Entry {
        code,
        row: Row::new(class, encoding, operands, flags, clobbers),
    }
}

impl Row {
    const INTERPRET: Self = Self::new(Class::Interpret, "0F 0B", "", "oszapc", "");

    /// Reads one line:
    /// - `encoding` as in Intel's manual, with `o16` for the operand size prefix, `W`
    ///   for REX.W or VEX.W, `x` for VEX.128 and `y` for VEX.256;
    /// - `operands`, a letter each, upper case when written: `m` ModRM.rm, `r`
    ///   ModRM.reg, `v` VEX.vvvv, `o` in the opcode, `i` immediate, `s` the register
    ///   in an immediate, `a` implied;
    /// - `flags`: read, then `>` and written;
    /// - `clobbers`: implied registers written, `acdbsBSD` for RAX to RDI.
    pub(crate) const fn new(
        class: Class,
        encoding: &str,
        operands: &str,
        flags: &str,
        clobbers: &str,
    ) -> Self {
        let mut row = Self {
            class,
            feature: Feature::Base,
            vex: Vex::No,
            opcode: 0,
            map: 0,
            mandatory: 0,
            o16: false,
            w: false,
            reg: NO_OPERAND,
            rm: NO_OPERAND,
            low: NO_OPERAND,
            vvvv: NO_OPERAND,
            is4: NO_OPERAND,
            immediate: NO_OPERAND,
            immediate_size: 0,
            reads: 0,
            kills: 0,
            writes: 0,
            clobbers: 0,
        };
        let operands = operands.as_bytes();
        let mut i = 0;
        while i < operands.len() {
            if operands[i].is_ascii_uppercase() {
                row.writes |= 1 << i;
            }
            match operands[i].to_ascii_lowercase() {
                b'm' => row.rm = i as u8,
                b'r' => row.reg = i as u8,
                b'o' => row.low = i as u8,
                b'i' => row.immediate = i as u8,
                b'v' => row.vvvv = i as u8,
                b's' => row.is4 = i as u8,
                b'a' => {}
                _ => panic!("unknown operand letter"),
            }
            i += 1;
        }
        row = row.encoded(encoding.as_bytes());
        let flags = flags.as_bytes();
        let mut written = false;
        i = 0;
        while i < flags.len() {
            let bit = match flags[i] {
                b'o' => OF,
                b's' => SF,
                b'z' => ZF,
                b'a' => AF,
                b'p' => PF,
                b'c' => CF,
                b'>' => {
                    written = true;
                    0
                }
                _ => panic!("unknown flag letter"),
            };
            if written {
                row.kills |= bit;
            } else {
                row.reads |= bit;
            }
            i += 1;
        }
        let clobbers = clobbers.as_bytes();
        i = 0;
        while i < clobbers.len() {
            row.clobbers |= match clobbers[i] {
                b'a' => 1,
                b'c' => 2,
                b'd' => 4,
                b'b' => 8,
                b's' => 0x10,
                b'B' => 0x20,
                b'S' => 0x40,
                b'D' => 0x80,
                _ => panic!("unknown register letter"),
            };
            i += 1;
        }
        row
    }

    const fn encoded(mut self, text: &[u8]) -> Self {
        let mut opcode_seen = false;
        let mut i = 0;
        while i < text.len() {
            let (a, b) = (
                text[i],
                if i + 1 < text.len() {
                    text[i + 1]
                } else {
                    b' '
                },
            );
            match (a, b) {
                (b'o', b'1') => {
                    self.o16 = true;
                    i += 1;
                }
                (b'W' | b'x' | b'y', _) => {
                    match a {
                        b'W' => self.w = true,
                        b'x' => self.vex = Vex::L0,
                        _ => self.vex = Vex::L1,
                    }
                    i += 2;
                    continue;
                }
                (b'/', b'r') => {}
                (b'/', digit) => self.reg = DIGIT | (digit - b'0'),
                (b'i', b'b' | b's') => self.immediate_size = 1,
                (b'i', b'w') => self.immediate_size = 2,
                (b'i', b'd') => self.immediate_size = 4,
                (b'i', b'o') => self.immediate_size = 8,
                _ => {
                    let byte = hex(a) << 4 | hex(b);
                    if opcode_seen {
                        // A fixed ModRM, or one whose rm is a stack register.
                        self.reg = DIGIT | byte >> 3 & 7;
                        if self.rm == NO_OPERAND {
                            self.rm = DIGIT | byte & 7;
                        }
                    } else if self.map == 0 && matches!(byte, 0x66 | 0xf2 | 0xf3) {
                        self.mandatory = byte;
                    } else if self.map == 0 && byte == 0x0f {
                        self.map = 1;
                    } else if self.map == 1 && byte == 0x38 {
                        self.map = 2;
                    } else if self.map == 1 && byte == 0x3a {
                        self.map = 3;
                    } else {
                        self.opcode = byte;
                        opcode_seen = true;
                    }
                }
            }
            i += 3;
        }
        self
    }
}

const fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'A'..=b'F' => digit - b'A' + 10,
        _ => panic!("not a hexadecimal digit"),
    }
}

/// Above the number of codes that the decoder knows; a test compares.
const SLOTS: usize = 5120;

static TABLE: [Row; SLOTS] = {
    let mut table = [Row::INTERPRET; SLOTS];
    let mut list = 0;
    while list < LISTS.len() {
        let mut i = 0;
        let (feature, rows) = LISTS[list];
        while i < rows.len() {
            table[rows[i].code as usize] = rows[i].row;
            table[rows[i].code as usize].feature = feature;
            i += 1;
        }
        list += 1;
    }
    table
};

static INTERPRET: Row = Row::INTERPRET;

/// The row of `code`; [`Class::Interpret`] when it is not on the allow-list.
pub(crate) fn row(code: Code) -> &'static Row {
    TABLE.get(code as usize).unwrap_or(&INTERPRET)
}

#[cfg(test)]
mod tests {
    use iced_x86::{CpuidFeature, EncodingKind};

    use super::*;
    use crate::allowed::entries;

    #[test]
    fn the_table_has_room_for_every_code_that_the_decoder_knows() {
        assert!(Code::values().len() <= SLOTS);
    }

    #[test]
    fn no_code_has_two_lines() {
        let mut codes: Vec<_> = entries().map(|e| e.code).collect();
        let all = codes.len();
        codes.sort();
        codes.dedup();
        assert_eq!(codes.len(), all);
    }

    #[test]
    fn nothing_privileged_is_allowed() {
        for entry in entries() {
            let ours = matches!(
                entry.row.class,
                Class::InterruptsOff
                    | Class::InterruptsOn
                    | Class::UserAccessOn
                    | Class::UserAccessOff
                    | Class::SwapGs
                    | Class::Interpret
                    | Class::SystemReturn
            );
            assert!(ours || !entry.code.is_privileged(), "{:?}", entry.code);
        }
    }

    #[test]
    fn an_instruction_is_vex_encoded_exactly_when_its_line_says_so() {
        for entry in entries() {
            let encoding = match entry.row.vex {
                Vex::No => EncodingKind::Legacy,
                Vex::L0 | Vex::L1 => EncodingKind::VEX,
            };
            assert_eq!(entry.code.encoding(), encoding, "{:?}", entry.code);
        }
    }

    /// What the decoder's own tables say an instruction needs.
    #[test]
    fn an_instruction_belongs_to_the_feature_that_cpuid_shows_for_it() {
        use CpuidFeature as C;
        for entry in entries() {
            let code = entry.code;
            let feature = row(code).feature;
            let wanted: &[Feature] = match code.cpuid_features() {
                [C::AVX] => &[Feature::Avx],
                [C::AVX2] => &[Feature::Avx2],
                [C::FMA] => &[Feature::Fma],
                [C::F16C] => &[Feature::F16c],
                [C::BMI1] => &[Feature::Bmi1],
                [C::BMI2] => &[Feature::Bmi2],
                [C::LZCNT] => &[Feature::Lzcnt],
                [C::MOVBE] => &[Feature::Movbe],
                [C::ADX] => &[Feature::Adx],
                [C::RDRAND] => &[Feature::Rdrand],
                [C::RDSEED] => &[Feature::Rdseed],
                [C::AES] => &[Feature::Aes],
                [C::PCLMULQDQ] => &[Feature::Pclmulqdq],
                [C::AES, C::AVX] => &[Feature::VexAes],
                [C::PCLMULQDQ, C::AVX] => &[Feature::VexPclmulqdq],
                [C::SHA] => &[Feature::Sha],
                [C::TSC] => &[Feature::Tsc],
                [C::RDTSCP] => &[Feature::Rdtscp],
                [C::RDPID] => &[Feature::Rdpid],
                [C::FSGSBASE] => &[Feature::Fsgsbase],
                [C::XSAVE] => &[Feature::Xsave],
                [C::XSAVEOPT] | [C::XSAVE, C::XSAVEOPT] => &[Feature::Xsaveopt],
                [C::CLFLUSHOPT] => &[Feature::Clflushopt],
                [C::CLWB] => &[Feature::Clwb],
                [C::FPU] | [C::FPU287] | [C::FPU387] | [C::FPU, C::SSE3] => &[Feature::Fpu],
                [C::MMX] => &[Feature::Mmx],
                all if all.iter().any(|one| {
                    matches!(
                        one,
                        C::SSE | C::SSE2 | C::SSE3 | C::SSSE3 | C::SSE4_1 | C::SSE4_2
                    )
                }) =>
                {
                    &[Feature::Sse, Feature::Mmx, Feature::Base]
                }
                _ => &[Feature::Base, Feature::Fpu],
            };
            assert!(wanted.contains(&feature), "{code:?}: {feature:?}");
        }
    }
}
