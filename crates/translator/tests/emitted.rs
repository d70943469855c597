//! What code comes out, pinned: a slowdown shows in review.
//! `UPDATE_EXPECT=1` rewrites.

use expect_test::{Expect, expect};
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};
use translator::block::POLL_BYTES;
use translator::context::Mode;
use translator::{Block, Exit, GuestCode, Kind, Options, Request, Thunks, Translator};
use x86::features::Features;

const VA: u64 = 0xffff_ffff_8100_0100;
const PLACE: u64 = 0x10_0000;

struct Page(Vec<u8>);

impl GuestCode for Page {
    fn tail(&self, va: u64) -> Option<&[u8]> {
        let offset = va.checked_sub(VA & !0xfff)?;
        self.0.get(offset as usize..)
    }
}

fn translate(kind: Kind, mode: Mode, code: &[u8]) -> Block {
    let mut page = vec![0xcc; 4096];
    page[0x100..0x100 + code.len()].copy_from_slice(code);
    let mut block = Block::default();
    let thunks = Thunks {
        exit: PLACE - 0x100,
        jump_miss: PLACE - 0x80,
        stack_refill: [PLACE - 0x60; 3],
        system_call: PLACE - 0x40,
        system_return: PLACE - 0x20,
    };
    let request = Request {
        va: VA,
        mode,
        kind,
        features: Features::EVERYTHING,
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
        let entry = u64::from(block.direct_entry);
        if ins.ip() + POLL_BYTES as u64 == entry || (ins.ip() == 0 && entry == 0) {
            text.clear();
        }
        text += &format!("{:4x} ", ins.ip());
        formatter.format(&ins, &mut text);
        text.push('\n');
    }
    text + &format!("{:?}\n", block.exits)
}

/// The code from the entry that polls on, as a kernel block.
fn check(code: &[u8], expect: Expect) {
    expect.assert_eq(&disassemble(&translate(Kind::Grouped, Mode::Kernel, code)));
}

