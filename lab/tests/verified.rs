//! Emitted code, proved harmless block by block: see `lab::verifier`.
//!
//! `KOMBI_SOUP_CASES` and `KOMBI_SOUP_SEED` make the random part longer or another.

mod boot;

use std::sync::{Mutex, PoisonError};

use boot::Boot;
use hv_soft::{CpuModel, SoftHypervisor};
use lab::Random;
use lab::difference::compare;
use lab::engine::Guest;
use lab::oracle::Oracle;
use lab::program::Generator;
use lab::verifier::{Proof, verify};
use machine::Outcome;
use translator::context::Mode;
use translator::{Block, GuestCode, Kind, Options, Request, Thunks, Translator};
use x86::features::Features;

const PLACE: u64 = 0x10_0000;
const THUNKS: Thunks = Thunks {
    exit: PLACE - 0x100,
    jump_miss: PLACE - 0x80,
    stack_refill: [PLACE - 0x60, PLACE - 0x40, PLACE - 0x20],
    system_call: PLACE - 0x18,
    system_return: PLACE - 0x10,
};
const MODES: [Mode; 3] = Mode::ALL;
const KINDS: [Kind; 4] = [Kind::Grouped, Kind::PerAccess, Kind::Bounce, Kind::Step];

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(otherwise)
}

/// Two pages of guest code from `va`'s page on.
struct Pages {
    page: u64,
    bytes: Vec<u8>,
}

impl GuestCode for Pages {
    fn tail(&self, va: u64) -> Option<&[u8]> {
        let offset = usize::try_from(va.checked_sub(self.page)?).ok()?;
        let tail = self.bytes.get(offset..)?;
        tail.get(..tail.len().min(4096 - (offset & 0xfff)))
            .filter(|tail| !tail.is_empty())
    }
}

/// Translates `code` in every form and proves each; gives what was proved.
fn prove(code: &[u8], offset: usize, va: u64, count_instructions: bool) -> Proof {
    let mut bytes = vec![0x90; 8192];
    bytes[offset..offset + code.len()].copy_from_slice(code);
    let pages = Pages { page: va, bytes };
    let mut translator = Translator::new(Options { count_instructions });
    let mut block = Block::default();
    let mut sum = Proof::default();
    for (kind, mode) in KINDS
        .iter()
        .flat_map(|k| MODES.iter().map(move |m| (*k, *m)))
    {
        let request = Request {
            va: va + offset as u64,
            mode,
            kind,
            features: Features::EVERYTHING,
            place: PLACE,
            first_exit: 0x1000,
            thunks: THUNKS,
        };
        if translator.translate(&request, &pages, &mut block).is_err() {
            continue;
        }
        match verify(&request, &block) {
            Ok(proof) => {
                sum.add(proof);
            }
            Err(violation) => {
                panic!(
                    "{kind:?} {mode:?} block of {code:02x?} at {va:#x}+{offset:#x}:\n{violation}"
                )
            }
        }
    }
    sum
}

/// Bytes with many instructions in them, rather than many invalid ones.
fn soup(random: &mut Random, len: u64) -> Vec<u8> {
    const OFTEN: [u8; 24] = [
        0x0f, 0x66, 0xf3, 0xf2, 0xf0, 0x48, 0x4c, 0x41, 0x49, 0x4d, 0x8b, 0x89, 0x24, 0x64, 0x65,
        0x67, 0x83, 0x50, 0x58, 0xa4, 0xab, 0xc7, 0xff, 0x38,
    ];
    (0..len)
        .map(|_| {
            if random.below(3) == 0 {
                random.pick(&OFTEN)
            } else {
                random.bits() as u8
            }
        })
        .collect()
}

