//! Runs a program on both sides and says what differs.

use std::fmt::Write as _;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};

use crate::Error;
use crate::engine::{GUEST_END, Guest};
use crate::layout::{DATA, DATA_LEN, NO_VECTOR, SLOTS, State};
use crate::oracle::{Oracle, native_end};
use crate::program::Program;

/// Status flags and DF.
const FLAGS: u64 = 0xcd5;
const PAGE_FAULT: u64 = 14;
const SIMD_EXCEPTION: u64 = 19;

/// What a comparison found.
pub struct Outcome {
    /// Nothing, or what differs, in words.
    pub difference: Option<String>,
    /// The vector of the fault that ended the program natively, if one did.
    pub vector: Option<u64>,
}

/// Runs `program` natively and in the guest.
///
/// # Errors
/// [`Error`] when a side could not run it at all.
pub fn compare(
    oracle: &mut Oracle,
    guest: &mut Guest,
    program: &Program,
) -> Result<Outcome, Error> {
    let mut native_tail = vec![0xff, 0x25, 0, 0, 0, 0];
    native_tail.extend_from_slice(&native_end().to_le_bytes());
    for (at, code) in &program.pieces {
        oracle.write(*at, code);
        guest.write(*at, code)?;
    }
    oracle.write(program.end, &native_tail);
    guest.write(program.end, &GUEST_END)?;
    for (at, bytes) in [(SLOTS, &program.slots), (DATA, &program.data)] {
        oracle.write(at, bytes);
        guest.write(at, bytes)?;
    }
    let native = oracle.run(&program.state)?;
    let emulated = guest.run(&program.state)?;
    let native_data = oracle.read(DATA, DATA_LEN);
    let emulated_data = guest.read(DATA, DATA_LEN)?;
    let mut text = String::new();
    let mut expected = native.clone();
    if native.vector != NO_VECTOR {
        allow_choices(
            &instruction_at(program, native.rip),
            &mut expected,
            &emulated,
        );
    }
    states(&mut text, &expected, &emulated);
    if let Some(i) = native_data
        .iter()
        .zip(&emulated_data)
        .position(|(a, b)| a != b)
    {
        let (a, b) = (native_data.get(i), emulated_data.get(i));
        let _ = writeln!(
            text,
            "memory at {:#x}: {a:02x?} native, {b:02x?} engine",
            DATA + i as u64
        );
    }
    if !text.is_empty() && native.vector != NO_VECTOR {
        let (at, ours) = (native.rip, native.cr2);
        let _ = writeln!(
            text,
            "native fault at {at:x}, address {ours:#x}, engine {:x} {:#x}",
            emulated.rip, emulated.cr2
        );
    }
    let difference = (!text.is_empty()).then_some(text);
    Ok(Outcome {
        difference,
        vector: (native.vector != NO_VECTOR).then_some(native.vector),
    })
}

/// What a CPU may do at a fault in one way or another.
fn allow_choices(instruction: &Instruction, native: &mut State, engine: &State) {
    use Mnemonic as M;
    match instruction.mnemonic() {
        // Raised what converting raises before it found that it cannot store.
        M::Vcvtps2ph => {
            let mxcsr = x86::xsave::MXCSR;
            native.xsave[mxcsr] &= !0x3f | engine.xsave[mxcsr];
            // The engine looks whether it can store before it converts.
            if (native.vector, engine.vector) == (SIMD_EXCEPTION, PAGE_FAULT) {
                (native.vector, native.cr2, native.wrote) = (PAGE_FAULT, engine.cr2, engine.wrote);
            }
        }
        // What is in the mask besides the elements' signs: Intel's processors fill each element
        // with its sign before they load the first one, AMD's afterwards.
        M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq
        | M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd
            if !on_intels() =>
        {
            let mask = instruction.op2_register();
            let element = instruction.memory_size().element_size();
            let count = match mask.size() / element {
                // As many as there are indexes, where those are wider.
                all if element == 4 => {
                    all.min(instruction.memory_index().size() / index_size(instruction))
                }
                all => all,
            };
            let signs = |state: &State| -> Vec<u8> {
                let bytes = vector(state, mask.number());
                let last = (1..=count).map(|n| bytes[n * element - 1] >> 7);
                last.collect()
            };
            if signs(native) == signs(engine) {
                copy_vector(native, engine, mask.number());
            }
            // The upper half of what is loaded goes at once or in the end.
            let loaded = instruction.op0_register();
            if loaded.is_xmm() {
                let [_, high] = halves(loaded.number());
                native.xsave[high.clone()].copy_from_slice(&engine.xsave[high]);
            }
        }
        // Which element's address it names.
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq
            if native.cr2.wrapping_sub(engine.cr2).wrapping_add(32) < 64 =>
        {
            native.cr2 = engine.cr2;
        }
        _ => {}
    }
}