#[test]
fn load_from_a_base_with_dead_flags_is_checked_by_xor_and_cmp() {
    // mov rax, [rbx+8]; xor ecx, ecx; jmp 0
    check(
        &[0x48, 0x8b, 0x43, 0x08, 0x31, 0xc9, 0xeb, 0xf8],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 lea r14, [rbx+8]
              24 pext r15, r14, gs:[0B0h]
              2f xor r14, gs:[r15*8+410h]
              38 cmp r14, 0FF8h
              3f ja 0000000000000065h
              45 mov r14, gs:[r15*8+60410h]
              4e mov rax, [rbx+r14+8]
              53 xor ecx, ecx
              55 jmp 0000000000000017h
              5a mov r15d, 64h
              60 jmp 0FFFFFFFFFFFFFF00h
              65 xor r14, gs:[r15*8+410h]
              6e mov r15d, 65h
              74 jmp 0FFFFFFFFFFFFFF00h
            [Stale, Access { at: 0, size: 8, write: false, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn load_from_a_base_with_live_flags_touches_no_flag() {
    // mov rax, [rbx+8]; setc al; ud2
    check(
        &[0x48, 0x8b, 0x43, 0x08, 0x0f, 0x92, 0xc0, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 lea r14, [rbx+8]
              24 pext r15, r14, gs:[0B0h]
              2f mov gs:[0E8h], rcx
              38 mov rcx, gs:[r15*8+410h]
              41 not rcx
              44 lea r14, [r14+rcx+1]
              49 lea rcx, [r14+7]
              4d pext rcx, rcx, gs:[0B8h]
              58 jrcxz 000000000000005Fh
              5a jmp 000000000000008Fh
              5f mov rcx, gs:[0E8h]
              68 mov r14, gs:[r15*8+60410h]
              71 mov rax, [rbx+r14+8]
              76 setb al
              79 mov r15d, 64h
              7f jmp 0FFFFFFFFFFFFFF00h
              84 mov r15d, 65h
              8a jmp 0FFFFFFFFFFFFFF00h
              8f mov rcx, gs:[r15*8+410h]
              98 lea r14, [r14+rcx]
              9c mov rcx, gs:[0E8h]
              a5 mov r15d, 66h
              ab jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 7 }, Stale, Access { at: 0, size: 8, write: false, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn prologue_shares_one_stack_check() {
    // push rbp; mov rbp, rsp; push r15; push rbx; sub rsp, 8; call +0x100
    check(
        &[
            0x55, 0x48, 0x89, 0xe5, 0x41, 0x57, 0x53, 0x48, 0x83, 0xec, 0x08, 0xe8, 0x00, 0x01,
            0x00, 0x00,
        ],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 lea r14, [rsp-28h]
              25 xor r14, gs:[80410h]
              2e cmp r14, 0FD8h
              35 ja 0000000000000090h
              3b mov r14, gs:[80420h]
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
              90 xor r14, gs:[80410h]
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

#[test]
fn epilogue_shares_one_stack_check() {
    // add rsp, 8; pop rbx; pop r15; pop rbp; ret
    check(
        &[0x48, 0x83, 0xc4, 0x08, 0x5b, 0x41, 0x5f, 0x5d, 0xc3],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 lea r14, [rsp+8]
              25 xor r14, gs:[80410h]
              2e cmp r14, 0FE0h
              35 ja 0000000000000094h
              3b add rsp, 8
              3f mov r14, gs:[80420h]
              48 mov rbx, [rsp+r14]
              4c lea rsp, [rsp+8]
              51 mov r15, [rsp+r14]
              55 mov gs:[78h], r15
              5e lea rsp, [rsp+8]
              63 mov rbp, [rsp+r14]
              67 lea rsp, [rsp+8]
              6c mov r14, [rsp+r14]
              70 lea rsp, [rsp+8]
              75 pext r15, r14, gs:[0C0h]
              80 jmp qword ptr gs:[r15*8+180470h]
              89 mov r15d, 64h
              8f jmp 0FFFFFFFFFFFFFF00h
              94 xor r14, gs:[80410h]
              9d lea r15, [0AEh]
              a4 jmp 0FFFFFFFFFFFFFFA0h
              a9 jmp 0000000000000020h
              ae mov r15d, 65h
              b4 jmp 0FFFFFFFFFFFFFF00h
            [Stale, Group { at: 0, len: 32, write: true, stack: true, retry: 32, patch: 174 }]
        "#]],
    );
}

#[test]
fn fields_of_one_structure_share_one_check() {
    // mov rax, [rbx]; mov rcx, [rbx+8]; mov [rbx+16], r14; xor eax, eax; ud2
    check(
        &[
            0x48, 0x8b, 0x03, 0x48, 0x8b, 0x4b, 0x08, 0x4c, 0x89, 0x73, 0x10, 0x31, 0xc0, 0x0f,
            0x0b,
        ],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, rbx
              23 pext r15, r14, gs:[0B0h]
              2e xor r14, gs:[r15*8+20410h]
              37 cmp r14, 0FE8h
              3e ja 0000000000000085h
              44 mov r15, gs:[r15*8+60410h]
              4d mov gs:[108h], r15
              56 mov rax, [rbx+r15]
              5a mov rcx, [rbx+r15+8]
              5f mov r14, gs:[70h]
              68 mov [rbx+r15+10h], r14
              6d xor eax, eax
              6f mov r15d, 64h
              75 jmp 0FFFFFFFFFFFFFF00h
              7a mov r15d, 65h
              80 jmp 0FFFFFFFFFFFFFF00h
              85 xor r14, gs:[r15*8+20410h]
              8e mov r15d, 66h
              94 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 13 }, Stale, Group { at: 0, len: 24, write: true, stack: false, retry: 32, patch: 142 }]
        "#]],
    );
}

#[test]
fn single_push_with_dead_flags_asks_the_stack_slot() {
    // push rax; xor eax, eax; ud2
    check(
        &[0x50, 0x31, 0xc0, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 lea r14, [rsp-8]
              25 xor r14, gs:[80410h]
              2e cmp r14, 0FF8h
              35 ja 0000000000000066h
              3b mov r14, gs:[80420h]
              44 mov [rsp+r14-8], rax
              49 lea rsp, [rsp-8]
              4e xor eax, eax
              50 mov r15d, 64h
              56 jmp 0FFFFFFFFFFFFFF00h
              5b mov r15d, 65h
              61 jmp 0FFFFFFFFFFFFFF00h
              66 xor r14, gs:[80410h]
              6f lea r15, [80h]
              76 jmp 0FFFFFFFFFFFFFFA0h
              7b jmp 0000000000000020h
              80 mov r15d, 66h
              86 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 3 }, Stale, Access { at: 0, size: 8, write: true, stack: true, retry: 32 }]
        "#]],
    );
}

#[test]
fn constant_address_needs_no_index() {
    // mov eax, [rip+0x10000]; xor ecx, ecx; ud2
    check(
        &[0x8b, 0x05, 0x00, 0x00, 0x01, 0x00, 0x31, 0xc9, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 cmp qword ptr gs:[8490h], 0FFFFFFFF81010000h
              2d jne 000000000000005Bh
              33 mov r14, gs:[48490h]
              3c mov eax, [r14+106h]
              43 xor ecx, ecx
              45 mov r15d, 64h
              4b jmp 0FFFFFFFFFFFFFF00h
              50 mov r15d, 65h
              56 jmp 0FFFFFFFFFFFFFF00h
              5b mov r14, 0FFFFFFFF81010106h
              62 mov r15d, 66h
              68 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 8 }, Stale, Access { at: 0, size: 4, write: false, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn constant_address_with_live_flags() {
    // mov eax, [rip+0x10000]; setc al; ud2
    check(
        &[
            0x8b, 0x05, 0x00, 0x00, 0x01, 0x00, 0x0f, 0x92, 0xc0, 0x0f, 0x0b,
        ],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov gs:[0E8h], rcx
              29 mov rcx, gs:[8490h]
              32 lea rcx, [rcx+7EFF0000h]
              39 jrcxz 0000000000000040h
              3b jmp 0000000000000072h
              40 mov rcx, gs:[0E8h]
              49 mov r14, gs:[48490h]
              52 mov eax, [r14+106h]
              59 setb al
              5c mov r15d, 64h
              62 jmp 0FFFFFFFFFFFFFF00h
              67 mov r15d, 65h
              6d jmp 0FFFFFFFFFFFFFF00h
              72 mov rcx, gs:[0E8h]
              7b mov r14, 0FFFFFFFF81010106h
              82 mov r15d, 66h
              88 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 9 }, Stale, Access { at: 0, size: 4, write: false, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn percpu_access_adds_the_gs_base() {
    // mov rax, gs:[0x1234]; xor ecx, ecx; ud2
    check(
        &[
            0x65, 0x48, 0x8b, 0x04, 0x25, 0x34, 0x12, 0x00, 0x00, 0x31, 0xc9, 0x0f, 0x0b,
        ],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, gs:[180h]
              29 lea r14, [r14+1234h]
              30 pext r15, r14, gs:[0B0h]
              3b xor r14, gs:[r15*8+410h]
              44 cmp r14, 0FF8h
              4b ja 0000000000000075h
              51 add r14, gs:[r15*8+40410h]
              5a mov rax, [r14]
              5d xor ecx, ecx
              5f mov r15d, 64h
              65 jmp 0FFFFFFFFFFFFFF00h
              6a mov r15d, 65h
              70 jmp 0FFFFFFFFFFFFFF00h
              75 xor r14, gs:[r15*8+410h]
              7e mov r15d, 66h
              84 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 11 }, Stale, Access { at: 0, size: 8, write: false, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn guest_r14_and_r15_come_from_the_context() {
    // add r14, r15; ud2
    check(
        &[0x4d, 0x01, 0xfe, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, gs:[70h]
              29 mov r15, gs:[78h]
              32 add r14, r15
              35 mov gs:[70h], r14
              3e mov r15d, 64h
              44 jmp 0FFFFFFFFFFFFFF00h
              49 mov r15d, 65h
              4f jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 3 }, Stale]
        "#]],
    );
}

#[test]
fn guest_r14_as_base_and_r15_as_operand() {
    // xor [r14+4], r15d; ud2
    check(
        &[0x45, 0x31, 0x7e, 0x04, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, gs:[70h]
              29 lea r14, [r14+4]
              2d pext r15, r14, gs:[0B0h]
              38 xor r14, gs:[r15*8+20410h]
              41 cmp r14, 0FFCh
              48 ja 0000000000000079h
              4e add r14, gs:[r15*8+40410h]
              57 mov r15, gs:[78h]
              60 xor [r14], r15d
              63 mov r15d, 64h
              69 jmp 0FFFFFFFFFFFFFF00h
              6e mov r15d, 65h
              74 jmp 0FFFFFFFFFFFFFF00h
              79 xor r14, gs:[r15*8+20410h]
              82 mov r15d, 66h
              88 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 4 }, Stale, Access { at: 0, size: 4, write: true, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn high_byte_register_with_memory_borrows_rsi() {
    // mov [rbx], ah; xor eax, eax; ud2
    check(
        &[0x88, 0x23, 0x31, 0xc0, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, rbx
              23 pext r15, r14, gs:[0B0h]
              2e xor r14, gs:[r15*8+20410h]
              37 cmp r14, 0FFFh
              3e ja 000000000000007Ch
              44 add r14, gs:[r15*8+40410h]
              4d mov gs:[0C8h], rsi
              56 lea rsi, [r14]
              59 mov [rsi], ah
              5b mov rsi, gs:[0C8h]
              64 xor eax, eax
              66 mov r15d, 64h
              6c jmp 0FFFFFFFFFFFFFF00h
              71 mov r15d, 65h
              77 jmp 0FFFFFFFFFFFFFF00h
              7c xor r14, gs:[r15*8+20410h]
              85 mov r15d, 66h
              8b jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 4 }, Stale, Access { at: 0, size: 1, write: true, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn locked_instruction_keeps_its_lock() {
    // lock inc dword [rdi]; xor eax, eax; ud2
    check(
        &[0xf0, 0xff, 0x07, 0x31, 0xc0, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, rdi
              23 pext r15, r14, gs:[0B0h]
              2e xor r14, gs:[r15*8+20410h]
              37 cmp r14, 0FFCh
              3e ja 000000000000006Ah
              44 mov r14, gs:[r15*8+60410h]
              4d lock inc dword ptr [rdi+r14]
              52 xor eax, eax
              54 mov r15d, 64h
              5a jmp 0FFFFFFFFFFFFFF00h
              5f mov r15d, 65h
              65 jmp 0FFFFFFFFFFFFFF00h
              6a xor r14, gs:[r15*8+20410h]
              73 mov r15d, 66h
              79 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 5 }, Stale, Access { at: 0, size: 4, write: true, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn prefixes_without_meaning_are_dropped() {
    // repeated 2e and 3e, tzcnt eax, ecx; ud2
    check(
        &[0x2e, 0x3e, 0xf3, 0x0f, 0xbc, 0xc1, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 nop
              21 tzcnt eax, ecx
              25 mov r15d, 64h
              2b jmp 0FFFFFFFFFFFFFF00h
              30 mov r15d, 65h
              36 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 6 }, Stale]
        "#]],
    );
}

#[test]
fn bit_string_finds_its_word() {
    // bts [rdi], rax; ud2
    check(
        &[0x48, 0x0f, 0xab, 0x07, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, rdi
              23 mov gs:[0E8h], rcx
              2c mov r15, rax
              2f mov ecx, 6
              34 sarx r15, r15, rcx
              39 mov rcx, gs:[0E8h]
              42 lea r14, [r14+r15*8]
              46 pext r15, r14, gs:[0B0h]
              51 mov gs:[0E8h], rcx
              5a mov rcx, gs:[r15*8+20410h]
              63 not rcx
              66 lea r14, [r14+rcx+1]
              6b lea rcx, [r14+7]
              6f pext rcx, rcx, gs:[0B8h]
              7a jrcxz 0000000000000081h
              7c jmp 00000000000000D5h
              81 mov rcx, gs:[0E8h]
              8a mov r15, gs:[r15*8+40410h]
              93 lea r14, [r14+r15]
              97 mov gs:[0E8h], rcx
              a0 mov r15, rax
              a3 mov ecx, 3Ah
              a8 shlx r15, r15, rcx
              ad shrx r15, r15, rcx
              b2 mov rcx, gs:[0E8h]
              bb bts [r14], r15
              bf mov r15d, 64h
              c5 jmp 0FFFFFFFFFFFFFF00h
              ca mov r15d, 65h
              d0 jmp 0FFFFFFFFFFFFFF00h
              d5 mov rcx, gs:[r15*8+20410h]
              de lea r14, [r14+rcx]
              e2 mov rcx, gs:[0E8h]
              eb mov r15d, 66h
              f1 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 4 }, Stale, Access { at: 0, size: 8, write: true, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn conditional_jump_in_the_page_waits_for_its_link() {
    // test eax, eax; je +0x10; jmp -2
    check(
        &[0x85, 0xc0, 0x74, 0x10, 0xeb, 0xfe],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 nop [rax]
              23 test eax, eax
              25 je 000000000000003Bh
              2b jmp 0000000000000046h
              30 mov r15d, 64h
              36 jmp 0FFFFFFFFFFFFFF00h
              3b mov r15d, 65h
              41 jmp 0FFFFFFFFFFFFFF00h
              46 mov r15d, 66h
              4c jmp 0FFFFFFFFFFFFFF00h
            [Stale, Link { target: 276, patch: 39 }, Link { target: 260, patch: 44 }]
        "#]],
    );
}

#[test]
fn loop_to_its_own_start_needs_no_exit() {
    // dec ecx; jne 0; ud2
    check(
        &[0xff, 0xc9, 0x75, 0xfc, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 nop [rax]
              23 dec ecx
              25 jne 0000000000000017h
              2b mov r15d, 64h
              31 jmp 0FFFFFFFFFFFFFF00h
              36 mov r15d, 65h
              3c jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 4 }, Stale]
        "#]],
    );
}

#[test]
fn jump_out_of_the_page_goes_through_the_jump_cache() {
    // jmp +0x10000
    check(
        &[0xe9, 0x00, 0x00, 0x01, 0x00],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 nop [rax+rax]
              25 mov r14, 0FFFFFFFF81010105h
              2c jmp qword ptr gs:[1C0880h]
              34 mov r15d, 64h
              3a jmp 0FFFFFFFFFFFFFF00h
            [Stale]
        "#]],
    );
}

#[test]
fn indirect_jump_goes_through_the_jump_cache() {
    // jmp rax
    check(
        &[0xff, 0xe0],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, rax
              23 pext r15, r14, gs:[0C0h]
              2e jmp qword ptr gs:[r15*8+180470h]
              37 mov r15d, 64h
              3d jmp 0FFFFFFFFFFFFFF00h
            [Stale]
        "#]],
    );
}

#[test]
fn indirect_call_through_memory() {
    // call [rbx+8]
    check(
        &[0xff, 0x53, 0x08],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 lea r14, [rsp-8]
              25 mov gs:[0E8h], rcx
              2e mov rcx, gs:[80410h]
              37 not rcx
              3a lea r14, [r14+rcx+1]
              3f pext rcx, r14, gs:[0B8h]
              4a jrcxz 0000000000000051h
              4c jmp 000000000000010Eh
              51 lea rcx, [r14+7]
              55 pext rcx, rcx, gs:[0B8h]
              60 jrcxz 0000000000000067h
              62 jmp 000000000000010Eh
              67 mov rcx, gs:[0E8h]
              70 lea r14, [rbx+8]
              74 pext r15, r14, gs:[0B0h]
              7f mov gs:[0E8h], rcx
              88 mov rcx, gs:[r15*8+410h]
              91 not rcx
              94 lea r14, [r14+rcx+1]
              99 lea rcx, [r14+7]
              9d pext rcx, rcx, gs:[0B8h]
              a8 jrcxz 00000000000000AFh
              aa jmp 000000000000018Eh
              af mov rcx, gs:[0E8h]
              b8 mov r14, gs:[r15*8+60410h]
              c1 mov r14, [rbx+r14+8]
              c6 mov gs:[0C8h], r14
              cf mov r14, gs:[80420h]
              d8 mov qword ptr [rsp+r14-8], 0FFFFFFFF81000103h
              e1 lea rsp, [rsp-8]
              e6 mov r14, gs:[0C8h]
              ef pext r15, r14, gs:[0C0h]
              fa jmp qword ptr gs:[r15*8+180470h]
             103 mov r15d, 64h
             109 jmp 0FFFFFFFFFFFFFF00h
             10e mov rcx, gs:[80410h]
             117 lea r14, [r14+rcx]
             11b mov rcx, gs:[0E8h]
             124 mov gs:[0D0h], rax
             12d lahf
             12e seto al
             131 mov gs:[0D8h], rax
             13a mov rax, gs:[0D0h]
             143 lea r15, [154h]
             14a jmp 0FFFFFFFFFFFFFFA0h
             14f jmp 0000000000000174h
             154 mov rax, gs:[0D8h]
             15d add al, 7Fh
             15f sahf
             160 mov rax, gs:[0D0h]
             169 mov r15d, 65h
             16f jmp 0FFFFFFFFFFFFFF00h
             174 mov rax, gs:[0D8h]
             17d add al, 7Fh
             17f sahf
             180 mov rax, gs:[0D0h]
             189 jmp 0000000000000020h
             18e mov rcx, gs:[r15*8+410h]
             197 lea r14, [r14+rcx]
             19b mov rcx, gs:[0E8h]
             1a4 mov r15d, 66h
             1aa jmp 0FFFFFFFFFFFFFF00h
            [Stale, Group { at: 0, len: 8, write: true, stack: true, retry: 32, patch: 361 }, Access { at: 0, size: 8, write: false, stack: false, retry: 112 }]
        "#]],
    );
}

#[test]
fn pushf_takes_all_flags_together() {
    // pushfq; cli; ud2
    check(
        &[0x9c, 0xfa, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 lea r14, [rsp-8]
              25 mov gs:[0E8h], rcx
              2e mov rcx, gs:[80410h]
              37 not rcx
              3a lea r14, [r14+rcx+1]
              3f pext rcx, r14, gs:[0B8h]
              4a jrcxz 0000000000000051h
              4c jmp 000000000000010Dh
              51 lea rcx, [r14+7]
              55 pext rcx, rcx, gs:[0B8h]
              60 jrcxz 0000000000000067h
              62 jmp 000000000000010Dh
              67 mov rcx, gs:[0E8h]
              70 mov gs:[0D0h], rax
              79 lahf
              7a seto al
              7d movzx r15d, al
              81 movzx eax, ah
              84 rorx r15, r15, 35h
              8a lea r15, [r15+rax]
              8e mov rax, gs:[190h]
              97 rorx rax, rax, 37h
              9d lea r15, [r15+rax]
              a1 mov rax, gs:[170h]
              aa rorx rax, rax, 36h
              b0 lea r15, [r15+rax]
              b4 mov rax, gs:[1A0h]
              bd lea r15, [r15+rax]
              c1 mov rax, gs:[1C8h]
              ca lea r15, [r15+rax]
              ce mov rax, gs:[0D0h]
              d7 mov r14, gs:[80420h]
              e0 mov [rsp+r14-8], r15
              e5 lea rsp, [rsp-8]
              ea mov qword ptr gs:[190h], 0
              f7 mov r15d, 64h
              fd jmp 0FFFFFFFFFFFFFF00h
             102 mov r15d, 65h
             108 jmp 0FFFFFFFFFFFFFF00h
             10d mov rcx, gs:[80410h]
             116 lea r14, [r14+rcx]
             11a mov rcx, gs:[0E8h]
             123 mov gs:[0D0h], rax
             12c lahf
             12d seto al
             130 mov gs:[0D8h], rax
             139 mov rax, gs:[0D0h]
             142 lea r15, [153h]
             149 jmp 0FFFFFFFFFFFFFFA0h
             14e jmp 0000000000000173h
             153 mov rax, gs:[0D8h]
             15c add al, 7Fh
             15e sahf
             15f mov rax, gs:[0D0h]
             168 mov r15d, 66h
             16e jmp 0FFFFFFFFFFFFFF00h
             173 mov rax, gs:[0D8h]
             17c add al, 7Fh
             17e sahf
             17f mov rax, gs:[0D0h]
             188 jmp 0000000000000020h
            [Interpret { at: 2 }, Stale, Group { at: 0, len: 8, write: true, stack: true, retry: 32, patch: 360 }]
        "#]],
    );
}

#[test]
fn sti_ends_the_block_and_looks_for_interrupts() {
    // sti; nop
    check(
        &[0xfb, 0x90],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov gs:[0E8h], rcx
              29 mov rcx, gs:[198h]
              32 jrcxz 0000000000000039h
              34 jmp 000000000000006Fh
              39 mov rcx, gs:[0E8h]
              42 mov r14, 0FFFFFFFF81000101h
              49 mov gs:[1D8h], r14
              52 mov qword ptr gs:[190h], 1
              5f jmp 0000000000000083h
              64 mov r15d, 64h
              6a jmp 0FFFFFFFFFFFFFF00h
              6f mov rcx, gs:[0E8h]
              78 mov r15d, 65h
              7e jmp 0FFFFFFFFFFFFFF00h
              83 mov r15d, 66h
              89 jmp 0FFFFFFFFFFFFFF00h
            [Stale, Interpret { at: 0 }, Link { target: 257, patch: 96 }]
        "#]],
    );
}

#[test]
fn sti_hlt_is_one() {
    // sti; hlt
    check(
        &[0xfb, 0xf4],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov qword ptr gs:[190h], 1
              2d mov r15d, 64h
              33 jmp 0FFFFFFFFFFFFFF00h
              38 mov r15d, 65h
              3e jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 1 }, Stale]
        "#]],
    );
}

#[test]
fn string_store_runs_on_host_addresses() {
    // stosq; xor eax, eax; ud2
    check(
        &[0x48, 0xab, 0x31, 0xc0, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, rdi
              23 pext r15, r14, gs:[0B0h]
              2e xor r14, gs:[r15*8+20410h]
              37 cmp r14, 0FF8h
              3e ja 0000000000000073h
              44 mov r14, gs:[r15*8+60410h]
              4d lea rdi, [rdi+r14]
              51 stosq [rdi]
              53 not r14
              56 lea rdi, [rdi+r14+1]
              5b xor eax, eax
              5d mov r15d, 64h
              63 jmp 0FFFFFFFFFFFFFF00h
              68 mov r15d, 65h
              6e jmp 0FFFFFFFFFFFFFF00h
              73 xor r14, gs:[r15*8+20410h]
              7c mov r15d, 66h
              82 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 4 }, Stale, Access { at: 0, size: 8, write: true, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn repeated_store_has_a_path_in_line() {
    // rep stosq; xor eax, eax; ud2
    check(
        &[0xf3, 0x48, 0xab, 0x31, 0xc0, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 cmp qword ptr gs:[170h], 0
              2a jne 00000000000000A5h
              30 cmp rcx, 200h
              37 ja 00000000000000A5h
              3d pext r15, rdi, gs:[0B0h]
              48 mov r14, rdi
              4b xor r14, gs:[r15*8+20410h]
              54 cmp r14, 0FFFh
              5b ja 00000000000000A5h
              61 lea r14, [r14+rcx*8]
              65 cmp r14, 1000h
              6c ja 00000000000000A5h
              72 mov r14, gs:[r15*8+60410h]
              7b lea rdi, [rdi+r14]
              7f rep stosq [rdi]
              82 not r14
              85 lea rdi, [rdi+r14+1]
              8a jmp 000000000000009Ah
              8f mov r15d, 64h
              95 jmp 0FFFFFFFFFFFFFF00h
              9a mov r15d, 65h
              a0 jmp 0FFFFFFFFFFFFFF00h
              a5 mov r15d, 66h
              ab jmp 0FFFFFFFFFFFFFF00h
            [Stale, Link { target: 259, patch: 139 }, Interpret { at: 0 }]
        "#]],
    );
}

#[test]
fn repeated_move_has_a_path_in_line() {
    // rep movsb; xor eax, eax; ud2
    check(
        &[0xf3, 0xa4, 0x31, 0xc0, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 cmp qword ptr gs:[170h], 0
              2a jne 0000000000000100h
              30 cmp rcx, 1000h
              37 ja 0000000000000100h
              3d pext r15, rdi, gs:[0B0h]
              48 mov r14, rdi
              4b xor r14, gs:[r15*8+20410h]
              54 cmp r14, 0FFFh
              5b ja 0000000000000100h
              61 lea r14, [r14+rcx]
              65 cmp r14, 1000h
              6c ja 0000000000000100h
              72 mov r14, gs:[r15*8+60410h]
              7b mov gs:[0C8h], r14
              84 pext r15, rsi, gs:[0B0h]
              8f mov r14, rsi
              92 xor r14, gs:[r15*8+410h]
              9b cmp r14, 0FFFh
              a2 ja 0000000000000100h
              a8 lea r14, [r14+rcx]
              ac cmp r14, 1000h
              b3 ja 0000000000000100h
              b9 mov r14, gs:[r15*8+60410h]
              c2 mov r15, gs:[0C8h]
              cb lea rsi, [rsi+r14]
              cf lea rdi, [rdi+r15]
              d3 rep movsb [rdi], [rsi]
              d5 not r15
              d8 lea rdi, [rdi+r15+1]
              dd not r14
              e0 lea rsi, [rsi+r14+1]
              e5 jmp 00000000000000F5h
              ea mov r15d, 64h
              f0 jmp 0FFFFFFFFFFFFFF00h
              f5 mov r15d, 65h
              fb jmp 0FFFFFFFFFFFFFF00h
             100 mov r15d, 66h
             106 jmp 0FFFFFFFFFFFFFF00h
            [Stale, Link { target: 258, patch: 230 }, Interpret { at: 0 }]
        "#]],
    );
}

#[test]
fn direction_flag_is_mirrored() {
    // std; cld; ud2
    check(
        &[0xfd, 0xfc, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov qword ptr gs:[170h], 1
              2d std
              2e mov qword ptr gs:[170h], 0
              3b cld
              3c mov r15d, 64h
              42 jmp 0FFFFFFFFFFFFFF00h
              47 mov r15d, 65h
              4d jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 2 }, Stale]
        "#]],
    );
}

#[test]
fn lea_is_done_in_place() {
    // lea rax, [rbx+rcx*4+8]; lea r15, [rsp+8]; ud2
    check(
        &[
            0x48, 0x8d, 0x44, 0x8b, 0x08, 0x4c, 0x8d, 0x7c, 0x24, 0x08, 0x0f, 0x0b,
        ],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 lea rax, [rbx+rcx*4+8]
              25 lea r14, [rsp+8]
              2a mov gs:[78h], r14
              33 mov r15d, 64h
              39 jmp 0FFFFFFFFFFFFFF00h
              3e mov r15d, 65h
              44 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 10 }, Stale]
        "#]],
    );
}

#[test]
fn pop_to_memory_keeps_the_value_over_the_second_check() {
    // pop [rdi]; xor eax, eax; ud2
    check(
        &[0x8f, 0x07, 0x31, 0xc0, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, rsp
              23 xor r14, gs:[80410h]
              2c cmp r14, 0FF8h
              33 ja 00000000000000A5h
              39 mov r14, gs:[80420h]
              42 mov r14, [rsp+r14]
              46 mov gs:[0C8h], r14
              4f mov r14, rdi
              52 pext r15, r14, gs:[0B0h]
              5d xor r14, gs:[r15*8+20410h]
              66 cmp r14, 0FF8h
              6d ja 00000000000000CAh
              73 add r14, gs:[r15*8+40410h]
              7c mov r15, gs:[0C8h]
              85 mov [r14], r15
              88 lea rsp, [rsp+8]
              8d xor eax, eax
              8f mov r15d, 64h
              95 jmp 0FFFFFFFFFFFFFF00h
              9a mov r15d, 65h
              a0 jmp 0FFFFFFFFFFFFFF00h
              a5 xor r14, gs:[80410h]
              ae lea r15, [0BFh]
              b5 jmp 0FFFFFFFFFFFFFFA0h
              ba jmp 0000000000000020h
              bf mov r15d, 66h
              c5 jmp 0FFFFFFFFFFFFFF00h
              ca xor r14, gs:[r15*8+20410h]
              d3 mov r15d, 67h
              d9 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 4 }, Stale, Access { at: 0, size: 8, write: false, stack: true, retry: 32 }, Access { at: 0, size: 8, write: true, stack: false, retry: 79 }]
        "#]],
    );
}

#[test]
fn sse_operand_is_redirected() {
    // addps xmm9, [rsi]; xor eax, eax; ud2
    check(
        &[0x44, 0x0f, 0x58, 0x0e, 0x31, 0xc0, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, rsi
              23 pext r15, r14, gs:[0B0h]
              2e xor r14, gs:[r15*8+410h]
              37 cmp r14, 0FF0h
              3e ja 000000000000006Ah
              44 mov r14, gs:[r15*8+60410h]
              4d addps xmm9, [rsi+r14]
              52 xor eax, eax
              54 mov r15d, 64h
              5a jmp 0FFFFFFFFFFFFFF00h
              5f mov r15d, 65h
              65 jmp 0FFFFFFFFFFFFFF00h
              6a xor r14, gs:[r15*8+410h]
              73 mov r15d, 66h
              79 jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 6 }, Stale, Access { at: 0, size: 16, write: false, stack: false, retry: 32 }]
        "#]],
    );
}

#[test]
fn bounce_takes_its_operand_from_the_context() {
    // add [rbx+8], eax
    let block = translate(Kind::Bounce, Mode::Kernel, &[0x01, 0x43, 0x08]);
    expect![[r#"
           0 mov r14, gs:[1A8h]
           9 add [r14], eax
           c mov r15d, 64h
          12 jmp 0FFFFFFFFFFFFFF00h
          17 mov r15d, 65h
          1d jmp 0FFFFFFFFFFFFFF00h
        [Bounced { next: 3 }, Stale]
    "#]]
    .assert_eq(&disassemble(&block));
}

#[test]
fn per_access_form_checks_each_access() {
    // push rax; push rcx; xor eax, eax; ud2
    let code = [0x50, 0x51, 0x31, 0xc0, 0x0f, 0x0b];
    let block = translate(Kind::PerAccess, Mode::User, &code);
    expect![[r#"
           0 lea r14, [rsp-8]
           5 pext r15, r14, gs:[0B0h]
          10 xor r14, gs:[r15*8+0A0430h]
          19 cmp r14, 0FF8h
          20 ja 000000000000008Ah
          26 mov r14, gs:[r15*8+0E0430h]
          2f mov [rsp+r14-8], rax
          34 lea rsp, [rsp-8]
          39 lea r14, [rsp-8]
          3e pext r15, r14, gs:[0B0h]
          49 xor r14, gs:[r15*8+0A0430h]
          52 cmp r14, 0FF8h
          59 ja 000000000000009Eh
          5f mov r14, gs:[r15*8+0E0430h]
          68 mov [rsp+r14-8], rcx
          6d lea rsp, [rsp-8]
          72 xor eax, eax
          74 mov r15d, 64h
          7a jmp 0FFFFFFFFFFFFFF00h
          7f mov r15d, 65h
          85 jmp 0FFFFFFFFFFFFFF00h
          8a xor r14, gs:[r15*8+0A0430h]
          93 mov r15d, 66h
          99 jmp 0FFFFFFFFFFFFFF00h
          9e xor r14, gs:[r15*8+0A0430h]
          a7 mov r15d, 67h
          ad jmp 0FFFFFFFFFFFFFF00h
        [Interpret { at: 4 }, Stale, Access { at: 0, size: 8, write: true, stack: false, retry: 0 }, Access { at: 1, size: 8, write: true, stack: false, retry: 57 }]
    "#]].assert_eq(&disassemble(&block));
}

#[test]
fn privileged_instructions_are_the_engines_in_user_mode() {
    // cli
    let block = translate(Kind::Grouped, Mode::User, &[0xfa]);
    assert_eq!(block.exits, [Exit::Interpret { at: 0 }, Exit::Stale]);
}

#[test]
fn entry_from_the_jump_cache_keeps_flags() {
    // jmp 0
    let block = translate(Kind::Grouped, Mode::Kernel, &[0xeb, 0xfe]);
    let head = Block {
        code: block.code[..usize::from(block.direct_entry) - POLL_BYTES].to_vec(),
        ..Block::default()
    };
    expect![[r#"
           0 mov r15, rcx
           3 lea rcx, [r14+7EFFFF00h]
           a jrcxz 0000000000000014h
           c mov rcx, r15
           f jmp 0FFFFFFFFFFFFFF80h
          14 mov rcx, r15
        []
    "#]]
    .assert_eq(&disassemble(&head));
}

#[test]
fn what_may_be_executed_is_pinned() {
    let mut list: Vec<_> = translator::allowed_codes()
        .map(|code| format!("{code:?}\n"))
        .collect();
    list.sort();
    expect_test::expect_file!["allowed_codes.txt"].assert_eq(&list.concat());
}

#[test]
fn comparison_of_registers_is_done_again_behind_a_check() {
    // cmp rdx, 20h; mov rax, [rbx+8]; ja 0; ud2
    check(
        &[
            0x48, 0x83, 0xfa, 0x20, 0x48, 0x8b, 0x43, 0x08, 0x77, 0xf6, 0x0f, 0x0b,
        ],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 nop
              21 cmp rdx, 20h
              25 lea r14, [rbx+8]
              29 pext r15, r14, gs:[0B0h]
              34 xor r14, gs:[r15*8+410h]
              3d cmp r14, 0FF8h
              44 ja 0000000000000078h
              4a mov r14, gs:[r15*8+60410h]
              53 cmp rdx, 20h
              57 mov rax, [rbx+r14+8]
              5c ja 0000000000000017h
              62 mov r15d, 64h
              68 jmp 0FFFFFFFFFFFFFF00h
              6d mov r15d, 65h
              73 jmp 0FFFFFFFFFFFFFF00h
              78 xor r14, gs:[r15*8+410h]
              81 cmp rdx, 20h
              85 mov r15d, 66h
              8b jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 10 }, Stale, Access { at: 4, size: 8, write: false, stack: false, retry: 37 }]
        "#]],
    );
}

#[test]
fn result_of_a_logical_instruction_is_tested_behind_a_check() {
    // or esi, eax; mov rax, [rbx+rcx]; jmp rax
    check(
        &[0x09, 0xc6, 0x48, 0x8b, 0x04, 0x0b, 0xff, 0xe0],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 nop [rax]
              23 or esi, eax
              25 lea r14, [rbx+rcx]
              29 pext r15, r14, gs:[0B0h]
              34 xor r14, gs:[r15*8+410h]
              3d cmp r14, 0FF8h
              44 ja 000000000000007Bh
              4a add r14, gs:[r15*8+40410h]
              53 test esi, esi
              56 mov rax, [r14]
              59 mov r14, rax
              5c pext r15, r14, gs:[0C0h]
              67 jmp qword ptr gs:[r15*8+180470h]
              70 mov r15d, 64h
              76 jmp 0FFFFFFFFFFFFFF00h
              7b xor r14, gs:[r15*8+410h]
              84 test esi, esi
              87 mov r15d, 65h
              8d jmp 0FFFFFFFFFFFFFF00h
            [Stale, Access { at: 2, size: 8, write: false, stack: false, retry: 37 }]
        "#]],
    );
}

#[test]
fn two_bases_have_a_shared_check_each() {
    // mov rax, [rbx]; mov rdx, [rsi]; mov [rbx+8], rdx; mov [rsi+8], rax; xor eax, eax; jmp 0
    check(
        &[
            0x48, 0x8b, 0x03, 0x48, 0x8b, 0x16, 0x48, 0x89, 0x53, 0x08, 0x48, 0x89, 0x46, 0x08,
            0x31, 0xc0, 0xeb, 0xee,
        ],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov r14, rbx
              23 pext r15, r14, gs:[0B0h]
              2e xor r14, gs:[r15*8+20410h]
              37 cmp r14, 0FF0h
              3e ja 00000000000000C2h
              44 mov r15, gs:[r15*8+60410h]
              4d mov gs:[108h], r15
              56 mov rax, [rbx+r15]
              5a mov r14, rsi
              5d pext r15, r14, gs:[0B0h]
              68 xor r14, gs:[r15*8+20410h]
              71 cmp r14, 0FF0h
              78 ja 00000000000000D6h
              7e mov r15, gs:[r15*8+60410h]
              87 mov gs:[120h], r15
              90 mov rdx, [rsi+r15]
              94 mov r15, gs:[108h]
              9d mov [rbx+r15+8], rdx
              a2 mov r15, gs:[120h]
              ab mov [rsi+r15+8], rax
              b0 xor eax, eax
              b2 jmp 0000000000000017h
              b7 mov r15d, 64h
              bd jmp 0FFFFFFFFFFFFFF00h
              c2 xor r14, gs:[r15*8+20410h]
              cb mov r15d, 65h
              d1 jmp 0FFFFFFFFFFFFFF00h
              d6 xor r14, gs:[r15*8+20410h]
              df mov r15d, 66h
              e5 jmp 0FFFFFFFFFFFFFF00h
            [Stale, Group { at: 0, len: 16, write: true, stack: false, retry: 32, patch: 203 }, Group { at: 3, len: 16, write: true, stack: false, retry: 90, patch: 223 }]
        "#]],
    );
}

#[test]
fn guest_r14_is_used_where_it_lives() {
    // add rax, r14; cmp r15d, 5; test r14, r14; mov r15, rdi; add r14d, eax; ud2
    check(
        &[
            0x4c, 0x01, 0xf0, 0x41, 0x83, 0xff, 0x05, 0x4d, 0x85, 0xf6, 0x49, 0x89, 0xff, 0x41,
            0x01, 0xc6, 0x0f, 0x0b,
        ],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 add rax, gs:[70h]
              29 cmp dword ptr gs:[78h], 5
              32 cmp qword ptr gs:[70h], 0
              3c mov gs:[78h], rdi
              45 mov r14, gs:[70h]
              4e add r14d, eax
              51 mov gs:[70h], r14
              5a mov r15d, 64h
              60 jmp 0FFFFFFFFFFFFFF00h
              65 mov r15d, 65h
              6b jmp 0FFFFFFFFFFFFFF00h
            [Interpret { at: 16 }, Stale]
        "#]],
    );
}

#[test]
fn repeated_store_with_live_flags_saves_them() {
    // rep stosb; ud2
    check(
        &[0xf3, 0xaa, 0x0f, 0x0b],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 mov gs:[0D0h], rax
              29 lahf
              2a seto al
              2d mov gs:[0D8h], rax
              36 mov rax, gs:[0D0h]
              3f cmp qword ptr gs:[170h], 0
              49 jne 00000000000000D8h
              4f cmp rcx, 1000h
              56 ja 00000000000000D8h
              5c pext r15, rdi, gs:[0B0h]
              67 mov r14, rdi
              6a xor r14, gs:[r15*8+20410h]
              73 cmp r14, 0FFFh
              7a ja 00000000000000D8h
              80 lea r14, [r14+rcx]
              84 cmp r14, 1000h
              8b ja 00000000000000D8h
              91 mov r14, gs:[r15*8+60410h]
              9a mov rax, gs:[0D8h]
              a3 add al, 7Fh
              a5 sahf
              a6 mov rax, gs:[0D0h]
              af lea rdi, [rdi+r14]
              b3 rep stosb [rdi]
              b5 not r14
              b8 lea rdi, [rdi+r14+1]
              bd jmp 00000000000000CDh
              c2 mov r15d, 64h
              c8 jmp 0FFFFFFFFFFFFFF00h
              cd mov r15d, 65h
              d3 jmp 0FFFFFFFFFFFFFF00h
              d8 mov rax, gs:[0D8h]
              e1 add al, 7Fh
              e3 sahf
              e4 mov rax, gs:[0D0h]
              ed mov r15d, 66h
              f3 jmp 0FFFFFFFFFFFFFF00h
            [Stale, Link { target: 258, patch: 190 }, Interpret { at: 0 }]
        "#]],
    );
}

#[test]
fn the_guests_time_costs_seven_instructions_more_than_the_hosts() {
    // rdtsc; jmp 0
    check(
        &[0x0f, 0x31, 0xeb, 0xfc],
        expect![[r#"
              17 mov r14, gs:[482000h]
              20 rdtsc
              22 rorx rdx, rdx, 20h
              28 lea rax, [rax+rdx]
              2c mov rdx, gs:[480470h]
              35 lea rax, [rax+rdx]
              39 rorx rdx, rax, 20h
              3f mov eax, eax
              41 mov edx, edx
              43 jmp 0000000000000017h
              48 mov r15d, 64h
              4e jmp 0FFFFFFFFFFFFFF00h
            [Stale]
        "#]],
    );
}
