//! vsock packets, and what the host does at its sockets, at random but with good queues.
//!
//! Whatever they do to each other: the device stays in service; each side hears what the
//! other one said on a connection, from its start and in order; the guest gets no more than
//! it has room for; in the end a good guest is served.
#![no_main]

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use fuzz::{BUFFERS, Guest, Input, NEXT, WRITE, queue_at};
use libfuzzer_sys::fuzz_target;
use ram::{ByteSize, GuestRam};
use virtio::EventSource;
use virtio::vsock::Vsock;

const STEPS_MAX: usize = 64;
const CID: u64 = 3;
const HOST: u64 = 2;
const PORTS: [u32; 4] = [52, 80, 1 << 30, (1 << 30) + 1];
const RX: u64 = 0;
const TX: u64 = 1;
const HEADER_LEN: u32 = 44;
/// A packet of the guest: header, data.
const SENT: u64 = BUFFERS;
const SENT_DATA: u64 = BUFFERS + 0x100;
const SENT_DATA_MAX: u32 = 0x1000;
/// Buffers for the guest's packets.
const ROOMS: u64 = BUFFERS + 0x2000;
const ROOM: u64 = 0x400;
const ROOMS_COUNT: u16 = 8;

// virtio 1.2 §5.10.6
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const DATA: u16 = 5;

#[derive(Clone, Copy, Debug, Default)]
struct Header {
    source: u64,
    target: u64,
    source_port: u32,
    target_port: u32,
    len: u32,
    kind: u16,
    operation: u16,
    flags: u32,
    room: u32,
    consumed: u32,
}

impl Header {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.source.to_le_bytes().to_vec();
        bytes.extend(self.target.to_le_bytes());
        bytes.extend(self.source_port.to_le_bytes());
        bytes.extend(self.target_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.operation.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.room.to_le_bytes());
        bytes.extend(self.consumed.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let mut input = Input(bytes);
        Self {
            source: u64::from_le_bytes(input.take()),
            target: u64::from_le_bytes(input.take()),
            source_port: input.word(),
            target_port: input.word(),
            len: input.word(),
            kind: input.half(),
            operation: input.half(),
            flags: input.word(),
            room: input.word(),
            consumed: input.word(),
        }
    }
}

/// The byte at `place` of everything that is ever said.
fn said(place: u32) -> u8 {
    (place % 251) as u8
}

fn speech(from: u32, len: u32) -> Vec<u8> {
    (from..from + len).map(said).collect()
}

fn check_heard(from: u32, bytes: &[u8]) {
    assert!(
        bytes == speech(from, bytes.len() as u32),
        "something else was said at {from}"
    );
}

/// A connection as the guest knows it.
#[derive(Clone, Copy, Debug, Default)]
struct Connection {
    said: u32,
    heard: u32,
    room: u32,
    consumed: u32,
}

/// The host's end of a connection.
struct Socket {
    stream: UnixStream,
    said: u32,
    heard: u32,
    /// The line before what the guest says, as far as it came.
    answer: Option<Vec<u8>>,
}

