//! Between blocks: requests from outside, timers, interrupts, and sleeping in HLT.

use std::time::Duration;

use hv::Exit;
use x86::control::vector;

use crate::cpu::{Cpu, Phase};
use crate::doorbell::{Doorbell, INTERRUPT, KICK, TIMER};
use crate::exceptions::{Raised, Source};
use crate::fault::Armed;

/// When the host's timer fires, in guest TSC ticks.
#[derive(Default)]
pub(crate) struct HostTimer {
    armed: Option<u64>,
}

/// Why a run is over, from the point of view of attention.
pub(crate) enum Attention {
    /// It goes on.
    Run,
    /// It ends.
    End(Exit),
    /// The engine cannot go on.
    Broken(String),
}

impl Cpu {
    /// The APIC's timer, or what it could deliver, may have changed: have
    /// [`Cpu::attend`] look before the next block.
    pub(crate) fn timer_changed(&mut self) {
        self.context.pending = 1;
    }

    /// Looks after everything that came from outside, and sleeps where the guest
    /// does.
    pub(crate) fn attend(
        &mut self,
        bell: &Doorbell,
        timer: &mut HostTimer,
        armed: &Armed,
    ) -> Attention {
        loop {
            let requests = bell.take();
            if requests & INTERRUPT != 0 {
                self.collect();
            }
            if requests & TIMER != 0 {
                timer.armed = None;
                self.publish();
            }
            let now = self.clock.now();
            self.apic.expire(now);
            let taken = if self.shadowed() {
                // The next instruction comes first, on its own.
                Raised::Delivered
            } else {
                self.take_interrupts()
            };
            match taken {
                Raised::Delivered => {}
                Raised::TripleFault => return Attention::End(Exit::TripleFault),
                Raised::Engine(why) => return Attention::Broken(why),
            }
            self.context.pending = u64::from(self.apic.deliverable().is_some() || self.nmi_pending);
            if requests & KICK != 0 {
                return Attention::End(Exit::Kicked);
            }
            let deadline = self.apic.deadline();
            if !self.halted && self.phase != Phase::Waits {
                // An earlier setting that is still pending only rings too early.
                if let Some(deadline) = deadline
                    && timer.armed.is_none_or(|armed| deadline < armed)
                {
                    timer.armed = Some(deadline);
                    self.stats.timer_sets += 1;
                    let ticks = deadline.saturating_sub(self.clock.now());
                    armed.set_timer(self.clock.nanoseconds(ticks));
                }
                return Attention::Run;
            }
            if self.phase == Phase::Waits
                || (self.context.interrupts_enabled == 0 && !self.nmi_pending)
            {
                if self.sleep_dead(bell) {
                    return Attention::End(Exit::Halted);
                }
                continue;
            }
            self.stats.sleeps += 1;
            self.publish();
            let look_again = self.rest();
            let until_timer = deadline.map(|deadline| {
                let ticks = deadline.saturating_sub(self.clock.now());
                Duration::from_nanos(self.clock.nanoseconds(ticks))
            });
            self.quieten();
            bell.sleep(look_again.into_iter().chain(until_timer).min());
            self.waken();
        }
    }

    /// Sleeps until another vCPU does something about it; true when none ever will.
    fn sleep_dead(&mut self, bell: &Doorbell) -> bool {
        let me = self.id as usize;
        self.peers.set_dead(me, true);
        if self.peers.all_dead() && !self.chips.wakes_somebody() {
            self.peers.ring_others(me);
            return true;
        }
        self.quieten();
        bell.sleep(None);
        self.waken();
        self.peers.set_dead(me, false);
        false
    }

    /// Moves what the IOAPIC and other vCPUs sent into the local APIC.
    pub(crate) fn collect(&mut self) {
        let Some(inbox) = self.chips.inbox(self.id as usize) else {
            return;
        };
        let apic = &mut self.apic;
        inbox.drain(|vector, level| apic.request(vector, level));
        self.nmi_pending |= inbox.take_nmi();
        let startup = inbox.take_startup();
        self.take_startup(startup);
    }

    /// Delivers what can be delivered.
    fn take_interrupts(&mut self) -> Raised {
        if self.nmi_pending && !self.nmi_blocked {
            self.nmi_pending = false;
            self.nmi_blocked = true;
            self.halted = false;
            if let Err(fault) = self.deliver(vector::NMI, None, Source::Hardware) {
                return self.raise(fault);
            }
        }
        while self.context.interrupts_enabled != 0
            && let Some(vector) = self.apic.deliverable()
        {
            self.apic.accept(vector);
            self.halted = false;
            self.stats.interrupts += 1;
            if let Err(fault) = self.deliver(vector, None, Source::Hardware) {
                return self.raise(fault);
            }
        }
        Raised::Delivered
    }
}
