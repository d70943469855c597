//! The driver's calls (linux/if_tun.h).
#![allow(unsafe_code)] // ioctl(2)

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// What a reader of frames can do itself (linux/if_tun.h, `TUN_F_*`). Segments need
/// checksums.
pub mod offload {
    /// Frames without a checksum.
    pub const CHECKSUM: u32 = libc::TUN_F_CSUM;
    /// TCP segments over IPv4 that are longer than a frame.
    pub const TSO4: u32 = libc::TUN_F_TSO4;
    /// The same over IPv6.
    pub const TSO6: u32 = libc::TUN_F_TSO6;
    /// UDP datagrams that are longer than a frame.
    pub const UFO: u32 = libc::TUN_F_UFO;
}

/// Makes `tun`, an open driver, the other end of the device `name`: whole frames, each
/// behind a header.
pub(crate) fn attach(tun: impl AsFd, name: &[u8]) -> Result<(), Errno> {
    // SAFETY: all zeros is a request without name and flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // They are bits 1, 12 and 14.
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: the driver reads and writes one `ifreq`, which is valid and ours.
    answer(unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), libc::TUNSETIFF, &mut request) })
}

/// How long the header before each frame is.
pub(crate) fn set_header_bytes(tun: impl AsFd, bytes: i32) -> Result<(), Errno> {
    // SAFETY: the driver reads one `int`.
    answer(unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), libc::TUNSETVNETHDRSZ, &bytes) })
}

/// What our side can do; takes bits by value.
pub(crate) fn set_offloads(tun: impl AsFd, bits: u32) -> Result<(), Errno> {
    let bits = libc::c_ulong::from(bits);
    // SAFETY: the driver takes a number, no address.
    answer(unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, bits) })
}

fn answer(result: libc::c_int) -> Result<(), Errno> {
    match result {
        0.. => Ok(()),
        _ => Err(std::io::Error::last_os_error()
            .raw_os_error()
            .map_or(Errno::IO, Errno::from_raw_os_error)),
    }
}
