//! Changes of the stack, as kernels make them on each way in and out.

mod bare;

use bare::{DATA, Machine, STACK, STOP};
use iced_x86::code_asm::*;

/// The status flags of `cmp a, b`.
fn flags_of_comparison(a: u32, b: u32) -> u64 {
    let (difference, borrow) = a.overflowing_sub(b);
    let (_, overflow) = (a as i32).overflowing_sub(b as i32);
    let parity = (difference as u8).count_ones().is_multiple_of(2);
    u64::from(borrow)
        | u64::from(parity) << 2
        | u64::from((a ^ b ^ difference) >> 4 & 1) << 4
        | u64::from(difference == 0) << 6
        | u64::from(difference >> 31) << 7
        | u64::from(overflow) << 11
}

#[test]
fn a_change_of_stacks_keeps_flags_and_stays_in_translated_code() {
    const TIMES: u32 = 10_000;
    let mut machine = Machine::new();
    machine.code(|asm| {
        let mut again = asm.create_label();
        let (mut first, mut second) = (asm.create_label(), asm.create_label());
        asm.mov(rdi, STACK - 0x100).unwrap();
        asm.mov(rsi, DATA + 0x800).unwrap();
        asm.xor(r10d, r10d).unwrap();
        asm.mov(ecx, TIMES).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.imul_3(eax, ecx, 0x9e37_79b1_u32 as i32).unwrap();
        asm.mov(rsp, rdi).unwrap();
        asm.cmp(eax, 0x1234_5678).unwrap();
        asm.jmp(first).unwrap();
        asm.ud2().unwrap();
        asm.set_label(&mut first).unwrap();
        asm.push(rax).unwrap();
        asm.push(rcx).unwrap();
        asm.mov(rsp, rsi).unwrap();
        asm.jmp(second).unwrap();
        asm.ud2().unwrap();
        asm.set_label(&mut second).unwrap();
        asm.push(rax).unwrap();
        asm.pushfq().unwrap();
        asm.pop(rbx).unwrap();
        asm.and(ebx, 0x8d5).unwrap();
        asm.add(r10, rbx).unwrap();
        asm.dec(ecx).unwrap();
        asm.jne(again).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    let sum = (1..=TIMES)
        .map(|i| flags_of_comparison(i.wrapping_mul(0x9e37_79b1), 0x1234_5678))
        .sum::<u64>();
    assert_eq!(machine.run_to_stop().gpr[10], sum);
    let stats = machine.vcpu.stats();
    assert!(stats.groups < 50 && stats.accesses < 50, "{stats:?}");
}
