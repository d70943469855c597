//! A drive between a driver that keeps the rules or not and a back end in another process that keeps them or not: what
//! it answers on its socket, and what it writes into the memory that it is given.
//!
//! Whatever it does: of the guest's memory it changes buffers described as writable and no more; a driver hears of each
//! request once; one that starts anew is answered, by a drive that lost its back end too.
#![no_main]

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use fuzz::{BUFFERS, BUFFERS_LEN, Guest, Input, NEXT, QUEUE_SIZE, USED, WRITE, queue_at};
use libfuzzer_sys::fuzz_target;
use ram::{ByteSize, GuestRam};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use virtio::EventSource;
use virtio::block::Cache;
use virtio::block::vhost_user::{Connection, VhostUserBlock};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const STEPS_MAX: usize = 64;
const SECTORS: u64 = 64;

// docs/interop/vhost-user.rst of QEMU
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_CONFIG: u32 = 24;
/// VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_BLK_F_FLUSH.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 9;
/// VHOST_USER_PROTOCOL_F_CONFIG.
const PROTOCOL_FEATURES: u64 = 1 << 9;

/// What the back end was given.
#[derive(Default)]
struct Given {
    memory: Option<MmapRegion<()>>,
    call: Option<OwnedFd>,
    /// Offsets of descriptors, used ring and available ring in the memory.
    rings: [usize; 3],
}

/// What it answers to one question in place of the truth.
struct Lie {
    to: u32,
    bytes: Vec<u8>,
}

/// Answers the next message; none at the end.
fn answer(mut stream: &UnixStream, lie: &Lie, given: &Mutex<Given>) -> Option<()> {
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let into = &mut [IoSliceMut::new(&mut header)];
    let received = recvmsg(stream, into, &mut control, RecvFlags::WAITALL).ok()?;
    if received.bytes != header.len() {
        return None;
    }
    let mut descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    });
    let descriptor = descriptors.next();
    drop(descriptors);
    let mut words = Input(&header);
    let [request, _, len] = [words.word(), words.word(), words.word()];
    let mut payload = vec![0; len as usize];
    stream.read_exact(&mut payload).ok()?;
    let number = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().unwrap());
    let mut given = given.lock().unwrap();
    let body = match request {
        SET_MEM_TABLE => {
            let (base, len) = (number(8), number(16) as usize);
            given.rings = [base as usize; 3];
            let file = FileOffset::new(File::from(descriptor?), 0);
            given.memory = Some(MmapRegion::from_file(file, len).unwrap());
            None
        }
        SET_VRING_ADDR => {
            let base = given.rings[0];
            given.rings = [8, 16, 24].map(|at| number(at) as usize - base);
            None
        }
        SET_VRING_CALL => {
            given.call = descriptor;
            None
        }
        GET_FEATURES => Some(FEATURES.to_le_bytes().to_vec()),
        GET_PROTOCOL_FEATURES => Some(PROTOCOL_FEATURES.to_le_bytes().to_vec()),
        GET_CONFIG => {
            let mut config = payload[..12].to_vec();
            config.extend(SECTORS.to_le_bytes());
            config.resize(12 + 60, 0);
            Some(config)
        }
        _ => None,
    };
    let body = body.filter(|_| request != lie.to || lie.bytes.is_empty());
    if request == lie.to && !lie.bytes.is_empty() {
        // It goes then: nobody is to wait for the rest.
        let _ = stream.write_all(&lie.bytes);
        return None;
    }
    if let Some(body) = body {
        let header = [request, 5, body.len() as u32].map(u32::to_le_bytes);
        stream.write_all(header.as_flattened()).ok()?;
        stream.write_all(&body).ok()?;
    }
    Some(())
}

/// The back end's side of the ring.
struct BackEnd {
    given: Arc<Mutex<Given>>,
    taken: u16,
    used: u16,
}

impl BackEnd {
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let given = self.given.lock().unwrap();
        let mut bytes = [0; N];
        let memory = given.memory.as_ref().unwrap().as_volatile_slice();
        let _ = memory.read_slice(&mut bytes, at);
        bytes
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        let given = self.given.lock().unwrap();
        let memory = given.memory.as_ref().unwrap().as_volatile_slice();
        let _ = memory.write(bytes, at);
    }

    /// The name of the next request.
    fn take(&mut self) -> Option<u16> {
        let [_, _, available] = self.given.lock().unwrap().rings;
        if u16::from_le_bytes(self.get(available + 2)) == self.taken {
            return None;
        }
        let entry = usize::from(self.taken % 128);
        self.taken = self.taken.wrapping_add(1);
        Some(u16::from_le_bytes(self.get(available + 4 + 2 * entry)))
    }

    /// Says that it is done, and that all went well.
    fn done(&mut self, name: u32, status: u8) {
        let [descriptors, used, _] = self.given.lock().unwrap().rings;
        // Its last descriptor is the status's.
        let mut index = name as usize % 128;
        for _ in 0..4 {
            let at = descriptors + 16 * index;
            let flags = u16::from_le_bytes(self.get(at + 12));
            if flags & NEXT == 0 {
                let base = 1 << 20;
                let place = u64::from_le_bytes(self.get(at)).wrapping_sub(base);
                self.put(place as usize, &[status]);
                break;
            }
            index = usize::from(u16::from_le_bytes(self.get(at + 14))) % 128;
        }
        let entry = usize::from(self.used % 128);
        self.put(used + 4 + 8 * entry, &name.to_le_bytes());
        self.used = self.used.wrapping_add(1);
        self.put(used + 2, &self.used.to_le_bytes());
    }

    fn ring(&self) {
        let given = self.given.lock().unwrap();
        if let Some(call) = &given.call {
            let _ = rustix::io::write(call, &1_u64.to_ne_bytes());
        }
    }
}

