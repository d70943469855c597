//! Device memory, interrupts, sleep and kicks.

mod bare;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bare::{CODE, DEVICE, DEVICE_PA, Machine, SAY, STOP, Said};
use hv::{Exit, Vcpu};
use iced_x86::code_asm::*;
use translator::context::Mode;

#[test]
fn device_memory_is_accessed_in_the_width_of_the_instruction() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.mov(rsi, DEVICE).unwrap();
        asm.mov(eax, 0x0403_0201).unwrap();
        asm.mov(byte_ptr(rsi), al).unwrap();
        asm.mov(word_ptr(rsi + 2), ax).unwrap();
        asm.mov(dword_ptr(rsi + 4), eax).unwrap();
        asm.mov(qword_ptr(rsi + 8), rax).unwrap();
        asm.movzx(ebx, word_ptr(rsi + 16)).unwrap();
        asm.add(dword_ptr(rsi + 20), eax).unwrap();
        asm.movsxd(rcx, dword_ptr(rsi + 24)).unwrap();
        asm.movups(xmmword_ptr(rsi + 32), xmm0).unwrap();
        asm.sete(byte_ptr(rsi + 48)).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    let state = machine.run_to_stop();
    let store = |at: u64, bytes: &[u8]| Said::Store(DEVICE_PA + at, bytes.to_vec());
    let load = |at: u64, size| Said::Load(DEVICE_PA + at, size);
    assert_eq!(
        machine.said(),
        [
            store(0, &[1]),
            store(2, &[1, 2]),
            store(4, &[1, 2, 3, 4]),
            store(8, &[1, 2, 3, 4, 0, 0, 0, 0]),
            load(16, 2),
            load(20, 4),
            store(20, &[0x82, 0x84, 0x86, 0x88]),
            load(24, 4),
            store(32, &[0; 8]),
            store(40, &[0; 8]),
            store(48, &[0]),
        ]
    );
    assert_eq!(
        (state.gpr[3], state.gpr[1]),
        (0x8281, 0xffff_ffff_8483_8281)
    );
}

#[test]
fn string_instructions_move_between_memory_and_devices() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.mov(rsi, DEVICE).unwrap();
        asm.mov(rdi, 0x10_0ffe_u64).unwrap();
        asm.mov(ecx, 2).unwrap();
        asm.rep().movsw().unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    assert_eq!(
        machine.said(),
        [Said::Load(DEVICE_PA, 2), Said::Load(DEVICE_PA + 2, 2)]
    );
    assert_eq!(machine.word(0x10_0ffe) & 0xffff_ffff, 0x8281_8281);
}

#[test]
fn hlt_without_interrupts_stops_for_good() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.cli().unwrap();
        asm.hlt().unwrap();
    });
    assert_eq!(machine.run(), Exit::Halted);
    assert!(machine.vcpu.state().unwrap().events.halted);
}

/// Programs the APIC for vector 0x40, `write` may add to it, and waits in HLT.
fn wait_for_interrupts(machine: &mut Machine, write: impl FnOnce(&mut CodeAssembler)) {
    machine.code(|asm| {
        let mut again = asm.create_label();
        msr(asm, 0x80f, 0x1ff);
        write(asm);
        asm.set_label(&mut again).unwrap();
        asm.sti().unwrap();
        asm.hlt().unwrap();
        asm.jmp(again).unwrap();
    });
    machine.code_at(CODE + 0x1000, |asm| {
        asm.inc(ebx).unwrap();
        asm.mov(eax, ebx).unwrap();
        asm.out(i32::from(SAY), eax).unwrap();
        msr(asm, 0x80b, 0);
        asm.iretq().unwrap();
    });
    machine.set_gate(0x40, CODE + 0x1000);
}

fn msr(asm: &mut CodeAssembler, index: u32, value: u64) {
    asm.mov(ecx, index).unwrap();
    asm.mov(eax, value as u32).unwrap();
    asm.mov(edx, (value >> 32) as u32).unwrap();
    asm.wrmsr().unwrap();
}

