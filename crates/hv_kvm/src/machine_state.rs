//! What the vCPUs of a machine share: IOAPIC, clock, the log of writes.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use hv::{Error, Gpa, Shared, SharedState};
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_clock_data, kvm_irqchip};
use ram::PAGE_SIZE;

use crate::failed;
use crate::ioctl::{self, IoApicRegisters, Vm};

/// Redirection entries: level-triggered.
const LEVEL: u64 = 1 << 15;

pub(crate) struct KvmShared(pub(crate) Arc<Vm>);

impl Shared for KvmShared {
    fn state(&self) -> Result<SharedState, Error> {
        let fd = self.0.fd();
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        fd.get_irqchip(&mut chip)
            .map_err(failed("read the IOAPIC's state"))?;
        let clock = fd.get_clock().map_err(failed("read the clock"))?;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(SharedState {
            ioapic: neutral(&ioctl::ioapic(&chip)),
            clock: clock.clock,
            time_of_day: since_1970.map_or(0, |time| time.as_nanos() as u64),
        })
    }

    fn set_state(&self, state: &SharedState) -> Result<(), Error> {
        // No flags: those that reading gave are refused, or would have it jump.
        let clock = kvm_clock_data {
            clock: state.clock,
            ..Default::default()
        };
        let fd = self.0.fd();
        fd.set_clock(&clock).map_err(failed("set the clock"))?;
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        fd.get_irqchip(&mut chip)
            .map_err(failed("read the IOAPIC's state"))?;
        ioctl::set_ioapic(&mut chip, &kvms(&state.ioapic));
        fd.set_irqchip(&chip)
            .map_err(failed("replace the IOAPIC's state"))
    }

    fn log_writes(&self, yes: bool) -> Result<(), Error> {
        self.0
            .log_writes(yes)
            .map_err(failed("log the guest's writes"))
    }

    fn collect_writes(&self) -> Result<(), Error> {
        for slot in self.0.slots() {
            let len = usize::try_from(slot.len).unwrap_or(usize::MAX);
            let words = self
                .0
                .fd()
                .get_dirty_log(slot.number, len)
                .map_err(failed("read the log of the guest's writes"))?;
            for (word, first) in words.into_iter().zip((0_u64..).step_by(64)) {
                let mut left = word;
                while left != 0 {
                    let page = first + u64::from(left.trailing_zeros());
                    left &= left - 1;
                    let at = Gpa(slot.at.0 + page * PAGE_SIZE);
                    self.0.ram().epochs().mark(at, PAGE_SIZE);
                }
            }
        }
        Ok(())
    }
}

fn level_pins(redirection: &[u64; 24]) -> u32 {
    let pins = redirection.iter().enumerate();
    pins.fold(0, |pins, (pin, entry)| {
        pins | u32::from(entry & LEVEL != 0) << pin
    })
}

/// KVM has one bit for each pin: its line, or an edge that was not delivered. Its id has no
/// bits around it.
fn neutral(from: &IoApicRegisters) -> x86::state::IoApic {
    let levels = level_pins(&from.redirection);
    x86::state::IoApic {
        id: from.id << 24,
        select: from.select as u8,
        redirection: from.redirection,
        lines: from.waiting & levels,
        edges: from.waiting & !levels,
    }
}

fn kvms(from: &x86::state::IoApic) -> IoApicRegisters {
    let levels = level_pins(&from.redirection);
    IoApicRegisters {
        id: from.id >> 24 & 0xf,
        select: from.select.into(),
        redirection: from.redirection,
        waiting: from.lines & levels | from.edges & !levels,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ioapic_comes_back_as_it_went() {
        let mut redirection = [1 << 16; 24];
        redirection[5] = LEVEL | 0x40;
        let state = x86::state::IoApic {
            id: 3 << 24,
            select: 0x10,
            redirection,
            lines: 1 << 5,
            edges: 1 << 4,
        };
        assert_eq!(neutral(&kvms(&state)), state);
    }
}
