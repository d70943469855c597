//! Guest code that changes while it exists in translation.

mod bare;

use bare::{CODE, DATA, Machine, SAY, STOP, Said};
use hv_soft::Options;
use iced_x86::code_asm::*;

#[test]
fn a_store_into_the_block_that_executes_it_takes_effect_at_once() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        let mut target = asm.create_label();
        asm.mov(cl, 7).unwrap();
        asm.lea(rsi, byte_ptr(target)).unwrap();
        asm.mov(byte_ptr(rsi + 1), cl).unwrap();
        asm.set_label(&mut target).unwrap();
        asm.mov(al, 1).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    assert_eq!(machine.run_to_stop().gpr[0] & 0xff, 7);
}

#[test]
fn a_loop_that_rewrites_itself_sees_every_version() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        let (mut again, mut target) = (asm.create_label(), asm.create_label());
        asm.lea(rsi, byte_ptr(target)).unwrap();
        asm.mov(ecx, 200).unwrap();
        asm.xor(ebx, ebx).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.mov(byte_ptr(rsi + 1), cl).unwrap();
        asm.set_label(&mut target).unwrap();
        asm.mov(al, 0).unwrap();
        asm.movzx(eax, al).unwrap();
        asm.add(ebx, eax).unwrap();
        asm.dec(ecx).unwrap();
        asm.jne(again).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    assert_eq!(machine.run_to_stop().gpr[3], (1..=200).sum::<u64>());
}

