//! One connection between a Unix socket and a port of the guest.
//!
//! ```text
//! host connects:   Requested ──RESPONSE──▶ Open
//! guest connects:  Accepted ──our RESPONSE──▶ Open
//! each direction ends on its own; both ended ──▶ RST, gone
//! ```
//!
//! Invariant: what the guest sent and the host has not taken is at most
//! [`BUFFER_BYTES`]; what we sent never exceeds the guest's credit. Counters wrap
//! (§5.10.6.3).

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ram::volatile;
use rustix::net::SendFlags;

use super::spec::{Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::Buffers;
use crate::poller::{Poller, Ready, Token};

/// Room for what the guest sends, as Firecracker.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// The guest hears of freed room when there is this much of it.
const CREDIT_UPDATE_BYTES: u32 = BUFFER_BYTES / 2;
/// How long the guest may take to answer a request or to end a connection.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host wants in; the guest is to be asked (again: has been asked).
    Requested {
        asked: bool,
    },
    /// The guest wanted in; it is to be told that it is.
    Accepted,
    Open,
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Verdict {
    Keep,
    /// End it and tell the guest.
    Reset,
    /// The guest ended it.
    Gone,
}

/// A packet for the guest, but for the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) op: Operation,
    pub(super) flags: u32,
    /// Bytes of data filled in.
    pub(super) len: u32,
    pub(super) fwd_cnt: u32,
}

#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    phase: Phase,
    /// The host's port, which the host learns when the guest has answered.
    host_port: u32,

    // From guest to host.
    /// What the socket did not take at once.
    backlog: VecDeque<u8>,
    /// Bytes that left towards the host, and what the guest knows of it.
    forwarded: u32,
    forwarded_told: u32,
    owes_credit_update: bool,

    // From host to guest.
    readable: bool,
    sent: u32,
    guest_room: u32,
    guest_consumed: u32,
    credit_requested: bool,

    // Ends: SHUTDOWN_* bits.
    guest_ended: u32,
    host_ended: u32,
    host_end_told: u32,
    write_side_closed: bool,
    expires: Option<Instant>,
    /// Polled for room to write.
    output_polled: bool,
    /// Waits in the muxer's line of connections with packets.
    pub(super) in_line: bool,
}

impl Connection {
    /// The host connected, for port `host_port` of its own.
    pub(super) fn from_host(socket: UnixStream, host_port: u32) -> Self {
        let mut connection = Self::new(socket, Phase::Requested { asked: false }, host_port);
        connection.expires = Some(Instant::now() + PATIENCE);
        connection
    }

    /// The guest asked with `request`, and the socket is connected.
    pub(super) fn from_guest(socket: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(socket, Phase::Accepted, request.dst_port);
        connection.take_credit(request);
        connection
    }

    fn new(socket: UnixStream, phase: Phase, host_port: u32) -> Self {
        Self {
            socket,
            phase,
            host_port,
            backlog: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            owes_credit_update: false,
            // The data may have come before the socket was polled.
            readable: true,
            sent: 0,
            guest_room: 0,
            guest_consumed: 0,
            credit_requested: false,
            guest_ended: 0,
            host_ended: 0,
            host_end_told: 0,
            write_side_closed: false,
            expires: None,
            output_polled: false,
            in_line: false,
        }
    }

    /// When to give up on it.
    pub(super) fn expires(&self) -> Option<Instant> {
        self.expires
    }

    /// Has the socket polled for room to write exactly while something waits.
    pub(super) fn poll_as_needed(&mut self, poller: &Poller, token: Token) {
        let wanted = !self.backlog.is_empty();
        if wanted != self.output_polled {
            self.output_polled = wanted;
            poller.poll_output(&self.socket, token, wanted);
        }
    }

    /// Takes a packet of the guest.
    pub(super) fn guest_sent(&mut self, header: &Header, data: Buffers<'_>) -> Verdict {
        self.take_credit(header);
        match (self.phase, Operation::parse(header.op)) {
            (_, Some(Operation::Reset)) => Verdict::Gone,
            (Phase::Requested { asked: true }, Some(Operation::Response)) => self.opened(),
            (Phase::Open, Some(Operation::Data)) => self.forward(header.len, data),
            (Phase::Open, Some(Operation::Shutdown)) => self.guest_ends(header.flags),
            (Phase::Open | Phase::Accepted, Some(Operation::CreditRequest)) => {
                self.owes_credit_update = true;
                Verdict::Keep
            }
            (Phase::Open | Phase::Accepted, Some(Operation::CreditUpdate)) => Verdict::Keep,
            _ => Verdict::Reset,
        }
    }

    /// Takes note of what happened to the socket.
    pub(super) fn host_ready(&mut self, ready: Ready) -> Verdict {
        self.readable |= ready.readable;
        if ready.hung_up {
            self.host_ended |= SHUTDOWN_RECEIVE;
        }
        if ready.writable {
            self.flush();
        }
        self.after_forwarding()
    }

