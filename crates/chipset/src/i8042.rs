//! The keyboard controller: the CPU's reset line, and a keyboard on which the host can
//! press Ctrl-Alt-Del.
//!
//! ```text
//! port 0x64  write: command            read: status
//! port 0x60  write: its argument, or for the keyboard     read: what is in the buffer
//! ```
//!
//! Invariant: the buffer holds at most [`BUFFER_BYTES`]; whatever is written, the next
//! command is understood. There is no mouse, and no test of it succeeds.
//!
//! Sources: IBM PS/2 Hardware Interface Technical Reference, keyboard controller;
//! Linux, drivers/input/serio/i8042.c for what is asked.

use std::collections::VecDeque;
use std::sync::Arc;

use bus::{IrqLine, Lifecycle, PioDevice};

use crate::{Error, PowerEvents, SavedI8042};

/// The data port; the command port is four further.
pub const I8042_FIRST_PORT: u16 = 0x60;
/// From the data port to the command port.
pub const I8042_PORTS: u64 = 5;

/// Offset of the data port.
const DATA: u16 = 0;
/// Offset of the command port, which reads as status.
const COMMAND: u16 = 4;

/// Bytes that a guest may leave unread.
const BUFFER_BYTES: usize = 16;

mod status {
    /// There is something to read.
    pub(super) const OUTPUT_FULL: u8 = 1 << 0;
    /// The controller has tested itself.
    pub(super) const SYSTEM: u8 = 1 << 2;
    /// The last byte went to the command port.
    pub(super) const COMMAND: u8 = 1 << 3;
    /// The keyboard is not locked.
    pub(super) const UNLOCKED: u8 = 1 << 4;
}

/// The controller's command byte.
mod control {
    /// The keyboard interrupts.
    pub(super) const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    /// The controller has tested itself.
    pub(super) const SYSTEM: u8 = 1 << 2;
    /// The keyboard is switched off.
    pub(super) const KEYBOARD_OFF: u8 = 1 << 4;
    /// The mouse is switched off.
    pub(super) const AUX_OFF: u8 = 1 << 5;
    /// Scan codes of set 2 become those of set 1.
    pub(super) const TRANSLATE: u8 = 1 << 6;
}

mod command {
    pub(super) const READ_CONTROL: u8 = 0x20;
    pub(super) const WRITE_CONTROL: u8 = 0x60;
    pub(super) const TEST_AUX: u8 = 0xa9;
    pub(super) const TEST_SELF: u8 = 0xaa;
    pub(super) const TEST_KEYBOARD: u8 = 0xab;
    pub(super) const KEYBOARD_OFF: u8 = 0xad;
    pub(super) const KEYBOARD_ON: u8 = 0xae;
    pub(super) const READ_OUTPUT: u8 = 0xd0;
    pub(super) const WRITE_OUTPUT: u8 = 0xd1;
    pub(super) const LOOP_KEYBOARD: u8 = 0xd2;
    pub(super) const LOOP_AUX: u8 = 0xd3;
    pub(super) const WRITE_AUX: u8 = 0xd4;
    pub(super) const RESET: u8 = 0xfe;
}

/// What a keyboard says.
mod keyboard {
    pub(super) const ACKNOWLEDGE: u8 = 0xfa;
    pub(super) const TEST_PASSED: u8 = 0xaa;
    pub(super) const ECHO: u8 = 0xee;
    pub(super) const READ_ID: u8 = 0xf2;
    pub(super) const RESET: u8 = 0xff;
    /// A keyboard of the MF2 kind.
    pub(super) const ID: [u8; 2] = [0xab, 0x83];
}

/// Ctrl, Alt and Del pressed, then released, in set 2 and in set 1.
const CTRL_ALT_DEL: [&[u8]; 2] = [
    &[
        0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
    ],
    &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d],
];

/// The guest does not listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoKeyboard {
    /// It has switched the keyboard, or its interrupt, off.
    #[error(
        "the guest does not listen to its keyboard: it needs a driver for the i8042 and an AT keyboard"
    )]
    Off,
    /// It has not read what was typed before.
    #[error("the guest has not read what was typed before")]
    Full,
}

/// Answers at [`I8042_FIRST_PORT`]; command 0xfe resets the machine.
pub struct I8042 {
    power: Arc<dyn PowerEvents>,
    line: IrqLine,
    control: u8,
    output: u8,
    last_was_command: bool,
    /// The command whose argument is next.
    pending: Option<u8>,
    buffer: VecDeque<u8>,
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("I8042")
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

impl I8042 {
    /// Connects the reset line to `power`; the keyboard interrupts on `line`, an edge for
    /// each byte.
    pub fn new(power: Arc<dyn PowerEvents>, line: IrqLine) -> Self {
        Self {
            power,
            line,
            control: control::SYSTEM | control::KEYBOARD_OFF | control::AUX_OFF,
            output: 0,
            last_was_command: false,
            pending: None,
            buffer: VecDeque::new(),
        }
    }

    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedI8042 {
        SavedI8042 {
            control: self.control,
            output: self.output,
            last_was_command: self.last_was_command,
            pending: self.pending,
            buffer: self.buffer.iter().copied().collect(),
        }
    }