struct Rig {
    guest: Guest,
    device: Arc<Mutex<Vsock>>,
    dir: tempfile::TempDir,
    listener: UnixListener,
    sockets: Vec<Socket>,
    /// By the host's port and the guest's.
    connections: HashMap<(u32, u32), Connection>,
    /// Rooms that the device does not have.
    free: Vec<u16>,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(fuzz::scratch()).unwrap();
        let listener = UnixListener::bind(dir.path().join("v_52")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let device = Vsock::new(CID as u32, &dir.path().join("v")).unwrap();
        let device = Arc::new(Mutex::new(device));
        let ram = GuestRam::new(ByteSize::mib(2)).unwrap();
        let mut guest = Guest::find(ram, device.clone());
        guest.set_up(0);
        Self {
            guest,
            device,
            dir,
            listener,
            sockets: Vec::new(),
            connections: HashMap::new(),
            free: (0..ROOMS_COUNT).collect(),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// Gives the device all rooms there are.
    fn post(&mut self) {
        for room in self.free.drain(..) {
            let at = queue_at(RX) + 16 * u64::from(room);
            let buffer = ROOMS + ROOM * u64::from(room);
            self.guest.describe(at, buffer, ROOM as u32, WRITE, 0);
            self.guest.publish(RX, room);
        }
        self.guest.kick(RX);
        self.take();
    }

    /// One turn of the event loop.
    fn turn(&mut self) {
        let device = &self.device;
        self.guest.watch(|_| device.lock().unwrap().on_event());
        self.take();
    }

    /// Sends a packet with `len` bytes of data behind it.
    fn send(&mut self, header: Header, len: u32) {
        let ports = (header.target_port, header.source_port);
        // The device takes no note of others.
        let counts = header.kind == 1 && header.source == CID && header.target == HOST;
        let mut connection = self.connections.get(&ports).copied().unwrap_or_default();
        if counts && header.operation == REQUEST {
            connection = Connection::default();
        }
        let data = speech(connection.said, len);
        if counts {
            connection.room = header.room;
            connection.consumed = header.consumed;
            if header.operation == DATA && header.len <= len {
                connection.said += header.len;
            }
            self.connections.insert(ports, connection);
        }
        self.guest.poke(SENT, &header.bytes());
        self.guest.poke(SENT_DATA, &data);
        let table = queue_at(TX);
        let more = if len > 0 { NEXT } else { 0 };
        self.guest.describe(table, SENT, HEADER_LEN, more, 1);
        self.guest.describe(table + 16, SENT_DATA, len, 0, 0);
        self.guest.publish(TX, 0);
        self.guest.kick(TX);
        // It would wait if too many resets did, which takes more steps.
        assert_eq!(self.guest.returned(TX), [(0, 0)]);
        self.take();
    }

    /// Looks at the packets that came.
    fn take(&mut self) {
        for (room, len) in self.guest.returned(RX) {
            self.free.push(room);
            let buffer = ROOMS + ROOM * u64::from(room);
            let bytes: [u8; ROOM as usize] = self.guest.get(buffer);
            let (header, data) = bytes[..len as usize].split_at(HEADER_LEN as usize);
            let header = Header::parse(header);
            assert_eq!((header.source, header.target), (HOST, CID));
            assert_eq!(header.len as usize, data.len());
            let ports = (header.source_port, header.target_port);
            match header.operation {
                // Also for packets of a kind that there is not.
                RESET => {}
                REQUEST => drop(self.connections.insert(ports, Connection::default())),
                operation => {
                    let connection = self.connections.get_mut(&ports);
                    let connection =
                        connection.expect("a packet of a connection that is not there");
                    if operation == RESPONSE {
                        connection.heard = 0;
                    }
                    assert!(operation == DATA || data.is_empty());
                    check_heard(connection.heard, data);
                    connection.heard += header.len;
                    let unread = connection.heard.wrapping_sub(connection.consumed);
                    assert!(data.is_empty() || unread <= connection.room);
                }
            }
        }
    }

    fn accept(&mut self) {
        if let Ok((stream, _)) = self.listener.accept() {
            stream.set_nonblocking(true).unwrap();
            self.sockets.push(Socket::new(stream, None));
        }
    }

    /// Greets up to the end of the line.
    fn connect(&mut self, greeting: &[u8]) {
        let line = greeting.split_inclusive(|&byte| byte == b'\n').next();
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_nonblocking(true).unwrap();
        (&stream).write_all(line.unwrap_or_default()).unwrap();
        self.sockets.push(Socket::new(stream, Some(Vec::new())));
    }
}

impl Socket {
    fn new(stream: UnixStream, answer: Option<Vec<u8>>) -> Self {
        Self {
            stream,
            said: 0,
            heard: 0,
            answer,
        }
    }

    fn say(&mut self, len: u32) {
        if let Ok(n) = self.stream.write(&speech(self.said, len)) {
            self.said += n as u32;
        }
    }

    /// Reads at most `len` bytes.
    fn hear(&mut self, len: usize) {
        let mut bytes = vec![0; len];
        let bytes = match self.stream.read(&mut bytes) {
            Ok(n) => &bytes[..n],
            Err(error) => {
                let kinds = [ErrorKind::WouldBlock, ErrorKind::ConnectionReset];
                return assert!(kinds.contains(&error.kind()), "{error}");
            }
        };
        for &byte in bytes {
            match &mut self.answer {
                Some(line) if line.last() != Some(&b'\n') => {
                    line.push(byte);
                    assert!(b"OK ".starts_with(&line[..line.len().min(3)]));
                }
                Some(_) | None => {
                    assert_eq!(byte, said(self.heard), "something else was said");
                    self.heard += 1;
                }
            }
        }
    }
}

/// A packet as the guest may send it, and how much data is behind it.
fn packet(input: &mut Input<'_>) -> (Header, u32) {
    let [operation, ports, flags, how] = input.take();
    let credit = |choice: u8, word: u32| match choice % 4 {
        0 => 0,
        1 | 2 => 64 << 10,
        _ => word,
    };
    let len = u32::from(input.half()) % SENT_DATA_MAX;
    let (room, consumed) = (
        credit(how, input.word()),
        credit(how >> 2, u32::from(input.half())),
    );
    let header = Header {
        source: if how & 0xf0 == 0xf0 { 9 } else { CID },
        target: HOST,
        source_port: PORTS[usize::from(ports) % 4],
        target_port: PORTS[usize::from(ports >> 2) % 4],
        len: if how & 0xf0 == 0x10 { room } else { len },
        kind: if how & 0xf0 == 0x20 { 2 } else { 1 },
        operation: u16::from(operation % 9),
        flags: u32::from(flags % 4),
        room,
        consumed: if consumed == 64 << 10 { 0 } else { consumed },
    };
    (header, len)
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut rig = Rig::new();
    rig.post();
    for _ in 0..STEPS_MAX {
        if input.0.is_empty() {
            break;
        }
        let [step, which] = input.take();
        let which = usize::from(which % 8);
        match step % 12 {
            0..=3 => {
                let (header, len) = packet(&mut input);
                rig.send(header, len);
            }
            4 => rig.post(),
            5 => rig.turn(),
            6 => rig.connect(b"CONNECT 80\n"),
            7 => rig.connect(&input.bytes()),
            8 => rig.accept(),
            9 => {
                let len = u32::from(input.half());
                if let Some(socket) = rig.sockets.get_mut(which) {
                    socket.say(len);
                }
            }
            10 => {
                let len = usize::from(input.half());
                if let Some(socket) = rig.sockets.get_mut(which) {
                    socket.hear(len);
                }
            }
            _ => {
                let how = input.byte();
                if which < rig.sockets.len() {
                    let _ = match how % 4 {
                        0 => {
                            rig.sockets.remove(which);
                            Ok(())
                        }
                        1 => rig.sockets[which].stream.shutdown(Shutdown::Read),
                        2 => rig.sockets[which].stream.shutdown(Shutdown::Write),
                        _ => rig.sockets[which].stream.shutdown(Shutdown::Both),
                    };
                }
            }
        }
        assert!(!rig.guest.needs_reset());
    }
    assert!(rig.guest.honest);
    rig.guest.check_all();

    // Whatever happened: after a reset a good guest gets what it wants.
    rig.sockets.clear();
    while rig.listener.accept().is_ok() {}
    rig.connections.clear();
    rig.guest.set_up(0);
    rig.free = (0..ROOMS_COUNT).collect();
    rig.post();
    let good = Header {
        source: CID,
        target: HOST,
        source_port: 1000,
        target_port: 52,
        kind: 1,
        operation: REQUEST,
        room: 64 << 10,
        ..Header::default()
    };
    rig.send(good, 0);
    rig.send(
        Header {
            operation: DATA,
            len: 4,
            ..good
        },
        4,
    );
    rig.accept();
    let mut socket = rig.sockets.pop().expect("the device connects");
    socket.hear(10);
    assert_eq!(socket.heard, 4, "the device does not forward");
});
