//! The local APIC (SDM vol. 3, chapter 11), in xAPIC and x2APIC mode.
//!
//! Invariant: a vector is in at most one of "requested" and "delivered and in
//! service" for each time it was raised; EOI ends the highest in service.
//!
//! Left to others: time (`deadline` is in guest TSC ticks, the caller says what
//! time it is), whom a message reaches (`message`).

use x86::msr;
use x86::state::LocalApic as Saved;

use super::Vectors;
use super::message::{self, Address, Destination, Message};
use crate::clock::Clock;

/// Register offsets in the xAPIC page.
mod offset {
    pub(super) const ID: u16 = 0x020;
    pub(super) const VERSION: u16 = 0x030;
    pub(super) const TPR: u16 = 0x080;
    pub(super) const PPR: u16 = 0x0a0;
    pub(super) const EOI: u16 = 0x0b0;
    pub(super) const LDR: u16 = 0x0d0;
    pub(super) const DFR: u16 = 0x0e0;
    pub(super) const SVR: u16 = 0x0f0;
    pub(super) const ISR: u16 = 0x100;
    pub(super) const TMR: u16 = 0x180;
    pub(super) const IRR: u16 = 0x200;
    pub(super) const ESR: u16 = 0x280;
    pub(super) const LVT_CMCI: u16 = 0x2f0;
    pub(super) const ICR: u16 = 0x300;
    pub(super) const ICR_HIGH: u16 = 0x310;
    pub(super) const LVT_TIMER: u16 = 0x320;
    pub(super) const LVT_ERROR: u16 = 0x370;
    pub(super) const INITIAL_COUNT: u16 = 0x380;
    pub(super) const CURRENT_COUNT: u16 = 0x390;
    pub(super) const DIVIDE: u16 = 0x3e0;
    pub(super) const SELF_IPI: u16 = 0x3f0;
}
use offset::*;

const MASKED: u32 = 1 << 16;
const SOFTWARE_ENABLE: u32 = 1 << 8;
/// Interrupt command: assert rather than de-assert.
const ASSERT: u32 = 1 << 14;
const TIMER_MODE: u32 = 3 << 17;
const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 2 << 17;
/// Version 0x14, six LVT entries.
const VERSION_VALUE: u32 = 0x0005_0014;
const LVTS: [u16; 7] = [LVT_CMCI, LVT_TIMER, 0x330, 0x340, 0x350, 0x360, LVT_ERROR];

/// What a store to a register asks of the engine beyond the APIC itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing, but what is deliverable may have changed.
    None,
    /// A level interrupt ended: tell the IOAPIC.
    EndOfLevel(u8),
    /// An interrupt for this CPU or others.
    Send(Message),
}

/// The register does not exist (x2APIC: #GP).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoRegister;

/// One vCPU's APIC.
#[derive(Clone, Debug)]
pub(crate) struct LocalApic {
    base: u64,
    id: u32,
    requested: Vectors,
    in_service: Vectors,
    trigger: Vectors,
    tpr: u8,
    svr: u32,
    ldr: u32,
    dfr: u32,
    icr: u64,
    lvt: [u32; 7],
    initial_count: u32,
    divide: u32,
    /// When the timer fires, in guest TSC ticks; 0 is never.
    deadline: u64,
    clock: Clock,
}

impl LocalApic {
    pub(crate) fn new(id: u32, clock: Clock) -> Self {
        Self {
            base: 0xfee0_0000
                | msr::APIC_BASE_ENABLE
                | if id == 0 { msr::APIC_BASE_BSP } else { 0 },
            id,
            requested: Vectors::default(),
            in_service: Vectors::default(),
            trigger: Vectors::default(),
            tpr: 0,
            svr: 0xff,
            ldr: 0,
            dfr: !0,
            icr: 0,
            lvt: [MASKED; 7],
            initial_count: 0,
            divide: 0,
            deadline: 0,
            clock,
        }
    }

    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    pub(crate) fn x2apic(&self) -> bool {
        self.base & msr::APIC_BASE_X2APIC != 0
    }

    /// A store to IA32_APIC_BASE.
    pub(crate) fn set_base(&mut self, value: u64) -> Result<(), NoRegister> {
        let modes = msr::APIC_BASE_ENABLE | msr::APIC_BASE_X2APIC;
        let (old, new) = (self.base & modes, value & modes);
        let known = msr::APIC_BASE_BSP | modes | 0x3fff_ffff_f000;
        // SDM vol. 3, figure 11-27: x2APIC only from xAPIC, and not back to it.
        let bad = value & !known != 0
            || new == msr::APIC_BASE_X2APIC
            || (old == modes && new == msr::APIC_BASE_ENABLE)
            || (old == 0 && new == modes);
        if bad {
            return Err(NoRegister);
        }
        self.base = value & !msr::APIC_BASE_BSP | self.base & msr::APIC_BASE_BSP;
        Ok(())
    }