#[test]
fn every_block_of_random_bytes_is_harmless() {
    let (cases, seed) = (
        number("KOMBI_SOUP_CASES", 5000),
        number("KOMBI_SOUP_SEED", 1),
    );
    let mut random = Random::new(seed);
    let mut sum = Proof::default();
    for case in 0..cases {
        let len = 1 + random.below(100);
        let code = soup(&mut random, len);
        let va =
            [0x7000_1000, 0xffff_ffff_8100_0000, 0x7fff_ffff_e000, 0][random.below(4) as usize];
        let offset = if case % 4 == 0 {
            4096 - code.len().min(8)
        } else {
            0
        };
        let proof = prove(&code, offset, va, case % 8 == 0);
        sum.add(proof);
    }
    println!("{cases} pieces of random bytes: {sum:?}");
    assert!(
        u64::from(sum.operands) > cases,
        "hardly any operand was proved"
    );
}

/// Proves every translation that an engine makes.
static OBSERVED: Mutex<(Proof, u64, Vec<String>)> = Mutex::new((
    Proof {
        instructions: 0,
        reached: 0,
        operands: 0,
    },
    0,
    Vec::new(),
));

/// One engine at a time: they share [`OBSERVED`].
static TURN: Mutex<()> = Mutex::new(());

fn observe(request: &Request, block: &Block) {
    let outcome = verify(request, block);
    let mut observed = OBSERVED.lock().unwrap_or_else(PoisonError::into_inner);
    match outcome {
        Ok(proof) => observed.0.add(proof),
        Err(violation) => observed.2.push(format!("{request:?}: {violation}")),
    }
    observed.1 += 1;
}

/// With all instructions that there are.
fn host_model() -> SoftHypervisor {
    SoftHypervisor::new(hv_soft::Options {
        cpu_model: CpuModel::Host,
        ..hv_soft::Options::default()
    })
}

/// How many blocks were proved since the last call.
#[track_caller]
fn all_were_harmless() -> u64 {
    let (sum, blocks, violations) = std::mem::take(&mut *OBSERVED.lock().unwrap());
    println!("{blocks} blocks: {sum:?}");
    assert!(
        violations.is_empty(),
        "{} of {blocks} blocks may do harm; the first: {}",
        violations.len(),
        violations[0]
    );
    blocks
}

#[test]
fn every_block_of_the_differential_test_is_harmless() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut oracle = Oracle::start().unwrap();
    let mut guest = Guest::start_on(host_model().observed(observe)).unwrap();
    let mut generator = Generator::new(number("KOMBI_DIFF_SEED", 1));
    for _ in 0..number("KOMBI_DIFF_CASES", 1500) {
        let program = generator.program();
        compare(&mut oracle, &mut guest, &program).unwrap();
    }
    assert!(all_were_harmless() > 5000);
}

#[test]
fn every_block_of_a_boot_is_harmless() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let boot = Boot {
        engine: host_model().observed(observe),
        ..Boot::new()
    };
    let (ended, text) =
        boot.run("for i in 1 2 3; do echo $i | gzip | gunzip | sha256sum; done; poweroff -f");
    assert!(
        text.contains("53c234e5e8472b6ac51c1ae1cab3fe06fad053beb8ebfd8977b010655bfdd3c3"),
        "{text}"
    );
    assert_eq!(ended.result.unwrap(), Outcome::PowerOff);
    assert!(all_were_harmless() > 20_000);
}

/// The harmless translation of `code` for the kernel.
#[track_caller]
fn translated(kind: Kind, code: &[u8]) -> (Request, Block) {
    let mut bytes = code.to_vec();
    bytes.resize(8192, 0x90);
    let pages = Pages {
        page: 0x7000_1000,
        bytes,
    };
    let request = Request {
        va: 0x7000_1000,
        mode: Mode::Kernel,
        kind,
        features: Features::EVERYTHING,
        place: PLACE,
        first_exit: 0x1000,
        thunks: THUNKS,
    };
    let mut block = Block::default();
    Translator::new(Options::default())
        .translate(&request, &pages, &mut block)
        .unwrap();
    verify(&request, &block).unwrap();
    (request, block)
}