/// Whether Intel made this CPU: the engine then leaves what it does.
fn on_intels() -> bool {
    let name = std::arch::x86_64::__cpuid(0);
    [name.ebx, name.edx, name.ecx]
        .map(u32::to_le_bytes)
        .concat()
        == b"GenuineIntel"
}

/// Bytes of an index of a gather.
fn index_size(instruction: &Instruction) -> usize {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Vpgatherqd | M::Vpgatherqq | M::Vgatherqps | M::Vgatherqpd => 8,
        _ => 4,
    }
}

/// Where the halves of vector register `n` are.
fn halves(n: usize) -> [std::ops::Range<usize>; 2] {
    let high = x86::xsave::YMM_HIGH.start + 16 * n;
    [160 + 16 * n..176 + 16 * n, high..high + 16]
}

fn vector(state: &State, n: usize) -> Vec<u8> {
    halves(n).map(|half| state.xsave[half].to_vec()).concat()
}

fn copy_vector(to: &mut State, from: &State, n: usize) {
    for half in halves(n) {
        to.xsave[half.clone()].copy_from_slice(&from.xsave[half]);
    }
}

fn instruction_at(program: &Program, rip: u64) -> Instruction {
    let bytes = program.pieces.iter().find_map(|(at, code)| {
        let from = rip.checked_sub(*at)?;
        code.get(from as usize..).filter(|bytes| !bytes.is_empty())
    });
    let decode = |bytes| Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE).decode();
    bytes.map_or_else(Instruction::default, decode)
}

fn states(text: &mut String, native: &State, engine: &State) {
    let mut differ = |what: &str, a: u64, b: u64| {
        if a != b {
            let _ = writeln!(text, "{what}: {a:#x} native, {b:#x} engine");
        }
    };
    differ("vector", native.vector, engine.vector);
    for (i, (a, b)) in native.gpr.iter().zip(&engine.gpr).enumerate() {
        differ(&format!("register {i}"), *a, *b);
    }
    if native.vector == NO_VECTOR {
        differ("flags", native.rflags & FLAGS, engine.rflags & FLAGS);
    } else {
        // Status flags that nothing reads any more may be wrong at a fault.
        differ("rip", native.rip, engine.rip);
        differ("direction", native.rflags & 0x400, engine.rflags & 0x400);
        if native.vector == PAGE_FAULT {
            differ("cr2", native.cr2, engine.cr2);
            differ("write", native.wrote, engine.wrote);
        }
    }
    let image = |state: &State, range: std::ops::Range<usize>| state.xsave[range].to_vec();
    for (what, range) in [
        ("x87 control", 0..2),
        ("x87 status", 2..4),
        ("x87 tags", 4..5),
        ("mxcsr", 24..26),
        ("x87 or mmx registers", 32..160),
        ("xmm registers", 160..416),
        ("upper halves of ymm registers", x86::xsave::YMM_HIGH),
    ] {
        let (mut a, mut b) = (image(native, range.clone()), image(engine, range));
        if what.starts_with("x87 or") {
            // Ten bytes of sixteen.
            for register in [&mut a, &mut b] {
                register.chunks_exact_mut(16).for_each(|r| r[10..].fill(0));
            }
        }
        if a != b {
            let _ = writeln!(text, "{what}: {a:02x?} native, {b:02x?} engine");
        }
    }
}
