//! ACPI's registers for sleep and reset on hardware-reduced machines
//! (ACPI 6.5 §4.8.3.7, §4.8.3.6), as byte-wide I/O ports:
//!
//! | offset | register | effect |
//! |---|---|---|
//! | 0 | SLEEP_CONTROL_REG | SLP_EN with SLP_TYP 5 switches off |
//! | 1 | SLEEP_STATUS_REG  | reads 0: nothing woke us |
//! | 2 | RESET_REG         | 1 resets |

use std::sync::Arc;

use bus::{Lifecycle, PioDevice};

use crate::PowerEvents;

/// How many ports [`SleepRegisters`] answers.
pub const SLEEP_PORTS: u64 = 3;
/// Where the FADT's SLEEP_CONTROL_REG is, from the first port.
pub const SLEEP_CONTROL_OFFSET: u16 = 0;
/// Where the FADT's SLEEP_STATUS_REG is.
pub const SLEEP_STATUS_OFFSET: u16 = 1;
/// Where the FADT's RESET_REG is.
pub const RESET_OFFSET: u16 = 2;
/// The FADT's RESET_VALUE.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of the `\_S5` package: soft off.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111;
const SLP_EN: u8 = 1 << 5;

/// The registers. Firmware tables that point here belong to the machine.
pub struct SleepRegisters {
    power: Arc<dyn PowerEvents>,
}

impl SleepRegisters {
    /// Registers that tell `power` what the guest asks for.
    pub fn new(power: Arc<dyn PowerEvents>) -> Self {
        Self { power }
    }
}

impl PioDevice for SleepRegisters {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        let &[value] = data else {
            return;
        };
        match offset {
            SLEEP_CONTROL_OFFSET
                if value & SLP_EN != 0
                    && value >> SLP_TYP_SHIFT & SLP_TYP_MASK == SLEEP_TYPE_S5 =>
            {
                self.power.power_off();
            }
            RESET_OFFSET if value == RESET_VALUE => self.power.reset(),
            _ => {}
        }
    }
}

impl Lifecycle for SleepRegisters {
    fn pause(&mut self) {}
    fn resume(&mut self) {}
    /// They hold no state.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::Asked;

    #[test]
    fn s5_with_sleep_enable_switches_off() {
        let asked = Arc::new(Asked::default());
        let mut registers = SleepRegisters::new(asked.clone());
        registers.write(SLEEP_CONTROL_OFFSET, &[SLEEP_TYPE_S5 << 2]);
        registers.write(SLEEP_CONTROL_OFFSET, &[SLP_EN]);
        registers.write(SLEEP_CONTROL_OFFSET, &[SLEEP_TYPE_S5 << 2 | SLP_EN, 0]);
        registers.write(SLEEP_STATUS_OFFSET, &[0x34]);
        assert_eq!(asked.counts(), (0, 0));
        registers.write(SLEEP_CONTROL_OFFSET, &[0x34]);
        assert_eq!(asked.counts(), (0, 1));
    }

    #[test]
    fn the_reset_value_resets() {
        let asked = Arc::new(Asked::default());
        let mut registers = SleepRegisters::new(asked.clone());
        registers.write(RESET_OFFSET, &[0]);
        assert_eq!(asked.counts(), (0, 0));
        registers.write(RESET_OFFSET, &[RESET_VALUE]);
        assert_eq!(asked.counts(), (1, 0));
    }

    #[test]
    fn nothing_ever_woke_us() {
        let mut registers = SleepRegisters::new(Arc::new(Asked::default()));
        let mut data = [0xff; 2];
        registers.read(SLEEP_STATUS_OFFSET, &mut data);
        assert_eq!(data, [0, 0]);
    }
}
