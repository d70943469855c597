//! How other commands reach a supervisor: a socket in the container's directory, one wish a connection.
//!
//! Invariant: only who may enter the directory reaches it (mode 0700); what is no wish is no wish, whoever says it.
//! Left to others: what comes of it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags};
use sandbox::{Control, Request};
use serde::{Deserialize, Serialize};

const SOCKET: &str = "control";
/// Bytes of a wish.
const WISH_BYTES_MAX: u64 = 1024;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that are heard at once.
const TALKING_MAX: usize = 16;
/// Before the next try, where the host had nothing left.
const PAUSE: Duration = Duration::from_millis(100);

/// What a supervisor is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Wish {
    /// Send this signal to the command.
    Signal(u8),
    /// End the machine, as if by this signal.
    Kill(u8),
}

/// Says it to the supervisor of the container in `dir`.
pub(crate) fn say(dir: &Path, wish: Wish) -> std::io::Result<()> {
    let (_dir, path) = reachable(dir)?;
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{}\n", serde_json::to_string(&wish)?).as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream.take(WISH_BYTES_MAX)).read_line(&mut answer)?;
    match answer.as_str() {
        "ok\n" => Ok(()),
        other => Err(std::io::Error::other(format!("it answered {other:?}"))),
    }
}

/// The socket's path by way of its directory's descriptor: a socket's path is short (unix(7)), a home's need not be.
fn reachable(dir: &Path) -> std::io::Result<(OwnedFd, PathBuf)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    Ok((dir, path.into()))
}

/// Wishes on their way to the container.
#[derive(Clone, Debug)]
pub(crate) struct Wishes {
    bell: Arc<OwnedFd>,
    waiting: Arc<Mutex<VecDeque<Request>>>,
}

impl Wishes {
    pub(crate) fn new() -> std::io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            bell: Arc::new(bell),
            waiting: Arc::default(),
        })
    }

    pub(crate) fn add(&self, request: Request) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push_back(request);
        // It only fails after 2^64 rings.
        let _ = rustix::io::write(&*self.bell, &1_u64.to_ne_bytes());
    }

    fn take(&self) -> Option<Request> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let next = waiting.pop_front();
        if waiting.is_empty() {
            let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
        }
        next
    }

    /// Listens in `dir`, on a thread of its own, for as long as the process lives.
    pub(crate) fn listen(&self, dir: &Path) -> std::io::Result<()> {
        let (held, path) = reachable(dir)?;
        // A supervisor that was killed leaves it.
        match std::fs::remove_file(dir.join(SOCKET)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        drop(held);
        let wishes = self.clone();
        std::thread::Builder::new()
            .name("wishes".into())
            .spawn(move || wishes.serve(&listener))?;
        Ok(())
    }

    /// Each connection has a thread, so that who says nothing keeps nobody waiting; a few at once are enough.
    fn serve(&self, listener: &UnixListener) {
        let talking = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // No descriptors: others may give some back.
                std::thread::sleep(PAUSE);
                continue;
            };
            if talking.fetch_add(1, Ordering::SeqCst) >= TALKING_MAX {
                talking.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (wishes, counted) = (self.clone(), talking.clone());
            let thread = std::thread::Builder::new().name("wish".into());
            let started = thread.spawn(move || {
                // Who says nothing is hung up on.
                let _ = wishes.hear(stream);
                counted.fetch_sub(1, Ordering::SeqCst);
            });
            if started.is_err() {
                talking.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    fn hear(&self, mut stream: UnixStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        BufReader::new((&stream).take(WISH_BYTES_MAX)).read_line(&mut line)?;
        let request = match serde_json::from_str(&line)? {
            Wish::Signal(number @ 1..=64) => Request::Signal(number),
            Wish::Kill(signal @ 1..=64) => Request::Kill { signal },
            Wish::Signal(_) | Wish::Kill(_) => return stream.write_all(b"no such signal\n"),
        };
        self.add(request);
        stream.write_all(b"ok\n")
    }
}

/// Wishes as a container's control; tells when its command started.
pub(crate) struct Told<'a> {
    pub(crate) wishes: Wishes,
    pub(crate) on_start: &'a mut dyn FnMut(),
}

impl Control for Told<'_> {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wishes.bell.as_fd())
    }

    fn take(&mut self) -> Option<Request> {
        self.wishes.take()
    }

    fn started(&mut self) {
        (self.on_start)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_arrive_in_their_order_and_nonsense_does_not() {
        let temp = tempfile::tempdir().expect("made");
        // Longer than a socket's path may be.
        let dir = temp.path().join("d".repeat(120));
        std::fs::create_dir(&dir).expect("made");
        assert!(say(&dir, Wish::Kill(9)).is_err());
        let wishes = Wishes::new().expect("made");
        wishes.listen(&dir).expect("listens");
        say(&dir, Wish::Signal(15)).expect("heard");
        for signal in [0, 65] {
            say(&dir, Wish::Signal(signal)).expect_err("no signal");
        }
        for nonsense in ["", "\n", "{}\n", "{\"signal\":-1}\n", &"[".repeat(10_000)] {
            let (_held, path) = reachable(&dir).expect("there");
            let mut stream = UnixStream::connect(path).expect("connected");
            // It may hang up before all is said.
            let _ = stream.write_all(nonsense.as_bytes());
        }
        // Who says nothing keeps nobody waiting.
        let (_held, path) = reachable(&dir).expect("there");
        let _silent = UnixStream::connect(path).expect("connected");
        say(&dir, Wish::Kill(9)).expect("heard");
        let mut told = Told {
            wishes,
            on_start: &mut || {},
        };
        assert_eq!(told.take(), Some(Request::Signal(15)));
        assert_eq!(told.take(), Some(Request::Kill { signal: 9 }));
        assert_eq!(told.take(), None);
    }
}
