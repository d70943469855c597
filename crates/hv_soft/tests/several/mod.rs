//! Several vCPUs on one bare machine.

#![allow(dead_code)] // each test crate uses its part

use std::time::Duration;

use hv::{Error, Exit, Vcpu};
use hv_soft::Options;
use iced_x86::code_asm::*;

use crate::bare::{self, CODE, Machine, STACK, STOP};

/// No run takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where vCPU `index` begins.
pub(crate) const fn code_of(index: u64) -> u64 {
    CODE + 0x1_0000 * index
}

/// A machine whose vCPUs begin in 64-bit mode, at [`code_of`], with their number in
/// R15 and a stack each.
pub(crate) fn machine(count: u8) -> Machine {
    let mut machine = Machine::with_vcpus(Options::default(), count);
    for (index, vcpu) in (1..).zip(&mut machine.others) {
        let mut state = bare::state();
        state.rip = code_of(index);
        state.gpr[4] = STACK + 0x1000 * index;
        state.gpr[15] = index;
        vcpu.set_state(&state).unwrap();
    }
    machine
}

/// Runs every vCPU on a thread of its own until some say STOP; gives how each ended.
pub(crate) fn run(machine: &mut Machine) -> Vec<Result<Exit, Error>> {
    let board = &*machine.board.clone();
    let kicks: Vec<_> = std::iter::once(&machine.vcpu)
        .chain(&machine.others)
        .map(Vcpu::kicker)
        .collect();
    std::thread::scope(|scope| {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let threads: Vec<_> = std::iter::once(&mut machine.vcpu)
            .chain(&mut machine.others)
            .map(|vcpu| scope.spawn(|| vcpu.run(board)))
            .collect();
        scope.spawn(move || {
            let late = wait.recv_timeout(PATIENCE);
            if late == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("too slow: kicked");
                for kick in kicks {
                    kick.kick();
                }
            }
        });
        let ended = threads.into_iter().map(|t| t.join().unwrap()).collect();
        drop(done);
        ended
    })
}

/// [`run`], where all must end by STOP.
pub(crate) fn run_to_stop(machine: &mut Machine) {
    for (index, ended) in run(machine).into_iter().enumerate() {
        assert_eq!(ended.unwrap(), Exit::Kicked, "vCPU {index}");
    }
}

/// The end of a vCPU's program: waits for `count` vCPUs to come here, and stops.
pub(crate) fn meet_and_stop(asm: &mut CodeAssembler, at: u64, count: u8) {
    let mut wait = asm.create_label();
    asm.lock().inc(qword_ptr(at)).unwrap();
    asm.set_label(&mut wait).unwrap();
    asm.pause().unwrap();
    asm.cmp(qword_ptr(at), i32::from(count)).unwrap();
    asm.jne(wait).unwrap();
    asm.out(i32::from(STOP), al).unwrap();
    asm.cli().unwrap();
    asm.hlt().unwrap();
}

pub(crate) fn msr(asm: &mut CodeAssembler, index: u32, value: u64) {
    asm.mov(ecx, index).unwrap();
    asm.mov(eax, value as u32).unwrap();
    asm.mov(edx, (value >> 32) as u32).unwrap();
    asm.wrmsr().unwrap();
}

/// Sends a fixed interrupt to one vCPU; changes RAX, RCX, RDX.
pub(crate) fn interrupt(asm: &mut CodeAssembler, to: u64, vector: u64) {
    msr(asm, 0x830, to << 32 | 0x4000 | vector);
}

/// Enables the local APIC (x2APIC mode).
pub(crate) fn enable_apic(asm: &mut CodeAssembler) {
    msr(asm, 0x80f, 0x1ff);
}

pub(crate) fn end_of_interrupt(asm: &mut CodeAssembler) {
    msr(asm, 0x80b, 0);
}
