//! What is said to a back end, on its socket.
//!
//! ```text
//! connected ──agree──▶ features, configuration ──hand over──▶ memory, ring: it works
//!                                                   asked anew ─▶ configuration
//! ```
//!
//! Invariant: nobody waits for a back end longer than [`PATIENCE`]: for all that there is to agree on, for one question later. Once a question got no answer in time none
//! is asked any more: answers could not be told apart.
//!
//! Left to others: what is in memory and ring (`shadow`).

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::shadow::{AVAILABLE_AT, BASE, DESCRIPTORS_AT, RING_SIZE, Shadow, USED_AT};
use crate::block::spec::Config;
use crate::{Error, feature};

/// How long a back end may take until it works, and for each question after that.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// A back end that was reached, and that nothing was said to yet.
#[derive(Debug)]
pub struct Connection {
    path: PathBuf,
    stream: UnixStream,
}

impl Connection {
    /// Connects to the socket at `path`; never waits.
    ///
    /// # Errors
    /// [`Error::ConnectBackEnd`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::ConnectBackEnd {
            path: path.to_owned(),
            source,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let socket = socket.map_err(|errno| failed(errno.into()))?;
        SocketAddrUnix::new(path)
            .and_then(|address| rustix::net::connect(&socket, &address))
            .map_err(|errno| failed(errno.into()))?;
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            stream,
        })
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What both sides agreed on.
pub(super) struct Agreed {
    /// Feature bits of the disk's.
    pub(super) features: u64,
    pub(super) config: [u8; Config::LEN],
}

/// The conversation with a back end.
pub struct Session {
    path: PathBuf,
    /// The same socket as the front end's.
    stream: UnixStream,
    front_end: Mutex<Frontend>,
    silent: AtomicBool,
    /// When it has to work.
    until: Instant,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Agrees with the back end on its disk, with those of the features `wanted` that it has.
    pub(super) fn agree(connection: Connection, wanted: u64) -> Result<(Self, Agreed), Error> {
        let Connection { path, stream } = connection;
        let ours = stream.try_clone().map_err(|source| Error::Host {
            doing: "duplicate a socket",
            source,
        })?;
        let session = Self {
            path,
            stream: ours,
            front_end: Mutex::new(Frontend::from_stream(stream, 1)),
            silent: AtomicBool::new(false),
            until: Instant::now() + PATIENCE,
        };
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let offered = session.ask("say what it offers", session.until, |front_end| {
            front_end.set_owner()?;
            let offered = front_end.get_features()?;
            let asked = match offered & protocol {
                0 => VhostUserProtocolFeatures::empty(),
                _ => front_end.get_protocol_features()?,
            };
            Ok((offered, asked))
        });
        let (offered, asked) = offered?;
        let lacks = |what| {
            Err(Error::BackEndLacks {
                path: session.path.clone(),
                what,
            })
        };
        if offered & feature::VERSION_1 == 0 {
            return lacks("VIRTIO_F_VERSION_1");
        }
        if !asked.contains(VhostUserProtocolFeatures::CONFIG) {
            return lacks("VHOST_USER_PROTOCOL_F_CONFIG");
        }
        let features = offered & wanted;
        session.ask("take what was agreed on", session.until, |front_end| {
            front_end.set_protocol_features(VhostUserProtocolFeatures::CONFIG)?;
            front_end.set_features(features | feature::VERSION_1 | protocol)
        })?;
        let config = session.config_until(session.until)?;
        Ok((session, Agreed { features, config }))
    }

    /// Hands memory and ring over: from now on it works.
    pub(super) fn hand_over(&self, shadow: &Shadow) -> Result<(), Error> {
        let memory = VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: Shadow::LEN as u64,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: shadow.file().as_raw_fd(),
        };
        let ring = VringConfigData {
            queue_max_size: RING_SIZE,
            queue_size: RING_SIZE,
            flags: 0,
            desc_table_addr: BASE + DESCRIPTORS_AT as u64,
            used_ring_addr: BASE + USED_AT as u64,
            avail_ring_addr: BASE + AVAILABLE_AT as u64,
            log_addr: None,
        };
        self.ask("take its memory and its ring", self.until, |front_end| {
            front_end.set_mem_table(&[memory])?;
            front_end.set_vring_num(0, RING_SIZE)?;
            front_end.set_vring_addr(0, &ring)?;
            front_end.set_vring_base(0, 0)?;
            front_end.set_vring_call(0, shadow.call())?;
            front_end.set_vring_kick(0, shadow.kick_event())?;
            front_end.set_vring_enable(0, true)?;
            // None of these is answered. This is, after them.
            front_end.get_features().map(drop)
        })
    }

    /// Asks how its disk is now.
    ///
    /// # Errors
    /// [`Error::BackEnd`], [`Error::BackEndSilent`].
    pub fn config(&self) -> Result<[u8; Config::LEN], Error> {
        self.config_until(Instant::now() + PATIENCE)
    }

    fn config_until(&self, until: Instant) -> Result<[u8; Config::LEN], Error> {
        let bytes = self.ask("say how its disk is", until, |front_end| {
            let empty = [0; Config::LEN];
            let flags = VhostUserConfigFlags::WRITABLE;
            let (_, bytes) = front_end.get_config(0, Config::LEN as u32, flags, &empty)?;
            Ok(bytes)
        })?;
        let mut config = [0; Config::LEN];
        config
            .iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = from);
        Ok(config)
    }

    /// Its socket, which hangs up when the back end goes.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// The socket's place.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Has the back end know that it is not needed any more.
    pub(super) fn end(&self) {
        // It fails if the other end is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Whoever does not answer in time is not listened to any more; it may go on with its ring.
    fn ask<T>(
        &self,
        doing: &'static str,
        until: Instant,
        talk: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Error> {
        let silent = || Error::BackEndSilent {
            path: self.path.clone(),
            doing,
            seconds: PATIENCE.as_secs(),
        };
        let mut front_end = self
            .front_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.silent.load(Ordering::SeqCst) {
            return Err(silent());
        }
        let (answered, waiting) = channel::<()>();
        let answer = std::thread::scope(|scope| {
            // The library takes a time limit of the socket's for a reason to try again for ever.
            let watch = std::thread::Builder::new()
                .name("patience".to_owned())
                .spawn_scoped(scope, move || {
                    let patience = until.saturating_duration_since(Instant::now());
                    if waiting.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                        self.silent.store(true, Ordering::SeqCst);
                        let _ = self.stream.shutdown(Shutdown::Read);
                    }
                });
            watch.map_err(|source| Error::Host {
                doing: "start a thread that waits for a back end",
                source,
            })?;
            let answer = talk(&mut front_end);
            drop(answered);
            answer.map_err(|source| Error::BackEnd {
                path: self.path.clone(),
                doing,
                source,
            })
        });
        match self.silent.load(Ordering::SeqCst) {
            true => Err(silent()),
            false => answer,
        }
    }
}
