//! Between the guest's kernel and its user code, as a kernel does it: IRET and SYSRET out,
//! SYSCALL in. Completed where this KVM needs it.

mod bare;

use std::sync::Arc;

use bare::{CODE, DATA, Machine, SAY, on_kvm, soft, state, stop};
use hv::{Partition, Vcpu};
use hv_kvm::{Kind, KvmHypervisor, Options};
use iced_x86::code_asm::*;
use x86::msr;

/// In the page that user code may reach.
const USER: u64 = 0x40_0000;
const ENTRY: u64 = CODE + 0x2000;
const USER_STACK: u64 = 0x48_0000;

/// Two system calls: the first from code that IRET went to, the second from where SYSRET
/// went. What RCX, R11, CS and SS were at each, and what RAX came back.
fn two_system_calls<P: Partition>(machine: &mut Machine<P>) -> Vec<u64> {
    machine.user_may(USER);
    // Nothing faults that should not.
    machine.set_gate(14, ENTRY + 0x800);
    machine.code_at(ENTRY + 0x800, stop);
    machine.code(|asm| {
        asm.mov(r15, DATA).unwrap();
        for value in [0x23, USER_STACK as i32, 0x202, 0x2b, USER as i32] {
            asm.push(value).unwrap();
        }
        asm.iretq().unwrap();
    });
    machine.code_at(USER, |asm| {
        for _ in 0..2 {
            asm.syscall().unwrap();
            asm.mov(r14, rax).unwrap();
        }
        let mut forever = asm.create_label();
        asm.set_label(&mut forever).unwrap();
        asm.jmp(forever).unwrap();
    });
    machine.code_at(ENTRY, |asm| {
        let mut second = asm.create_label();
        let mut all = asm.create_label();
        for register in [rcx, r11, r14, rsp] {
            asm.mov(qword_ptr(r15), register).unwrap();
            asm.add(r15, 8).unwrap();
        }
        asm.mov(eax, cs).unwrap();
        asm.mov(qword_ptr(r15), rax).unwrap();
        asm.mov(eax, ss).unwrap();
        asm.mov(qword_ptr(r15 + 8), rax).unwrap();
        asm.add(r15, 16).unwrap();
        asm.mov(eax, 0x77).unwrap();
        asm.inc(r13).unwrap();
        asm.out(i32::from(SAY), eax).unwrap();
        asm.cmp(r13, 2).unwrap();
        asm.jae(all).unwrap();
        asm.jmp(second).unwrap();
        asm.set_label(&mut all).unwrap();
        stop(asm);
        asm.set_label(&mut second).unwrap();
        asm.sysretq().unwrap();
    });
    let mut start = state();
    start.efer |= 1;
    // 0x10 and 0x18 in, 0x2b and 0x23 out.
    start.msrs = vec![
        (msr::STAR, 0x001b_0010 << 32),
        (msr::LSTAR, ENTRY),
        (msr::FMASK, 0x200),
    ];
    start.gpr[13] = 0;
    start.gpr[14] = 0;
    machine.vcpu.set_state(&start).unwrap();
    machine.run_to_stop();
    (0..12).map(|i| machine.word(DATA + 8 * i)).collect()
}

#[test]
fn system_calls_go_in_and_come_back() {
    if on_kvm().is_none() {
        return;
    }
    let kvm = KvmHypervisor::open(Options::default()).unwrap();
    let kvm = kvm.completed_by(Arc::new(bare::completions));
    let ran = two_system_calls(&mut Machine::new(&kvm));
    let expected = two_system_calls(&mut Machine::new(&soft()));
    assert_eq!(ran, expected);
    assert_eq!(ran[4..6], [0x10, 0x18]);
    assert_eq!(ran[8], 0x77);
}

/// A hypercall that this KVM begins again and again is answered as on the software engine.
#[test]
fn hypercalls_of_the_guests_kernel_are_answered() {
    fn answers<P: Partition>(machine: &mut Machine<P>) -> [u64; 2] {
        machine.code(|asm| {
            // KVM_HC_CLOCK_PAIRING.
            asm.mov(eax, 9).unwrap();
            asm.xor(ecx, ecx).unwrap();
            asm.mov(rbx, DATA).unwrap();
            asm.db(&[0x0f, 0x01, 0xc1]).unwrap(); // vmcall
            asm.mov(r14, rax).unwrap();
            asm.mov(eax, 99).unwrap();
            asm.db(&[0x0f, 0x01, 0xd9]).unwrap(); // vmmcall
            asm.mov(r15, rax).unwrap();
            stop(asm);
        });
        let state = machine.run_to_stop();
        [state.gpr[14], state.gpr[15]]
    }
    if on_kvm().is_none() {
        return;
    }
    let kvm = KvmHypervisor::open(Options::default()).unwrap();
    let kvm = kvm.completed_by(Arc::new(bare::completions));
    let ran = answers(&mut Machine::new(&kvm));
    // -KVM_ENOSYS for a call that there is not; the first one real KVMs may know.
    assert_eq!(ran[1], -1000_i64 as u64);
    if matches!(hv_kvm::probe(), Ok(Kind::Software { .. })) {
        assert_eq!(ran, answers(&mut Machine::new(&soft())));
    }
}
