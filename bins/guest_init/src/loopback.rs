//! The loopback interface, up: the one network that every machine has. The kernel gives it its addresses when it comes up.

use std::io;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// rtnetlink(7): RTM_NEWLINK, as a request that wants an acknowledgement, for the interface with index 1 (which the
/// loopback always has in the first network namespace), setting IFF_UP. Little-endian, as x86-64 is.
const REQUEST: [u8; 32] = [
    32, 0, 0, 0, // nlmsghdr: length
    16, 0, // type RTM_NEWLINK
    5, 0, // flags NLM_F_REQUEST | NLM_F_ACK
    1, 0, 0, 0, // sequence
    0, 0, 0, 0, // port: the kernel's
    0, 0, 0, 0, // ifinfomsg: family, padding, device type
    1, 0, 0, 0, // index
    1, 0, 0, 0, // flags IFF_UP
    1, 0, 0, 0, // which of them to change
];

/// Where an acknowledgement holds its error, zero or a negated errno (struct nlmsgerr, after the header).
const ERROR_OFFSET: usize = 16;

/// Brings the loopback interface up.
pub(crate) fn bring_up() -> Result<(), io::Error> {
    // Protocol 0 is NETLINK_ROUTE.
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    send(&socket, &REQUEST, SendFlags::empty())?;
    let mut answer = [0; 256];
    let (count, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    match answer
        .get(..count)
        .and_then(|answer| answer.get(ERROR_OFFSET..)?.first_chunk())
    {
        Some(&error) => match i32::from_le_bytes(error) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        },
        None => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
    }
}
