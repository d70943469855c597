//! A machine that was paused on one engine goes on, on the other: a bare guest, its
//! memory, its CPU and what its CPUs share.

mod bare;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bare::{CODE, DATA, Machine, SAY, on_kvm, program_pin, stop, wrmsr};
use hv::{Exit, Hypervisor, Partition, SharedState, Vcpu, VcpuState};
use hv_kvm::{KvmHypervisor, KvmPartition, Options};
use hv_soft::{SoftHypervisor, SoftPartition};
use iced_x86::code_asm::*;

const LEVEL: u32 = 1 << 15;

fn soft() -> Machine<SoftPartition> {
    Machine::new(&SoftHypervisor::default())
}

/// Everything of a machine but memory.
fn take<P: Partition>(machine: &Machine<P>) -> (SharedState, VcpuState) {
    let shared = machine.partition.shared().state().unwrap();
    (shared, machine.vcpu.state().unwrap())
}

/// The machine on another engine, around the same memory.
fn move_to<H: Hypervisor, P: Partition>(engine: &H, from: &Machine<P>) -> Machine<H::Partition> {
    let (shared, state) = take(from);
    let mut to = Machine::around(engine, from.ram.clone());
    to.partition.shared().set_state(&shared).unwrap();
    to.vcpu.set_state(&state).unwrap();
    to
}

fn to_kvm<P: Partition>(from: &Machine<P>) -> Machine<KvmPartition> {
    move_to(&KvmHypervisor::open(Options::default()).unwrap(), from)
}

fn to_soft<P: Partition>(from: &Machine<P>) -> Machine<SoftPartition> {
    move_to(&SoftHypervisor::default(), from)
}

/// Counts in a register and in memory; says the count, and stops, at each round.
fn counter<P: Partition>(machine: &mut Machine<P>) {
    machine.code(|asm| {
        let mut again = asm.create_label();
        asm.mov(rsi, DATA).unwrap();
        asm.mov(rax, 0x4_1000_u64).unwrap();
        asm.mov(dr1, rax).unwrap();
        wrmsr(asm, 0xc000_0082, 0xffff_8000_1234_5678);
        wrmsr(asm, 0xc000_0102, 0x7777_0000);
        asm.xor(ebx, ebx).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.inc(rbx).unwrap();
        asm.add(qword_ptr(rsi), rbx).unwrap();
        asm.mov(eax, ebx).unwrap();
        asm.out(i32::from(SAY), eax).unwrap();
        stop(asm);
        asm.jmp(again).unwrap();
    });
    // Not by the guest: some that play KVM cannot.
    machine.change(|state| {
        state.xsave[160 + 5 * 16..][..8].copy_from_slice(&XMM5.to_le_bytes());
        state.xsave[32..40].copy_from_slice(&ST0.to_le_bytes());
    });
}

const XMM5: u64 = 0x0123_4567_89ab_cdef;
const ST0: u64 = 0x8000_0000_0000_0000;

/// What two states of one CPU must agree on, whatever engine they are of.
fn essence(state: &VcpuState) -> impl PartialEq + std::fmt::Debug + use<> {
    let msrs: Vec<_> = state
        .msrs
        .iter()
        .filter(|(index, _)| [0xc000_0081, 0xc000_0082, 0xc000_0084, 0xc000_0102].contains(index))
        .copied()
        .collect();
    (
        (state.gpr, state.rip, state.rflags & !(1 << 16)),
        (state.segments, state.gdt, state.idt),
        (state.cr0, state.cr3, state.cr4, state.efer, state.debug[1]),
        // x87's and SSE's registers.
        state.xsave[32..160 + 16 * 8].to_vec(),
        msrs,
    )
}

