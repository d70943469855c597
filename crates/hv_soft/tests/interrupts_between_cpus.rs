//! Interrupts from vCPU to vCPU, and what they are used for.

mod bare;
mod several;

use bare::{DATA, Machine, STACK, STOP};
use hv::Vcpu;
use hv_soft::{CpuModel, Options, host_features};
use iced_x86::code_asm::*;
use several::*;
use x86::xsave;

const COUNT: u64 = DATA;

/// vCPUs 0 and 1 wake each other from HLT, `rounds` times each.
fn ping_pong(rounds: u32) {
    let mut machine = machine(2);
    for index in 0..2 {
        let handler = code_of(index) + 0x1000;
        machine.code_at(code_of(index), |asm| {
            let mut again = asm.create_label();
            enable_apic(asm);
            asm.lock().inc(qword_ptr(COUNT + 64)).unwrap();
            if index == 0 {
                let mut both = asm.create_label();
                asm.set_label(&mut both).unwrap();
                asm.pause().unwrap();
                asm.cmp(qword_ptr(COUNT + 64), 2).unwrap();
                asm.jne(both).unwrap();
                interrupt(asm, 1, 0x41);
            }
            asm.set_label(&mut again).unwrap();
            asm.sti().unwrap();
            asm.hlt().unwrap();
            asm.jmp(again).unwrap();
        });
        machine.code_at(handler, |asm| {
            let mut go_on = asm.create_label();
            asm.inc(qword_ptr(COUNT)).unwrap();
            asm.cmp(qword_ptr(COUNT), 2 * rounds as i32).unwrap();
            asm.jb(go_on).unwrap();
            asm.out(i32::from(STOP), al).unwrap();
            asm.set_label(&mut go_on).unwrap();
            end_of_interrupt(asm);
            interrupt(asm, 1 - index, 0x40 + (1 - index));
            asm.iretq().unwrap();
        });
        machine.set_gate(0x40 + index as u8, handler);
    }
    run_to_stop(&mut machine);
    assert!(machine.word(COUNT) >= u64::from(2 * rounds));
}

#[test]
fn of_100_000_wake_ups_from_hlt_none_is_lost() {
    ping_pong(50_000);
}

