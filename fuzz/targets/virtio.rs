//! Devices behind their MMIO registers: what a hostile driver writes into registers, rings
//! and buffers, what the host asks of them meanwhile, what they then do in their event loop,
//! and how they go on from a saved state. The first byte chooses the device; see
//! [`fuzz::Guest`] for what must hold.
#![no_main]

use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fuzz::{
    AVAILABLE, BUFFERS, BUFFERS_LEN, Guest, INDIRECT, Input, NEXT, QUEUE_SIZE, QUEUES_MAX, TABLES,
    TABLES_LEN, WRITE, queue_at,
};
use libfuzzer_sys::fuzz_target;
use ram::{ByteSize, Further, Gpa, GuestRam};
use virtio::rate_limiter::{Limit, Limits};
use virtio::transport::SavedTransport;
use virtio::{EventSource, VirtioDevice, balloon, block, mem, net, pmem, rng, vsock};

/// The driver's steps in one input.
const STEPS_MAX: usize = 64;

/// A device and its host.
struct Parts {
    device: Arc<Mutex<dyn VirtioDevice>>,
    events: Option<Arc<Mutex<dyn EventSource>>>,
    /// The host's doing.
    host: Box<dyn FnMut(u8)>,
}

impl Parts {
    fn new<D: VirtioDevice + 'static>(
        device: D,
        mut host: impl FnMut(&mut D, u8) + 'static,
    ) -> Self {
        let device = Arc::new(Mutex::new(device));
        Self {
            device: device.clone(),
            events: None,
            host: Box::new(move |how| host(&mut device.lock().unwrap(), how)),
        }
    }

    fn with_events<D: VirtioDevice + EventSource + 'static>(
        device: D,
        mut host: impl FnMut(&mut D, u8) + 'static,
    ) -> Self {
        let device = Arc::new(Mutex::new(device));
        Self {
            device: device.clone(),
            events: Some(device.clone()),
            host: Box::new(move |how| host(&mut device.lock().unwrap(), how)),
        }
    }
}

/// The driver of a device and the device.
struct Machine {
    which: u8,
    guest: Guest,
    parts: Parts,
}

/// A few requests at once, more in a moment.
fn few() -> Limits {
    let limit = |size| Limit {
        size,
        one_time_burst: 0,
        refill_ms: 1,
    };
    Limits {
        bandwidth: Some(limit(2048)),
        ops: Some(limit(4)),
    }
}

fn limits(how: u8) -> Limits {
    if how & 1 == 0 {
        few()
    } else {
        Limits::default()
    }
}

fn source(limits: Limits) -> Parts {
    let rng = rng::Rng::new(limits).unwrap();
    Parts::with_events(rng, |_, _| {})
}

fn disk(access: block::Access, cache: block::Cache, how_much: Limits) -> Parts {
    let file = tempfile::NamedTempFile::new_in(fuzz::scratch()).unwrap();
    file.as_file().set_len(64 << 10).unwrap();
    let disk = block::Block::open(file.path(), access, cache, how_much).unwrap();
    Parts::with_events(disk, move |disk, how| match how % 4 {
        0 => file.as_file().set_len(u64::from(how) << 9).unwrap(),
        1 => disk.update_path(file.path()).unwrap(),
        _ => disk.update_limiter(limits(how)),
    })
}

