//! Instructions that this KVM may not know, completed by the software engine: their effect
//! is the same as on the software engine alone.

mod bare;

use std::sync::Arc;

use bare::{CODE, DATA, Machine, completions, on_kvm, soft, state, stop};
use hv::{Partition, Vcpu, VcpuState};
use hv_kvm::{Kind, KvmHypervisor, Options};
use iced_x86::code_asm::*;
use x86::control::cr4;

const HANDLER: u64 = CODE + 0x800;

/// Runs it on KVM, completed where need be, and on the software engine alone.
fn on_both(write: impl Fn(&mut CodeAssembler)) -> Option<[(VcpuState, Vec<u8>); 2]> {
    fn run<P: Partition>(
        machine: &mut Machine<P>,
        write: &dyn Fn(&mut CodeAssembler),
    ) -> (VcpuState, Vec<u8>) {
        machine.set_gate(3, HANDLER);
        machine.set_gate(6, HANDLER);
        machine.code(write);
        machine.code_at(HANDLER, |asm| {
            // The frame: where it came from.
            asm.mov(r15, ptr(rsp)).unwrap();
            asm.inc(r14).unwrap();
            asm.iretq().unwrap();
        });
        let mut start = state();
        start.cr4 |= cr4::OSXSAVE;
        start.xcr0 = 3;
        machine.vcpu.set_state(&start).unwrap();
        let end = machine.run_to_stop();
        let mut data = vec![0; 4096];
        let memory = machine.ram.memory();
        vm_memory::Bytes::read_slice(memory, &mut data, hv::Gpa(DATA)).unwrap();
        (end, data)
    }
    on_kvm()?;
    let kvm = KvmHypervisor::open(Options::default()).unwrap();
    let kvm = kvm.completed_by(Arc::new(completions));
    let mut on_kvm = Machine::new(&kvm);
    let ran = [
        run(&mut on_kvm, &write),
        run(&mut Machine::new(&soft()), &write),
    ];
    // One that runs guests on the processor knows them all.
    if matches!(hv_kvm::probe(), Ok(Kind::Hardware)) {
        assert_eq!(on_kvm.vcpu.completed(), 0);
    }
    println!("completed: {}", on_kvm.vcpu.completed());
    Some(ran)
}

fn alike([kvm, soft]: &[(VcpuState, Vec<u8>); 2]) {
    assert_eq!(kvm.0.gpr, soft.0.gpr);
    assert_eq!(kvm.0.rip, soft.0.rip);
    assert_eq!(kvm.0.rflags, soft.0.rflags);
    assert_eq!(kvm.0.xcr0, soft.0.xcr0);
    assert_eq!(kvm.1, soft.1, "memory");
}

#[test]
fn a_breakpoint_reaches_its_handler() {
    let ran = on_both(|asm| {
        asm.xor(r14d, r14d).unwrap();
        for _ in 0..3 {
            asm.int3().unwrap();
        }
        stop(asm);
    });
    let Some(ran) = ran else { return };
    assert_eq!(ran[0].0.gpr[14], 3);
    alike(&ran);
}

#[test]
fn sixteen_bytes_are_compared_and_exchanged() {
    let ran = on_both(|asm| {
        asm.mov(rdi, DATA).unwrap();
        asm.mov(qword_ptr(rdi), 5).unwrap();
        asm.mov(qword_ptr(rdi + 8), 6).unwrap();
        for (low, high) in [(5_u64, 6_u64), (7, 7)] {
            asm.mov(rax, low).unwrap();
            asm.mov(rdx, high).unwrap();
            asm.mov(rbx, 0x1111_2222_3333_4444_u64).unwrap();
            asm.mov(rcx, 0x5555_6666_7777_8888_u64).unwrap();
            asm.lock().cmpxchg16b(xmmword_ptr(rdi)).unwrap();
            asm.pushfq().unwrap();
            asm.pop(r8).unwrap();
            asm.mov(qword_ptr(rdi + 16), r8).unwrap();
            asm.add(rdi, 0).unwrap();
        }
        stop(asm);
    });
    let Some(ran) = ran else { return };
    assert_eq!(ran[0].0.gpr[0], 0x1111_2222_3333_4444);
    alike(&ran);
}

#[test]
fn extended_state_is_saved_and_comes_back() {
    let ran = on_both(|asm| {
        asm.mov(rdi, DATA).unwrap();
        asm.mov(rax, 0x0123_4567_89ab_cdef_u64).unwrap();
        asm.movq(xmm3, rax).unwrap();
        asm.mov(eax, 3).unwrap();
        asm.xor(edx, edx).unwrap();
        asm.xsave64(ptr(rdi)).unwrap();
        asm.pxor(xmm3, xmm3).unwrap();
        asm.xrstor64(ptr(rdi)).unwrap();
        asm.movq(rbx, xmm3).unwrap();
        stop(asm);
    });
    let Some(ran) = ran else { return };
    for (end, _) in &ran {
        assert_eq!(end.gpr[3], 0x0123_4567_89ab_cdef);
    }
}

/// Code that is changed between two completions of the same place is the new one.
#[test]
fn code_that_the_guest_changes_is_not_remembered() {
    let ran = on_both(|asm| {
        let mut again = asm.create_label();
        let mut done = asm.create_label();
        asm.xor(r13d, r13d).unwrap();
        asm.xor(r14d, r14d).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.int3().unwrap();
        asm.inc(r13).unwrap();
        asm.lea(rax, ptr(again)).unwrap();
        asm.mov(byte_ptr(rax), 0x90).unwrap();
        asm.cmp(r13, 2).unwrap();
        asm.jae(done).unwrap();
        asm.jmp(again).unwrap();
        asm.set_label(&mut done).unwrap();
        stop(asm);
    });
    let Some(ran) = ran else { return };
    assert_eq!((ran[0].0.gpr[13], ran[0].0.gpr[14]), (2, 1));
    alike(&ran);
}
