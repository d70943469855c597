//! What engineers see of an engine that runs: counters, a trace, and how it fails.
//!
//! Invariant: nothing here is done for a machine that nobody watches, but for one look
//! at an `Option` at each exit from translated code, and nothing that a guest does
//! switches anything on.
//!
//! Left to others: what a trace says (`trace`), what a failure says (`report`).

use std::sync::{Arc, Mutex, PoisonError};

use crate::blocks::Id;
use crate::cpu::Cpu;
use crate::partition::VCPUS_MAX;
use crate::stats::EngineStats;
use crate::trace::{EngineTrace, Trace};

/// A way to fail, for tests of what is said then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failing {
    /// A panic on a vCPU's thread.
    Panic,
    /// A fault of the host's CPU in translated code that is none of the guest's.
    HostFault,
    /// A jump out of translated code to where there is nothing.
    WildJump,
}

/// A failure on purpose comes with this translation or the next: some code ran before.
const FAILING_TRANSLATION: u64 = 3;

/// A machine's counters, for any thread: those of its vCPUs as of their last timer,
/// sleep, or end of a run.
#[derive(Debug, Default)]
pub struct Counters([Mutex<EngineStats>; VCPUS_MAX as usize]);

impl Counters {
    /// All vCPUs together.
    #[must_use]
    pub fn sum(&self) -> EngineStats {
        let one = |vcpu: &Mutex<EngineStats>| *vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.0.iter().map(one);
        all.fold(EngineStats::default(), |sum, one| sum.plus(&one))
    }

    fn publish(&self, vcpu: u32, stats: EngineStats) {
        if let Some(slot) = self.0.get(vcpu as usize) {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = stats;
        }
    }
}

/// What is wanted of all vCPUs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) counters: Option<Arc<Counters>>,
    pub(crate) trace: Option<Arc<EngineTrace>>,
    pub(crate) failing: Option<Failing>,
}

/// A vCPU's part.
#[derive(Default)]
pub(crate) struct Watch {
    counters: Option<Arc<Counters>>,
    pub(crate) trace: Option<Box<Trace>>,
    failing: Option<Failing>,
}

impl Watch {
    pub(crate) fn new(wanted: &Wanted, vcpu: u32) -> Self {
        let trace = |to: &Arc<EngineTrace>| Box::new(Trace::new(Arc::clone(to), vcpu));
        Self {
            counters: wanted.counters.clone(),
            trace: wanted.trace.as_ref().map(trace),
            failing: wanted.failing,
        }
    }
}

impl Cpu {
    /// Counters become visible to others; called where it is not often.
    pub(crate) fn publish(&mut self) {
        self.stats.instructions = self.context.instructions;
        if let Some(counters) = &self.watch.counters {
            counters.publish(self.id, self.stats);
        }
        if let Some(trace) = &mut self.watch.trace {
            trace.tick(&self.stats);
        }
    }

    /// Fails, if that is wanted, now that block `id` was made.
    pub(crate) fn fail_on_purpose(&mut self, id: Id) {
        let Some(failing) = self.watch.failing else {
            return;
        };
        if self.stats.translations + self.stats.recalled < FAILING_TRANSLATION {
            return;
        }
        let code: &[u8] = match failing {
            Failing::Panic => panic!("on purpose"),
            // int3
            Failing::HostFault => &[0xcc],
            // xor r14d, r14d; jmp r14
            Failing::WildJump => &[0x45, 0x31, 0xf6, 0x41, 0xff, 0xe6],
        };
        let at = self.blocks.record(id).direct();
        self.blocks.buf.patch(at, code);
    }
}