/// Ends the run when the guest has said `value`.
fn stop_at(machine: &Machine, value: u32) {
    let kick = machine.vcpu.kicker();
    *machine.board.on_say.lock().unwrap() = Some(Box::new(move |said| {
        if said >= value {
            kick.kick();
        }
    }));
}

fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap()
}

#[test]
fn a_guest_in_hlt_uses_no_cpu_and_the_deadline_wakes_it() {
    let mut machine = Machine::new();
    wait_for_interrupts(&mut machine, |asm| {
        msr(asm, 0x832, 2 << 17 | 0x40);
        asm.rdtsc().unwrap();
        asm.shl(rdx, 32).unwrap();
        asm.or(rax, rdx).unwrap();
        asm.add(rax, 500_000_000).unwrap();
        asm.mov(rdx, rax).unwrap();
        asm.shr(rdx, 32).unwrap();
        asm.mov(ecx, 0x6e0).unwrap();
        asm.wrmsr().unwrap();
    });
    stop_at(&machine, 1);
    let (wall, cpu) = (Instant::now(), thread_time());
    assert_eq!(machine.run(), Exit::Kicked);
    let (wall, cpu) = (wall.elapsed(), thread_time() - cpu);
    assert!(wall > Duration::from_millis(50), "{wall:?}");
    assert!(cpu < Duration::from_millis(20), "{cpu:?} of {wall:?}");
    assert_eq!(machine.said(), [Said::Port(1)]);
}

#[test]
fn the_first_rest_drops_every_translation_once_and_the_guest_goes_on() {
    let mut machine = Machine::new();
    wait_for_interrupts(&mut machine, |asm| {
        msr(asm, 0x83e, 0xb);
        msr(asm, 0x832, 1 << 17 | 0x40);
        msr(asm, 0x838, 100_000_000);
    });
    let ticks = 16;
    stop_at(&machine, ticks);
    let start = Instant::now();
    assert_eq!(machine.run(), Exit::Kicked);
    assert!(
        start.elapsed() > Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(machine.vcpu.stats().code_flushes, 1);
    assert_eq!(
        machine.said(),
        (1..=ticks).map(Said::Port).collect::<Vec<_>>()
    );
}

#[test]
fn a_timer_interrupts_a_loop_that_never_leaves_translated_code() {
    let mut machine = Machine::new();
    wait_for_interrupts(&mut machine, |asm| {
        let mut forever = asm.create_label();
        msr(asm, 0x83e, 0xb);
        msr(asm, 0x832, 1 << 17 | 0x40);
        msr(asm, 0x838, 2_000_000);
        asm.sti().unwrap();
        asm.set_label(&mut forever).unwrap();
        asm.inc(rdi).unwrap();
        asm.jmp(forever).unwrap();
    });
    stop_at(&machine, 5);
    assert_eq!(machine.run(), Exit::Kicked);
    assert_eq!(machine.said(), (1..=5).map(Said::Port).collect::<Vec<_>>());
}

#[test]
fn blocks_that_share_a_jump_cache_entry_go_on_while_an_interrupt_has_to_wait() {
    // Apart in a bit that does not choose the jump cache entry.
    let far = CODE + 0x1000 + (Mode::Kernel.jump_mask() << 1 & !Mode::Kernel.jump_mask());
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.cli().unwrap();
        msr(asm, 0x80f, 0x1ff);
        // A self-IPI that interrupts-off keeps waiting.
        msr(asm, 0x83f, 0x40);
        asm.mov(rsi, CODE + 0x1000).unwrap();
        asm.mov(rdi, far).unwrap();
        asm.xor(ebx, ebx).unwrap();
        asm.jmp(rsi).unwrap();
    });
    machine.code_at(CODE + 0x1000, |asm| {
        asm.inc(ebx).unwrap();
        asm.jmp(rdi).unwrap();
    });
    machine.code_at(far, |asm| {
        let mut end = asm.create_label();
        asm.cmp(ebx, 1000).unwrap();
        asm.je(end).unwrap();
        asm.jmp(rsi).unwrap();
        asm.set_label(&mut end).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    assert_eq!(machine.run_to_stop().gpr[3], 1000);
}

#[test]
fn a_level_interrupt_comes_again_until_its_line_is_low() {
    let mut machine = Machine::new();
    // Redirection entry 5: vector 0x40, level-triggered.
    machine.map(0x1f_f000, 0xfec0_0003);
    wait_for_interrupts(&mut machine, |asm| {
        asm.mov(dword_ptr(0x1f_f000_u64), 0x1a).unwrap();
        asm.mov(dword_ptr(0x1f_f010_u64), 0x8040).unwrap();
    });
    let (interrupts, kick) = (Arc::clone(&machine.interrupts), machine.vcpu.kicker());
    let line = Arc::clone(&machine.interrupts);
    *machine.board.on_say.lock().unwrap() = Some(Box::new(move |said| {
        if said == 3 {
            line.set_line(5, false);
            kick.kick();
        }
    }));
    let device = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        interrupts.set_line(5, true);
    });
    assert_eq!(machine.run(), Exit::Kicked);
    device.join().unwrap();
    assert_eq!(machine.said(), (1..=3).map(Said::Port).collect::<Vec<_>>());
    // Low now: nothing more comes.
    let kick = machine.vcpu.kicker();
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        kick.kick();
    });
    assert_eq!(machine.run(), Exit::Kicked);
    later.join().unwrap();
    assert_eq!(machine.said().len(), 3);
}

