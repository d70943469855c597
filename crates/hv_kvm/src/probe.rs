//! Whether /dev/kvm runs kernels on the processor.
//!
//! Where a machine is a guest itself and its host gives it no VMX or SVM, some put a KVM
//! there that runs user code on the processor and interprets the guest's kernel: all is
//! well but for the speed, which is below the software engine's, and for instructions
//! that their interpreter lacks. Such a one is taken on request only.
//!
//! Invariant: a KVM counts as hardware only when the processor says that it has VMX or
//! SVM, and a small kernel ran as fast as the processor does.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hv::{Error, Exit, Gpa, GuestRam, Hypervisor, Io, Kick, Partition, Vcpu, VcpuState};
use ram::ByteSize;
use rustix::time::{ClockId, clock_gettime};
use vm_memory::Bytes;
use x86::control::cr0;
use x86::features::Features;
use x86::state::Segment;

use crate::failed;
use crate::hypervisor::{KvmHypervisor, Options};

/// What a KVM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest's kernel runs on the processor.
    Hardware,
    /// A program plays the processor, at least for the guest's kernel.
    Software {
        /// How it showed.
        why: String,
    },
}

/// Says what /dev/kvm is: some milliseconds where it is real.
///
/// # Errors
/// [`Error::HostLacks`] where there is none that can be used; whatever stops the small
/// guest that it is tried with.
pub fn probe() -> Result<Kind, Error> {
    let kvm = KvmHypervisor::open(Options::default())?;
    if !Features::host_has_virtualisation() {
        return Ok(Kind::Software {
            why: "the processor has neither VMX nor SVM".to_owned(),
        });
    }
    match time_kernel_code(&kvm) {
        Ok(took) => Ok(judge(took)),
        Err(Error::Engine { why, .. }) => Ok(Kind::Software {
            why: format!("a small kernel stops on it: {why}"),
        }),
        Err(error) => Err(error),
    }
}

/// Times round the loop, of two instructions.
const ROUNDS: u32 = 50_000;
/// Ten times what a slow processor needs, a tenth of what the fastest interpreter does.
const AT_MOST: Duration = Duration::from_millis(3);

fn judge(took: Duration) -> Kind {
    if took <= AT_MOST {
        return Kind::Hardware;
    }
    let mips = f64::from(2 * ROUNDS) / 1e6 / took.as_secs_f64();
    Kind::Software {
        why: format!("it executes {mips:.0} million instructions of a kernel in a second"),
    }
}

/// Runs a loop at CPL 0, in 32-bit code without paging: the processor's time for it, the
/// best of three.
fn time_kernel_code(kvm: &KvmHypervisor) -> Result<Duration, Error> {
    const CODE: u64 = 0x1000;
    const PORT: u8 = 0x10;
    let memory = |error: std::io::Error| failed("make memory for a small guest")(error);
    let ram =
        GuestRam::new(ByteSize::mib(1)).map_err(|error| memory(std::io::Error::other(error)))?;
    let mut code = vec![0xb9];
    code.extend(ROUNDS.to_le_bytes()); // mov ecx, ROUNDS
    code.extend([0x49, 0x75, 0xfd]); // again: dec ecx; jnz again
    code.extend([0xe6, PORT, 0xeb, 0xfc]); // out PORT, al; jmp to it
    ram.memory()
        .write_slice(&code, Gpa(CODE))
        .map_err(|error| memory(std::io::Error::other(error)))?;
    let mut partition = kvm.create(ram, 1)?;
    let mut vcpu = partition.vcpu(0)?;
    let mut state = VcpuState::after_reset();
    let flat = |rights| Segment {
        selector: 8,
        base: 0,
        limit: !0,
        rights,
    };
    state.segments = [flat(0xc093); 6];
    state.segments[VcpuState::CS] = flat(0xc09b);
    state.cr0 = cr0::PE | cr0::ET | cr0::NE;
    state.rip = CODE;
    let stop = Stop::default();
    let _ = stop.0.set(vcpu.kicker());
    let mut best = Duration::MAX;
    for _ in 0..3 {
        vcpu.set_state(&state)?;
        let before = thread_time();
        match vcpu.run(&stop)? {
            Exit::Kicked => {}
            exit => {
                return Err(Error::Engine {
                    engine: crate::NAME,
                    rip: CODE,
                    why: format!("a loop ended with {exit:?}"),
                });
            }
        }
        best = best.min(thread_time().saturating_sub(before));
    }
    Ok(best)
}

/// The processor's time that this thread had, its guests' included.
fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// Ends the run at the first OUT.
#[derive(Default)]
struct Stop(OnceLock<Arc<dyn Kick>>);

impl Io for Stop {
    fn mmio_read(&self, _: Gpa, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _: Gpa, _: &[u8]) {}

    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, _: u16, _: &[u8]) {
        if let Some(kick) = self.0.get() {
            kick.kick();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interpreter_is_told_from_a_processor_by_its_speed() {
        assert_eq!(judge(Duration::from_micros(50)), Kind::Hardware);
        let slow = judge(Duration::from_millis(25));
        assert_eq!(
            slow,
            Kind::Software {
                why: "it executes 4 million instructions of a kernel in a second".to_owned()
            }
        );
    }

    #[test]
    fn kernel_code_on_this_hosts_kvm_is_timed_where_there_is_one() {
        match KvmHypervisor::open(Options::default()) {
            Ok(kvm) => {
                let took = time_kernel_code(&kvm).unwrap();
                assert!(took > Duration::ZERO, "{took:?}");
                let kind = probe().unwrap();
                if !Features::host_has_virtualisation() {
                    assert_ne!(kind, Kind::Hardware);
                    assert_ne!(judge(took), Kind::Hardware, "{took:?}");
                }
            }
            Err(error) => {
                assert!(error.to_string().contains("--engine soft"), "{error}");
                assert!(probe().is_err());
            }
        }
    }
}
