//! Emitted code, proved harmless block by block: see `lab::verifier`.
//!
//! `KOMBI_SOUP_CASES` and `KOMBI_SOUP_SEED` make the random part longer or another.

mod boot;

use std::sync::{Mutex, PoisonError};

use boot::Boot;
use hv_soft::SoftHypervisor;
use lab::Random;
use lab::difference::compare;
use lab::engine::Guest;
use lab::oracle::Oracle;
use lab::program::Generator;
use lab::verifier::{Proof, verify};
use machine::Outcome;
use translator::context::Mode;
use translator::{Block, GuestCode, Kind, Options, Request, Thunks, Translator};

const PLACE: u64 = 0x10_0000;
const THUNKS: Thunks = Thunks {
    exit: PLACE - 0x100,
    jump_miss: PLACE - 0x80,
    stack_refill: [PLACE - 0x60, PLACE - 0x40],
};
const MODES: [Mode; 2] = [Mode::Kernel, Mode::User];
const KINDS: [Kind; 3] = [Kind::Grouped, Kind::PerAccess, Kind::Bounce];

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

    fn flags_wanted(&self, _: u64) -> Option<u8> {
        None
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

/// How many blocks were proved since the last call.
#[track_caller]
fn all_were_harmless() -> u64 {
    let (sum, blocks, violations) = std::mem::replace(
        &mut *OBSERVED.lock().unwrap(),
        (Proof::default(), 0, Vec::new()),
    );
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
    let mut guest = Guest::start_on(SoftHypervisor::default().observed(observe)).unwrap();
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
        engine: SoftHypervisor::default().observed(observe),
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
