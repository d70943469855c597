//! The keyboard controller, of which only the CPU's reset line is connected.

use std::convert::Infallible;
use std::sync::Arc;

use bus::{Lifecycle, PioDevice};
use vm_superio::{I8042Device, Trigger};

use crate::PowerEvents;

/// The data port; the command port is four further.
pub const I8042_FIRST_PORT: u16 = 0x60;
/// From the data port to the command port.
pub const I8042_PORTS: u64 = 5;

/// Offset of the command port, which reads as status.
const COMMAND: u8 = 4;

/// Answers at [`I8042_FIRST_PORT`]; its status always says that it can take a
/// command, and command 0xfe resets the machine.
pub struct I8042 {
    device: I8042Device<ResetLine>,
}

struct ResetLine(Arc<dyn PowerEvents>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.reset();
        Ok(())
    }
}

impl I8042 {
    /// Connects the reset line to `power`.
    pub fn new(power: Arc<dyn PowerEvents>) -> Self {
        Self {
            device: I8042Device::new(ResetLine(power)),
        }
    }
}

impl PioDevice for I8042 {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        // The ports between data and command belong to others, who are not there:
        // Linux would wait forever for a bit of port 0x61 that stays 0.
        data.fill(0xff);
        if let ([byte], Ok(offset @ (0 | COMMAND))) = (data, u8::try_from(offset)) {
            *byte = self.device.read(offset);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let Ok(()) = self.device.write(offset, byte);
        }
    }
}

impl Lifecycle for I8042 {
    fn pause(&mut self) {}
    fn resume(&mut self) {}
    /// It has no state.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::Asked;

    #[test]
    fn command_0xfe_resets_the_machine_and_nothing_else_does() {
        let asked = Arc::new(Asked::default());
        let mut device = I8042::new(asked.clone());
        for offset in 0..=4 {
            for value in 0..=255 {
                if (offset, value) != (4, 0xfe) {
                    device.write(offset, &[value]);
                }
            }
        }
        device.write(4, &[0xfe, 0xfe]);
        assert_eq!(asked.counts(), (0, 0));
        device.write(4, &[0xfe]);
        assert_eq!(asked.counts(), (1, 0));
    }

    #[test]
    fn status_says_that_a_command_can_be_taken() {
        let mut device = I8042::new(Arc::new(Asked::default()));
        let mut status = [0xff];
        device.read(4, &mut status);
        // Bit 1: the input buffer is full; Linux waits for it to clear.
        assert_eq!(status[0] & 0b11, 0);
        device.read(1, &mut status);
        assert_eq!(status, [0xff], "port 0x61 is not ours");
    }
}
