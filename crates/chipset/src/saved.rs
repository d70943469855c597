//! What a snapshot keeps of serial port and keyboard controller.

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

/// A serial port in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial {
    /// DLL.
    pub divisor_low: u8,
    /// DLH.
    pub divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// What the guest has not read of its FIFO.
    pub received: Vec<u8>,
    /// Input that did not fit into it.
    pub waiting: Vec<u8>,
}

impl SavedSerial {
    pub(crate) fn new(state: SerialState, waiting: Vec<u8>) -> Self {
        Self {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
            waiting,
        }
    }

    pub(crate) fn state(&self) -> SerialState {
        SerialState {
            baud_divisor_low: self.divisor_low,
            baud_divisor_high: self.divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.received.clone(),
        }
    }
}

/// A keyboard controller in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedI8042 {
    /// The command byte.
    pub control: u8,
    /// The output port.
    pub output: u8,
    /// The last byte went to the command port.
    pub last_was_command: bool,
    /// The command whose argument is next.
    pub pending: Option<u8>,
    /// What the guest has not read.
    pub buffer: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bus::{IrqLine, PioDevice};
    use proptest::prelude::*;

    use crate::{I8042, PowerEvents, Serial};

    struct Ignored;

    impl PowerEvents for Ignored {
        fn reset(&self) {}
        fn power_off(&self) {}
    }

    fn serial() -> Serial {
        Serial::new(IrqLine::new(|_| ()), Box::new(std::io::sink()))
    }

    fn keyboard() -> I8042 {
        I8042::new(Arc::new(Ignored), IrqLine::new(|_| ()))
    }

    fn write(device: &mut impl PioDevice, writes: &[(u16, u8)]) {
        for &(offset, byte) in writes {
            device.write(offset, &[byte]);
        }
    }

    fn read_all(device: &mut impl PioDevice, offsets: u16) -> Vec<u8> {
        let read = |offset| {
            let mut byte = [0];
            device.read(offset % offsets, &mut byte);
            byte[0]
        };
        (0..offsets * 100).map(read).collect()
    }

    #[test]
    fn a_restored_port_has_the_input_that_nobody_read() {
        let mut port = serial();
        let typed: Vec<u8> = (0..200).collect();
        assert_eq!(port.enqueue_input(&typed), 200);
        let mut other = serial();
        other.restore(&port.save()).unwrap();
        let read = |_| {
            let mut byte = [0];
            other.read(0, &mut byte);
            byte[0]
        };
        assert_eq!(typed.iter().map(read).collect::<Vec<_>>(), typed);
    }

    #[test]
    fn more_than_a_device_holds_is_refused() {
        let mut saved = serial().save();
        saved.received = vec![0; 65];
        assert!(serial().restore(&saved).is_err());
        let mut saved = serial().save();
        saved.waiting = vec![0; (64 << 10) + 1];
        assert!(serial().restore(&saved).is_err());
        let mut saved = keyboard().save();
        saved.buffer = vec![0; 17];
        assert!(keyboard().restore(&saved).is_err());
    }

    proptest! {
        #[test]
        fn a_restored_port_answers_as_the_one_before(
            writes in proptest::collection::vec((0u16..8, any::<u8>()), 0..40),
            typed in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let mut port = serial();
            port.enqueue_input(&typed);
            write(&mut port, &writes);
            let mut other = serial();
            other.restore(&port.save()).unwrap();
            prop_assert_eq!(other.save(), port.save());
            prop_assert_eq!(read_all(&mut other, 8), read_all(&mut port, 8));
        }

        #[test]
        fn a_restored_keyboard_answers_as_the_one_before(
            writes in proptest::collection::vec((prop_oneof![Just(0u16), Just(4)], any::<u8>()), 0..40),
            more in proptest::collection::vec((prop_oneof![Just(0u16), Just(4)], any::<u8>()), 0..10),
        ) {
            let mut one = keyboard();
            write(&mut one, &writes);
            let mut other = keyboard();
            other.restore(&one.save()).unwrap();
            for keyboard in [&mut one, &mut other] {
                write(keyboard, &more);
            }
            prop_assert_eq!(other.save(), one.save());
            prop_assert_eq!(read_all(&mut other, 5), read_all(&mut one, 5));
        }
    }
}