/// The host listens on one port, says a word to whoever connects, and calls the guest.
fn cable() -> Parts {
    let dir = tempfile::tempdir_in(fuzz::scratch()).unwrap();
    let path = dir.path().join("v");
    let listener = UnixListener::bind(dir.path().join("v_1024")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let vsock = vsock::Vsock::new(3, &path).unwrap();
    let mut streams: Vec<UnixStream> = Vec::new();
    Parts::with_events(vsock, move |_, how| match how % 4 {
        0 => {
            let _ = dir.path();
            streams.extend(listener.accept().map(|(stream, _)| stream));
        }
        1 => {
            let stream = UnixStream::connect(&path).unwrap();
            stream.set_nonblocking(true).unwrap();
            let _ = (&stream).write(b"CONNECT 80\n");
            streams.push(stream);
        }
        2 => drop(streams.pop()),
        _ => {
            for mut stream in &streams {
                let _ = stream.write(&[how; 100]);
            }
        }
    })
}

fn balloon(ram: &GuestRam) -> Parts {
    let settings = balloon::Settings {
        amount_mib: 1,
        deflate_on_oom: true,
        statistics_interval_s: 1,
        hinting: true,
        reporting: true,
    };
    let balloon = balloon::Balloon::new(settings, ram).unwrap();
    Parts::with_events(balloon, |balloon, how| {
        let number = u16::from(how >> 3);
        let _ = match how % 8 {
            0 => balloon.update(number.into()),
            1 => balloon.start_hinting(number & 1 != 0),
            2 => balloon.stop_hinting(),
            3 => balloon.hinting().map(drop),
            4 => balloon.statistics().map(drop),
            _ => balloon.update_statistics_interval(number),
        };
    })
}

/// One end of a cable.
struct Cable(UnixDatagram);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl net::Link for Cable {
    fn set_offloads(&mut self, _: net::Offloads) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sends every frame back that begins with a 9.
#[derive(Default)]
struct Echo(Vec<Vec<u8>>);

impl net::Neighbour for Echo {
    fn is_for_me(&self, frame: &[u8]) -> bool {
        frame.first() == Some(&9)
    }

    fn take(&mut self, frame: &[u8], _: Instant) {
        assert_eq!(frame.first(), Some(&9));
        self.0.push(frame[..frame.len().min(1514)].to_vec());
    }

    fn next_frame(&mut self, _: Instant) -> Option<Vec<u8>> {
        self.0.pop()
    }

    fn poll_at(&mut self, now: Instant) -> Option<Instant> {
        (!self.0.is_empty()).then_some(now)
    }
}

/// The host sends frames of all lengths, and looks at the guest's.
fn interface(rx_limits: Limits, tx_limits: Limits) -> Parts {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    let settings = net::Settings {
        mac: Some([2, 0, 0, 0, 0, 7]),
        mtu: Some(1500),
        rx_limits,
        tx_limits,
    };
    let neighbour = Some(Box::<Echo>::default() as Box<dyn net::Neighbour>);
    let net = net::Net::new(settings, Box::new(Cable(near)), neighbour).unwrap();
    Parts::with_events(net, move |net, how| match how % 4 {
        0 | 1 => {
            let frame = vec![how; usize::from(how) << (how >> 5)];
            let _ = far.send(&frame);
        }
        2 => {
            let mut frame = vec![0; 1 << 17];
            if let Ok(len) = far.recv(&mut frame) {
                // Behind virtio's header: two addresses and a type, and what was taken apart.
                assert!(
                    (12 + 14..=12 + 65550).contains(&len),
                    "a frame of {len} bytes"
                );
                assert_ne!(frame[12], 9, "the neighbour's frame");
            }
        }
        _ => net.update_limits(limits(how), limits(how >> 1)),
    })
}

/// Flushes reach another file than the one in memory: which one is all the same.
fn persistent(ram: &GuestRam, how_much: Limits) -> Parts {
    let region = ram.regions().last().unwrap();
    let file = tempfile::tempfile_in(fuzz::scratch()).unwrap();
    let pmem = pmem::Pmem::new(file, region, how_much).unwrap();
    Parts::with_events(pmem, |pmem, how| pmem.update_limits(limits(how)))
}

/// Of which nothing is plugged.
fn pluggable(ram: &GuestRam) -> Parts {
    let region = ram.regions().last().unwrap();
    for block in (0..region.len).step_by(PLUG_BLOCK as usize) {
        let _ = ram.unplug(Gpa(region.start.0 + block), PLUG_BLOCK);
    }
    let mem = mem::Mem::new(ram, region, 4 << 20).unwrap();
    Parts::new(mem, |mem, how| {
        let _ = mem.request(u32::from(how % 20));
        let status = mem.status();
        assert!(status.plugged_mib <= status.total_mib);
        assert!(status.requested_mib <= status.total_mib);
    })
}

/// Bytes that are plugged at once.
const PLUG_BLOCK: u64 = 2 << 20;
const KINDS: u8 = 14;

fn parts(which: u8, ram: &GuestRam) -> Parts {
    use block::{Access, Cache};
    let no_limits = Limits::default();
    match which % KINDS {
        0 => source(no_limits),
        1 => disk(Access::ReadWrite, Cache::Writeback, no_limits),
        2 => disk(Access::ReadOnly, Cache::Unsafe, no_limits),
        3 => cable(),
        4 => balloon(ram),
        5 => persistent(ram, no_limits),
        6 => pluggable(ram),
        7 => source(few()),
        8 => disk(Access::ReadWrite, Cache::Unsafe, few()),
        9 | 11 => persistent(ram, few()),
        10 => disk(Access::ReadWrite, Cache::Unsafe, no_limits),
        12 => interface(no_limits, no_limits),
        _ => interface(few(), few()),
    }
}

/// The memory of a machine with such a device.
fn memory(which: u8) -> GuestRam {
    let file = |read_only| {
        let file = tempfile::tempfile_in(fuzz::scratch()).unwrap();
        file.set_len(4096).unwrap();
        vec![Further::File { file, read_only }]
    };
    let (len, block) = (16 << 20, PLUG_BLOCK);
    let further = match which % KINDS {
        5 | 11 => file(false),
        9 => file(true),
        6 => vec![Further::Pluggable { len, block }],
        _ => Vec::new(),
    };
    GuestRam::with(ByteSize::mib(2), further).unwrap()
}

impl Machine {
    fn new(which: u8) -> Self {
        let ram = memory(which);
        let parts = parts(which, &ram);
        let mut guest = Guest::find(ram, parts.device.clone());
        // The balloon.
        guest.zeroes = which % KINDS == 4;
        Self {
            which,
            guest,
            parts,
        }
    }

    /// As after a snapshot, in which bytes may have changed.
    fn move_on(&mut self, input: &mut Input<'_>) {
        let changes: Vec<[u8; 3]> = (0..input.byte() % 4).map(|_| input.take()).collect();
        let change = |saved: &SavedTransport| {
            let mut bytes = postcard::to_stdvec(saved).unwrap();
            for [low, high, byte] in changes {
                let at = usize::from(u16::from_le_bytes([low, high])) % bytes.len();
                bytes[at] = byte;
            }
            postcard::from_bytes(&bytes).ok()
        };
        let (which, parts) = (self.which, &mut self.parts);
        let new = |ram: &GuestRam| {
            *parts = self::parts(which, ram);
            parts.device.clone()
        };
        self.guest.move_on(new, change);
    }

    fn events(&mut self) {
        if let Some(events) = &self.parts.events {
            self.guest.watch(|_| events.lock().unwrap().on_event());
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let guest = &mut self.guest;
        let [kind, queue] = input.take();
        let queue = u64::from(queue) % QUEUES_MAX;
        let base = queue_at(queue);
        match kind % 13 {
            0 => {
                let register = u64::from(input.byte()) << 2;
                guest.write(register, input.word());
            }
            1 => {
                let [low, high, len] = input.take();
                let mut data = vec![0; usize::from(len % 9)];
                guest.read_into(u16::from_le_bytes([low, high]).into(), &mut data);
            }
            2 => {
                let at = u64::from(input.half());
                // Behind the descriptors the rings are, of which the model knows.
                guest.honest &= at + 256 <= AVAILABLE;
                guest.poke(base + at, &input.bytes());
            }
            3 | 4 => {
                let at = u64::from(input.half()) % BUFFERS_LEN;
                guest.poke(BUFFERS + at, &input.bytes());
            }
            5 | 6 => {
                // A descriptor whose buffer is among the buffers.
                let [index, flags] = input.take();
                let at = u64::from(input.half()) % BUFFERS_LEN;
                let len = input.half();
                let [next] = input.take();
                let index = u64::from(u16::from(index) % QUEUE_SIZE);
                let flags = u16::from(flags) & (NEXT | WRITE);
                let next = u16::from(next) % (QUEUE_SIZE + 1);
                guest.describe(
                    base + 16 * index,
                    BUFFERS + at,
                    (len % 0x1800).into(),
                    flags,
                    next,
                );
            }
            7 => {
                // An indirect table, and the descriptor that points to it.
                let [index, entries, at] = input.take();
                let table = TABLES + 16 * u64::from(at) % TABLES_LEN;
                for entry in 0..u64::from(entries % 8) {
                    let flags = u16::from(input.byte()) & (NEXT | WRITE);
                    let at = u64::from(input.half()) % BUFFERS_LEN;
                    let len = input.half() % 0x800;
                    guest.describe(
                        table + 16 * entry,
                        BUFFERS + at,
                        len.into(),
                        flags,
                        entry as u16 + 1,
                    );
                }
                let index = u64::from(u16::from(index) % QUEUE_SIZE);
                let len = 16 * u32::from(entries % 8);
                guest.describe(base + 16 * index, table, len, INDIRECT, 0);
            }
            8 => (self.parts.host)(input.byte()),
            12 => self.move_on(input),
            9 => {
                // What a rate limiter holds back comes later.
                if input.byte() >= 0xf0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                self.events();
            }
            _ => {
                let [first, heads] = input.take();
                for n in 0..u16::from(heads % 4) {
                    guest.publish(queue, (u16::from(first) + n) % QUEUE_SIZE);
                }
                guest.kick(queue);
                self.events();
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let [which, refused] = input.take();
    let mut machine = Machine::new(which & 0x7f);
    if which & 0x80 == 0 {
        machine.guest.set_up(refused.into());
    }
    for _ in 0..STEPS_MAX {
        if input.0.is_empty() {
            break;
        }
        machine.step(&mut input);
    }
    machine.guest.check_all();
    // A good driver can still use it.
    machine.guest.set_up(0);
    machine.events();
    assert_eq!(
        machine.guest.read(0x70),
        15,
        "the device refuses a good driver"
    );
});
