//! A guest's driver, honest or not, and what it may expect of a device all the same:
//!
//! - nothing is written but into buffers that it described as writable and into used
//!   rings, and each page that is written to is in the record of written pages;
//! - the used rings hold what was made available, once each, and say no more bytes than
//!   there was room for.
//!
//! A driver that lets a device write into its own queues, or moves them, has nothing to
//! expect any more ([`Guest::honest`]).

use std::ops::Range;
use std::sync::{Arc, Mutex};

use bus::{IrqLine, Lifecycle as _, MmioDevice};
use ram::{Gpa, GuestRam};
use virtio::VirtioDevice;
use virtio::transport::{MmioTransport, SavedTransport};
use vm_memory::Bytes as _;

use crate::Input;

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 16;
/// Queues of a device at most.
pub const QUEUES_MAX: u64 = 8;
const QUEUES: u64 = 0x1_0000;
const QUEUE_LEN: u64 = 0x3000;
/// The descriptor table in a queue's memory.
pub const DESCRIPTORS: u64 = 0;
/// The available ring in a queue's memory.
pub const AVAILABLE: u64 = 0x1000;
/// The used ring in a queue's memory.
pub const USED: u64 = 0x2000;
const USED_LEN: u64 = 6 + 8 * QUEUE_SIZE as u64;
/// Room for indirect tables.
pub const TABLES: u64 = QUEUES + QUEUES_MAX * QUEUE_LEN;
/// Its length.
pub const TABLES_LEN: u64 = 0x1000;
/// Room for buffers.
pub const BUFFERS: u64 = TABLES + TABLES_LEN;
/// Its length.
pub const BUFFERS_LEN: u64 = 0x4000;
const PAGE: u64 = 4096;
/// What is looked at for stray writes.
const WATCHED: Range<u64> = 0..0x20_0000;

/// The flag of a descriptor that is not the last one.
pub const NEXT: u16 = 1;
/// The flag of a buffer that the device is to fill.
pub const WRITE: u16 = 2;
/// The flag of a descriptor whose buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// An indirect table with more entries is not followed.
const TABLE_ENTRIES_MAX: u64 = 64;

/// Where a queue's memory is.
pub fn queue_at(queue: u64) -> u64 {
    QUEUES + queue * QUEUE_LEN
}

/// A request that the device has.
#[derive(Clone, Copy, Debug)]
struct Pending {
    head: u16,
    /// Bytes that the device may fill, if the driver left its descriptors alone.
    room: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Ring {
    pending: Vec<Pending>,
    /// Head and length of what came back and nobody has asked for.
    returned: Vec<(u16, u32)>,
    available: u16,
    used: u16,
    /// The driver gave the page that it is in away: it is zeros, and nobody knows more.
    given_away: bool,
}

/// What the descriptors of all queues say.
#[derive(Debug, Default)]
struct Described {
    writable: Vec<Range<u64>>,
    tables: Vec<Range<u64>>,
    /// One of them was too large to be followed.
    endless: bool,
}

/// The driver of one device, in memory that is as new.
pub struct Guest {
    /// The machine's memory.
    pub ram: GuestRam,
    /// Whether the device is held to what it promises.
    pub honest: bool,
    /// The host may make pages zero.
    pub zeroes: bool,
    transport: MmioTransport,
    /// What is in memory.
    expected: Vec<u8>,
    rings: Vec<Ring>,
}

impl Guest {
    /// Finds `device`; it is as after power-on.
    pub fn find(ram: GuestRam, device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let transport = MmioTransport::new(device, &ram, IrqLine::new(|_| {}));
        Self {
            ram,
            honest: true,
            zeroes: false,
            transport,
            expected: vec![0; WATCHED.end as usize],
            rings: Vec::new(),
        }
    }

    /// Puts `bytes` anywhere into memory, as far as there is some.
    pub fn poke(&mut self, at: u64, bytes: &[u8]) {
        self.put(at, bytes);
        // They may have become descriptors.
        for pending in self.rings.iter_mut().flat_map(|ring| &mut ring.pending) {
            pending.room = None;
        }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        if self.ram.memory().write_slice(bytes, Gpa(at)).is_ok() {
            let end = (at + bytes.len() as u64).min(WATCHED.end);
            if at < end {
                let bytes = &bytes[..(end - at) as usize];
                self.expected[at as usize..end as usize].copy_from_slice(bytes);
            }
        }
    }

    /// Gets `N` bytes of memory that there is.
    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.memory().read_slice(&mut bytes, Gpa(at)).unwrap();
        bytes
    }

    /// Reads `data` from the device's registers or its configuration.
    pub fn read_into(&mut self, register: u64, data: &mut [u8]) {
        self.transport.read(register, data);
    }

