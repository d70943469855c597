//! TAP devices of the host (Documentation/networking/tuntap.rst): the far end of a
//! guest's network cable. Each read of the descriptor is one frame behind a
//! `virtio_net_hdr`, each write is one.
//!
//! Invariant: a device is never made here, so none is left behind: it exists before, with
//! the address, bridge or filter that whoever made it gave it, or opening it fails.
//!
//! Left to others: frames (`virtio`), addresses and routes (whoever made the device).

mod ioctl;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

pub use ioctl::offload;

/// Bytes of the header before each frame: with `num_buffers`, as from virtio 1.0 on.
pub const HEADER_BYTES: i32 = 12;
/// Bytes of a name (netdevice(7): `IFNAMSIZ` without the NUL).
const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;
const DRIVER: &str = "/dev/net/tun";

/// Why a TAP device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host has no TUN/TAP driver, or not for this user.
    #[error("failed to open {DRIVER}: load the tun module, or ask for access to it")]
    Driver {
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Nobody made it.
    #[error(
        "there is no network device {name:?}: make it with ip tuntap add dev {name} mode tap user $USER"
    )]
    Missing {
        /// The device.
        name: String,
    },
    /// Another process has it.
    #[error("TAP device {name:?} is in use by another process")]
    InUse {
        /// The device.
        name: String,
    },
    /// It is another user's.
    #[error(
        "TAP device {name:?} is not this user's: make it with ip tuntap add dev {name} mode tap user $USER"
    )]
    Forbidden {
        /// The device.
        name: String,
    },
    /// It is no TAP device, or one with several queues.
    #[error("network device {name:?} is not a TAP device of one queue")]
    NotATap {
        /// The device.
        name: String,
    },
    /// Something else.
    #[error("failed to use TAP device {name:?}")]
    Host {
        /// The device.
        name: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// A TAP device that is plugged in. Unplugged when dropped; the device itself stays.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
}

impl Tap {
    /// Plugs into the device `name`, of which this process is then the only user. Reads
    /// and writes never wait.
    ///
    /// # Errors
    /// [`Error`] says what is the matter with it.
    pub fn open(name: &str) -> Result<Self, Error> {
        let name_of = || name.to_owned();
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() > NAME_BYTES_MAX || bytes.contains(&0) {
            return Err(Error::Missing { name: name_of() });
        }
        let driver_failed = |errno: Errno| Error::Driver {
            source: errno.into(),
        };
        let host = |errno: Errno| Error::Host {
            name: name_of(),
            source: errno.into(),
        };
        // The driver makes a device that is not there, and one made so goes with us.
        match index(name) {
            Ok(_) => {}
            Err(Errno::NODEV) => return Err(Error::Missing { name: name_of() }),
            Err(errno) => return Err(host(errno)),
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(DRIVER, flags, Mode::empty()).map_err(driver_failed)?;
        ioctl::attach(&file, bytes).map_err(|errno| match errno {
            Errno::BUSY => Error::InUse { name: name_of() },
            Errno::PERM => Error::Forbidden { name: name_of() },
            Errno::INVAL => Error::NotATap { name: name_of() },
            errno => host(errno),
        })?;
        ioctl::set_header_bytes(&file, HEADER_BYTES).map_err(host)?;
        ioctl::set_offloads(&file, 0).map_err(host)?;
        Ok(Self { file })
    }

    /// Says what the reader of frames can do itself: bits of [`offload`]. Whatever it
    /// cannot, the host does before.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` for a combination that it does not know.
    pub fn set_offloads(&self, bits: u32) -> std::io::Result<()> {
        Ok(ioctl::set_offloads(&self.file, bits)?)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A network device's number. Any socket may ask; this kind is one that monitors may make.
fn index(name: &str) -> rustix::io::Result<u32> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    rustix::net::netdevice::name_to_index(&socket, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_neither_made_nor_used() {
        for name in ["kombi-none", "", "a-name-that-is-too-long", "a\0b"] {
            let refused = Tap::open(name);
            assert!(matches!(refused, Err(Error::Missing { .. })), "{refused:?}");
        }
        assert_eq!(index("kombi-none"), Err(Errno::NODEV));
    }

    #[test]
    fn a_device_of_another_kind_is_refused() {
        let refused = Tap::open("lo").unwrap_err();
        // Without the driver, or the right to use it, the host says so first.
        let said = refused.to_string();
        assert!(
            matches!(
                refused,
                Error::NotATap { .. } | Error::Driver { .. } | Error::Forbidden { .. }
            ),
            "{said}"
        );
    }
}
