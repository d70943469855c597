//! What holds for every block, whatever the guest's bytes are.

use iced_x86::{Decoder, DecoderOptions, Instruction};
use proptest::prelude::*;
use translator::context::Mode;
use translator::relocation;
use translator::{Block, Exit, GuestCode, Kind, Options, Placing, Request, Thunks, Translator};
use x86::features::Features;

const VA: u64 = 0x7000_1000;
const PLACE: u64 = 0x10_0000;
const FIRST_EXIT: u32 = 0x1000;

struct Pages(Vec<u8>);

impl GuestCode for Pages {
    fn tail(&self, va: u64) -> Option<&[u8]> {
        let offset = usize::try_from(va.checked_sub(VA)?).ok()?;
        let end = (offset | 0xfff) + 1;
        self.0
            .get(offset..end.min(self.0.len()))
            .filter(|tail| !tail.is_empty())
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Grouped),
        Just(Kind::PerAccess),
        Just(Kind::Bounce),
        Just(Kind::Step)
    ]
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![
        Just(Mode::Kernel),
        Just(Mode::User),
        Just(Mode::KernelUserAccess)
    ]
}

fn features() -> impl Strategy<Value = Features> {
    prop_oneof![
        Just(Features::EVERYTHING),
        Just(x86::features::CpuModel::Baseline.required())
    ]
}

/// Bytes with many instructions in them, rather than many invalid ones.
fn code() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        4 => any::<u8>(),
        1 => prop::sample::select(vec![0x0f, 0x66, 0xf3, 0xf2, 0xf0, 0xc4, 0xc5, 0xe2, 0x7d, 0x48, 0x4c, 0x41, 0x8b, 0x89, 0x24]),
    ];
    prop::collection::vec(byte, 1..200)
}

fn positions_are_in_range(block: &Block, len: usize) {
    let inside = |at: u32| assert!((at as usize) < len, "{at:#x} of {len:#x}");
    for exit in &block.exits {
        match *exit {
            Exit::Link { target, patch } => {
                assert!(target < 4096);
                inside(patch + 3);
            }
            Exit::Goto { next } | Exit::Bounced { next } => assert!(next <= block.guest_len),
            Exit::Interpret { at } => assert!(at <= block.guest_len),
            Exit::Access {
                at, size, retry, ..
            } => {
                assert!(at < block.guest_len && (1..=64).contains(&size));
                inside(retry);
            }
            Exit::Group {
                at,
                len: bytes,
                retry,
                patch,
                ..
            } => {
                assert!(at < block.guest_len && (1..=2048).contains(&bytes));
                inside(u32::from(retry));
                inside(u32::from(patch) + 10);
            }
            Exit::Stale => {}
        }
    }
    inside(block.stale);
    assert!(block.indirect_entry <= block.direct_entry);
    assert!(block.positions.first() == Some(&(0, 0)));
    assert!(
        block
            .positions
            .windows(2)
            .all(|p| p[0].0 <= p[1].0 && p[0].1 < p[1].1)
    );
    assert_eq!(block.positions.len(), usize::from(block.instructions));
}

/// Every byte belongs to an instruction, and every direct jump leads to the start of
/// one, or to a thunk.
fn code_is_well_formed(block: &Block) {
    let mut decoder = Decoder::with_ip(64, &block.code, PLACE, DecoderOptions::NONE);
    let (mut starts, mut targets) = (vec![], vec![]);
    let mut ins = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut ins);
        assert!(!ins.is_invalid(), "at {:#x}", ins.ip());
        starts.push(ins.ip());
        if ins.near_branch_target() != 0 {
            targets.push((ins.ip(), ins.near_branch_target()));
        }
    }
    for (from, target) in targets {
        let thunk = (PLACE - 0x100..PLACE).contains(&target);
        assert!(
            thunk || starts.binary_search(&target).is_ok(),
            "{from:#x} to {target:#x}"
        );
        let entry = PLACE + u64::from(block.direct_entry);
        assert!(
            !(entry + 1..entry + 5).contains(&target),
            "into the patch at the entry"
        );
    }
}

