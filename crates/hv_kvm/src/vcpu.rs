//! The engine's virtual CPU behind `hv`'s trait: the loop around KVM_RUN.

use std::sync::Arc;

use hv::{Completion, Error, Exit, Gpa, Io, Kick, Vcpu, VcpuState};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::VcpuFd;

use crate::ioctl::{self, Nudges, Vm};
use crate::kick::Kicks;
use crate::state::Shape;
use crate::{NAME, failed};

/// A virtual CPU of KVM's. Runs on whatever thread calls it.
pub struct KvmVcpu {
    pub(crate) fd: VcpuFd,
    pub(crate) shape: Arc<Shape>,
    kicks: Arc<Kicks>,
    /// What its descriptor needs: the machine, and the memory.
    pub(crate) vm: Arc<Vm>,
    /// Executes what KVM cannot.
    pub(crate) completion: Option<Box<dyn Completion>>,
    /// How often it did.
    completed: u64,
    /// The guest's handler of page faults, if there is a breakpoint at it.
    pub(crate) watched: u64,
    /// How many system calls were put right.
    pub(crate) system_calls: u64,
}

impl std::fmt::Debug for KvmVcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmVcpu")
            .field("fd", &self.fd)
            .finish_non_exhaustive()
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        if self.completed != 0 {
            tracing::info!(
                instructions = self.completed,
                system_calls = self.system_calls,
                "completed for KVM, which cannot emulate them"
            );
        }
    }
}

impl KvmVcpu {
    pub(crate) fn new(fd: VcpuFd, vm: Arc<Vm>, shape: Arc<Shape>) -> Result<Self, Error> {
        let kicks = Kicks::new(&fd).map_err(failed("map a virtual CPU's page"))?;
        Ok(Self {
            fd,
            shape,
            kicks,
            vm,
            completion: None,
            completed: 0,
            watched: 0,
            system_calls: 0,
        })
    }

    /// The rate of the guest's TSC.
    ///
    /// # Errors
    /// [`Error::Host`] where the host's own is not stable.
    pub fn tsc_khz(&self) -> Result<u32, Error> {
        self.fd
            .get_tsc_khz()
            .map_err(failed("ask for the rate of the TSC"))
    }

    /// How many instructions were completed for it by others.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Has the instruction at RIP executed by who can, if there is somebody. The guest goes
    /// on from behind it, or has ended.
    pub(crate) fn complete(&mut self, io: &dyn Io) -> Result<Option<Exit>, Error> {
        let Some(mut completion) = self.completion.take() else {
            return Ok(None);
        };
        let completed = self.complete_by(&mut *completion, io);
        self.completion = Some(completion);
        self.completed += 1;
        self.watch_page_faults()?;
        completed
    }

    /// An end that nobody asked for.
    fn broken(&self, why: String) -> Error {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Error::Engine {
            engine: NAME,
            rip,
            why,
        }
    }
}

/// Why a run of the kernel's is over for good.
enum Broken {
    Call(std::io::Error),
    Entry { reason: u64, cpu: u32 },
    Internal { suberror: u32, data: Vec<u64> },
    Event { kind: u32 },
    Memory { at: u64 },
    Other { reason: u32 },
}

impl Broken {
    fn why(self) -> String {
        match self {
            Self::Call(error) => format!("KVM_RUN failed: {error}"),
            Self::Entry { reason, cpu } => format!(
                "the processor ({cpu}) refused the guest's state, hardware reason {reason:#x}"
            ),
            Self::Internal { suberror, data } => {
                let what = match suberror {
                    KVM_INTERNAL_ERROR_EMULATION => {
                        return format!(
                            "KVM cannot emulate the instruction there{}",
                            instruction(&data)
                        );
                    }
                    KVM_INTERNAL_ERROR_SIMUL_EX => "of simultaneous exceptions",
                    KVM_INTERNAL_ERROR_DELIVERY_EV => "while an event was delivered",
                    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "of an unexpected exit",
                    _ => "of a kind that it does not name",
                };
                format!("an internal error of KVM {what} ({suberror}), {data:x?}")
            }
            Self::Event { kind } => format!("the guest crashed, or so it says (event {kind})"),
            Self::Memory { at } => format!("KVM cannot reach guest memory at {at:#x}"),
            Self::Other { reason } => format!("KVM gave an exit that nobody expects ({reason})"),
        }
    }
}

/// The bytes that could not be emulated, where the kernel gives them (`flags` bit 0 of
/// `struct kvm_run::emulation_failure`, Linux 5.14).
fn instruction(data: &[u64]) -> String {
    let [flags, first, second, ..] = *data else {
        return String::new();
    };
    let bytes: Vec<u8> = [first, second]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect();
    let len = usize::from(bytes[0]).min(15);
    if flags & 1 == 0 || len == 0 {
        return String::new();
    }
    let hex: Vec<_> = bytes[1..=len].iter().map(|b| format!("{b:02x}")).collect();
    format!(" (bytes {})", hex.join(" "))
}

/// Widths of accesses that devices know, of `len` bytes: KVM gives three bytes and a
/// fourth for an access across pages.
fn widths(len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = len - at;
        let width = [8, 4, 2, 1].into_iter().find(|width| *width <= left)?;
        at += width;
        Some(at - width..at)
    })
}

