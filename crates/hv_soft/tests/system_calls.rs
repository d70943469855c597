//! SYSCALL and SYSRET (SDM vol. 2B), which translated code does itself where the
//! kernel uses them as kernels do, and the engine does otherwise: the same either way.

mod bare;

use bare::{CODE, DATA, KERNEL_STACK, Machine, STACK, STOP};
use hv::VcpuState;
use iced_x86::code_asm::*;

const USER: u64 = 0x4_0000;
const USER_STACK: u64 = 0x5_0000;
const CALLED: u64 = CODE + 0x800;
/// Flags that the user starts each call with.
const GIVEN: u64 = USER + 0x8000;
/// What the kernel, at [`DATA`], and the user see of each call.
const SEEN: u64 = USER + 0xa000;

const STATUS: u64 = 0x8d5;
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
const DF: u64 = 1 << 10;
const AC: u64 = 1 << 18;
const ID: u64 = 1 << 21;
const FIXED: u64 = 2;

/// A machine whose CPU is at CPL 3, at [`USER`], with SYSCALL leading to [`CALLED`].
fn machine(fmask: u64) -> Machine {
    let mut machine = Machine::new();
    for page in (USER..USER_STACK + 0x1000).step_by(0x1000) {
        machine.map(page, page | 7);
    }
    machine.change(|state| {
        state.efer |= 1;
        state.msrs.extend([
            (0xc000_0081, 0x1b_0010 << 32),
            (0xc000_0082, CALLED),
            (0xc000_0084, fmask),
        ]);
        state.msrs.sort_unstable();
        state.rip = USER;
        state.gpr[4] = USER_STACK;
        state.rflags |= IF;
    });
    machine.enter_user();
    machine
}

/// All sixty-four settings of the status flags, and `others`.
fn given(others: u64) -> Vec<u64> {
    let bits: Vec<u64> = (0..12)
        .map(|bit| 1 << bit)
        .filter(|bit| STATUS & bit != 0)
        .collect();
    let setting = |number: u64| {
        let chosen = bits
            .iter()
            .enumerate()
            .filter(|(i, _)| number >> i & 1 != 0);
        chosen.map(|(_, bit)| bit).sum::<u64>() | others
    };
    (0..64).map(setting).collect()
}