    /// Makes this controller, a new one, the one that was saved.
    ///
    /// # Errors
    /// [`Error::Saved`]: more in its buffer than that holds.
    pub fn restore(&mut self, saved: &SavedI8042) -> Result<(), Error> {
        if saved.buffer.len() > BUFFER_BYTES {
            return Err(Error::Saved { device: "i8042" });
        }
        self.control = saved.control | control::AUX_OFF;
        self.output = saved.output;
        self.last_was_command = saved.last_was_command;
        self.pending = saved.pending;
        self.buffer = saved.buffer.iter().copied().collect();
        Ok(())
    }

    /// Presses Ctrl-Alt-Del, which Linux's init takes for a wish to restart.
    ///
    /// # Errors
    /// [`NoKeyboard`]: the guest would not notice.
    pub fn press_ctrl_alt_del(&mut self) -> Result<(), NoKeyboard> {
        let listens = self.control & control::KEYBOARD_INTERRUPT != 0
            && self.control & control::KEYBOARD_OFF == 0;
        if !listens {
            return Err(NoKeyboard::Off);
        }
        let [set2, set1] = CTRL_ALT_DEL;
        let codes = if self.control & control::TRANSLATE != 0 {
            set1
        } else {
            set2
        };
        if self.buffer.len() + codes.len() > BUFFER_BYTES {
            return Err(NoKeyboard::Full);
        }
        self.buffer.extend(codes);
        self.interrupt();
        Ok(())
    }

    fn interrupt(&self) {
        if !self.buffer.is_empty() && self.control & control::KEYBOARD_INTERRUPT != 0 {
            self.line.pulse();
        }
    }

    fn status(&self) -> u8 {
        let flag = |set, flag| if set { flag } else { 0 };
        status::SYSTEM
            | status::UNLOCKED
            | flag(self.last_was_command, status::COMMAND)
            | flag(!self.buffer.is_empty(), status::OUTPUT_FULL)
    }

    /// Puts in what is read next; what was there is gone, as a controller has room for
    /// one answer.
    fn answer(&mut self, bytes: &[u8]) {
        self.buffer.clear();
        self.buffer.extend(bytes);
        self.interrupt();
    }

    fn command(&mut self, command: u8) {
        self.last_was_command = true;
        self.pending = None;
        match command {
            command::READ_CONTROL => self.answer(&[self.control]),
            command::READ_OUTPUT => self.answer(&[self.output]),
            command::WRITE_CONTROL
            | command::WRITE_OUTPUT
            | command::LOOP_KEYBOARD
            | command::LOOP_AUX
            | command::WRITE_AUX => self.pending = Some(command),
            command::TEST_SELF => {
                self.control |= control::SYSTEM;
                self.answer(&[0x55]);
            }
            command::TEST_KEYBOARD => self.answer(&[0]),
            // The clock line of what is not there stays low.
            command::TEST_AUX => self.answer(&[1]),
            command::KEYBOARD_OFF => self.control |= control::KEYBOARD_OFF,
            command::KEYBOARD_ON => self.control &= !control::KEYBOARD_OFF,
            command::RESET => self.power.reset(),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        self.last_was_command = false;
        match self.pending.take() {
            Some(command::WRITE_CONTROL) => self.control = byte | control::AUX_OFF,
            Some(command::WRITE_OUTPUT) => self.output = byte,
            Some(command::LOOP_KEYBOARD) => self.answer(&[byte]),
            // Nothing comes back as it was sent: there is no mouse.
            Some(command::LOOP_AUX) => self.answer(&[!byte]),
            Some(_) => {}
            None => self.type_back(byte),
        }
    }

    /// The keyboard takes a byte.
    fn type_back(&mut self, byte: u8) {
        use keyboard::{ACKNOWLEDGE, ECHO, ID, READ_ID, RESET, TEST_PASSED};
        match byte {
            RESET => self.answer(&[ACKNOWLEDGE, TEST_PASSED]),
            ECHO => self.answer(&[ECHO]),
            READ_ID => self.answer(&[ACKNOWLEDGE, ID[0], ID[1]]),
            _ => self.answer(&[ACKNOWLEDGE]),
        }
    }
}

impl PioDevice for I8042 {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        // The ports between data and command belong to others, who are not there:
        // Linux would wait forever for a bit of port 0x61 that stays 0.
        data.fill(0xff);
        if let [byte] = data {
            match offset {
                DATA => {
                    *byte = self.buffer.pop_front().unwrap_or(0);
                    self.interrupt();
                }
                COMMAND => *byte = self.status(),
                _ => {}
            }
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        match (offset, data) {
            (COMMAND, &[byte]) => self.command(byte),
            (DATA, &[byte]) => self.data(byte),
            _ => {}
        }
    }
}

impl Lifecycle for I8042 {
    fn pause(&mut self) {}
    fn resume(&mut self) {}

