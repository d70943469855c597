//! The Unix sockets by which the host reaches us and we reach the host.
//!
//! Invariant: the path of a [`Listener`] is gone when the listener is, unless
//! somebody else has put something there meanwhile.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::Error;

/// Listens on the path where the host connects.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of what we put there.
    identity: Option<(u64, u64)>,
}

impl Listener {
    /// Takes `path`, replacing a socket that a dead process left behind.
    pub(super) fn bind(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::VsockListen {
            path: path.into(),
            source,
        };
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(there) if !there.file_type().is_socket() => {
                return Err(Error::VsockBlocked { path: path.into() });
            }
            Ok(_) => match connect(path) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(failed)?;
                }
                // Connected, or too many wait: somebody is there.
                _ => return Err(Error::VsockInUse { path: path.into() }),
            },
        }
        let socket = UnixListener::bind(path).map_err(failed)?;
        let identity = identity(path);
        let listener = Self {
            socket,
            path: path.into(),
            identity,
        };
        listener.socket.set_nonblocking(true).map_err(failed)?;
        Ok(listener)
    }

    /// The next connection that waits, if one does.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        Ok(UnixStream::from(rustix::net::accept_with(
            &self.socket,
            flags,
        )?))
    }

    /// Connects to whoever listens for `port` of the guest: `path_<port>`.
    pub(super) fn connect_to_port(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        connect(Path::new(&path))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Nothing is left to do if it fails; the next start clears it away.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Connects without ever waiting: a full backlog is an error.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket: OwnedFd =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}