    /// Reads a register.
    pub fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.read_into(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register, and looks at what the device then did.
    pub fn write(&mut self, register: u64, value: u32) {
        // Features, queues, status: the model does not follow.
        if matches!(register, 0x20..0x50 | 0x70..0x100) {
            self.honest = false;
        }
        self.watch(|transport| transport.write(register, &value.to_le_bytes()));
    }

    /// Whether the device gave up.
    pub fn needs_reset(&mut self) -> bool {
        self.read(0x70) & 0x40 != 0
    }

    /// virtio 1.2 §3.1.1, with all features but those in `refused`; queues as new.
    pub fn set_up(&mut self, refused: u32) {
        for status in [0, 1, 3] {
            self.set(0x70, status);
        }
        for (page, refused) in [(0, refused), (1, 0)] {
            self.set(0x14, page);
            let accepted = self.read(0x10) & !refused;
            self.set(0x24, page);
            self.set(0x20, accepted);
        }
        self.set(0x70, 11);
        self.rings.clear();
        for queue in 0..QUEUES_MAX {
            self.set(0x30, queue as u32);
            if self.read(0x34) == 0 {
                break;
            }
            self.put(queue_at(queue), &[0; QUEUE_LEN as usize]);
            self.set(0x38, QUEUE_SIZE.into());
            for (register, at) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
                self.set(register, (queue_at(queue) + at) as u32);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
            self.rings.push(Ring::default());
        }
        self.watch(|transport| transport.write(0x70, &15_u32.to_le_bytes()));
    }

    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    /// Writes one descriptor into a table.
    pub fn describe(&mut self, at: u64, buffer: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = buffer.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.poke(at, &bytes);
    }

    /// Makes `head` available in `queue`; no kick.
    pub fn publish(&mut self, queue: u64, head: u16) {
        let base = queue_at(queue);
        let room = self.room(base + DESCRIPTORS, QUEUE_SIZE.into(), head);
        let Some(ring) = self.rings.get_mut(queue as usize) else {
            return;
        };
        let place = u64::from(ring.available % QUEUE_SIZE);
        ring.available = ring.available.wrapping_add(1);
        ring.pending.push(Pending { head, room });
        let index = ring.available;
        // More than fits: what waits is overwritten.
        self.honest &= ring.pending.len() <= usize::from(QUEUE_SIZE);
        self.put(base + AVAILABLE + 4 + 2 * place, &head.to_le_bytes());
        self.put(base + AVAILABLE + 2, &index.to_le_bytes());
    }

    /// Tells the device of `queue`.
    pub fn kick(&mut self, queue: u64) {
        self.write(0x50, queue as u32);
    }

    /// Requests of `queue` that the device has not given back.
    pub fn pending(&self, queue: u64) -> usize {
        self.rings
            .get(queue as usize)
            .map_or(0, |ring| ring.pending.len())
    }

    /// What the device gave back of `queue` since the last time: heads, and how many bytes
    /// were filled.
    pub fn returned(&mut self, queue: u64) -> Vec<(u16, u32)> {
        let ring = self.rings.get_mut(queue as usize);
        ring.map_or_else(Vec::new, |ring| std::mem::take(&mut ring.returned))
    }

    /// Has the device do something, and looks at what it did.
    pub fn watch<R>(&mut self, work: impl FnOnce(&mut MmioTransport) -> R) -> R {
        let described = self.honest.then(|| self.described());
        let cursor = self.ram.epochs().cursor();
        let done = work(&mut self.transport);
        if let Some(described) = described {
            let written: Vec<_> = self.ram.epochs().written_since(cursor).collect();
            self.check_writes(&described, &written);
        }
        if self.honest {
            for queue in 0..self.rings.len() {
                self.check_used(queue);
            }
        }
        done
    }

    /// Saves the device and goes on with a new one of the same settings, as after a
    /// snapshot. `change` is what happens to the saved state; none when it is lost.
    ///
    /// What was saved is taken back. What was tampered with may be refused: the device is as
    /// after power-on then.
    pub fn move_on(
        &mut self,
        mut new: impl FnMut(&GuestRam) -> Arc<Mutex<dyn VirtioDevice>>,
        change: impl FnOnce(&SavedTransport) -> Option<SavedTransport>,
    ) {
        let device = self.transport.device();
        let saved = self.watch(|transport| transport.save(&mut *device.lock().unwrap()));
        // Not of a ring that the driver broke.
        let Some((saved, changed)) = saved
            .ok()
            .and_then(|saved| change(&saved).map(|it| (saved, it)))
        else {
            return;
        };
        let mut find = |ram: &GuestRam| MmioTransport::new(new(ram), ram, IrqLine::new(|_| {}));
        self.honest &= changed == saved;
        self.transport = find(&self.ram);
        let restored = self.watch(|transport| transport.restore(&changed));
        if let Err(error) = restored {
            assert!(changed != saved, "what was saved is refused: {error}");
            self.transport = find(&self.ram);
        }
        self.watch(MmioTransport::resume);
    }

    /// At the end: no write went unrecorded.
    pub fn check_all(&mut self) {
        if self.honest {
            let pages = (QUEUES..BUFFERS + BUFFERS_LEN).step_by(PAGE as usize);
            let pages: Vec<_> = pages.map(Gpa).collect();
            self.check_writes(&Described::default(), &pages);
        }
    }

    /// A descriptor's buffer, flags and successor.
    fn descriptor(&self, at: u64) -> Option<(Range<u64>, u16, u16)> {
        let mut bytes = [0; 16];
        self.ram.memory().read_slice(&mut bytes, Gpa(at)).ok()?;
        let mut input = Input(&bytes);
        let start = u64::from_le_bytes(input.take());
        let end = start.saturating_add(input.word().into());
        Some((start..end, input.half(), input.half()))
    }

    /// What the driver may ask the device to write to, whatever it makes available.
    fn described(&self) -> Described {
        let mut described = Described::default();
        for queue in 0..self.rings.len() as u64 {
            let base = queue_at(queue);
            described.tables.push(base..base + QUEUE_LEN);
            for index in 0..u64::from(QUEUE_SIZE) {
                self.follow(base + 16 * index, true, &mut described);
            }
        }
        described
    }

    fn follow(&self, at: u64, outer: bool, described: &mut Described) {
        let Some((buffer, flags, _)) = self.descriptor(at) else {
            return;
        };
        if flags & INDIRECT != 0 && outer {
            let entries = (buffer.end - buffer.start) / 16;
            described.endless |= entries > TABLE_ENTRIES_MAX;
            described.tables.push(buffer.clone());
            for entry in 0..entries.min(TABLE_ENTRIES_MAX) {
                if let Some(at) = buffer.start.checked_add(16 * entry) {
                    self.follow(at, false, described);
                }
            }
        } else if flags & WRITE != 0 {
            described.writable.push(buffer);
        }
    }

    /// The bytes that a request may have filled which starts at `index` of a table of so
    /// many `entries`; `None` if it does not end properly.
    fn room(&self, table: u64, entries: u64, mut index: u16) -> Option<u64> {
        let mut room = 0;
        for _ in 0..entries {
            if u64::from(index) >= entries {
                return None;
            }
            let (buffer, flags, next) = self.descriptor(table + 16 * u64::from(index))?;
            let len = buffer.end - buffer.start;
            if flags & INDIRECT != 0 {
                return self.room(buffer.start, (len / 16).min(TABLE_ENTRIES_MAX), 0);
            }
            if flags & WRITE != 0 {
                room += len;
            }
            if flags & NEXT == 0 {
                return Some(room);
            }
            index = next;
        }
        None
    }

    fn check_writes(&mut self, described: &Described, written: &[Gpa]) {
        let overlap = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        let mut writable = described.writable.iter();
        if described.endless
            || writable.any(|buffer| described.tables.iter().any(|table| overlap(buffer, table)))
        {
            self.honest = false;
            return;
        }
        let rings = (0..self.rings.len() as u64).map(|queue| queue_at(queue) + USED);
        let rings = rings.map(|at| at..at + USED_LEN);
        let allowed: Vec<_> = rings.chain(described.writable.iter().cloned()).collect();
        for page in written.iter().map(|page| page.0) {
            if WATCHED.contains(&page) {
                self.check_page(page, &allowed);
            }
        }
    }

    /// Nothing but what is `allowed` has changed.
    fn check_page(&mut self, page: u64, allowed: &[Range<u64>]) {
        let now: [u8; PAGE as usize] = self.get(page);
        let expected = &mut self.expected[page as usize..(page + PAGE) as usize];
        for one in allowed {
            let start = one.start.max(page);
            let end = one.end.min(page + PAGE);
            if start < end {
                let place = (start - page) as usize..(end - page) as usize;
                expected[place.clone()].copy_from_slice(&now[place]);
            }
        }
        if *expected == now {
            return;
        }
        for (at, (expected, now)) in (page..).zip(expected.iter_mut().zip(now)) {
            assert!(
                *expected == now || self.zeroes && now == 0,
                "{at:#x} was written to: {expected:#x} became {now:#x}"
            );
            *expected = now;
        }
    }

    /// Takes what the device gave back.
    fn check_used(&mut self, queue: usize) {
        let base = queue_at(queue as u64) + USED;
        let now = u16::from_le_bytes(self.get(base + 2));
        let ring = &self.rings[queue];
        // Only a device that zeroes what it is given can have taken all of it back.
        let is_zeros = || self.get::<{ USED_LEN as usize }>(base) == [0; USED_LEN as usize];
        if ring.given_away || self.zeroes && ring.used != 0 && now == 0 && is_zeros() {
            self.rings[queue].given_away = true;
            return;
        }
        while self.rings[queue].used != now {
            let place = u64::from(self.rings[queue].used % QUEUE_SIZE);
            let head = u32::from_le_bytes(self.get(base + 4 + 8 * place));
            let len = u32::from_le_bytes(self.get(base + 8 + 8 * place));
            let ring = &mut self.rings[queue];
            let pending = ring
                .pending
                .iter()
                .position(|one| u32::from(one.head) == head);
            let pending =
                pending.unwrap_or_else(|| panic!("request {head} of queue {queue} was not made"));
            let Pending { head, room } = ring.pending.remove(pending);
            ring.returned.push((head, len));
            assert!(
                room.is_none_or(|room| u64::from(len) <= room),
                "request {head} of queue {queue} had room for {room:?} bytes, {len} were filled"
            );
            ring.used = ring.used.wrapping_add(1);
        }
    }
}
