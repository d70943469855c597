//! Machines with everything switched on that their CPU model has.

#![allow(dead_code)] // each test crate uses its part

use hv::VcpuState;
use hv_soft::{CpuModel, Options, host_features};
use iced_x86::code_asm::*;
use x86::features::{Feature, Features};

use crate::bare::{Machine, STOP};

/// CR4.
pub(crate) const FSGSBASE: u64 = 1 << 16;
pub(crate) const OSXSAVE: u64 = 1 << 18;
pub(crate) const OSFXSR: u64 = 1 << 9;

pub(crate) fn machine(cpu_model: CpuModel) -> Machine {
    Machine::with(Options {
        cpu_model,
        ..Options::default()
    })
}

/// A machine with everything switched on that its model has.
pub(crate) fn switched_on(cpu_model: CpuModel) -> (Machine, Features) {
    let features = cpu_model.on(host_features()).unwrap();
    let mut machine = machine(cpu_model);
    machine.change(|state| switch_on(state, features));
    (machine, features)
}

pub(crate) fn switch_on(state: &mut VcpuState, features: Features) {
    if features.has(Feature::Xsave) {
        state.cr4 |= OSXSAVE;
    }
    if features.has(Feature::Fsgsbase) {
        state.cr4 |= FSGSBASE;
    }
    if features.has(Feature::Avx) {
        state.xcr0 = 7;
    }
}

/// Runs what `write` writes in a machine of this host's model, to its end or a fault.
pub(crate) fn run(
    change: impl Fn(&mut VcpuState),
    write: impl FnOnce(&mut CodeAssembler),
) -> VcpuState {
    let (mut machine, _) = switched_on(CpuModel::Host);
    machine.change(change);
    machine.code(|asm| {
        write(asm);
        asm.mov(eax, 0xffff).unwrap();
        asm.out(u32::from(STOP), al).unwrap();
        asm.hlt().unwrap();
    });
    machine.run_to_stop()
}

/// The vector of the fault that `write`'s code ends by; 0xffff at its end.
pub(crate) fn vector(
    change: impl Fn(&mut VcpuState),
    write: impl FnOnce(&mut CodeAssembler),
) -> u64 {
    run(change, write).gpr[0]
}

pub(crate) const END: u64 = 0xffff;
pub(crate) const UD: u64 = 6;
pub(crate) const NM: u64 = 7;
pub(crate) const GP: u64 = 13;

pub(crate) fn has(feature: Feature) -> bool {
    CpuModel::Host.on(host_features()).unwrap().has(feature)
}