/// `PROPTEST_CASES` says how many cases, or it is a few.
fn cases(few: u32) -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(few),
    }
}

proptest! {
    #![proptest_config(cases(3000))]

    #[test]
    fn any_bytes_become_a_well_formed_block_or_are_refused(
        code in code(), kind in kinds(), mode in modes(), at_end in any::<bool>(), count in any::<bool>(),
        features in features(),
    ) {
        let mut pages = vec![0x90; 8192];
        let offset = if at_end { 4096 - code.len().min(8) } else { 0 };
        pages[offset..offset + code.len()].copy_from_slice(&code);
        let thunks = Thunks { exit: PLACE - 0x100, jump_miss: PLACE - 0x80, stack_refill: [PLACE - 0x40; 3], system_call: PLACE - 0x30, system_return: PLACE - 0x20 };
        let request = Request { va: VA + offset as u64, mode, kind, features, place: PLACE, first_exit: FIRST_EXIT, thunks };
        let mut translator = Translator::new(Options { count_instructions: count });
        let mut block = Block::default();
        if translator.translate(&request, &Pages(pages), &mut block).is_ok() {
            positions_are_in_range(&block, block.code.len());
            code_is_well_formed(&block);
        }
    }
}

fn places() -> impl Strategy<Value = (u64, u32, Thunks)> {
    (0x1_0000_u64..0x7000_0000, any::<[u16; 7]>(), any::<u32>()).prop_map(
        |(place, near, first_exit)| {
            let [
                exit,
                jump_miss,
                kernel,
                user,
                access,
                system_call,
                system_return,
            ] = near.map(|less| place - u64::from(less));
            let thunks = Thunks {
                exit,
                jump_miss,
                stack_refill: [kernel, user, access],
                system_call,
                system_return,
            };
            (place, first_exit >> 4, thunks)
        },
    )
}

proptest! {
    #![proptest_config(cases(3000))]

    #[test]
    fn a_block_moved_is_the_block_translated_there(
        code in code(), kind in kinds(), mode in modes(), at_end in any::<bool>(), count in any::<bool>(),
        here in places(), there in places(),
    ) {
        let mut pages = vec![0x90; 8192];
        let offset = if at_end { 4096 - code.len().min(8) } else { 0 };
        pages[offset..offset + code.len()].copy_from_slice(&code);
        let pages = Pages(pages);
        let request = |(place, first_exit, thunks)| Request {
            va: VA + offset as u64, mode, kind, features: Features::EVERYTHING, place, first_exit, thunks,
        };
        let mut translator = Translator::new(Options { count_instructions: count });
        let (mut moved, mut wanted) = (Block::default(), Block::default());
        if translator.translate(&request(here), &pages, &mut moved).is_ok() {
            translator.translate(&request(there), &pages, &mut wanted).unwrap();
            let (place, first_exit, thunks) = there;
            let placing = Placing { place, first_exit, thunks, mode };
            prop_assert!(relocation::place(&mut moved.code, moved.relocations.iter().copied(), &placing));
            prop_assert_eq!(&moved.code, &wanted.code);
            prop_assert_eq!(&moved.relocations, &wanted.relocations);
            prop_assert_eq!(&moved.exits, &wanted.exits);
        }
    }
}

#[test]
fn an_instruction_across_pages_wants_the_second_page() {
    // mov eax, imm32, its last bytes in an absent page
    let mut page = vec![0x90; 4096];
    page[4094] = 0xb8;
    let request = Request {
        va: VA + 4094,
        mode: Mode::User,
        kind: Kind::Grouped,
        features: Features::EVERYTHING,
        place: PLACE,
        first_exit: FIRST_EXIT,
        thunks: Thunks::default(),
    };
    let refused = Translator::new(Options::default())
        .translate(&request, &Pages(page), &mut Block::default())
        .unwrap_err();
    assert_eq!(refused, translator::Refused::Fetch(VA + 4096));
}

#[test]
fn an_exit_is_at_most_16_bytes() {
    assert!(size_of::<Exit>() <= 16);
}