#[test]
fn a_guest_that_counts_goes_on_from_engine_to_engine() {
    if on_kvm().is_none() {
        return;
    }
    let mut soft = soft();
    counter(&mut soft);
    let mut total = 0;
    let mut round = 0;
    let mut next = |state: VcpuState, word: u64| {
        round += 1;
        total += round;
        assert_eq!((state.gpr[3], word), (round, total));
    };
    next(soft.run_to_stop(), soft.word(DATA));
    for _ in 0..3 {
        let before = soft.vcpu.state().unwrap();
        let mut kvm = to_kvm(&soft);
        assert_eq!(essence(&kvm.vcpu.state().unwrap()), essence(&before));
        next(kvm.run_to_stop(), kvm.word(DATA));
        let before = kvm.vcpu.state().unwrap();
        soft = to_soft(&kvm);
        assert_eq!(essence(&soft.vcpu.state().unwrap()), essence(&before));
        next(soft.run_to_stop(), soft.word(DATA));
    }
    let state = soft.vcpu.state().unwrap();
    assert_eq!(&state.xsave[160 + 5 * 16..][..8], &XMM5.to_le_bytes());
}

#[test]
fn a_state_comes_back_from_kvm_as_it_went() {
    let Some(mut machine) = on_kvm() else { return };
    counter(&mut machine);
    machine.run_to_stop();
    let (shared, state) = take(&machine);
    let mut other = to_kvm(&machine);
    let (shared_again, again) = take(&other);
    assert_eq!(shared_again.ioapic, shared.ioapic);
    assert!(shared_again.clock >= shared.clock);
    let tsc = |state: &VcpuState| state.msrs.iter().find(|(i, _)| *i == 0x10).unwrap().1;
    assert!(tsc(&again) >= tsc(&state));
    let still = |state: &VcpuState| {
        let mut state = state.clone();
        state.msrs.retain(|(index, _)| *index != 0x10);
        state
    };
    assert_eq!(still(&again), still(&state));
    assert_eq!(other.run_to_stop().gpr[3], 2);
}

/// Sets the timer to `ticks` from now, and waits for it in HLT; says how often it rang.
fn waiter<P: Partition>(machine: &mut Machine<P>, ticks: i32) {
    bare::wait_for_interrupts(machine, |asm| {
        wrmsr(asm, 0x832, 2 << 17 | 0x40);
        asm.rdtsc().unwrap();
        asm.shl(rdx, 32).unwrap();
        asm.or(rax, rdx).unwrap();
        asm.add(rax, ticks).unwrap();
        asm.mov(rdx, rax).unwrap();
        asm.shr(rdx, 32).unwrap();
        asm.mov(ecx, 0x6e0).unwrap();
        asm.wrmsr().unwrap();
    });
}

/// Runs a machine for so long.
fn run_for<P: Partition>(machine: &mut Machine<P>, time: Duration) {
    let kick = machine.vcpu.kicker();
    let ends = std::thread::spawn(move || {
        std::thread::sleep(time);
        kick.kick();
    });
    assert_eq!(machine.run(), Exit::Kicked);
    ends.join().unwrap();
}

#[test]
fn a_timer_that_was_set_on_one_engine_rings_on_the_other() {
    if on_kvm().is_none() {
        return;
    }
    const TICKS: i32 = 1_000_000_000;
    let mut soft = soft();
    waiter(&mut soft, TICKS);
    run_for(&mut soft, Duration::from_millis(50));
    let mut kvm = to_kvm(&soft);
    let state = kvm.vcpu.state().unwrap();
    assert!(
        state.events.halted && state.apic.tsc_deadline != 0,
        "{state:?}"
    );
    kvm.stop_at(1);
    let start = Instant::now();
    assert_eq!(kvm.run(), Exit::Kicked);
    assert!(start.elapsed() > Duration::from_millis(20));
    assert_eq!(kvm.said().len(), 1);

    let Some(mut kvm) = on_kvm() else { return };
    waiter(&mut kvm, TICKS);
    run_for(&mut kvm, Duration::from_millis(50));
    let mut soft = to_soft(&kvm);
    assert!(soft.vcpu.state().unwrap().events.halted);
    soft.stop_at(1);
    assert_eq!(soft.run(), Exit::Kicked);
    assert_eq!(soft.said().len(), 1);
}