/// Translates `code`, replaces `from` by `to` in what came out, and gives why that is
/// refused.
#[track_caller]
fn tampered(kind: Kind, code: &[u8], from: &[u8], to: &[u8]) -> &'static str {
    assert_eq!(from.len(), to.len(), "nothing moves");
    let (request, mut block) = translated(kind, code);
    let at = block.code.windows(from.len()).rposition(|w| w == from);
    let at = at.unwrap_or_else(|| panic!("{from:02x?} is not in {:02x?}", block.code));
    block.code[at..at + to.len()].copy_from_slice(to);
    verify(&request, &block)
        .expect_err("harmful code was taken for harmless")
        .why
}

/// `mov rax, [rbx]; xor eax, eax; ret`: the flags are dead, so that the check compares.
const LOAD: &[u8] = &[0x48, 0x8b, 0x03, 0x31, 0xc0, 0xc3];

#[test]
fn a_check_of_fewer_bytes_than_the_operand_has_is_found() {
    // cmp r14, 4096 - 8 becomes 4096 - 7
    let why = tampered(
        Kind::PerAccess,
        LOAD,
        &[0x49, 0x81, 0xfe, 0xf8, 0x0f, 0, 0, 0x0f, 0x87],
        &[0x49, 0x81, 0xfe, 0xf9, 0x0f, 0, 0, 0x0f, 0x87],
    );
    assert_eq!(why, "an operand that no check covers");
}

#[test]
fn a_check_whose_outcome_is_ignored_is_found() {
    // ja becomes jb
    for condition in [0x82, 0x83, 0x84, 0x86, 0x8f] {
        let why = tampered(
            Kind::PerAccess,
            LOAD,
            &[0x49, 0x81, 0xfe, 0xf8, 0x0f, 0, 0, 0x0f, 0x87],
            &[0x49, 0x81, 0xfe, 0xf8, 0x0f, 0, 0, 0x0f, condition],
        );
        assert_eq!(why, "an operand that no check covers");
    }
}

#[test]
fn an_operand_beside_the_one_that_was_checked_is_found() {
    // mov rax, [rbx + r14] becomes [rsi + r14], and [rbx + r15]
    for to in [[0x4a, 0x8b, 0x04, 0x36], [0x4a, 0x8b, 0x04, 0x3b]] {
        let why = tampered(Kind::PerAccess, LOAD, &[0x4a, 0x8b, 0x04, 0x33], &to);
        assert_eq!(why, "an operand that no check covers");
    }
}

#[test]
fn a_store_behind_a_check_for_reading_is_found() {
    let why = tampered(
        Kind::PerAccess,
        LOAD,
        &[0x4a, 0x8b, 0x04, 0x33],
        &[0x4a, 0x89, 0x04, 0x33],
    );
    assert_eq!(why, "an operand that no check covers");
}

#[test]
fn an_access_to_the_host_by_a_guest_register_is_found() {
    // mov rax, [rbx + r14] becomes nop; mov rax, [rbx], and with FS and GS
    for (to, wanted) in [
        ([0x90, 0x48, 0x8b, 0x03], "an operand that no check covers"),
        (
            [0x64, 0x48, 0x8b, 0x03],
            "a segment other than the context's",
        ),
        (
            [0x65, 0x48, 0x8b, 0x03],
            "a field of the context that is out of reach",
        ),
    ] {
        let why = tampered(Kind::PerAccess, LOAD, &[0x4a, 0x8b, 0x04, 0x33], &to);
        assert!(
            why == wanted || why == "a table of the context that is out of reach",
            "{why}"
        );
    }
}

