//! A fake guest and a fake host around the device.

mod flow;
mod places;
mod random;
mod restored;
mod talk;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Vsock;
use super::connection::BUFFER_BYTES;
use super::muxer::CONNECTIONS_MAX;
use super::spec::{
    HEADER_LEN, HOST_CID, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
    TYPE_STREAM,
};
use crate::fake_driver::{BUFFERS, Buffer, FakeDriver};
use crate::{Error, EventSource};

const CID: u32 = 3;
const RX: usize = 0;
const TX: usize = 1;
const RX_BUFFERS: u64 = BUFFERS + 0x10_0000;
const RX_LEN: u32 = HEADER_LEN as u32 + 4096;

/// A guest's driver, a host's files, and the event loop between them.
struct Rig {
    driver: FakeDriver,
    vsock: Arc<Mutex<Vsock>>,
    dir: tempfile::TempDir,
    /// What the guest says of its buffers in each packet.
    room: u32,
    consumed: u32,
}

/// Without buffers for the device to fill.
fn starved_rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let vsock = Arc::new(Mutex::new(Vsock::new(CID, &dir.path().join("v")).unwrap()));
    let driver = FakeDriver::start(vsock.clone());
    Rig {
        driver,
        vsock,
        dir,
        room: 64 << 10,
        consumed: 0,
    }
}

fn rig() -> Rig {
    let mut rig = starved_rig();
    rig.post(32);
    rig
}

impl Rig {
    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// Listens where guests connect to `port`.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    fn post(&mut self, buffers: usize) {
        for _ in 0..buffers {
            self.post_one();
        }
        self.driver.kick(RX);
    }

    fn post_one(&mut self) {
        let at = RX_BUFFERS + 0x2000 * u64::from(self.driver.next_head(RX));
        self.driver.add(RX, &[Buffer::In(at, RX_LEN)]);
    }

    /// One turn of the event loop, if it has anything to do within 50 ms.
    fn turn(&self) -> bool {
        let mut vsock = self.vsock.lock().unwrap();
        let fd = vsock.fd();
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)).unwrap() > 0;
        if ready {
            vsock.on_event();
        }
        ready
    }

    /// The next packet for the guest that is there already.
    fn taken(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.driver.used(RX)?;
        let bytes = self
            .driver
            .get(RX_BUFFERS + 0x2000 * u64::from(head), len as usize);
        let (header, data) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
        let header = Header::parse(header);
        assert_eq!(header.len as usize, data.len());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
        assert_eq!(header.kind, TYPE_STREAM);
        self.post_one();
        self.driver.handle_interrupt();
        Some((header, data.to_vec()))
    }

    /// The next packet for the guest, turning the event loop until it comes.
    fn take(&mut self) -> (Header, Vec<u8>) {
        let limit = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(packet) = self.taken() {
                return packet;
            }
            assert!(Instant::now() < limit, "no packet for the guest");
            self.turn();
        }
    }

    /// The next packet, which is to be of kind `op`.
    fn expect(&mut self, op: Operation) -> (Header, Vec<u8>) {
        let (header, data) = self.take();
        assert_eq!(header.op, op as u16, "{header:?}");
        (header, data)
    }

    fn expect_nothing(&mut self) {
        while self.turn() {}
        assert!(self.taken().is_none());
    }

    /// Sends a packet from the guest's `port` to the host's.
    fn send(&mut self, op: Operation, ports: (u32, u32), flags: u32, data: &[u8]) {
        self.send_raw(&self.header(op, ports, flags, data.len()), data);
    }

    fn header(&self, op: Operation, ports: (u32, u32), flags: u32, len: usize) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.0,
            dst_port: ports.1,
            len: len as u32,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: self.room,
            fwd_cnt: self.consumed,
        }
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.driver.put(BUFFERS, &header.bytes());
        self.driver.put(BUFFERS + 0x100, data);
        let mut buffers = vec![Buffer::Out(BUFFERS, HEADER_LEN as u32)];
        if !data.is_empty() {
            buffers.push(Buffer::Out(BUFFERS + 0x100, data.len() as u32));
        }
        assert_eq!(self.driver.request(TX, &buffers), 0);
        assert!(!self.driver.needs_reset());
    }

    /// A connection that the guest opened: its ports and the host's end.
    fn guest_connects(&mut self, guest: u32, host: u32) -> ((u32, u32), UnixStream) {
        let listener = self.listen(host);
        self.send(Operation::Request, (guest, host), 0, &[]);
        let (response, _) = self.expect(Operation::Response);
        assert_eq!((response.dst_port, response.src_port), (guest, host));
        assert_eq!(response.buf_alloc, BUFFER_BYTES);
        let (stream, _) = listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        std::fs::remove_file(self.dir.path().join(format!("v_{host}"))).unwrap();
        ((guest, host), stream)
    }

    /// A connection that the host opened, as the guest's port is `guest`.
    fn host_connects(&mut self, guest: u32) -> ((u32, u32), UnixStream) {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        writeln!(stream, "CONNECT {guest}").unwrap();
        let (request, _) = self.expect(Operation::Request);
        assert_eq!(request.dst_port, guest);
        let ports = (guest, request.src_port);
        self.send(Operation::Response, ports, 0, &[]);
        let answer = format!("OK {}\n", request.src_port);
        assert_eq!(read(&mut stream, answer.len()), answer.as_bytes());
        (ports, stream)
    }

    fn connections(&self) -> usize {
        self.vsock.lock().unwrap().connection_count()
    }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Whether the other end is closed (reset, when it left something unread).
fn at_end(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}