#[test]
fn an_instruction_across_pages_is_seen_anew_when_its_second_page_changes() {
    let mut machine = Machine::new();
    let function = CODE + 0x1fff;
    machine.code_at(function, |asm| {
        asm.mov(eax, 5).unwrap(); // four of its five bytes are in the next page
        asm.ret().unwrap();
    });
    machine.code(|asm| {
        for value in [None, Some(9), Some(11)] {
            if let Some(value) = value {
                asm.mov(byte_ptr(function + 1), value).unwrap();
            }
            asm.call(function).unwrap();
            asm.out(i32::from(SAY), eax).unwrap();
        }
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    assert_eq!(machine.said(), [5, 9, 11].map(Said::Port));
}

#[test]
fn code_behind_a_changed_mapping_is_the_new_page_s() {
    let mut machine = Machine::new();
    let function = 0x18_0000;
    for (at, value) in [(function, 1), (0x18_1000, 2)] {
        machine.code_at(at, |asm| {
            asm.mov(eax, value).unwrap();
            asm.ret().unwrap();
        });
    }
    let entry = 0x5000 + (function >> 12) * 8;
    machine.code(|asm| {
        asm.call(function).unwrap();
        asm.out(i32::from(SAY), eax).unwrap();
        asm.mov(rax, 0x18_1003_u64).unwrap();
        asm.mov(qword_ptr(entry), rax).unwrap();
        asm.invlpg(byte_ptr(function)).unwrap();
        asm.call(function).unwrap();
        asm.out(i32::from(SAY), eax).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    assert_eq!(machine.said(), [1, 2].map(Said::Port));
}

#[test]
fn data_next_to_code_can_be_written_without_end() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        let mut again = asm.create_label();
        asm.mov(ecx, 10_000).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.inc(qword_ptr(CODE + 0x800)).unwrap();
        asm.push(rcx).unwrap();
        asm.pop(rax).unwrap();
        asm.dec(ecx).unwrap();
        asm.jne(again).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    assert_eq!(machine.word(CODE + 0x800), 10_000);
    let stats = machine.vcpu.stats();
    assert!(stats.translations < 20_000, "{stats:?}");
}

/// Calls the functions from `table` on and adds up what they return in EBX, `rounds`
/// times; `between` comes after each round, which EDI counts down.
fn call_all(
    machine: &mut Machine,
    functions: i32,
    rounds: i32,
    between: impl FnOnce(&mut CodeAssembler),
) {
    machine.code(|asm| {
        let (mut round, mut again) = (asm.create_label(), asm.create_label());
        asm.mov(edi, rounds).unwrap();
        asm.xor(ebx, ebx).unwrap();
        asm.set_label(&mut round).unwrap();
        asm.xor(esi, esi).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.call(qword_ptr(rsi * 8 + TABLE)).unwrap();
        asm.add(ebx, eax).unwrap();
        asm.inc(esi).unwrap();
        asm.cmp(esi, functions).unwrap();
        asm.jne(again).unwrap();
        between(asm);
        asm.dec(edi).unwrap();
        asm.jne(round).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
}

const TABLE: u64 = 0x20_0000;
const FUNCTIONS: u64 = 0x40_0000;

/// `mov eax, value; ret` in slots of 32 bytes, and their addresses at [`TABLE`].
fn put_functions(machine: &mut Machine, count: u64) {
    for i in 0..count {
        let at = FUNCTIONS + 32 * i;
        machine.put_word(TABLE + 8 * i, at);
        machine.code_at(at, |asm| {
            asm.mov(eax, i as i32).unwrap();
            asm.ret().unwrap();
        });
    }
}

#[test]
fn patching_one_function_leaves_its_neighbours_translated() {
    let mut machine = Machine::new();
    put_functions(&mut machine, 100);
    call_all(&mut machine, 100, 500, |asm| {
        // The operand of `mov eax` in function 7.
        asm.mov(dword_ptr(FUNCTIONS + 32 * 7 + 1), edi).unwrap();
    });
    let sum = machine.run_to_stop().gpr[3];
    // At first 7, then what the round before counted.
    assert_eq!(sum, 500 * (4950 - 7) + 7 + (2..=500).sum::<u64>());
    let stats = machine.vcpu.stats();
    assert_eq!(stats.invalidations, 0, "{stats:?}");
    assert!(stats.translations < 100 + 2 * 500, "{stats:?}");
}

#[test]
fn code_appended_to_a_page_that_runs_costs_its_own_translation_only() {
    let mut machine = Machine::new();
    put_functions(&mut machine, 64);
    // Each round appends some code that nobody calls yet.
    call_all(&mut machine, 64, 60, |asm| {
        asm.mov(eax, edi).unwrap();
        asm.shl(eax, 5).unwrap();
        asm.mov(dword_ptr(rax + (FUNCTIONS + 0x800)), edi).unwrap();
    });
    assert_eq!(machine.run_to_stop().gpr[3], 60 * 2016);
    let stats = machine.vcpu.stats();
    assert_eq!(stats.invalidations, 0, "{stats:?}");
    assert!(stats.translations < 100, "{stats:?}");
}

#[test]
fn a_page_that_is_code_no_more_is_written_at_full_speed() {
    let mut machine = Machine::new();
    put_functions(&mut machine, 64);
    machine.code(|asm| {
        let (mut again, mut write) = (asm.create_label(), asm.create_label());
        asm.xor(esi, esi).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.call(qword_ptr(rsi * 8 + TABLE)).unwrap();
        asm.inc(esi).unwrap();
        asm.cmp(esi, 64).unwrap();
        asm.jne(again).unwrap();
        asm.mov(ecx, 100_000).unwrap();
        asm.set_label(&mut write).unwrap();
        asm.inc(qword_ptr(FUNCTIONS + 0xff0)).unwrap();
        asm.dec(ecx).unwrap();
        asm.jne(write).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    assert_eq!(machine.word(FUNCTIONS + 0xff0), 100_000);
    let stats = machine.vcpu.stats();
    assert_eq!(stats.invalidations, 1, "{stats:?}");
    assert!(stats.accesses < 1000, "{stats:?}");
}

#[test]
fn a_full_code_cache_is_flushed_and_the_guest_goes_on() {
    let mut machine = Machine::with(Options {
        code_cache_bytes: 512 << 10,
        ..Options::default()
    });
    let functions = 4000;
    let table = 0x20_0000;
    for i in 0..functions {
        let at = 0x40_0000 + 32 * i;
        machine.put_word(table + 8 * i, at);
        machine.code_at(at, |asm| {
            asm.add(rbx, i as i32).unwrap();
            asm.push(rbx).unwrap();
            asm.pop(rdx).unwrap();
            asm.ret().unwrap();
        });
    }
    machine.code(|asm| {
        let (mut round, mut again) = (asm.create_label(), asm.create_label());
        asm.mov(edi, 3).unwrap();
        asm.set_label(&mut round).unwrap();
        asm.xor(esi, esi).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.call(qword_ptr(rsi * 8 + table)).unwrap();
        asm.inc(esi).unwrap();
        asm.cmp(esi, functions as i32).unwrap();
        asm.jne(again).unwrap();
        asm.dec(edi).unwrap();
        asm.jne(round).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    let state = machine.run_to_stop();
    assert_eq!(state.gpr[3], 3 * (0..functions).sum::<u64>());
    let stats = machine.vcpu.stats();
    assert!(stats.code_flushes >= 3, "{stats:?}");
}

#[test]
fn code_that_a_device_writes_is_translated_anew() {
    let mut machine = Machine::new();
    let function = DATA;
    let code = |value: u8| [0xb8, value, 0, 0, 0, 0xc3];
    machine.put(function, &code(3));
    let ram = machine.ram.clone();
    *machine.board.on_say.lock().unwrap() = Some(Box::new(move |_| {
        use vm_memory::Bytes;
        ram.memory()
            .write_slice(&code(4), hv::Gpa(function))
            .unwrap();
    }));
    machine.code(|asm| {
        for _ in 0..2 {
            asm.call(function).unwrap();
            asm.out(i32::from(SAY), eax).unwrap();
        }
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    assert_eq!(machine.said(), [3, 4].map(Said::Port));
}

#[test]
fn links_to_code_that_was_patched_lead_to_its_new_translation() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        let (mut again, mut skip) = (asm.create_label(), asm.create_label());
        let mut target = asm.create_label();
        asm.lea(rsi, byte_ptr(target)).unwrap();
        asm.mov(ecx, 10_000).unwrap();
        asm.xor(ebx, ebx).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.cmp(ecx, 9_000).unwrap();
        asm.jne(skip).unwrap();
        asm.mov(byte_ptr(rsi + 1), 2).unwrap();
        asm.set_label(&mut skip).unwrap();
        asm.jmp(target).unwrap();
        asm.ud2().unwrap();
        asm.set_label(&mut target).unwrap();
        asm.mov(al, 1).unwrap();
        asm.movzx(eax, al).unwrap();
        asm.add(ebx, eax).unwrap();
        asm.dec(ecx).unwrap();
        asm.jne(again).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    assert_eq!(machine.run_to_stop().gpr[3], 1_000 + 2 * 9_000);
    let stats = machine.vcpu.stats();
    assert!(stats.patched >= 1 && stats.stale < 10, "{stats:?}");
}

#[test]
fn string_instructions_over_code_that_ran_take_effect_as_one_store() {
    let mut machine = Machine::new();
    // `mov eax, 1; ret` near the end of one page, then another across the border.
    let (first, second) = (CODE + 0x1f80, CODE + 0x1ffd);
    for at in [first, second] {
        machine.code_at(at, |asm| {
            asm.mov(eax, 1).unwrap();
            asm.ret().unwrap();
        });
    }
    machine.put(DATA, &[0xb8, 2, 0, 0, 0, 0xc3]);
    machine.put(DATA + 0x10, &[0x90; 0x77]);
    machine.code(|asm| {
        let mut call_both = asm.create_label();
        asm.call(call_both).unwrap();
        for function in [first, second] {
            asm.mov(rsi, DATA).unwrap();
            asm.mov(rdi, function).unwrap();
            asm.mov(ecx, 6).unwrap();
            asm.rep().movsb().unwrap();
        }
        asm.call(call_both).unwrap();
        // The first runs through what is between them, into the second.
        asm.mov(rdi, first).unwrap();
        asm.mov(eax, 0x9090_9090_u32).unwrap();
        asm.mov(ecx, 2).unwrap();
        asm.rep().stosd().unwrap();
        asm.mov(rsi, DATA + 0x10).unwrap();
        asm.mov(ecx, 0x75).unwrap();
        asm.rep().movsb().unwrap();
        asm.call(call_both).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
        asm.set_label(&mut call_both).unwrap();
        for function in [first, second] {
            asm.xor(eax, eax).unwrap();
            asm.call(function).unwrap();
            asm.out(i32::from(SAY), eax).unwrap();
        }
        asm.ret().unwrap();
    });
    machine.run_to_stop();
    assert_eq!(machine.said(), [1, 1, 2, 2, 2, 2].map(Said::Port));
}
