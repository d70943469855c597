//! The engine's virtual CPU behind `hv`'s trait.

use std::sync::Arc;

use hv::{Error, Exit, Io, Kick, Vcpu, VcpuState};

use crate::cpu::Cpu;
use crate::doorbell::{Doorbell, KICK};
use crate::stats::EngineStats;

/// A virtual CPU of the software engine. Runs on whatever thread calls it.
pub struct SoftVcpu {
    pub(crate) cpu: Box<Cpu>,
    bell: Arc<Doorbell>,
}

impl SoftVcpu {
    pub(crate) fn new(cpu: Box<Cpu>, bell: Arc<Doorbell>) -> Self {
        bell.connect(&cpu.context);
        Self { cpu, bell }
    }

    /// What the engine did so far; the counts of a run are complete at its end.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.cpu.stats
    }
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        self.bell.disconnect();
        let cpu = &mut *self.cpu;
        if let Some(trace) = &mut cpu.watch.trace {
            trace.end(&cpu.stats);
        }
    }
}

impl Vcpu for SoftVcpu {
    fn state(&self) -> Result<VcpuState, Error> {
        Ok(self.cpu.state())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), Error> {
        self.cpu.set_state(state)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Kicker(Arc::clone(&self.bell)))
    }

    fn run(&mut self, io: &dyn Io) -> Result<Exit, Error> {
        self.cpu.run(io, &self.bell)
    }
}

struct Kicker(Arc<Doorbell>);

impl Kick for Kicker {
    fn kick(&self) {
        self.0.ring(KICK);
    }
}