impl Vcpu for KvmVcpu {
    fn state(&self) -> Result<VcpuState, Error> {
        self.save()
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), Error> {
        self.restore(state)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kicks) as Arc<dyn Kick>
    }

    fn run(&mut self, io: &dyn Io) -> Result<Exit, Error> {
        let _nudges = match self.completion {
            Some(_) => {
                self.watch_page_faults()?;
                Some(Nudges::start().map_err(failed("have a timer look after a virtual CPU"))?)
            }
            None => None,
        };
        let kicks = Arc::clone(&self.kicks);
        let _listening = kicks
            .enter()
            .map_err(failed("let a signal reach a virtual CPU"))?;
        let broken = loop {
            let exit = match ioctl::run(&mut self.fd) {
                Ok(exit) => exit,
                Err(error) => {
                    // A file of the host that is shorter than it was: it is made whole.
                    let gone = error.raw_os_error() == Some(libc::EFAULT);
                    if gone && matches!(self.vm.ram().heal_files(), Ok(true)) {
                        continue;
                    }
                    break Broken::Call(error);
                }
            };
            match exit {
                // The next call of the kernel completes what these began, also when it
                // is interrupted at once: a run never ends within an instruction.
                ioctl::Exit::PortRead { port, size, data } => {
                    for item in data.chunks_mut(size.max(1)) {
                        io.pio_read(port, item);
                    }
                }
                ioctl::Exit::PortWrite { port, size, data } => {
                    for item in data.chunks(size.max(1)) {
                        io.pio_write(port, item);
                    }
                }
                ioctl::Exit::MmioRead { at, data } => {
                    for part in widths(data.len()) {
                        io.mmio_read(Gpa(at + part.start as u64), &mut data[part]);
                    }
                }
                ioctl::Exit::MmioWrite { at, data } => {
                    for part in widths(data.len()) {
                        io.mmio_write(Gpa(at + part.start as u64), &data[part]);
                    }
                }
                ioctl::Exit::Interrupted => {
                    if kicks.take() {
                        return Ok(Exit::Kicked);
                    }
                    if self.completion.is_some()
                        && let Some(exit) = self.look_for_hypercall(io)?
                    {
                        return Ok(exit);
                    }
                }
                ioctl::Exit::Debug => {
                    if let Some(exit) = self.at_breakpoint(io)? {
                        return Ok(exit);
                    }
                }
                ioctl::Exit::Shutdown => return Ok(Exit::TripleFault),
                ioctl::Exit::SystemEvent { kind } => match kind {
                    KVM_SYSTEM_EVENT_SHUTDOWN => return Ok(Exit::PowerOff),
                    KVM_SYSTEM_EVENT_RESET => return Ok(Exit::Reset),
                    kind => break Broken::Event { kind },
                },
                ioctl::Exit::FailEntry { reason, cpu } => break Broken::Entry { reason, cpu },
                ioctl::Exit::InternalError { suberror, data } => {
                    if suberror == KVM_INTERNAL_ERROR_EMULATION && self.completion.is_some() {
                        match self.complete(io)? {
                            Some(exit) => return Ok(exit),
                            None => continue,
                        }
                    }
                    break Broken::Internal { suberror, data };
                }
                ioctl::Exit::MemoryFault { at } => break Broken::Memory { at },
                ioctl::Exit::Other { reason } => break Broken::Other { reason },
            }
        };
        Err(self.broken(broken.why()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_split_into_widths_that_devices_know() {
        let widths = |len| widths(len).map(|part| part.len()).collect::<Vec<_>>();
        for len in [1, 2, 4, 8] {
            assert_eq!(widths(len), [len]);
        }
        assert_eq!(widths(3), [2, 1]);
        assert_eq!(widths(7), [4, 2, 1]);
        assert!(widths(0).is_empty());
    }

    #[test]
    fn an_instruction_that_kvm_cannot_emulate_is_shown() {
        // flags, then length and bytes
        let words = [1, 0x48c7_0f04, 0x07, 0];
        assert_eq!(instruction(&words), " (bytes 0f c7 48 00)");
        assert_eq!(instruction(&[0, 4, 5]), "");
        assert_eq!(instruction(&[1]), "");
    }

    #[test]
    fn every_way_to_break_says_what_it_was() {
        let ways = [
            Broken::Call(std::io::ErrorKind::Other.into()),
            Broken::Entry {
                reason: 0x8000_0021,
                cpu: 1,
            },
            Broken::Internal {
                suberror: KVM_INTERNAL_ERROR_DELIVERY_EV,
                data: vec![1],
            },
            Broken::Internal {
                suberror: 99,
                data: Vec::new(),
            },
            Broken::Event { kind: 3 },
            Broken::Memory { at: 0x1000 },
            Broken::Other { reason: 27 },
        ];
        let words: Vec<_> = ways.into_iter().map(Broken::why).collect();
        for (part, words) in [
            "failed",
            "0x80000021",
            "delivered (3)",
            "(99)",
            "event 3",
            "0x1000",
            "(27)",
        ]
        .iter()
        .zip(&words)
        {
            assert!(words.contains(part), "{words}");
        }
    }
}
