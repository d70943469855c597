//! A back end for tests: what it is asked on its socket a thread answers, what is in its ring it does when it is told
//! to, honestly or not.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::shadow::{AVAILABLE_AT, BASE, DESCRIPTORS_AT, RING_SIZE, Shadow, USED_AT};
use crate::block::spec::{Config, F_FLUSH};
use crate::feature;

const PROTOCOL_FEATURES: u64 = 1 << 30;
const CONFIG: u64 = 1 << 9;

// docs/interop/vhost-user.rst
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_CONFIG: u32 = 24;

/// How it answers on its socket.
#[derive(Clone, Debug)]
pub(super) struct Manner {
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) sectors: u64,
    /// From this request on it says nothing.
    pub(super) silent_from: Option<u32>,
    /// What it answers to this request, whatever was asked.
    pub(super) answer: Option<(u32, Vec<u8>)>,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            features: feature::VERSION_1 | PROTOCOL_FEATURES | F_FLUSH,
            protocol_features: CONFIG,
            sectors: 4096,
            silent_from: None,
            answer: None,
        }
    }
}

/// What it was given.
#[derive(Debug, Default)]
pub(super) struct Given {
    pub(super) accepted: u64,
    pub(super) memory: Option<File>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    stream: Option<UnixStream>,
}

pub(super) struct FakeBackEnd {
    pub(super) path: PathBuf,
    pub(super) manner: Arc<Mutex<Manner>>,
    pub(super) given: Arc<Mutex<Given>>,
    /// Requests done, by their operation.
    pub(super) done: Vec<u32>,
    pub(super) disk: Vec<u8>,
    next: u16,
    pub(super) used: u16,
    _folder: tempfile::TempDir,
}

/// A request as it finds it.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) head: u16,
    /// Offset, length, whether it is to be filled in.
    pub(super) pieces: Vec<(usize, usize, bool)>,
}

