//! The KVM engine: guest code on the processor itself, by way of the host's kernel.
//!
//! ```text
//! vcpu ─▶ ioctl (KVM_RUN) ─▶ port, device memory ─▶ hv::Io, and on
//!   │        ▲          └──▶ interrupted, reset, failed ─▶ hv::Exit or an error
//!   │        └── kick: immediate_exit, and a signal
//!   └─ state ⇄ x86::VcpuState, registers by registers
//! hypervisor ─▶ cpuid (x86::guest_cpuid, cut to what KVM has), slots (memory), irqchip
//! probe: is this KVM the processor's, or a program that plays it?
//! corrections: what such a program gets wrong without saying so
//! ```
//!
//! Local APICs and IOAPIC are the kernel's. Lines go to the IOAPIC only: KVM's 8259s are
//! there, but nothing reaches them, as the software engine has none. There is no 8254.
//!
//! HLT waits in the kernel. A guest that halts all its CPUs for good therefore waits for
//! good: the run does not end with [`hv::Exit::Halted`], as nobody tells us.
//!
//! Unsafe code is in `ioctl` only.
//!
//! Left to others: devices, boot, threads (`machine`); which engine runs a machine (`vmm`).
#![deny(unsafe_code)]

mod corrections;
mod cpuid;
mod hypervisor;
mod ioctl;
mod kick;
mod machine_state;
mod partition;
mod probe;
mod registers;
mod slots;
mod state;
mod vcpu;

pub use hypervisor::{KvmHypervisor, MakeCompletions, Options};
pub use partition::KvmPartition;
pub use probe::{Kind, probe};
pub use vcpu::KvmVcpu;

/// The engine's name, as in `--engine`.
const NAME: &str = "kvm";
/// Where it is.
const DEVICE: &str = "/dev/kvm";

/// The error of a call of the kernel that failed.
fn failed<E: Into<std::io::Error>>(doing: &'static str) -> impl FnOnce(E) -> hv::Error {
    move |source| hv::Error::Host {
        doing,
        source: source.into(),
    }
}