    /// Whether a guest-physical address is in the xAPIC page.
    #[inline]
    pub(crate) fn answers(&self, pa: u64) -> bool {
        (pa ^ self.base) & 0x000f_ffff_ffff_f000 == 0
            && self.base & msr::APIC_BASE_ENABLE != 0
            && !self.x2apic()
    }

    /// An interrupt arrived.
    pub(crate) fn request(&mut self, vector: u8, level: bool) {
        // Vectors below 16 are illegal (§11.5.2).
        if vector < 16 {
            return;
        }
        self.requested.set(vector);
        if level {
            self.trigger.set(vector)
        } else {
            self.trigger.unset(vector)
        }
    }

    fn ppr(&self) -> u8 {
        let service = self.in_service.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= service {
            self.tpr
        } else {
            service
        }
    }

    fn enabled(&self) -> bool {
        self.svr & SOFTWARE_ENABLE != 0 && self.base & msr::APIC_BASE_ENABLE != 0
    }

    /// The vector that would be delivered now, were interrupts enabled.
    pub(crate) fn deliverable(&self) -> Option<u8> {
        let vector = self.requested.highest()?;
        (self.enabled() && vector & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// The CPU takes the vector that [`LocalApic::deliverable`] gave.
    pub(crate) fn accept(&mut self, vector: u8) {
        self.requested.unset(vector);
        self.in_service.set(vector);
    }

    /// When the timer fires next, in guest TSC ticks.
    pub(crate) fn deadline(&self) -> Option<u64> {
        (self.deadline != 0).then_some(self.deadline)
    }

    /// Fires the timer if its time has come.
    pub(crate) fn expire(&mut self, now: u64) {
        if self.deadline == 0 || now < self.deadline {
            return;
        }
        let lvt = self.lvt(LVT_TIMER);
        if lvt & TIMER_MODE == PERIODIC {
            let period = self
                .count_ticks(self.initial_count)
                .max(self.clock.min_period());
            // Periods that nobody saw are skipped.
            self.deadline = (self.deadline + period).max(now.saturating_sub(period) + 1);
        } else {
            self.deadline = 0;
        }
        if lvt & MASKED == 0 {
            self.request(lvt as u8, false);
        }
    }

    /// IA32_TSC_DEADLINE as the guest reads it.
    pub(crate) fn tsc_deadline(&self) -> u64 {
        if self.lvt(LVT_TIMER) & TIMER_MODE == DEADLINE {
            self.deadline
        } else {
            0
        }
    }

    /// A store to IA32_TSC_DEADLINE; ignored in other timer modes (§11.5.4.1).
    pub(crate) fn set_tsc_deadline(&mut self, deadline: u64) {
        if self.lvt(LVT_TIMER) & TIMER_MODE == DEADLINE {
            self.deadline = deadline;
        }
    }

    pub(crate) fn tpr(&self) -> u8 {
        self.tpr
    }

    pub(crate) fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
    }

    fn lvt(&self, at: u16) -> u32 {
        LVTS.iter()
            .position(|lvt| *lvt == at)
            .map_or(MASKED, |i| self.lvt[i])
    }

    /// Divide configuration (§11.5.4) times a 1 GHz timer, in TSC ticks.
    fn count_ticks(&self, count: u32) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        let divide = if code == 7 { 1 } else { 2u64 << code };
        self.clock.ticks(u64::from(count).saturating_mul(divide))
    }

    fn current_count(&self, now: u64) -> u32 {
        if self.deadline == 0 || self.lvt(LVT_TIMER) & TIMER_MODE == DEADLINE {
            return 0;
        }
        let left = self.deadline.saturating_sub(now);
        let whole = self.count_ticks(self.initial_count).max(1);
        (u128::from(left.min(whole)) * u128::from(self.initial_count) / u128::from(whole)) as u32
    }

    /// Loads the register at an offset of the xAPIC page.
    pub(crate) fn read(&self, at: u16, now: u64) -> Result<u32, NoRegister> {
        let word = |vectors: &Vectors, first: u16| vectors.0[usize::from((at - first) >> 4) & 7];
        Ok(match at & !0xf {
            ID => {
                if self.x2apic() {
                    self.id
                } else {
                    self.id << 24
                }
            }
            VERSION => VERSION_VALUE,
            TPR => u32::from(self.tpr),
            PPR => u32::from(self.ppr()),
            LDR if self.x2apic() => (self.id >> 4) << 16 | 1 << (self.id & 15),
            LDR => self.ldr,
            DFR if !self.x2apic() => self.dfr,
            SVR => self.svr,
            ISR..=0x170 => word(&self.in_service, ISR),
            TMR..=0x1f0 => word(&self.trigger, TMR),
            IRR..=0x270 => word(&self.requested, IRR),
            ESR => 0,
            ICR => self.icr as u32,
            ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            INITIAL_COUNT => self.initial_count,
            CURRENT_COUNT => self.current_count(now),
            DIVIDE => self.divide,
            at if LVTS.contains(&at) => self.lvt(at),
            _ => return Err(NoRegister),
        })
    }

