//! The software engine: runs a 64-bit guest on any x86-64 host with BMI2, without
//! KVM and without privileges, by translating guest code to host code.
//!
//! ```text
//! vcpu ─▶ dispatch ─▶ enter ⇄ translated code (codebuf)
//!            │                    │ exits: fault, context
//!            ├─ translate ─▶ recall ─▶ translations, translator; blocks
//!            ├─ mmu (walk, tlb, access)
//!            ├─ interp (what is not translated), exceptions, msr, cpuid
//!            ├─ interrupts ─▶ apic (local, ioapic), clock, doorbell
//!            └─ watch (counters), trace, samples, report: what engineers see
//! ```
//!
//! Unsafe code is in `codebuf` (the code cache), `enter` (into translated code and
//! back), `fault` (signal handlers) and `guest_ram` (raw guest memory), each behind
//! a safe interface; every other module forbids it.
//!
//! 32-bit code does not run: every transfer to it raises #GP.
//!
//! What a device writes into translated code is seen at the next exit from translated
//! code, interrupts included; a guest that polls for the device without any exit runs
//! the old code. Writes of the guest itself reach `ram`'s page epochs when a run ends:
//! pause a vCPU before reading them.
//!
//! A thread that runs a vCPU has every signal blocked but host faults and the vCPU's
//! timer: process signals need another thread.
//!
//! Left to others: devices, boot, threads (`machine`).
#![deny(unsafe_code)]

mod alignment;
mod apic;
mod blocks;
mod bounce;
mod clock;
mod codebuf;
mod completion;
mod cpu;
mod cpuid;
mod crossing;
mod debug;
mod decoded;
mod dispatch;
mod doorbell;
mod enter;
mod exceptions;
mod fault;
mod guest_ram;
mod interp;
mod interrupts;
mod machine_state;
mod mmu;
mod msr;
mod partition;
mod peers;
mod recall;
mod report;
mod rest;
mod samples;
mod startup;
mod state;
mod stats;
mod stepping;
mod trace;
mod translate;
mod units;
mod vcpu;
mod watch;

pub use cpuid::{host_check, host_features};
pub use partition::{Observer, Options, SoftHypervisor, SoftPartition};
pub use stats::EngineStats;
pub use trace::EngineTrace;
pub use vcpu::SoftVcpu;
pub use watch::{Counters, Failing};
pub use x86::features::CpuModel;

/// The engine's name, as in `--engine`.
const NAME: &str = "soft";