/// Makes a call with each of `flags`, gives back others, and compares everything that
/// SYSCALL and SYSRET are about. Returns how many instructions the engine executed.
fn call_with(flags: &[u64], fmask: u64) -> u64 {
    let mut machine = machine(fmask);
    for (i, flags) in flags.iter().enumerate() {
        machine.put_word(GIVEN + 8 * i as u64, *flags);
    }
    let count = flags.len() as i32;
    let mut behind = 0;
    machine.code_at(USER, |asm| {
        let mut next = asm.create_label();
        asm.xor(esi, esi).unwrap();
        asm.set_label(&mut next).unwrap();
        asm.push(qword_ptr(GIVEN + rsi * 8)).unwrap();
        asm.popfq().unwrap();
        asm.syscall().unwrap();
        behind = USER + asm.assemble(USER).unwrap().len() as u64;
        asm.pushfq().unwrap();
        asm.pop(r8).unwrap();
        asm.mov(eax, cs).unwrap();
        asm.mov(ecx, ss).unwrap();
        asm.mov(qword_ptr(SEEN + rdi), r8).unwrap();
        asm.mov(qword_ptr(SEEN + rdi + 8), rax).unwrap();
        asm.mov(qword_ptr(SEEN + rdi + 16), rcx).unwrap();
        asm.lea(esi, ptr(rsi + 1)).unwrap();
        asm.cmp(esi, count).unwrap();
        asm.jb(next).unwrap();
        asm.ud2().unwrap();
    });
    machine.code_at(CALLED, |asm| {
        asm.pushfq().unwrap();
        asm.pop(rax).unwrap();
        asm.mov(rdi, rsi).unwrap();
        asm.shl(rdi, 6).unwrap();
        asm.mov(qword_ptr(DATA + rdi), rax).unwrap();
        asm.mov(qword_ptr(DATA + rdi + 8), r11).unwrap();
        asm.mov(qword_ptr(DATA + rdi + 16), rcx).unwrap();
        asm.mov(eax, cs).unwrap();
        asm.mov(qword_ptr(DATA + rdi + 24), rax).unwrap();
        asm.mov(eax, ss).unwrap();
        asm.mov(qword_ptr(DATA + rdi + 32), rax).unwrap();
        asm.xor(r11d, STATUS as i32).unwrap();
        asm.sysretq().unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!(
        (exception.vector, exception.state.gpr[6]),
        (6, flags.len() as u64)
    );
    for (i, flags) in flags.iter().enumerate() {
        let user = flags | IF | FIXED;
        let at = DATA + 64 * i as u64;
        let kernel: [u64; 5] = std::array::from_fn(|word| machine.word(at + 8 * word as u64));
        assert_eq!(
            kernel,
            [user & !fmask, user, behind, 0x10, 0x18],
            "flags {user:#x}"
        );
        let at = SEEN + 64 * i as u64;
        let seen: [u64; 3] = std::array::from_fn(|word| machine.word(at + 8 * word as u64));
        assert_eq!(seen, [user ^ STATUS, 0x2b, 0x23], "flags {user:#x}");
    }
    machine.vcpu.stats().interpreted
}

#[test]
fn calls_and_returns_carry_all_flags_whoever_does_them() {
    let flags = given(0);
    let by_engine = call_with(&flags, TF);
    let in_line = call_with(&flags, STATUS | TF | IF | DF | AC);
    assert_eq!(by_engine, in_line + 64, "no call was in line");
    // The engine loads DF.
    let backwards = call_with(&given(DF), STATUS | TF | IF | DF | AC);
    assert_eq!(backwards, in_line + 64);
    call_with(&given(DF | ID), STATUS | TF | IF | DF | AC);
}

#[test]
fn a_return_to_no_address_of_the_lower_half_is_no_return() {
    for rip in [1 << 47, 1 << 63, 0xffff_7fff_ffff_ffff] {
        let mut machine = machine(STATUS | TF | IF | DF);
        machine.code_at(USER, |asm| asm.syscall().unwrap());
        machine.code_at(CALLED, |asm| {
            asm.mov(rcx, rip).unwrap();
            asm.mov(rsp, STACK).unwrap();
            asm.cmp(ecx, ecx).unwrap();
            asm.sysretq().unwrap();
        });
        let exception = machine.run_to_exception();
        assert_eq!((exception.vector, exception.code), (13, Some(0)));
        assert_eq!(machine.word(exception.rip) & 0xff_ffff, 0x07_0f48);
        // Still the kernel's flags: those of the comparison.
        assert_eq!(machine.word(exception.state.gpr[4] + 24) & 0xcd5, 0x44);
        assert_eq!(exception.state.segments[VcpuState::CS].selector, 0x10);
        assert_eq!((exception.state.gpr[1], exception.rsp), (rip, STACK));
    }
}

#[test]
fn sysret_is_refused_between_kernel_and_user() {
    let mut machine = machine(STATUS | TF | IF | DF);
    machine.map(CODE, CODE | 7);
    machine.change(|state| {
        state.rip = CODE;
        state.gpr[4] = STACK;
        state.segments[VcpuState::CS].selector = 0x11;
        state.segments[VcpuState::CS].rights = 0xa0bb;
        state.segments[VcpuState::SS].selector = 0x19;
        state.segments[VcpuState::SS].rights = 0xc0b3;
    });
    machine.code(|asm| {
        asm.nop().unwrap();
        asm.sysretq().unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (13, CODE + 1));
}

#[test]
fn an_interrupt_that_waits_comes_right_behind_sysret() {
    let mut machine = machine(STATUS | TF | IF | DF);
    machine.set_gate(0x40, CODE + 0x1800);
    machine.code_at(USER, |asm| {
        asm.mov(edi, 3).unwrap();
        asm.syscall().unwrap();
        asm.inc(edi).unwrap();
        asm.ud2().unwrap();
    });
    machine.code_at(CODE + 0x1800, |asm| asm.out(i32::from(STOP), al).unwrap());
    machine.code_at(CALLED, |asm| {
        asm.mov(r8, rcx).unwrap();
        for (msr, value) in [(0x1b, 0xfee0_0d00_u32), (0x80f, 0x1ff), (0x83f, 0x40)] {
            asm.mov(ecx, msr).unwrap();
            asm.mov(eax, value).unwrap();
            asm.xor(edx, edx).unwrap();
            asm.wrmsr().unwrap();
        }
        asm.mov(rcx, r8).unwrap();
        asm.sysretq().unwrap();
    });
    let state = machine.run_to_stop();
    assert_eq!(state.rip, CODE + 0x1802);
    assert_eq!(state.gpr[7], 3);
    assert_eq!(machine.word(KERNEL_STACK - 40), USER + 7);
    assert_eq!(machine.word(KERNEL_STACK - 32), 0x2b);
}

#[test]
fn a_page_of_a_users_code_is_entered_as_a_whole_in_an_emptied_address_space() {
    const FUNCTIONS: u64 = USER + 0x2000;
    const TIMES: u64 = 100;
    let mut machine = machine(STATUS | TF | IF | DF);
    let functions: Vec<u64> = (0..20).map(|i| FUNCTIONS + 0x10 * i).collect();
    for function in &functions {
        machine.code_at(*function, |asm| {
            asm.inc(rbx).unwrap();
            asm.ret().unwrap();
        });
    }
    machine.code_at(USER, |asm| {
        let mut again = asm.create_label();
        asm.xor(ebx, ebx).unwrap();
        asm.mov(r12, TIMES).unwrap();
        asm.set_label(&mut again).unwrap();
        for function in &functions {
            asm.mov(rax, *function).unwrap();
            asm.call(rax).unwrap();
        }
        asm.syscall().unwrap();
        asm.dec(r12).unwrap();
        asm.jne(again).unwrap();
        asm.ud2().unwrap();
    });
    machine.code_at(CALLED, |asm| {
        asm.mov(rax, cr3).unwrap();
        asm.mov(cr3, rax).unwrap();
        asm.sysretq().unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!(exception.vector, 6);
    assert_eq!(exception.state.gpr[3], TIMES * functions.len() as u64);
    let stats = machine.vcpu.stats();
    assert!(stats.flushes >= TIMES, "{stats:?}");
    assert!(stats.indirect < 6 * TIMES, "{stats:?}");
}