    fn reset(&mut self) {
        *self = Self::new(self.power.clone(), self.line.clone());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::power::tests::Asked;

    struct Rig {
        device: I8042,
        asked: Arc<Asked>,
        edges: Arc<Mutex<u32>>,
    }

    fn rig() -> Rig {
        let asked = Arc::new(Asked::default());
        let edges: Arc<Mutex<u32>> = Arc::default();
        let count = edges.clone();
        let line = IrqLine::new(move |high| *count.lock().unwrap() += u32::from(high));
        Rig {
            device: I8042::new(asked.clone(), line),
            asked,
            edges,
        }
    }

    impl Rig {
        fn read(&mut self, offset: u16) -> u8 {
            let mut byte = [0];
            self.device.read(offset, &mut byte);
            byte[0]
        }

        /// A command, its argument if any, and what it answers.
        fn ask(&mut self, command: u8, argument: Option<u8>) -> Vec<u8> {
            self.device.write(COMMAND, &[command]);
            if let Some(byte) = argument {
                self.device.write(DATA, &[byte]);
            }
            self.drain()
        }

        fn drain(&mut self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.read(COMMAND) & status::OUTPUT_FULL != 0 {
                bytes.push(self.read(DATA));
            }
            bytes
        }
    }

    #[test]
    fn command_0xfe_resets_the_machine_and_nothing_else_does() {
        let mut rig = rig();
        for offset in 0..=4 {
            for value in 0..=255 {
                if (offset, value) != (4, 0xfe) {
                    rig.device.write(offset, &[value]);
                }
            }
        }
        rig.device.write(4, &[0xfe, 0xfe]);
        assert_eq!(rig.asked.counts(), (0, 0));
        rig.device.write(4, &[0xfe]);
        assert_eq!(rig.asked.counts(), (1, 0));
    }

    #[test]
    fn status_says_that_a_command_can_be_taken() {
        let mut rig = rig();
        // Bit 1: the input buffer is full; Linux waits for it to clear.
        assert_eq!(rig.read(COMMAND) & 0b11, 0);
        assert_eq!(rig.read(1), 0xff, "port 0x61 is not ours");
    }

    #[test]
    fn linux_finds_a_keyboard_and_no_mouse() {
        let mut rig = rig();
        assert_eq!(rig.ask(0x20, None), [0x34], "as it comes up");
        assert_eq!(rig.ask(0xaa, None), [0x55]);
        assert_eq!(
            rig.ask(0xd3, Some(0x5a)),
            [0xa5],
            "not what a mouse loops back"
        );
        assert_ne!(rig.ask(0xa9, None), [0]);
        rig.ask(0x60, Some(0x45));
        assert_eq!(rig.ask(0x20, None), [0x65], "the mouse stays off");
        assert_eq!(rig.ask(0xab, None), [0]);
        rig.device.write(DATA, &[0xf2]);
        assert_eq!(rig.drain(), [0xfa, 0xab, 0x83]);
        rig.device.write(DATA, &[0xff]);
        assert_eq!(rig.drain(), [0xfa, 0xaa]);
    }

    #[test]
    fn ctrl_alt_del_is_typed_with_an_edge_for_each_byte() {
        let mut rig = rig();
        assert_eq!(rig.device.press_ctrl_alt_del(), Err(NoKeyboard::Off));
        rig.ask(0x60, Some(0x41));
        let before = *rig.edges.lock().unwrap();
        rig.device.press_ctrl_alt_del().unwrap();
        let full = rig.device.press_ctrl_alt_del();
        assert_eq!(full, Ok(()), "sixteen bytes have room for two");
        assert_eq!(rig.device.press_ctrl_alt_del(), Err(NoKeyboard::Full));
        let typed = rig.drain();
        assert_eq!(typed[..8], [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]);
        // One for each press, and one for each byte behind another.
        assert_eq!(*rig.edges.lock().unwrap() - before, 2 + 15);
        rig.ask(0x60, Some(0x01));
        rig.device.press_ctrl_alt_del().unwrap();
        assert_eq!(rig.drain()[..4], [0x14, 0x11, 0xe0, 0x71]);
    }

    proptest! {
        #[test]
        fn whatever_is_written_the_buffer_is_bounded_and_commands_work(
            writes in prop::collection::vec((0_u16..8, any::<u8>(), any::<bool>()), 0..200),
        ) {
            let mut rig = rig();
            for (offset, byte, press) in writes {
                if byte != 0xfe {
                    rig.device.write(offset, &[byte]);
                }
                if press {
                    let _ = rig.device.press_ctrl_alt_del();
                }
                prop_assert!(rig.device.buffer.len() <= BUFFER_BYTES);
            }
            rig.drain();
            prop_assert_eq!(rig.ask(0xaa, None), [0x55]);
        }
    }
}