#[test]
fn no_kick_is_ever_lost() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        let mut forever = asm.create_label();
        asm.set_label(&mut forever).unwrap();
        asm.inc(rbx).unwrap();
        asm.jmp(forever).unwrap();
    });
    kick_often(machine, 10_000);
}

#[test]
fn no_kick_is_lost_on_the_way_into_sleep() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        let mut again = asm.create_label();
        asm.set_label(&mut again).unwrap();
        asm.sti().unwrap();
        asm.hlt().unwrap();
        asm.jmp(again).unwrap();
    });
    kick_often(machine, 10_000);
}

/// Each kick ends one run: the two threads take turns, at varying distance.
fn kick_often(mut machine: Machine, times: u32) {
    let runs = Arc::new(AtomicU32::new(0));
    let (kick, seen) = (machine.vcpu.kicker(), Arc::clone(&runs));
    let kicker = std::thread::spawn(move || {
        for i in 0..times {
            while seen.load(Ordering::Acquire) != i {
                std::thread::yield_now();
            }
            for _ in 0..(i * 7) % 500 {
                std::hint::spin_loop();
            }
            kick.kick();
        }
    });
    for i in 0..times {
        assert_eq!(machine.run(), Exit::Kicked, "run {i}");
        runs.store(i + 1, Ordering::Release);
    }
    kicker.join().unwrap();
}

#[test]
fn a_state_taken_and_given_back_is_the_same() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.mov(rax, 0x3ff0_0000_0000_0000_u64).unwrap();
        asm.movq(xmm3, rax).unwrap();
        asm.fld1().unwrap();
        asm.std().unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    let state = machine.run_to_stop();
    assert_eq!(state.rflags & 0x400, 0x400);
    let mut other = Machine::new();
    other.vcpu.set_state(&state).unwrap();
    let mut again = other.vcpu.state().unwrap();
    // The TSC went on.
    for (index, value) in &mut again.msrs {
        if *index == x86::msr::TSC {
            *value = state.msrs.iter().find(|(i, _)| i == index).unwrap().1;
        }
    }
    assert_eq!(again, state);
}

#[test]
fn a_state_outside_of_64_bit_mode_is_refused() {
    let mut machine = Machine::new();
    let reset = hv::VcpuState::after_reset();
    let error = machine.vcpu.set_state(&reset).unwrap_err();
    assert!(error.to_string().contains("64-bit"), "{error}");
}