    /// Whether [`Connection::next_packet`] is worth a call.
    pub(super) fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Requested { asked } => !asked,
            Phase::Accepted => true,
            Phase::Open => self.owes_credit_update || self.may_receive() || self.untold_end() != 0,
        }
    }

    /// The next packet for the guest, its data filled into `room`. None when the
    /// socket had nothing after all.
    pub(super) fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Packet> {
        let (op, flags, len) = match self.phase {
            Phase::Requested { asked: true } => return None,
            Phase::Requested { asked: false } => {
                self.phase = Phase::Requested { asked: true };
                (Operation::Request, 0, 0)
            }
            Phase::Accepted => {
                self.phase = Phase::Open;
                (Operation::Response, 0, 0)
            }
            Phase::Open => self.open_packet(room)?,
        };
        // Every packet tells of the room.
        self.owes_credit_update = false;
        self.forwarded_told = self.forwarded;
        Some(Packet {
            op,
            flags,
            len,
            fwd_cnt: self.forwarded,
        })
    }

    fn open_packet(&mut self, room: &Buffers<'_>) -> Option<(Operation, u32, u32)> {
        if self.may_receive() {
            let credit = self.credit();
            if credit == 0 {
                self.credit_requested = true;
                return Some((Operation::CreditRequest, 0, 0));
            }
            let len = self.receive(room, credit);
            if len > 0 {
                self.sent = self.sent.wrapping_add(len);
                return Some((Operation::Data, 0, len));
            }
        }
        if self.untold_end() != 0 {
            self.host_end_told = self.host_ended;
            if self.host_ended == SHUTDOWN_BOTH {
                self.expires = Some(Instant::now() + PATIENCE);
            }
            return Some((Operation::Shutdown, self.host_ended, 0));
        }
        self.owes_credit_update
            .then_some((Operation::CreditUpdate, 0, 0))
    }

    /// Moves data from the socket into guest memory; returns how much.
    fn receive(&mut self, room: &Buffers<'_>, credit: u32) -> u32 {
        let room = room.clone().take(credit as usize);
        match volatile::receive(&self.socket, room.pieces()) {
            // At most `credit`.
            Ok(n) if n > 0 => return n as u32,
            Ok(_) => {
                self.readable = false;
                self.host_ended |= SHUTDOWN_SEND;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.readable = false;
                self.host_ended = SHUTDOWN_BOTH;
            }
        }
        0
    }

    fn may_receive(&self) -> bool {
        self.readable
            && self.host_ended & SHUTDOWN_SEND == 0
            && self.guest_ended & SHUTDOWN_RECEIVE == 0
            && (self.credit() > 0 || !self.credit_requested)
    }

    fn untold_end(&self) -> u32 {
        self.host_ended & !self.host_end_told
    }

    /// Bytes that the guest has room for. A guest that claims to have consumed
    /// what was never sent stalls itself.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_consumed);
        self.guest_room.saturating_sub(in_flight)
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_consumed = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// The guest accepted: Firecracker's answer to the host.
    fn opened(&mut self) -> Verdict {
        let answer = format!("OK {}\n", self.host_port);
        match send(&self.socket, answer.as_bytes()) {
            Ok(n) if n == answer.len() => {
                self.phase = Phase::Open;
                self.expires = None;
                Verdict::Keep
            }
            _ => Verdict::Reset,
        }
    }

    fn forward(&mut self, len: u32, mut data: Buffers<'_>) -> Verdict {
        let room = BUFFER_BYTES as usize - self.backlog.len();
        let len = len as usize;
        // A guest that sends more than it has credit for, less than it says, or
        // after the end.
        if len > room || len > data.len() || self.guest_ended & SHUTDOWN_SEND != 0 {
            return Verdict::Reset;
        }
        let mut data = data.take(len);
        while self.backlog.is_empty() && !data.is_empty() && !self.host_takes_no_more() {
            match volatile::send(&self.socket, data.pieces()) {
                Ok(n) => {
                    data.take(n);
                    self.count_forwarded(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.host_ended |= SHUTDOWN_RECEIVE,
            }
        }
        if self.host_takes_no_more() {
            self.count_forwarded(data.len());
        } else if !data.is_empty() {
            let mut rest = vec![0; data.len()];
            data.read(&mut rest);
            self.backlog.extend(rest);
        }
        Verdict::Keep
    }

    /// Moves what the socket now takes out of the backlog.
    fn flush(&mut self) {
        while !self.backlog.is_empty() && !self.host_takes_no_more() {
            match send(&self.socket, self.backlog.as_slices().0) {
                Ok(n) => {
                    self.backlog.drain(..n);
                    self.count_forwarded(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.host_ended |= SHUTDOWN_RECEIVE,
            }
        }
        // What nobody will read counts as read, so that the guest does not wait.
        let lost = self.backlog.len();
        self.backlog.clear();
        self.count_forwarded(lost);
    }

    fn host_takes_no_more(&self) -> bool {
        self.host_ended & SHUTDOWN_RECEIVE != 0
    }

    fn count_forwarded(&mut self, n: usize) {
        // At most BUFFER_BYTES.
        self.forwarded = self.forwarded.wrapping_add(n as u32);
        if self.forwarded.wrapping_sub(self.forwarded_told) >= CREDIT_UPDATE_BYTES {
            self.owes_credit_update = true;
        }
    }

    fn guest_ends(&mut self, flags: u32) -> Verdict {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            // The host gets EPIPE. It fails when the host is gone already.
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        let verdict = self.after_forwarding();
        if verdict == Verdict::Keep && self.guest_ended == SHUTDOWN_BOTH {
            self.expires = Some(Instant::now() + PATIENCE);
        }
        verdict
    }

    /// Ends what the guest ended, once the host has all of the guest's data.
    fn after_forwarding(&mut self) -> Verdict {
        if !self.backlog.is_empty() {
            return Verdict::Keep;
        }
        if self.guest_ended == SHUTDOWN_BOTH {
            return Verdict::Reset;
        }
        if self.guest_ended & SHUTDOWN_SEND != 0 && !self.write_side_closed {
            self.write_side_closed = true;
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        Verdict::Keep
    }
}

fn send(socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match rustix::net::send(socket, bytes, flags) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}
