//! What several vCPUs do to the same memory, code and clocks.

mod bare;
mod several;

use bare::{DATA, Machine, SAY, STOP, Said};
use hv::Exit;
use iced_x86::code_asm::*;
use several::*;

const MEET: u64 = DATA + 0x8000;

/// Every vCPU runs `each` (its own copy), then they meet.
fn all(count: u8, mut each: impl FnMut(&mut CodeAssembler, u64)) -> Machine {
    let mut machine = machine(count);
    for index in 0..u64::from(count) {
        machine.code_at(code_of(index), |asm| {
            each(asm, index);
            meet_and_stop(asm, MEET, count);
        });
    }
    machine
}

fn times(asm: &mut CodeAssembler, count: u32, body: impl FnOnce(&mut CodeAssembler)) {
    let mut again = asm.create_label();
    asm.mov(r14d, count).unwrap();
    asm.set_label(&mut again).unwrap();
    asm.nop().unwrap(); // the body may begin with a label of its own
    body(asm);
    asm.dec(r14d).unwrap();
    asm.jne(again).unwrap();
}

#[test]
fn locked_increments_of_one_word_lose_none() {
    let mut machine = all(4, |asm, _| {
        times(asm, 50_000, |asm| asm.lock().inc(qword_ptr(DATA)).unwrap());
    });
    run_to_stop(&mut machine);
    assert_eq!(machine.word(DATA), 200_000);
}

#[test]
fn locked_increments_across_pages_lose_none() {
    let across = DATA + 0x1ffd;
    let mut machine = all(3, |asm, _| {
        times(asm, 400, |asm| asm.lock().inc(qword_ptr(across)).unwrap());
        times(asm, 100, |asm| {
            asm.mov(eax, 1).unwrap();
            asm.lock().xadd(qword_ptr(across), rax).unwrap();
        });
    });
    run_to_stop(&mut machine);
    assert_eq!(machine.word(across), 1500);
    assert!(machine.vcpu.stats().alone > 0);
}

#[test]
fn locked_increments_beside_running_code_lose_none() {
    // In the page of vCPU 1's code.
    let beside = code_of(1) + 0x800;
    let mut machine = all(3, |asm, _| {
        times(asm, 3000, |asm| {
            asm.lock().inc(dword_ptr(beside)).unwrap();
            asm.lock().bts(dword_ptr(beside + 8), 3).unwrap();
            asm.lock().add(word_ptr(beside + 16), 1).unwrap();
        });
    });
    run_to_stop(&mut machine);
    assert_eq!(machine.word(beside) & 0xffff_ffff, 9000);
    assert_eq!(machine.word(beside + 16) & 0xffff, 9000);
}

fn exchange_pairs(at: u64, count: u32) {
    let mut machine = all(4, |asm, _| {
        asm.mov(rsi, at).unwrap();
        times(asm, count, |asm| {
            let mut again = asm.create_label();
            asm.mov(rax, qword_ptr(rsi)).unwrap();
            asm.mov(rdx, qword_ptr(rsi + 8)).unwrap();
            asm.set_label(&mut again).unwrap();
            asm.lea(rbx, qword_ptr(rax + 1)).unwrap();
            asm.lea(rcx, qword_ptr(rdx + 3)).unwrap();
            asm.lock().cmpxchg16b(xmmword_ptr(rsi)).unwrap();
            asm.jne(again).unwrap();
        });
    });
    run_to_stop(&mut machine);
    let wanted = 4 * u64::from(count);
    assert_eq!(
        (machine.word(at), machine.word(at + 8)),
        (wanted, 3 * wanted)
    );
}

#[test]
fn pairs_exchanged_by_all_lose_nothing() {
    exchange_pairs(DATA, 20_000);
}

#[test]
fn pairs_exchanged_beside_code_lose_nothing() {
    exchange_pairs(code_of(2) + 0xa00, 1000);
}