impl FakeBackEnd {
    pub(super) fn start(manner: Manner) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let disk = (0..manner.sectors * 512).map(|at| (at % 251) as u8);
        let disk = disk.collect();
        let manner = Arc::new(Mutex::new(manner));
        let given = Arc::<Mutex<Given>>::default();
        let (asked, to) = (manner.clone(), given.clone());
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            to.lock().unwrap().stream = Some(stream.try_clone().unwrap());
            // The end of the conversation is the end of this thread.
            while answer(&stream, &asked, &to).is_some() {}
        });
        Self {
            path,
            manner,
            given,
            done: Vec::new(),
            disk,
            next: 0,
            used: 0,
            _folder: folder,
        }
    }

    pub(super) fn memory(&self) -> MmapRegion<()> {
        let given = self.given.lock().unwrap();
        let file = given.memory.as_ref().unwrap().try_clone().unwrap();
        MmapRegion::from_file(FileOffset::new(file, 0), Shadow::LEN).unwrap()
    }

    pub(super) fn put(&self, at: usize, bytes: &[u8]) {
        let memory = self.memory();
        memory.as_volatile_slice().write_slice(bytes, at).unwrap();
    }

    pub(super) fn get(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let memory = self.memory();
        memory
            .as_volatile_slice()
            .read_slice(&mut bytes, at)
            .unwrap();
        bytes
    }

    fn get_u16(&self, at: usize) -> u16 {
        let bytes = self.get(at, 2);
        u16::from_le_bytes(bytes.try_into().unwrap())
    }

    /// The next request that it has not looked at.
    pub(super) fn find(&mut self) -> Option<Found> {
        if self.next == self.get_u16(AVAILABLE_AT + 2) {
            return None;
        }
        let entry = usize::from(self.next % RING_SIZE);
        self.next = self.next.wrapping_add(1);
        let head = self.get_u16(AVAILABLE_AT + 4 + 2 * entry);
        let (mut pieces, mut index) = (Vec::new(), usize::from(head));
        loop {
            let bytes = self.get(DESCRIPTORS_AT + 16 * index, 16);
            let descriptor = u128::from_le_bytes(bytes.try_into().unwrap());
            let at = descriptor as u64 - BASE;
            let (len, flags) = ((descriptor >> 64) as u32, (descriptor >> 96) as u16);
            pieces.push((at as usize, len as usize, flags & 2 != 0));
            if flags & 1 == 0 {
                return Some(Found { head, pieces });
            }
            index = (descriptor >> 112) as usize;
        }
    }

    /// Does what a request asks, and says so.
    pub(super) fn serve(&mut self, found: &Found) {
        let header = u128::from_le_bytes(self.get(found.pieces[0].0, 16).try_into().unwrap());
        let (operation, sector) = (header as u32, (header >> 64) as usize);
        self.done.push(operation);
        let (status, data) = found.pieces[1..].split_last().unwrap();
        assert_eq!((status.1, status.2), (1, true));
        let mut at = sector * 512;
        for &(place, len, fill) in data {
            match operation {
                0 => self.put(place, &self.disk[at..at + len]),
                1 => {
                    let bytes = self.get(place, len);
                    self.disk[at..at + len].copy_from_slice(&bytes);
                }
                8 => self.put(place, b"a fake back end's ID"),
                other => panic!("operation {other}"),
            }
            assert_eq!(fill, operation != 1);
            at += len;
        }
        self.put(status.0, &[0]);
        self.answer(found.head.into(), 1);
    }

    /// Does all that there is.
    pub(super) fn serve_all(&mut self) {
        while let Some(found) = self.find() {
            self.serve(&found);
        }
        self.ring();
    }

    /// Says that request `head` is done, whatever that is.
    pub(super) fn answer(&mut self, head: u32, len: u32) {
        let entry = usize::from(self.used % RING_SIZE);
        let bytes = [head.to_le_bytes(), len.to_le_bytes()];
        self.put(USED_AT + 4 + 8 * entry, bytes.as_flattened());
        self.set_used(self.used.wrapping_add(1));
    }

    pub(super) fn set_used(&mut self, used: u16) {
        self.used = used;
        let memory = self.memory();
        let ring = memory.as_volatile_slice();
        ring.store(used.to_le(), USED_AT + 2, Ordering::Release)
            .unwrap();
    }

    /// Interrupts.
    pub(super) fn ring(&self) {
        let given = self.given.lock().unwrap();
        rustix::io::write(given.call.as_ref().unwrap(), &1_u64.to_ne_bytes()).unwrap();
    }

    /// How often it was kicked since it last looked.
    pub(super) fn kicks(&self) -> u64 {
        let given = self.given.lock().unwrap();
        let mut kicks = [0; 8];
        match rustix::io::read(given.kick.as_ref().unwrap(), &mut kicks) {
            Ok(_) => u64::from_ne_bytes(kicks),
            Err(_) => 0,
        }
    }

    pub(super) fn hang_up(&self) {
        let given = self.given.lock().unwrap();
        let stream = given.stream.as_ref().unwrap();
        stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

/// Answers the next message; none at the end.
fn answer(mut stream: &UnixStream, manner: &Mutex<Manner>, given: &Mutex<Given>) -> Option<()> {
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let into = &mut [IoSliceMut::new(&mut header)];
    let received = recvmsg(stream, into, &mut control, RecvFlags::WAITALL).ok()?;
    if received.bytes != 12 {
        return None;
    }
    let mut descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    });
    let descriptor = descriptors.next();
    drop(descriptors);
    let word = |nth: usize| u32::from_le_bytes(header[4 * nth..4 * nth + 4].try_into().unwrap());
    let mut payload = vec![0; word(2) as usize];
    stream.read_exact(&mut payload).ok()?;
    let request = word(0);
    let manner = manner.lock().unwrap().clone();
    let mut given = given.lock().unwrap();
    let body = match request {
        SET_FEATURES => {
            given.accepted = u64::from_le_bytes(payload.try_into().unwrap());
            None
        }
        SET_MEM_TABLE => {
            given.memory = descriptor.map(File::from);
            None
        }
        SET_VRING_KICK => {
            given.kick = descriptor;
            None
        }
        SET_VRING_CALL => {
            given.call = descriptor;
            None
        }
        GET_FEATURES => Some(manner.features.to_le_bytes().to_vec()),
        GET_PROTOCOL_FEATURES => Some(manner.protocol_features.to_le_bytes().to_vec()),
        GET_CONFIG => {
            let mut config = payload[..12].to_vec();
            config.extend(manner.sectors.to_le_bytes());
            config.resize(12 + Config::LEN, 0);
            Some(config)
        }
        _ => None,
    };
    let body = match manner.answer {
        Some((to, bytes)) if to == request => {
            stream.write_all(&bytes).ok()?;
            return Some(());
        }
        _ => body,
    };
    if manner.silent_from.is_some_and(|from| from == request) {
        return Some(());
    }
    if let Some(body) = body {
        let header = [request, 5, body.len() as u32].map(u32::to_le_bytes);
        stream.write_all(header.as_flattened()).ok()?;
        stream.write_all(&body).ok()?;
    }
    Some(())
}
