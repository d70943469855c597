//! The driver's side of a device, for tests: registers, rings and buffers as a
//! guest makes them, honest or not.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bus::{IrqLine, Lifecycle, MmioDevice};
use ram::{ByteSize, Gpa, GuestRam};
use vm_memory::Bytes;

use crate::transport::{MmioTransport, SavedTransport};
use crate::{Error, VirtioDevice, feature};

pub(crate) const RAM: ByteSize = ByteSize::mib(16);
pub(crate) const QUEUE_SIZE: u16 = 64;
/// Buffers start here; rings lie below.
pub(crate) const BUFFERS: u64 = 0x10_0000;

pub(crate) const F_NEXT: u16 = 1;
pub(crate) const F_WRITE: u16 = 2;
pub(crate) const F_INDIRECT: u16 = 4;

/// A buffer of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Buffer {
    /// For the device to read.
    Out(u64, u32),
    /// For the device to fill.
    In(u64, u32),
}

pub(crate) struct FakeDriver {
    pub(crate) ram: GuestRam,
    pub(crate) transport: Arc<Mutex<MmioTransport>>,
    line: Arc<AtomicBool>,
    rises: Arc<AtomicU32>,
    rings: Vec<Ring>,
}

#[derive(Clone, Debug)]
pub(crate) struct Ring {
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    next_desc: u16,
    next_avail: u16,
    last_used: u16,
}

impl FakeDriver {
    /// Finds the device; it is as after power-on.
    pub(crate) fn find(device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        Self::find_in(GuestRam::new(RAM).unwrap(), device)
    }