/// vCPU 0 maps another page and has vCPU 1 forget the old one.
#[test]
fn after_a_shootdown_the_other_cpu_reads_the_new_page() {
    let (window, entry) = (0x18_0000_u64, 0x5000 + (0x18_0000 >> 12) * 8);
    let (pages, answer, asked, wrong) = (0x20_0000_u64, DATA, DATA + 64, DATA + 128);
    let rounds = 300_u32;
    let mut machine = machine(2);
    for page in 0..2 {
        machine.put_word(pages + 0x1000 * page, 0x1111 * (page + 1));
    }
    machine.code_at(code_of(0), |asm| {
        let (mut ready, mut round) = (asm.create_label(), asm.create_label());
        let (mut wait, mut right) = (asm.create_label(), asm.create_label());
        enable_apic(asm);
        asm.set_label(&mut ready).unwrap();
        asm.pause().unwrap();
        asm.cmp(qword_ptr(answer), 0).unwrap();
        asm.je(ready).unwrap();
        asm.mov(r14d, rounds).unwrap();
        asm.set_label(&mut round).unwrap();
        // r12: the other page, r13: what is in it
        asm.mov(r12d, r14d).unwrap();
        asm.and(r12d, 1).unwrap();
        asm.imul_3(r13d, r12d, 0x1111).unwrap();
        asm.add(r13d, 0x1111).unwrap();
        asm.shl(r12d, 12).unwrap();
        asm.add(r12d, pages as i32 + 3).unwrap();
        asm.mov(qword_ptr(entry), r12).unwrap();
        asm.mov(qword_ptr(answer), 0).unwrap();
        interrupt(asm, 1, 0x44);
        asm.set_label(&mut wait).unwrap();
        asm.pause().unwrap();
        asm.mov(rbx, qword_ptr(answer)).unwrap();
        asm.test(rbx, rbx).unwrap();
        asm.je(wait).unwrap();
        asm.cmp(rbx, r13).unwrap();
        asm.je(right).unwrap();
        asm.inc(qword_ptr(wrong)).unwrap();
        asm.set_label(&mut right).unwrap();
        asm.dec(r14d).unwrap();
        asm.jne(round).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.map(window, pages | 3);
    machine.code_at(code_of(1), |asm| {
        let mut again = asm.create_label();
        enable_apic(asm);
        asm.mov(rsi, window).unwrap();
        asm.mov(rax, qword_ptr(rsi)).unwrap();
        asm.mov(qword_ptr(answer), rax).unwrap();
        asm.sti().unwrap();
        // Keeps the page in the TLB, for writes too.
        asm.set_label(&mut again).unwrap();
        asm.mov(rbx, qword_ptr(rsi)).unwrap();
        asm.inc(qword_ptr(rsi + 8)).unwrap();
        asm.jmp(again).unwrap();
    });
    let handler = code_of(1) + 0x1000;
    machine.code_at(handler, |asm| {
        asm.invlpg(byte_ptr(rsi)).unwrap();
        asm.mov(rbx, qword_ptr(rsi)).unwrap();
        asm.inc(qword_ptr(asked)).unwrap();
        end_of_interrupt(asm);
        asm.mov(qword_ptr(answer), rbx).unwrap();
        asm.iretq().unwrap();
    });
    machine.set_gate(0x44, handler);
    run_to_stop(&mut machine);
    assert_eq!(machine.word(asked), u64::from(rounds));
    assert_eq!(machine.word(wrong), 0);
}

/// vCPU 0 sends by every kind of destination; each vCPU counts what it got.
#[test]
fn interrupts_reach_whom_their_destination_names() {
    let got = |index: u64| DATA + 64 * index;
    let count = 4;
    let mut machine = machine(count);
    // (ICR without vector, how many get it)
    let sends: [(u64, u64); 6] = [
        (2 << 32, 1),                // physical
        (0b1010 << 32 | 1 << 11, 2), // logical
        (1 << 18, 1),                // self
        (2 << 18, 4),                // all
        (3 << 18, 3),                // all but self
        (0xffff_ffff << 32, 4),      // broadcast
    ];
    let total: u64 = sends.iter().map(|(_, reached)| reached).sum();
    let sum = DATA + 0x400;
    for index in 0..u64::from(count) {
        machine.code_at(code_of(index), |asm| {
            let mut wait = asm.create_label();
            enable_apic(asm);
            asm.lock().inc(qword_ptr(sum + 64)).unwrap();
            asm.set_label(&mut wait).unwrap();
            asm.pause().unwrap();
            asm.cmp(qword_ptr(sum + 64), i32::from(count)).unwrap();
            asm.jne(wait).unwrap();
            asm.sti().unwrap();
            if index == 0 {
                let mut expected = 0;
                for (icr, reached) in sends {
                    let mut arrived = asm.create_label();
                    msr(asm, 0x830, icr | 0x4000 | 0x51);
                    expected += reached as i32;
                    asm.set_label(&mut arrived).unwrap();
                    asm.pause().unwrap();
                    asm.cmp(qword_ptr(sum), expected).unwrap();
                    asm.jne(arrived).unwrap();
                }
                asm.out(i32::from(STOP), al).unwrap();
            }
            let mut sleep = asm.create_label();
            asm.set_label(&mut sleep).unwrap();
            asm.sti().unwrap();
            asm.hlt().unwrap();
            asm.jmp(sleep).unwrap();
        });
    }
    let handler = code_of(0) + 0x1000;
    machine.code_at(handler, |asm| {
        asm.push(rax).unwrap();
        asm.push(rcx).unwrap();
        asm.push(rdx).unwrap();
        asm.mov(rax, r15).unwrap();
        asm.shl(rax, 6).unwrap();
        asm.inc(qword_ptr(rax + DATA as i32)).unwrap();
        end_of_interrupt(asm);
        asm.lock().inc(qword_ptr(sum)).unwrap();
        asm.pop(rdx).unwrap();
        asm.pop(rcx).unwrap();
        asm.pop(rax).unwrap();
        asm.iretq().unwrap();
    });
    machine.set_gate(0x51, handler);
    run_to_stop(&mut machine);
    let counts: Vec<u64> = (0..4).map(|index| machine.word(got(index))).collect();
    assert_eq!(counts, [3, 4, 4, 4]);
    assert_eq!(counts.iter().sum::<u64>(), total);
}

#[test]
fn a_non_maskable_interrupt_wakes_a_cpu_that_halted_with_interrupts_off() {
    let mut machine = machine(2);
    machine.code_at(code_of(0), |asm| {
        let mut wait = asm.create_label();
        let mut again = asm.create_label();
        enable_apic(asm);
        asm.set_label(&mut again).unwrap();
        msr(asm, 0x830, 1 << 32 | 0x4400);
        asm.mov(ebx, 100_000).unwrap();
        asm.set_label(&mut wait).unwrap();
        asm.pause().unwrap();
        asm.dec(ebx).unwrap();
        asm.jne(wait).unwrap();
        asm.jmp(again).unwrap();
    });
    machine.code_at(code_of(1), |asm| {
        asm.cli().unwrap();
        asm.hlt().unwrap();
        asm.inc(qword_ptr(COUNT)).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    let handler = code_of(1) + 0x1000;
    machine.code_at(handler, |asm| asm.iretq().unwrap());
    machine.set_gate(2, handler);
    run_to_stop(&mut machine);
    assert_eq!(machine.word(COUNT), 1);
}

/// SDM vol. 3, table 9-1.
#[test]
fn init_leaves_avx_registers_and_xcr0_as_they_were() {
    let cpu_model = CpuModel::V3;
    if cpu_model.on(host_features()).is_err() {
        return;
    }
    let (upper, page, started) = (0x0123_4567_89ab_cdef, 0x70, 0x7_0100);
    let options = Options {
        cpu_model,
        ..Options::default()
    };
    let mut machine = Machine::with_vcpus(options, 2);
    let mut state = bare::state();
    state.rip = code_of(1);
    state.gpr[4] = STACK + 0x1000;
    state.cr4 |= 1 << 18; // OSXSAVE
    state.xcr0 = 7;
    machine.others[0].set_state(&state).unwrap();
    machine.put_word(DATA + 128 + 16, upper);
    machine.code_at(code_of(1), |asm| {
        let mut again = asm.create_label();
        asm.vmovdqu(ymm3, ymmword_ptr(DATA + 128)).unwrap();
        asm.inc(qword_ptr(COUNT)).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.pause().unwrap();
        asm.jmp(again).unwrap();
    });
    // mov ax, 0x7000; mov ds, ax; mov byte [0x100], 1; jmp $
    machine.put(
        page << 12,
        &[0xb8, 0, 0x70, 0x8e, 0xd8, 0xc6, 0x06, 0, 1, 1, 0xeb, 0xfe],
    );
    machine.code_at(code_of(0), |asm| {
        let mut wait = asm.create_label();
        let mut wait_again = asm.create_label();
        enable_apic(asm);
        asm.set_label(&mut wait).unwrap();
        asm.pause().unwrap();
        asm.cmp(qword_ptr(COUNT), 1).unwrap();
        asm.jne(wait).unwrap();
        msr(asm, 0x830, 1 << 32 | 0x4500);
        msr(asm, 0x830, 1 << 32 | 0x4600 | page);
        asm.set_label(&mut wait_again).unwrap();
        asm.pause().unwrap();
        asm.cmp(byte_ptr(started), 1).unwrap();
        asm.jne(wait_again).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
        asm.cli().unwrap();
        asm.hlt().unwrap();
    });
    run_to_stop(&mut machine);
    let state = machine.others[0].state().unwrap();
    assert_eq!((state.xcr0, state.cr4), (7, 0));
    let third = &state.xsave[xsave::YMM_HIGH][3 * 16..];
    assert_eq!(third[..8], u64::to_le_bytes(upper));
}
