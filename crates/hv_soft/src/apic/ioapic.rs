//! The IOAPIC (Intel 82093AA, §3): 24 pins, edge- and level-triggered.
//!
//! ```text
//! level pin:  line high, not masked, remote IRR clear ─▶ message, remote IRR set
//!             EOI ─▶ remote IRR clear ─▶ line still high? message again
//! edge pin:   rise ─▶ pending ─▶ not masked? message, pending clear
//! ```

use x86::state::IoApic as Saved;

use super::message::{Destination, Message};

/// Where it is mapped.
pub(crate) const BASE: u64 = 0xfec0_0000;
/// Number of pins.
pub(crate) const PINS: usize = 24;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;
/// 24 entries; version 0x20 has the EOI register.
const VERSION: u32 = (PINS as u32 - 1) << 16 | 0x20;

const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;

/// The vector that a store to the EOI register ends, if it is one.
pub(crate) fn ends(at: u64, value: u32) -> Option<u8> {
    (at == BASE + EOI).then_some(value as u8)
}

/// The chip.
pub(crate) struct IoApic {
    select: u8,
    id: u32,
    redirection: [u64; PINS],
    lines: u32,
    pending: u32,
}

impl IoApic {
    pub(crate) fn new() -> Self {
        Self {
            select: 0,
            id: 0,
            redirection: [MASKED; PINS],
            lines: 0,
            pending: 0,
        }
    }

    /// Drives a line. Lines that do not exist are ignored.
    pub(crate) fn set_line(&mut self, pin: u32, high: bool) -> Option<Message> {
        let entry = *self.redirection.get(pin as usize)?;
        let (was, bit) = (self.lines >> pin & 1 != 0, 1 << pin);
        if high {
            self.lines |= bit;
            if !was && entry & LEVEL == 0 {
                self.pending |= bit;
            }
        } else {
            self.lines &= !bit;
        }
        self.service(pin as usize)
    }

    fn service(&mut self, pin: usize) -> Option<Message> {
        let entry = self.redirection.get_mut(pin)?;
        if *entry & MASKED != 0 {
            return None;
        }
        let bit = 1 << pin;
        let level = *entry & LEVEL != 0;
        if level {
            if self.lines & bit == 0 || *entry & REMOTE_IRR != 0 {
                return None;
            }
            *entry |= REMOTE_IRR;
        } else {
            if self.pending & bit == 0 {
                return None;
            }
            self.pending &= !bit;
        }
        Some(Message {
            vector: *entry as u8,
            delivery: (*entry >> 8) as u8 & 7,
            level,
            destination: match (*entry >> 56) as u32 {
                0xff => Destination::All,
                to if *entry & LOGICAL != 0 => Destination::Logical(to),
                to => Destination::Physical(to),
            },
        })
    }

    /// The state in the neutral form.
    pub(crate) fn save(&self) -> Saved {
        let levels = self.level_pins();
        Saved {
            id: self.id,
            select: self.select,
            redirection: self.redirection,
            lines: self.lines & levels,
            edges: self.pending & !levels,
        }
    }

    /// Takes a saved state; gives what it makes the chip send.
    pub(crate) fn load(&mut self, saved: &Saved) -> Vec<Message> {
        const PINS_ALL: u32 = (1 << PINS) - 1;
        self.id = saved.id & 0x0f00_0000;
        self.select = saved.select;
        self.redirection = saved.redirection;
        // An edge's line is high until its device says otherwise.
        self.lines = (saved.lines | saved.edges) & PINS_ALL;
        self.pending = saved.edges & PINS_ALL;
        (0..PINS).filter_map(|pin| self.service(pin)).collect()
    }

    fn level_pins(&self) -> u32 {
        let pins = self.redirection.iter().enumerate();
        pins.fold(0, |pins, (pin, entry)| {
            pins | u32::from(entry & LEVEL != 0) << pin
        })
    }

    /// Ends a level-triggered interrupt. Lines that are still high come again.
    pub(crate) fn end_of_interrupt(&mut self, vector: u8) -> Vec<Message> {
        let mut messages = Vec::new();
        for pin in 0..PINS {
            let entry = &mut self.redirection[pin];
            if *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && *entry as u8 == vector {
                *entry &= !REMOTE_IRR;
                messages.extend(self.service(pin));
            }
        }
        messages
    }

