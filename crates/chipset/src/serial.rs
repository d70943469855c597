//! A 16550A serial port: vm-superio's registers, with room for more input than
//! its FIFO holds.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};

use bus::{IrqLine, Lifecycle, PioDevice};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};

use crate::{Error, SavedSerial};

/// How many ports [`Serial`] answers.
pub const SERIAL_PORTS: u64 = 8;
/// Bytes of input that wait for the guest at most; more are refused.
const INPUT_BYTES_MAX: usize = 64 << 10;
/// vm-superio's FIFO when empty.
const FIFO_BYTES: usize = 64;

type Sink = Box<dyn Write + Send>;

/// A serial port. What the guest sends goes to a sink, byte by byte; a sink that
/// fails loses the byte and nothing else.
pub struct Serial {
    uart: Uart<Edge, NoEvents, SinkSlot>,
    line: IrqLine,
    waiting: VecDeque<u8>,
}

/// ISA interrupts are edges.
struct Edge(IrqLine);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

/// Empty only inside of a reset.
#[derive(Default)]
struct SinkSlot(Option<Sink>);

impl Write for SinkSlot {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .as_mut()
            .map_or(Ok(bytes.len()), |sink| sink.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.as_mut().map_or(Ok(()), |sink| sink.flush())
    }
}

impl Serial {
    /// A port that interrupts with edges on `line` and sends to `sink`.
    pub fn new(line: IrqLine, sink: Sink) -> Self {
        let uart = Uart::new(Edge(line.clone()), SinkSlot(Some(sink)));
        Self {
            uart,
            line,
            waiting: VecDeque::new(),
        }
    }

    /// Sends `bytes` to the guest. Returns how many were taken: fewer than all
    /// when 64 KiB wait already.
    pub fn enqueue_input(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(INPUT_BYTES_MAX - self.waiting.len());
        self.waiting.extend(bytes.iter().take(n));
        self.refill();
        n
    }

    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedSerial {
        SavedSerial::new(self.uart.state(), self.waiting.iter().copied().collect())
    }

    /// Makes this port, a new one, the one that was saved. What it interrupted for it may
    /// interrupt for again.
    ///
    /// # Errors
    /// [`Error::Saved`]: more input than a port holds.
    pub fn restore(&mut self, saved: &SavedSerial) -> Result<(), Error> {
        let bad = || Error::Saved { device: "serial" };
        if saved.waiting.len() > INPUT_BYTES_MAX || saved.received.len() > FIFO_BYTES {
            return Err(bad());
        }
        let sink = std::mem::take(self.uart.writer_mut());
        let trigger = Edge(self.line.clone());
        self.uart = Uart::from_state(&saved.state(), trigger, NoEvents, sink).map_err(|_| bad())?;
        self.waiting = saved.waiting.iter().copied().collect();
        Ok(())
    }

    /// Moves what fits from the waiting input into the FIFO.
    fn refill(&mut self) {
        let n = self.uart.fifo_capacity().min(self.waiting.len());
        if n == 0 {
            return;
        }
        let batch: Vec<u8> = self.waiting.iter().copied().take(n).collect();
        // A port in loop-back takes none; they wait for its end.
        let taken = self.uart.enqueue_raw_bytes(&batch).unwrap_or(0);
        self.waiting.drain(..taken);
    }
}

impl PioDevice for Serial {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.uart.read(offset);
            // Not before it is empty: each refill is another edge.
            if offset == 0 && self.uart.fifo_capacity() == FIFO_BYTES {
                self.refill();
            }
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // A sink that fails loses the byte: the guest has no use for the error,
            // and a full disk must not flood a log.
            let _ = self.uart.write(offset, byte);
        }
    }
}

impl Lifecycle for Serial {
    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.waiting.clear();
        let sink = std::mem::take(self.uart.writer_mut());
        let trigger = Edge(self.line.clone());
        // An initial state raises no interrupt and has no input: it cannot fail.
        if let Ok(uart) = Uart::from_state(&SerialState::default(), trigger, NoEvents, sink) {
            self.uart = uart;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Serial, Shared, Arc<AtomicU32>) {
        let output = Shared::default();
        let edges = Arc::new(AtomicU32::new(0));
        let counter = edges.clone();
        let line = IrqLine::new(move |high| {
            counter.fetch_add(high.into(), Ordering::Relaxed);
        });
        (Serial::new(line, Box::new(output.clone())), output, edges)
    }

    fn read(serial: &mut Serial, offset: u16) -> u8 {
        let mut byte = [0];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn bytes_sent_reach_the_sink_in_order_also_after_a_reset() {
        let (mut serial, output, _) = port();
        for byte in b"hello" {
            serial.write(0, &[*byte]);
        }
        serial.reset();
        serial.write(0, b"!");
        assert_eq!(*output.0.lock().unwrap(), b"hello!");
    }

    #[test]
    fn input_beyond_the_fifo_follows_as_the_guest_reads() {
        let (mut serial, _, edges) = port();
        serial.write(1, &[1]); // interrupt on received data
        let sent: Vec<u8> = (0..=255).cycle().take(1000).collect();
        assert_eq!(serial.enqueue_input(&sent), 1000);
        assert!(edges.load(Ordering::Relaxed) >= 1);
        let mut got = Vec::new();
        while read(&mut serial, 5) & 1 != 0 {
            got.push(read(&mut serial, 0));
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn input_that_nobody_reads_is_bounded() {
        let (mut serial, _, _) = port();
        let taken = serial.enqueue_input(&vec![0; 1 << 20]);
        assert!(
            (INPUT_BYTES_MAX..=INPUT_BYTES_MAX + 64).contains(&taken),
            "{taken}"
        );
        assert!(serial.enqueue_input(&[0; 1000]) <= 64);
    }

    #[test]
    fn transmitter_is_always_empty_and_interrupts_when_enabled() {
        let (mut serial, _, edges) = port();
        assert_eq!(read(&mut serial, 5) & 0x60, 0x60);
        serial.write(1, &[2]);
        assert_eq!(edges.load(Ordering::Relaxed), 1);
        assert_eq!(read(&mut serial, 2) & 0x0f, 2);
    }

    #[test]
    fn accesses_of_other_widths_do_nothing() {
        let (mut serial, output, _) = port();
        serial.write(0, b"ab");
        let mut data = [0xff; 4];
        serial.read(5, &mut data);
        assert_eq!(data, [0; 4]);
        assert!(output.0.lock().unwrap().is_empty());
    }
}
