//! The time-stamp counter of a state that was taken elsewhere.

mod bare;
mod several;

use bare::{DATA, Machine, STOP};
use hv::{Vcpu, VcpuState};
use iced_x86::code_asm::*;
use several::*;

/// A day or so away from any host's.
const ELSEWHERE: u64 = 1 << 50;
/// Longer than a test.
const SOON: u64 = 1 << 41;

fn set_tsc(state: &mut VcpuState, value: u64) {
    state.msrs.retain(|(index, _)| *index != x86::msr::TSC);
    state.msrs.push((x86::msr::TSC, value));
}

#[test]
fn all_ways_to_read_a_restored_time_agree() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.rdtsc().unwrap();
        asm.shl(rdx, 32).unwrap();
        asm.lea(rbx, qword_ptr(rax + rdx)).unwrap();
        asm.rdtscp().unwrap();
        asm.shl(rdx, 32).unwrap();
        asm.lea(rsi, qword_ptr(rax + rdx)).unwrap();
        asm.mov(ecx, x86::msr::TSC).unwrap();
        asm.rdmsr().unwrap();
        asm.shl(rdx, 32).unwrap();
        asm.lea(rdi, qword_ptr(rax + rdx)).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    for from in [ELSEWHERE, 5, u64::MAX - SOON] {
        machine.change(|state| {
            set_tsc(state, from);
            state.rip = bare::CODE;
        });
        let state = machine.run_to_stop();
        let [first, second, third] = [3, 6, 7].map(|register| state.gpr[register]);
        let to = from.saturating_add(SOON);
        assert!(
            from <= first && first <= second && second <= third && third < to,
            "{from:#x}: {first:#x} {second:#x} {third:#x}"
        );
    }
}

#[test]
fn flags_and_upper_halves_are_those_of_rdtsc() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.mov(rax, -1_i64).unwrap();
        asm.mov(rdx, -1_i64).unwrap();
        asm.stc().unwrap();
        asm.rdtsc().unwrap();
        asm.setb(bl).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.change(|state| set_tsc(state, u64::MAX - SOON));
    let state = machine.run_to_stop();
    assert_eq!((state.gpr[0] >> 32, state.gpr[2] >> 32), (0, 0));
    assert_eq!(state.gpr[3] & 0xff, 1);
}

#[test]
fn restored_vcpus_have_one_time() {
    let mut machine = machine(2);
    // As it was saved: one after the other.
    let mut state = machine.vcpu.state().unwrap();
    set_tsc(&mut state, ELSEWHERE);
    machine.vcpu.set_state(&state).unwrap();
    let mut state = machine.others[0].state().unwrap();
    set_tsc(&mut state, ELSEWHERE + SOON);
    machine.others[0].set_state(&state).unwrap();
    // In turns, each notes the time where it is later than all before.
    let (turn, last, wrong) = (DATA, DATA + 64, DATA + 128);
    for index in 0..2 {
        machine.code_at(code_of(index), |asm| {
            let (mut round, mut wait) = (asm.create_label(), asm.create_label());
            let mut fine = asm.create_label();
            asm.mov(r14d, 1000).unwrap();
            asm.set_label(&mut round).unwrap();
            asm.nop().unwrap();
            asm.set_label(&mut wait).unwrap();
            asm.pause().unwrap();
            asm.cmp(qword_ptr(turn), index as i32).unwrap();
            asm.jne(wait).unwrap();
            asm.lfence().unwrap();
            asm.rdtsc().unwrap();
            asm.shl(rdx, 32).unwrap();
            asm.or(rax, rdx).unwrap();
            asm.cmp(rax, qword_ptr(last)).unwrap();
            asm.jae(fine).unwrap();
            asm.inc(qword_ptr(wrong)).unwrap();
            asm.set_label(&mut fine).unwrap();
            asm.mov(qword_ptr(last), rax).unwrap();
            asm.mov(qword_ptr(turn), 1 - index as i32).unwrap();
            asm.dec(r14d).unwrap();
            asm.jne(round).unwrap();
            meet_and_stop(asm, DATA + 0x8000, 2);
        });
    }
    run_to_stop(&mut machine);
    let last = machine.word(last);
    assert!((ELSEWHERE..ELSEWHERE + SOON).contains(&last), "{last:#x}");
    assert_eq!(machine.word(wrong), 0);
}
