//! What code comes out, pinned: a slowdown shows in review.
//! `UPDATE_EXPECT=1` rewrites.

use expect_test::{Expect, expect};
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};
use translator::context::Mode;
use translator::{Block, GuestCode, Kind, Options, Request, Thunks, Translator};

const VA: u64 = 0xffff_ffff_8100_0100;
const PLACE: u64 = 0x10_0000;

struct Page(Vec<u8>);

impl GuestCode for Page {
    fn tail(&self, va: u64) -> Option<&[u8]> {
        let offset = va.checked_sub(VA & !0xfff)?;
        self.0.get(offset as usize..)
    }

    fn flags_wanted(&self, _: u64) -> Option<u8> {
        None
    }
}

fn translate(kind: Kind, mode: Mode, code: &[u8]) -> Block {
    let mut page = vec![0xcc; 4096];
    page[0x100..0x100 + code.len()].copy_from_slice(code);
    let mut block = Block::default();
    let thunks = Thunks {
        exit: PLACE - 0x100,
        jump_miss: PLACE - 0x80,
        stack_refill: [PLACE - 0x60; 2],
    };
    let request = Request {
        va: VA,
        mode,
        kind,
        place: PLACE,
        first_exit: 100,
        thunks,
    };
    Translator::new(Options::default())
        .translate(&request, &Page(page), &mut block)
        .unwrap();
    block
}

fn disassemble(block: &Block) -> String {
    let mut decoder = Decoder::with_ip(64, &block.code, 0, DecoderOptions::NONE);
    let mut formatter = IntelFormatter::new();
    formatter
        .options_mut()
        .set_space_after_operand_separator(true);
    let (mut text, mut ins) = (String::new(), Instruction::default());
    while decoder.can_decode() {
        decoder.decode_out(&mut ins);
        if ins.ip() == u64::from(block.direct_entry) && block.direct_entry != 0 {
            text.clear();
        }
        text += &format!("{:4x} ", ins.ip());
        formatter.format(&ins, &mut text);
        text.push('\n');
    }
    text + &format!("{:?}\n", block.exits)
}

/// The code from the direct entry on, as a kernel block.
fn check(code: &[u8], expect: Expect) {
    expect.assert_eq(&disassemble(&translate(Kind::Grouped, Mode::Kernel, code)));
}

#[test]
fn load_from_a_base_with_dead_flags_is_checked_by_xor_and_cmp() {
    // mov rax, [rbx+8]; xor ecx, ecx; ret
    check(
        &[0x48, 0x8b, 0x43, 0x08, 0x31, 0xc9, 0xc3],
        expect![[r#"
          17 mov r14, gs:[442000h]
          20 lea r14, [rbx+8]
          24 pext r15, r14, gs:[0B0h]
          2f xor r14, gs:[r15*8+280h]
          38 cmp r14, 0FF8h
          3f ja 00000000000000A0h
          45 mov r14, gs:[r15*8+18280h]
          4e mov rax, [rbx+r14+8]
          53 lea r14, [rsp]
          57 xor r14, gs:[20280h]
          60 cmp r14, 0FF8h
          67 ja 00000000000000B4h
          6d xor ecx, ecx
          6f mov r14, gs:[20290h]
          78 mov r14, [rsp+r14]
          7c lea rsp, [rsp+8]
          81 pext r15, r14, gs:[0C0h]
          8c jmp qword ptr gs:[r15*8+402C0h]
          95 mov r15d, 64h
          9b jmp 0FFFFFFFFFFFFFF00h
          a0 xor r14, gs:[r15*8+280h]
          a9 mov r15d, 65h
          af jmp 0FFFFFFFFFFFFFF00h
          b4 xor r14, gs:[20280h]
          bd lea r15, [0CEh]
          c4 jmp 0FFFFFFFFFFFFFFA0h
          c9 jmp 0000000000000053h
          ce mov r15d, 66h
          d4 jmp 0FFFFFFFFFFFFFF00h
        [Stale, Access { at: 0, size: 8, write: false, stack: false, retry: 32 }, Group { at: 4, len: 8, write: true, stack: true, retry: 83, patch: 206 }]
    "#]],
    );
}
#[test]
fn prologue_shares_one_stack_check() {
    // push rbp; mov rbp, rsp; push r15; push rbx; sub rsp, 8; call +0x100
    check(
        &[
            0x55, 0x48, 0x89, 0xe5, 0x41, 0x57, 0x53, 0x48, 0x83, 0xec, 8, 0xe8, 0, 1, 0, 0,
        ],
        expect![[r#"
              17 mov r14, gs:[442000h]
              20 lea r14, [rsp-28h]
              25 xor r14, gs:[20280h]
              2e cmp r14, 0FD8h
              35 ja 0000000000000090h
              3b mov r14, gs:[20290h]
              44 mov [rsp+r14-8], rbp
              49 lea rsp, [rsp-8]
              4e mov rbp, rsp
              51 mov r15, gs:[78h]
              5a mov [rsp+r14-8], r15
              5f lea rsp, [rsp-8]
              64 mov [rsp+r14-8], rbx
              69 lea rsp, [rsp-8]
              6e sub rsp, 8
              72 mov qword ptr [rsp+r14-8], 0FFFFFFFF81000110h
              7b lea rsp, [rsp-8]
              80 jmp 00000000000000B5h
              85 mov r15d, 64h
              8b jmp 0FFFFFFFFFFFFFF00h
              90 xor r14, gs:[20280h]
              99 lea r15, [0AAh]
              a0 jmp 0FFFFFFFFFFFFFFA0h
              a5 jmp 0000000000000020h
              aa mov r15d, 65h
              b0 jmp 0FFFFFFFFFFFFFF00h
              b5 mov r15d, 66h
              bb jmp 0FFFFFFFFFFFFFF00h
            [Stale, Group { at: 0, len: 40, write: true, stack: true, retry: 32, patch: 170 }, Link { target: 528, patch: 129 }]
        "#]],
    );
}