    /// A 32-bit load.
    pub(crate) fn read(&self, at: u64) -> u32 {
        match at - BASE {
            SELECT => u32::from(self.select),
            WINDOW => match self.select {
                0 | 2 => self.id,
                1 => VERSION,
                index => match self
                    .redirection
                    .get(usize::from(index.wrapping_sub(0x10) / 2))
                {
                    Some(entry) if index & 1 == 0 => *entry as u32,
                    Some(entry) => (*entry >> 32) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// A 32-bit store.
    pub(crate) fn write(&mut self, at: u64, value: u32) -> Option<Message> {
        match at - BASE {
            SELECT => self.select = value as u8,
            WINDOW => match self.select {
                0 => self.id = value & 0x0f00_0000,
                index => {
                    let pin = usize::from(index.wrapping_sub(0x10) / 2);
                    let entry = self.redirection.get_mut(pin)?;
                    let value = u64::from(value);
                    let new = if index & 1 == 0 {
                        *entry & !0xffff_ffff | value
                    } else {
                        *entry & 0xffff_ffff | value << 32
                    };
                    *entry = new & !READ_ONLY | *entry & READ_ONLY;
                    if *entry & LEVEL == 0 {
                        *entry &= !REMOTE_IRR;
                    }
                    return self.service(pin);
                }
            },
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(chip: &mut IoApic, pin: u8, low: u32) -> Option<Message> {
        chip.write(BASE, u32::from(0x11 + pin * 2));
        chip.write(BASE + WINDOW, 0);
        chip.write(BASE, u32::from(0x10 + pin * 2));
        chip.write(BASE + WINDOW, low)
    }

    #[test]
    fn an_edge_interrupts_once_and_again_only_after_a_new_rise() {
        let mut chip = IoApic::new();
        assert_eq!(program(&mut chip, 4, 0x31), None);
        assert_eq!(
            chip.set_line(4, true).map(|m| (m.vector, m.level)),
            Some((0x31, false))
        );
        assert_eq!(chip.set_line(4, true), None);
        assert_eq!(chip.set_line(4, false), None);
        assert!(chip.set_line(4, true).is_some());
    }

    #[test]
    fn an_edge_that_comes_while_masked_is_delivered_when_unmasked() {
        let mut chip = IoApic::new();
        assert_eq!(program(&mut chip, 4, 0x1_0031), None);
        assert_eq!(chip.set_line(4, true), None);
        assert_eq!(chip.set_line(4, false), None);
        assert!(program(&mut chip, 4, 0x31).is_some());
    }

    #[test]
    fn a_level_that_stays_high_comes_again_after_each_end_of_interrupt() {
        let mut chip = IoApic::new();
        program(&mut chip, 5, 0x8035);
        assert_eq!(
            chip.set_line(5, true).map(|m| (m.vector, m.level)),
            Some((0x35, true))
        );
        assert_eq!(chip.set_line(5, true), None);
        assert_eq!(chip.end_of_interrupt(0x35).len(), 1);
        chip.set_line(5, false);
        assert_eq!(chip.end_of_interrupt(0x35), []);
        assert!(chip.set_line(5, true).is_some());
    }

    #[test]
    fn a_saved_chip_goes_on_where_it_was() {
        let mut chip = IoApic::new();
        program(&mut chip, 4, 0x1_0031);
        chip.set_line(4, true);
        program(&mut chip, 5, 0x8035);
        assert!(chip.set_line(5, true).is_some());
        let saved = chip.save();
        assert_eq!((saved.lines, saved.edges), (1 << 5, 1 << 4));
        let mut other = IoApic::new();
        assert_eq!(other.load(&saved), []);
        assert_eq!(other.save(), saved);
        assert!(program(&mut other, 4, 0x31).is_some());
        assert_eq!(other.end_of_interrupt(0x35).len(), 1);
    }

    #[test]
    fn registers_that_do_not_exist_read_as_zero() {
        let mut chip = IoApic::new();
        for index in [3, 0x0f, 0x40, 0xff] {
            chip.write(BASE, index);
            assert_eq!(chip.write(BASE + WINDOW, !0), None);
            assert_eq!(chip.read(BASE + WINDOW), 0, "{index:#x}");
        }
        assert_eq!(chip.set_line(24, true), None);
        assert_eq!(chip.set_line(u32::MAX, true), None);
    }
}