#[test]
fn an_interrupt_that_waits_on_one_engine_is_taken_on_the_other() {
    if on_kvm().is_none() {
        return;
    }
    // It comes while interrupts are off, from a level and an edge.
    fn pending<P: Partition>(machine: &mut Machine<P>) {
        machine.code(|asm| {
            wrmsr(asm, 0x80f, 0x1ff);
            program_pin(asm, 5, 0x40 | LEVEL);
            program_pin(asm, 7, 0x51);
            asm.mov(eax, 1).unwrap();
            asm.out(i32::from(SAY), eax).unwrap();
            stop(asm);
            asm.sti().unwrap();
            asm.mov(r13d, 100_000).unwrap();
            let mut again = asm.create_label();
            asm.set_label(&mut again).unwrap();
            asm.dec(r13d).unwrap();
            asm.jnz(again).unwrap();
            asm.cli().unwrap();
            stop(asm);
        });
        for (vector, value) in [(0x40_u8, 0x40_u32), (0x51, 0x51)] {
            let at = CODE + 0x1000 + u64::from(vector) * 0x40;
            machine.code_at(at, |asm| {
                asm.mov(eax, value).unwrap();
                asm.out(i32::from(SAY), eax).unwrap();
                wrmsr(asm, 0x80b, 0);
                asm.iretq().unwrap();
            });
            machine.set_gate(vector, at);
        }
        let lines = Arc::clone(&machine.interrupts);
        *machine.board.on_say.lock().unwrap() = Some(Box::new(move |_| {
            lines.set_line(5, true);
            lines.set_line(7, true);
            lines.set_line(7, false);
        }));
        machine.run_to_stop();
    }
    /// Of the second half, with the level lowered by its handler.
    fn taken<P: Partition>(machine: &mut Machine<P>) -> Vec<u64> {
        let lines = Arc::clone(&machine.interrupts);
        *machine.board.on_say.lock().unwrap() = Some(Box::new(move |said| {
            if said == 0x40 {
                lines.set_line(5, false);
            }
        }));
        machine.run_to_stop();
        let said = machine.said();
        let numbers = said.into_iter().map(|said| match said {
            bare::Said::Port(bytes) => u64::from(bytes[0]),
            other => panic!("{other:?}"),
        });
        numbers.collect()
    }
    let mut soft = soft();
    pending(&mut soft);
    let mut kvm = to_kvm(&soft);
    let state = kvm.partition.shared().state().unwrap();
    assert_eq!(state.ioapic.lines, 1 << 5);
    let first = taken(&mut kvm);
    assert_eq!(first.first(), Some(&0x51));
    assert!(first.contains(&0x40), "{first:x?}");

    let Some(mut kvm) = on_kvm() else { return };
    pending(&mut kvm);
    let mut soft = to_soft(&kvm);
    assert_eq!(taken(&mut soft), [0x51, 0x40]);
}

#[test]
fn the_clock_of_kvm_goes_on_from_engine_to_engine() {
    if on_kvm().is_none() {
        return;
    }
    let soft = soft();
    std::thread::sleep(Duration::from_millis(30));
    let before = soft.partition.shared().state().unwrap();
    assert!(before.clock >= 30_000_000 && before.time_of_day > before.clock);
    let kvm = to_kvm(&soft);
    let on_kvm = kvm.partition.shared().state().unwrap();
    assert!(on_kvm.clock >= before.clock && on_kvm.clock < before.clock + 10_000_000_000);
    let back = to_soft(&kvm).partition.shared().state().unwrap();
    assert!(back.clock >= on_kvm.clock && back.clock < on_kvm.clock + 10_000_000_000);
}

#[test]
fn a_tsc_of_another_rate_is_refused_where_it_cannot_be_scaled() {
    let mut soft = soft();
    let mut state = soft.vcpu.state().unwrap();
    let khz = state.tsc_khz;
    assert!(khz > 0);
    state.tsc_khz = khz + khz / 1000;
    let refused = soft.vcpu.set_state(&state).unwrap_err();
    assert!(refused.to_string().contains("kHz"), "{refused}");
    state.tsc_khz = khz + khz / 100_000;
    soft.vcpu.set_state(&state).unwrap();
    let Some(mut kvm) = on_kvm() else { return };
    state.tsc_khz = khz / 2;
    // Some processors can.
    if let Err(refused) = kvm.vcpu.set_state(&state) {
        assert!(refused.to_string().contains("kHz"), "{refused}");
    }
}