    /// As [`FakeDriver::find`], in a machine with this memory, of at least [`RAM`].
    pub(crate) fn find_in(ram: GuestRam, device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let (line, rises) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU32::new(0)),
        );
        let (level, count) = (line.clone(), rises.clone());
        let irq = IrqLine::new(move |high| {
            if high && !level.swap(high, Ordering::SeqCst) {
                count.fetch_add(1, Ordering::SeqCst);
            }
            level.store(high, Ordering::SeqCst);
        });
        let transport = Arc::new(Mutex::new(MmioTransport::new(device, &ram, irq)));
        Self {
            ram,
            transport,
            line,
            rises,
            rings: Vec::new(),
        }
    }

    /// The device's registers.
    pub(crate) fn registers(&self) -> MutexGuard<'_, MmioTransport> {
        self.transport.lock().unwrap()
    }

    /// What a snapshot keeps.
    pub(crate) fn save(&self) -> Result<SavedTransport, Error> {
        let device = self.registers().device();
        let mut device = device.lock().unwrap();
        self.registers().save(&mut *device)
    }

    /// Goes on with `device`, a new one, behind new registers, from `saved`.
    pub(crate) fn restore(
        &mut self,
        saved: &SavedTransport,
        device: Arc<Mutex<dyn VirtioDevice>>,
    ) -> Result<(), Error> {
        let new = Self::find_in(self.ram.clone(), device);
        (self.transport, self.line, self.rises) = (new.transport, new.line, new.rises);
        self.registers().restore(saved)?;
        self.registers().resume();
        Ok(())
    }

    /// Goes on with `device`, a new one, from what this one keeps, by way of bytes.
    pub(crate) fn move_to(&mut self, device: Arc<Mutex<dyn VirtioDevice>>) {
        let bytes = postcard::to_stdvec(&self.save().unwrap()).unwrap();
        let saved = postcard::from_bytes(&bytes).unwrap();
        self.restore(&saved, device).unwrap();
    }

    /// Finds the device and sets it up with all that it offers.
    pub(crate) fn start(device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let mut driver = Self::find(device);
        driver.set_up(u64::MAX);
        driver
    }

    /// As [`FakeDriver::start`], in a machine with this memory.
    pub(crate) fn start_in(ram: GuestRam, device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let mut driver = Self::find_in(ram, device);
        driver.set_up(u64::MAX);
        driver
    }

    /// As Linux does: status, features, queues, status.
    pub(crate) fn set_up(&mut self, wanted: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.accept(wanted | feature::VERSION_1);
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "features refused");
        self.set_up_queues();
        self.write(0x70, 15);
    }

    pub(crate) fn accept(&mut self, features: u64) {
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
    }

    pub(crate) fn set_up_queues(&mut self) {
        self.rings.clear();
        for index in 0.. {
            self.write(0x30, index);
            if self.read(0x34) == 0 {
                break;
            }
            let base = 0x1_0000 * u64::from(index + 1);
            let ring = Ring {
                desc: base,
                avail: base + 0x4000,
                used: base + 0x8000,
                next_desc: 0,
                next_avail: 0,
                last_used: 0,
            };
            self.ram
                .memory()
                .write_slice(&[0; 0x1_0000], Gpa(base))
                .unwrap();
            self.write(0x38, QUEUE_SIZE.into());
            self.write(0x80, ring.desc as u32);
            self.write(0x84, 0);
            self.write(0x90, ring.avail as u32);
            self.write(0x94, 0);
            self.write(0xa0, ring.used as u32);
            self.write(0xa4, 0);
            self.write(0x44, 1);
            self.rings.push(ring);
        }
    }

    pub(crate) fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.registers().read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&mut self, register: u64, value: u32) {
        self.registers().write(register, &value.to_le_bytes());
    }

    pub(crate) fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.registers().read(0x100 + offset, &mut data);
        data
    }

    pub(crate) fn ring(&self, queue: usize) -> &Ring {
        &self.rings[queue]
    }

    /// The head that the next request will get.
    pub(crate) fn next_head(&self, queue: usize) -> u16 {
        self.rings[queue].next_desc
    }

    /// How many queues were set up.
    pub(crate) fn queues(&self) -> usize {
        self.rings.len()
    }

    /// Whether the interrupt line is high.
    pub(crate) fn line_is_high(&self) -> bool {
        self.line.load(Ordering::SeqCst)
    }

    /// How often the interrupt line rose.
    pub(crate) fn rises(&self) -> u32 {
        self.rises.load(Ordering::SeqCst)
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.read(0x70) & 0x40 != 0
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, Gpa(at)).unwrap();
    }

    pub(crate) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, Gpa(at)).unwrap();
        bytes
    }

    pub(crate) fn put_descriptor(
        &self,
        table: u64,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    /// Makes a request available, without a kick; returns its head.
    pub(crate) fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let ring = self.rings[queue].clone();
        let head = ring.next_desc;
        for (nth, buffer) in buffers.iter().enumerate() {
            let index = (head + nth as u16) % QUEUE_SIZE;
            let (addr, len, flags) = match *buffer {
                Buffer::Out(addr, len) => (addr, len, 0),
                Buffer::In(addr, len) => (addr, len, F_WRITE),
            };
            let more = if nth + 1 < buffers.len() { F_NEXT } else { 0 };
            self.put_descriptor(
                ring.desc,
                index,
                addr,
                len,
                flags | more,
                (index + 1) % QUEUE_SIZE,
            );
        }
        self.rings[queue].next_desc = (head + buffers.len() as u16) % QUEUE_SIZE;
        self.publish(queue, head);
        head
    }

    /// Makes `head` available, whatever it is.
    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.avail + 4 + 2 * u64::from(ring.next_avail % QUEUE_SIZE);
        ring.next_avail = ring.next_avail.wrapping_add(1);
        let (index, next) = (ring.avail + 2, ring.next_avail);
        self.put(slot, &head.to_le_bytes());
        self.put(index, &next.to_le_bytes());
    }

    pub(crate) fn kick(&mut self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// The next request that the device gave back: its head and what was written.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let memory = self.ram.memory();
        let index: u16 = memory.read_obj(Gpa(ring.used + 2)).unwrap();
        if index == ring.last_used {
            return None;
        }
        let slot = ring.used + 4 + 8 * u64::from(ring.last_used % QUEUE_SIZE);
        ring.last_used = ring.last_used.wrapping_add(1);
        let head: u32 = memory.read_obj(Gpa(slot)).unwrap();
        let len: u32 = memory.read_obj(Gpa(slot + 4)).unwrap();
        // used_event: we want to hear of the next one.
        let event = ring.avail + 4 + 2 * u64::from(QUEUE_SIZE);
        memory.write_obj(ring.last_used, Gpa(event)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    /// One request, served at once; returns how much was written.
    pub(crate) fn request(&mut self, queue: usize, buffers: &[Buffer]) -> u32 {
        let head = self.add(queue, buffers);
        self.kick(queue);
        let (used, len) = self.used(queue).expect("the request was not served");
        assert_eq!(used, head);
        len
    }

    /// Reads and acknowledges the interrupt status, as a handler does.
    pub(crate) fn handle_interrupt(&mut self) -> u32 {
        let status = self.read(0x60);
        self.write(0x64, status);
        status
    }
}

/// What `counted` says besides zeros.
pub(crate) fn told(counted: &dyn crate::Counted) -> Vec<(&'static str, u64)> {
    let counts = counted.counts().into_iter();
    counts.filter(|(_, n)| *n != 0).collect()
}
