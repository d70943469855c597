//! One instruction in the place of another engine, which has the guest's memory as well and
//! runs everything else.
//!
//! Invariant: nothing that was known of the guest before is used: the other engine changed
//! its code, its page tables and its registers without telling. No interrupt is taken.

use hv::{Completed, Completion, Error, Exit as Ended, Io, Vcpu, VcpuState};

use crate::cpu::Run;
use crate::dispatch::Next;
use crate::enter::Stay;
use crate::exceptions::{Fault, Raised};
use crate::mmu::walk::Access;
use crate::vcpu::SoftVcpu;
use x86::xsave;

impl Completion for SoftVcpu {
    fn complete(&mut self, state: &VcpuState, io: &dyn Io) -> Result<Completed, Error> {
        // What the guest switched on by a CPUID that is not ours, this CPU does not have:
        // it stays as it is, as nothing here can change it.
        let foreign = state.xcr0 & !(xsave::X87 | xsave::SSE | xsave::AVX);
        let own = VcpuState {
            xcr0: state.xcr0 & !foreign,
            ..state.clone()
        };
        self.set_state(&own)?;
        self.cpu.alone = true;
        let ended = self.run(io);
        self.cpu.alone = false;
        Ok(match ended? {
            // A kick is the other engine's; none comes here.
            Ended::Kicked => {
                let mut state = self.state()?;
                state.xcr0 |= foreign;
                Completed::GoesOn(Box::new(state))
            }
            ended => Completed::Ended(ended),
        })
    }
}

impl Run<'_> {
    /// Executes the instruction at RIP, or delivers its exception.
    pub(crate) fn run_alone(&mut self, stay: &Stay) -> Result<Ended, Error> {
        let mut next = self.begin_alone();
        loop {
            next = match next {
                Ok(Next::Resume(at)) => {
                    let number = self.enter(stay, at);
                    self.handle(number, stay)
                }
                Ok(Next::Look) => match self.trap() {
                    Some(fault) => Err(fault),
                    None => return Ok(Ended::Kicked),
                },
                Err(fault) => {
                    return match self.raise(fault) {
                        Raised::Delivered => Ok(Ended::Kicked),
                        Raised::TripleFault => Ok(Ended::TripleFault),
                        Raised::Engine(why) => Err(self.broken(why)),
                    };
                }
            }
        }
    }

    fn begin_alone(&mut self) -> Result<Next, Fault> {
        self.begin_step()?;
        let (rip, mode) = (self.context.rip, self.mode());
        let walked = self.walk(rip, Access::Execute, mode)?;
        // The bytes there may be others by now.
        self.invalidate((walked.pa >> 12) as u32);
        Ok(Next::Resume(self.step_block()?))
    }
}