/// Puts a request together whose data lie among the buffers, and offers it. `out` are the names of those that were: the
/// driver keeps their descriptors as they are.
fn ask(guest: &mut Guest, out: &mut Vec<u16>, input: &mut Input<'_>) {
    let [kind, sector, first, shape] = input.take();
    let (base, first) = (queue_at(0), 3 * (u16::from(first) % (QUEUE_SIZE / 3)));
    for (name, _) in guest.returned(0) {
        out.retain(|one| *one != name);
    }
    if out.contains(&first) {
        return;
    }
    out.push(first);
    let header = BUFFERS + 0x20 * u64::from(first);
    let operation = [0_u32, 1, 4, 8, 0, 1, 11, kind.into()][usize::from(kind % 8)];
    guest.poke(header, &operation.to_le_bytes());
    guest.poke(header + 8, &u64::from(sector).to_le_bytes());
    let data = BUFFERS + 0x400 + u64::from(input.half()) % (BUFFERS_LEN - 0xc00);
    let len = [512, 1024, 20, u32::from(shape) * 8][usize::from(shape % 4)];
    let flags = if operation == 1 { NEXT } else { NEXT | WRITE };
    let at = |n: u16| base + 16 * u64::from(first + n);
    guest.describe(at(0), header, 16, NEXT, first + 1);
    guest.describe(at(1), data, len, flags, first + 2);
    guest.describe(at(2), header + 16, 1, WRITE, 0);
    guest.publish(0, first);
    guest.kick(0);
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let folder = tempfile::tempdir_in(fuzz::scratch()).unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let connection = Connection::open(&path).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let given = Arc::<Mutex<Given>>::default();
    let [which, cache] = input.take();
    let lie = Lie {
        to: [GET_FEATURES, GET_PROTOCOL_FEATURES, GET_CONFIG][usize::from(which % 3)],
        bytes: if which < 64 {
            input.bytes()
        } else {
            Vec::new()
        },
    };
    let (ours, to) = (stream.try_clone().unwrap(), given.clone());
    let answering = std::thread::spawn(move || {
        while answer(&ours, &lie, &to).is_some() {}
        let _ = ours.shutdown(std::net::Shutdown::Both);
    });
    let cache = match cache & 1 {
        0 => Cache::Unsafe,
        _ => Cache::Writeback,
    };
    let Ok(disk) = VhostUserBlock::new(connection, cache) else {
        let _ = stream.shutdown(std::net::Shutdown::Both);
        answering.join().unwrap();
        return;
    };
    let disk = Arc::new(Mutex::new(disk));
    let mut guest = Guest::find(GuestRam::new(ByteSize::mib(2)).unwrap(), disk.clone());
    guest.set_up(0);
    let mut out = Vec::new();
    let mut back_end = BackEnd {
        given,
        taken: 0,
        used: 0,
    };
    for _ in 0..STEPS_MAX {
        if input.0.is_empty() {
            break;
        }
        match input.byte() % 12 {
            0..=3 => ask(&mut guest, &mut out, &mut input),
            4 | 5 => {
                let status = input.byte() % 4;
                if let Some(name) = back_end.take() {
                    back_end.done(name.into(), status);
                }
                back_end.ring();
            }
            6 => back_end.done(input.byte().into(), 0),
            7 => back_end.put(usize::from(input.half()), &input.bytes()),
            8 => back_end.used = input.half(),
            9 => {
                guest.set_up(input.byte().into());
                out.clear();
            }
            _ => {}
        }
        guest.watch(|_| disk.lock().unwrap().on_event());
    }
    guest.check_all();
    // A good driver is answered, if only that there is no disk any more.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    answering.join().unwrap();
    guest.set_up(0);
    guest.watch(|_| disk.lock().unwrap().on_event());
    ask(&mut guest, &mut Vec::new(), &mut Input(&[2]));
    guest.watch(|_| disk.lock().unwrap().on_event());
    // The model follows honest drivers only: the ring itself says.
    let used = u16::from_le_bytes(guest.get(queue_at(0) + USED + 2));
    assert_eq!(used, 1, "a request without an answer");
});