#[test]
fn instructions_that_leave_the_guest_are_found() {
    let harmful: [[u8; 4]; 17] = [
        [0x90, 0x90, 0x0f, 0x05], // syscall
        [0x90, 0x90, 0x0f, 0x34], // sysenter
        [0x90, 0x90, 0xcd, 0x80], // int 0x80
        [0x90, 0x90, 0x90, 0xcc], // int3
        [0x90, 0x90, 0xe6, 0x80], // out
        [0x90, 0x90, 0x90, 0xf4], // hlt
        [0x90, 0x90, 0x8e, 0xe8], // mov gs, eax
        [0x90, 0x0f, 0x01, 0xf8], // swapgs
        [0x90, 0x0f, 0xa1, 0x90], // pop fs
        [0x90, 0x0f, 0xa2, 0x90], // cpuid
        [0x90, 0x90, 0x90, 0x50], // push rax
        [0x90, 0x90, 0x90, 0xc3], // ret
        [0x90, 0x90, 0xff, 0xe0], // jmp rax
        [0x90, 0x90, 0xff, 0xd0], // call rax
        [0x90, 0x90, 0x90, 0xd7], // xlat
        [0x66, 0x0f, 0xf7, 0xc1], // maskmovdqu
        [0x90, 0x0f, 0xae, 0x03], // fxsave [rbx]
    ];
    for to in harmful {
        let why = tampered(Kind::PerAccess, LOAD, &[0x4a, 0x8b, 0x04, 0x33], &to);
        assert!(
            matches!(
                why,
                "not on the list"
                    | "privileged, or saves or restores state"
                    | "a computed jump to where the guest says"
                    | "an operand of a kind that is not allowed"
                    | "a jump where none is expected"
            ),
            "{to:02x?}: {why}"
        );
    }
}

#[test]
fn a_host_address_left_in_a_guest_register_is_found() {
    // stosb: not r14 behind it becomes three NOPs
    let why = tampered(
        Kind::PerAccess,
        &[0xaa, 0x31, 0xc0, 0xc3],
        &[0xaa, 0x49, 0xf7, 0xd6],
        &[0xaa, 0x90, 0x90, 0x90],
    );
    assert_eq!(why, "a host address in a guest register on leaving");
}

#[test]
fn a_bit_index_that_is_not_masked_is_found() {
    // bts [rbx], rax; ret: shrx r15, r15, rcx becomes sarx
    let why = tampered(
        Kind::PerAccess,
        &[0x48, 0x0f, 0xab, 0x03, 0xc3],
        &[0xc4, 0x42, 0xf3, 0xf7, 0xff],
        &[0xc4, 0x42, 0xf2, 0xf7, 0xff],
    );
    assert_eq!(why, "a bit index beyond the operand");
}

#[test]
fn a_jump_into_an_instruction_is_found() {
    // the check's jump goes a byte further
    let code = &[0x49, 0x81, 0xfe, 0xf8, 0x0f, 0, 0, 0x0f, 0x87];
    let (request, mut block) = translated(Kind::PerAccess, LOAD);
    let at = block
        .code
        .windows(code.len())
        .position(|w| w == code)
        .unwrap();
    block.code[at + code.len()] += 1;
    let why = verify(&request, &block).unwrap_err().why;
    assert_eq!(why, "a jump into the middle of an instruction");
}

/// `sysretq`
const RETURN: &[u8] = &[0x48, 0x0f, 0x07];

#[test]
fn a_way_back_from_a_stub_into_an_instruction_is_found() {
    let why = tampered(
        Kind::Grouped,
        RETURN,
        &[0x4c, 0x8d, 0x3d, 5, 0, 0, 0],
        &[0x4c, 0x8d, 0x3d, 6, 0, 0, 0],
    );
    assert_eq!(why, "a jump into the middle of an instruction");
}

#[test]
fn a_kernels_jump_to_the_stub_for_system_calls_is_found() {
    let (mut request, block) = translated(Kind::Grouped, RETURN);
    let thunks = &mut request.thunks;
    std::mem::swap(&mut thunks.system_call, &mut thunks.system_return);
    let found = verify(&request, &block).unwrap_err();
    assert_eq!(found.why, "a jump out of the block");
}

#[test]
fn a_link_where_an_entry_is_patched_is_found() {
    // jmp, behind five bytes that do nothing: the entry would be the jump itself
    let (request, mut block) = translated(Kind::Grouped, &[0xeb, 0x10]);
    block.direct_entry += 5;
    let found = verify(&request, &block).unwrap_err();
    assert_eq!(found.why, "a link in what else the engine patches");
}