#[test]
fn an_exchange_across_pages_is_a_lock() {
    let lock = DATA + 0x2fff;
    let mut machine = all(3, |asm, _| {
        times(asm, 300, |asm| {
            let mut again = asm.create_label();
            asm.set_label(&mut again).unwrap();
            asm.mov(eax, 1).unwrap();
            asm.xchg(dword_ptr(lock), eax).unwrap();
            asm.test(eax, eax).unwrap();
            asm.jne(again).unwrap();
            asm.inc(qword_ptr(DATA)).unwrap();
            asm.mov(dword_ptr(lock), 0).unwrap();
        });
    });
    run_to_stop(&mut machine);
    assert_eq!(machine.word(DATA), 900);
}

/// vCPU 0 changes a function; vCPU 1 learns of it, serialises, and calls it.
#[test]
fn store_into_another_cpus_code_is_seen() {
    let (function, flag, ack, wrong) = (DATA + 0x4000, DATA, DATA + 64, DATA + 128);
    let rounds = 300;
    let mut machine = machine(2);
    machine.code_at(function, |asm| {
        asm.mov(eax, 0).unwrap();
        asm.ret().unwrap();
    });
    machine.code_at(code_of(0), |asm| {
        let (mut round, mut wait) = (asm.create_label(), asm.create_label());
        asm.xor(ebx, ebx).unwrap();
        asm.set_label(&mut round).unwrap();
        asm.inc(ebx).unwrap();
        asm.mov(dword_ptr(function + 1), ebx).unwrap();
        asm.mov(qword_ptr(flag), rbx).unwrap();
        asm.set_label(&mut wait).unwrap();
        asm.pause().unwrap();
        asm.cmp(qword_ptr(ack), rbx).unwrap();
        asm.jne(wait).unwrap();
        asm.cmp(ebx, rounds).unwrap();
        asm.jne(round).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.code_at(code_of(1), |asm| {
        let (mut round, mut right) = (asm.create_label(), asm.create_label());
        asm.xor(r12d, r12d).unwrap();
        asm.set_label(&mut round).unwrap();
        asm.pause().unwrap();
        asm.mov(r13, qword_ptr(flag)).unwrap();
        asm.cmp(r13, r12).unwrap();
        asm.je(round).unwrap();
        asm.mov(r12, r13).unwrap();
        asm.xor(eax, eax).unwrap();
        asm.cpuid().unwrap();
        asm.call(function).unwrap();
        asm.cmp(eax, r12d).unwrap();
        asm.je(right).unwrap();
        asm.inc(qword_ptr(wrong)).unwrap();
        asm.set_label(&mut right).unwrap();
        asm.mov(qword_ptr(ack), r12).unwrap();
        asm.jmp(round).unwrap();
    });
    run_to_stop(&mut machine);
    assert_eq!((machine.word(ack), machine.word(wrong)), (rounds as u64, 0));
    assert!(machine.others[0].stats().requests > 0);
}

/// vCPU 1 never leaves a loop that calls the function.
#[test]
fn store_into_code_that_another_cpu_runs_in_a_loop_is_seen_soon() {
    let (function, seen) = (DATA + 0x4000, DATA);
    let rounds = 300;
    let mut machine = machine(2);
    machine.code_at(function, |asm| {
        asm.mov(eax, 0).unwrap();
        asm.ret().unwrap();
    });
    machine.code_at(code_of(0), |asm| {
        let (mut round, mut wait) = (asm.create_label(), asm.create_label());
        asm.xor(ebx, ebx).unwrap();
        asm.set_label(&mut round).unwrap();
        asm.inc(ebx).unwrap();
        asm.mov(dword_ptr(function + 1), ebx).unwrap();
        asm.set_label(&mut wait).unwrap();
        asm.pause().unwrap();
        asm.cmp(dword_ptr(seen), ebx).unwrap();
        asm.jne(wait).unwrap();
        asm.cmp(ebx, rounds).unwrap();
        asm.jne(round).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.code_at(code_of(1), |asm| {
        let mut again = asm.create_label();
        asm.set_label(&mut again).unwrap();
        asm.call(function).unwrap();
        asm.mov(dword_ptr(seen), eax).unwrap();
        asm.jmp(again).unwrap();
    });
    run_to_stop(&mut machine);
    assert_eq!(machine.word(seen), rounds as u64);
}

/// All vCPUs write functions for each other in turn, at the same addresses.
#[test]
fn code_that_moves_from_cpu_to_cpu_is_always_the_last_written() {
    let (count, rounds) = (3_u64, 200);
    let (function, turn, wrong) = (DATA + 0x4ffe, DATA, DATA + 64);
    let mut machine = all(count as u8, |asm, index| {
        let (mut wait, mut right, mut done) =
            (asm.create_label(), asm.create_label(), asm.create_label());
        asm.set_label(&mut wait).unwrap();
        asm.pause().unwrap();
        asm.mov(r12, qword_ptr(turn)).unwrap();
        asm.cmp(r12, rounds).unwrap();
        asm.jae(done).unwrap();
        asm.mov(rax, r12).unwrap();
        asm.xor(edx, edx).unwrap();
        asm.mov(ecx, count as u32).unwrap();
        asm.div(rcx).unwrap();
        asm.cmp(rdx, index as i32).unwrap();
        asm.jne(wait).unwrap();
        // What the one before wrote, across two pages: mov eax, turn; ret
        asm.call(function).unwrap();
        asm.cmp(eax, r12d).unwrap();
        asm.je(right).unwrap();
        asm.inc(qword_ptr(wrong)).unwrap();
        asm.set_label(&mut right).unwrap();
        asm.inc(r12).unwrap();
        asm.mov(dword_ptr(function + 1), r12d).unwrap();
        asm.mov(qword_ptr(turn), r12).unwrap();
        asm.jmp(wait).unwrap();
        asm.set_label(&mut done).unwrap();
        asm.nop().unwrap();
    });
    machine.code_at(function, |asm| {
        asm.mov(eax, 0).unwrap();
        asm.ret().unwrap();
    });
    run_to_stop(&mut machine);
    assert_eq!(
        (machine.word(turn), machine.word(wrong)),
        (rounds as u64, 0)
    );
}

#[test]
fn what_a_device_writes_into_code_is_seen_by_the_cpu_it_interrupts() {
    let (function, seen) = (DATA + 0x4000, DATA);
    let mut machine = machine(2);
    let code = |value: u8| [0xb8, value, 0, 0, 0, 0xc3];
    machine.put(function, &code(1));
    let (ram, chips) = (machine.ram.clone(), machine.interrupts.clone());
    *machine.board.on_say.lock().unwrap() = Some(Box::new(move |value| {
        use vm_memory::Bytes;
        let at = hv::Gpa(function);
        ram.memory().write_slice(&code(value as u8), at).unwrap();
        chips.set_line(5, true);
        chips.set_line(5, false);
    }));
    // IOAPIC pin 5: edge, vector 0x45, to vCPU 1.
    let ioapic_page = 0xfec0_0000_u64;
    machine.map(0x1f_f000, ioapic_page | 3);
    machine.code_at(code_of(0), |asm| {
        for (register, value) in [(0x1b, 1 << 24), (0x1a, 0x45)] {
            asm.mov(dword_ptr(0x1f_f000), register).unwrap();
            asm.mov(dword_ptr(0x1f_f010), value).unwrap();
        }
        let (mut round, mut wait) = (asm.create_label(), asm.create_label());
        let mut ready = asm.create_label();
        asm.set_label(&mut ready).unwrap();
        asm.pause().unwrap();
        asm.cmp(dword_ptr(seen), 1).unwrap();
        asm.jne(ready).unwrap();
        asm.mov(ebx, 1).unwrap();
        asm.set_label(&mut round).unwrap();
        asm.inc(ebx).unwrap();
        asm.mov(eax, ebx).unwrap();
        asm.out(i32::from(SAY), eax).unwrap();
        asm.set_label(&mut wait).unwrap();
        asm.pause().unwrap();
        asm.cmp(dword_ptr(seen), ebx).unwrap();
        asm.jne(wait).unwrap();
        asm.cmp(ebx, 100).unwrap();
        asm.jne(round).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.code_at(code_of(1), |asm| {
        let mut again = asm.create_label();
        enable_apic(asm);
        asm.call(function).unwrap();
        asm.mov(dword_ptr(seen), eax).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.sti().unwrap();
        asm.hlt().unwrap();
        asm.jmp(again).unwrap();
    });
    let handler = code_of(1) + 0x1000;
    machine.code_at(handler, |asm| {
        asm.call(function).unwrap();
        asm.mov(dword_ptr(seen), eax).unwrap();
        end_of_interrupt(asm);
        asm.iretq().unwrap();
    });
    machine.set_gate(0x45, handler);
    run_to_stop(&mut machine);
    assert_eq!(machine.word(seen), 100);
    assert_eq!(machine.said().len(), 99);
    assert_eq!(machine.said().last(), Some(&Said::Port(100)));
}

#[test]
fn time_stamps_never_go_back_from_cpu_to_cpu() {
    let (lock, last, wrong) = (DATA, DATA + 64, DATA + 128);
    let mut machine = all(2, |asm, _| {
        times(asm, 50_000, |asm| {
            let (mut again, mut taken) = (asm.create_label(), asm.create_label());
            let mut fine = asm.create_label();
            asm.set_label(&mut again).unwrap();
            asm.lock().bts(qword_ptr(lock), 0).unwrap();
            asm.jae(taken).unwrap();
            asm.pause().unwrap();
            asm.jmp(again).unwrap();
            asm.set_label(&mut taken).unwrap();
            asm.rdtscp().unwrap();
            asm.shl(rdx, 32).unwrap();
            asm.or(rax, rdx).unwrap();
            asm.cmp(rax, qword_ptr(last)).unwrap();
            asm.jae(fine).unwrap();
            asm.inc(qword_ptr(wrong)).unwrap();
            asm.set_label(&mut fine).unwrap();
            asm.mov(qword_ptr(last), rax).unwrap();
            asm.mov(qword_ptr(lock), 0).unwrap();
        });
    });
    run_to_stop(&mut machine);
    assert!(machine.word(last) > 0);
    assert_eq!(machine.word(wrong), 0);
}

#[test]
fn every_cpu_s_clock_page_is_the_same() {
    let mut machine = all(3, |asm, index| {
        times(asm, 5000, |asm| asm.pause().unwrap());
        msr(asm, 0x4b56_4d01, (DATA + 0x40 * index) | 1);
    });
    run_to_stop(&mut machine);
    let page = |index: u64| -> Vec<u64> {
        (0..4)
            .map(|word| machine.word(DATA + 0x40 * index + 8 * word))
            .collect()
    };
    assert_ne!(page(0)[1], 0);
    assert_eq!(page(0)[3] >> 40 & 1, 1, "the stable flag");
    assert_eq!(page(0)[1..], page(1)[1..]);
    assert_eq!(page(0)[1..], page(2)[1..]);
}

#[test]
fn cpus_that_all_halt_for_good_end_their_runs() {
    let mut machine = machine(3);
    for index in 0..3 {
        machine.code_at(code_of(index), |asm| {
            times(asm, 1000 * index as u32 + 1, |asm| asm.pause().unwrap());
            asm.cli().unwrap();
            asm.hlt().unwrap();
        });
    }
    for ended in run(&mut machine) {
        assert_eq!(ended.unwrap(), Exit::Halted);
    }
}