    /// Stores to the register at an offset of the xAPIC page.
    pub(crate) fn write(&mut self, at: u16, value: u32, now: u64) -> Result<Effect, NoRegister> {
        match at & !0xf {
            TPR => self.tpr = value as u8,
            EOI => {
                if let Some(vector) = self.in_service.highest() {
                    self.in_service.unset(vector);
                    if self.trigger.has(vector) {
                        return Ok(Effect::EndOfLevel(vector));
                    }
                }
            }
            SVR => self.svr = value & 0x1ff,
            ESR => {}
            ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value);
                return Ok(self.send());
            }
            SELF_IPI if self.x2apic() => {
                return Ok(Effect::Send(Message {
                    vector: value as u8,
                    delivery: message::FIXED,
                    level: false,
                    destination: Destination::Sender,
                }));
            }
            INITIAL_COUNT => {
                self.initial_count = value;
                if self.lvt(LVT_TIMER) & TIMER_MODE != DEADLINE {
                    self.deadline = if value == 0 {
                        0
                    } else {
                        now + self.count_ticks(value).max(1)
                    };
                }
            }
            DIVIDE => self.divide = value & 0xb,
            ID | LDR | DFR | ICR_HIGH if !self.x2apic() => match at & !0xf {
                LDR => self.ldr = value & 0xff00_0000,
                DFR => self.dfr = value | 0x0fff_ffff,
                ICR_HIGH => self.icr = self.icr & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            },
            at => {
                let Some(i) = LVTS.iter().position(|lvt| *lvt == at) else {
                    return Err(NoRegister);
                };
                let changed = self.lvt[i] ^ value;
                self.lvt[i] = value;
                if at == LVT_TIMER && changed & TIMER_MODE != 0 {
                    self.deadline = 0;
                }
            }
        }
        Ok(Effect::None)
    }

    /// x2APIC: the whole interrupt command register at once.
    pub(crate) fn write_icr(&mut self, value: u64) -> Effect {
        self.icr = value;
        self.send()
    }

    /// Sends what the command register says.
    fn send(&mut self) -> Effect {
        let icr = self.icr as u32;
        let destination = if self.x2apic() {
            (self.icr >> 32) as u32
        } else {
            (self.icr >> 56) as u32
        };
        let broadcast = if self.x2apic() { !0 } else { 0xff };
        let destination = match icr >> 18 & 3 {
            0 if destination == broadcast => Destination::All,
            0 if icr & 1 << 11 == 0 => Destination::Physical(destination),
            0 => Destination::Logical(destination),
            1 => Destination::Sender,
            2 => Destination::All,
            _ => Destination::Others,
        };
        let delivery = (icr >> 8) as u8 & 7;
        // Taking INIT back does nothing since the Pentium 4 (§11.6.1).
        if delivery == message::INIT && icr & ASSERT == 0 {
            return Effect::None;
        }
        Effect::Send(Message {
            vector: icr as u8,
            delivery,
            level: false,
            destination,
        })
    }

    /// What it answers to, for senders.
    pub(crate) fn address(&self) -> Address {
        Address {
            x2apic: self.x2apic(),
            logical: (self.ldr >> 24) as u8,
            clusters: self.dfr >> 28 == 0,
            enabled: self.enabled(),
        }
    }

    /// INIT (§11.4.7.3): as after power-up, but id and mode stay.
    pub(crate) fn initialize(&mut self) {
        let base = self.base;
        *self = Self::new(self.id, self.clock.clone());
        self.base = base;
    }

    /// The whole interrupt command register.
    pub(crate) fn icr(&self) -> u64 {
        self.icr
    }

    /// The state in the neutral form.
    pub(crate) fn save(&self, now: u64) -> Saved {
        let mut registers = Vec::new();
        for at in (0..0x400).step_by(16) {
            if matches!(at, PPR | EOI | CURRENT_COUNT | SELF_IPI) {
                continue;
            }
            if let Ok(value) = self.read(at, now) {
                registers.push((at, value));
            }
        }
        if self.x2apic() {
            registers.push((ICR_HIGH, (self.icr >> 32) as u32));
            registers.sort_unstable();
        }
        if self.lvt(LVT_TIMER) & TIMER_MODE != DEADLINE {
            registers.push((CURRENT_COUNT, self.current_count(now)));
            registers.sort_unstable();
        }
        Saved {
            base: self.base,
            registers,
            tsc_deadline: self.tsc_deadline(),
        }
    }

    /// Takes a saved state. Registers that do not exist are refused.
    pub(crate) fn load(&mut self, saved: &Saved, now: u64) -> Result<(), NoRegister> {
        let mut new = Self::new(self.id, self.clock.clone());
        new.base = saved.base;
        let mut count = None;
        for &(at, value) in &saved.registers {
            let word = usize::from(at >> 4) & 7;
            match at {
                ISR..=0x170 => new.in_service.0[word] = value,
                TMR..=0x1f0 => new.trigger.0[word] = value,
                IRR..=0x270 => new.requested.0[word] = value,
                ICR => new.icr = new.icr & !0xffff_ffff | u64::from(value),
                ICR_HIGH => new.icr = new.icr & 0xffff_ffff | u64::from(value) << 32,
                INITIAL_COUNT => new.initial_count = value,
                CURRENT_COUNT => count = Some(value),
                ID | VERSION | ESR => {}
                LDR | DFR if new.x2apic() => {}
                at => {
                    new.write(at, value, now)?;
                }
            }
        }
        match count {
            Some(count) if count != 0 => new.deadline = now + new.count_ticks(count).max(1),
            Some(_) | None => new.deadline = saved.tsc_deadline,
        }
        *self = new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apic() -> LocalApic {
        let mut apic = LocalApic::new(0, Clock::at_rate(1_000_000));
        apic.write(SVR, 0x1ff, 0).unwrap();
        apic
    }

    #[test]
    fn the_higher_priority_class_goes_first_and_blocks_the_lower() {
        let mut apic = apic();
        apic.request(0x31, false);
        apic.request(0x52, false);
        assert_eq!(apic.deliverable(), Some(0x52));
        apic.accept(0x52);
        assert_eq!(apic.deliverable(), None);
        assert_eq!(apic.write(EOI, 0, 0), Ok(Effect::None));
        assert_eq!(apic.deliverable(), Some(0x31));
    }

    #[test]
    fn the_task_priority_holds_interrupts_back() {
        let mut apic = apic();
        apic.request(0x31, false);
        apic.set_tpr(0x30);
        assert_eq!(apic.deliverable(), None);
        apic.set_tpr(0x20);
        assert_eq!(apic.deliverable(), Some(0x31));
    }

    #[test]
    fn ending_a_level_interrupt_tells_the_ioapic() {
        let mut apic = apic();
        apic.request(0x41, true);
        apic.accept(0x41);
        assert_eq!(apic.write(EOI, 0, 0), Ok(Effect::EndOfLevel(0x41)));
    }

    #[test]
    fn the_tsc_deadline_fires_once() {
        let mut apic = apic();
        apic.write(LVT_TIMER, DEADLINE | 0xec, 0).unwrap();
        apic.set_tsc_deadline(100);
        apic.expire(99);
        assert_eq!(apic.deliverable(), None);
        apic.expire(100);
        assert_eq!((apic.deliverable(), apic.deadline()), (Some(0xec), None));
    }

    #[test]
    fn a_periodic_timer_fires_again() {
        let mut apic = apic();
        apic.write(DIVIDE, 0xb, 0).unwrap();
        apic.write(LVT_TIMER, PERIODIC | 0xec, 0).unwrap();
        apic.write(INITIAL_COUNT, 1_000_000, 0).unwrap();
        let first = apic.deadline().unwrap();
        apic.expire(first);
        assert_eq!(apic.deliverable(), Some(0xec));
        assert_eq!(apic.deadline(), Some(2 * first));
    }

    #[test]
    fn x2apic_mode_is_entered_from_xapic_and_not_left_for_it() {
        let mut apic = apic();
        assert!(apic.answers(0xfee0_00f0));
        let x2 = apic.base() | msr::APIC_BASE_X2APIC;
        apic.set_base(x2).unwrap();
        assert!(apic.x2apic() && !apic.answers(0xfee0_00f0));
        assert_eq!(apic.set_base(x2 & !msr::APIC_BASE_X2APIC), Err(NoRegister));
        assert_eq!(apic.read(ICR_HIGH, 0), Err(NoRegister));
    }

    #[test]
    fn a_saved_apic_is_the_same_when_loaded() {
        let mut apic = apic();
        apic.set_base(apic.base() | msr::APIC_BASE_X2APIC).unwrap();
        apic.write(LVT_TIMER, DEADLINE | 0xec, 0).unwrap();
        apic.set_tsc_deadline(12345);
        apic.request(0x77, true);
        apic.request(0x33, false);
        apic.accept(0x77);
        let saved = apic.save(5);
        let mut other = LocalApic::new(0, Clock::at_rate(1_000_000));
        other.load(&saved, 5).unwrap();
        assert_eq!(other.save(5), saved);
        assert_eq!(other.deadline(), Some(12345));
    }
}
