//! The server at a link-local address: frames of a guest's network device in, frames out.
//!
//! ```text
//! listening ──SYN──▶ open ──request──▶ answering ──sent──▶ open (keep-alive) | closing ──▶ gone
//! ```
//!
//! Invariant: at most [`CONNECTIONS_MAX`] connections, each with buffers of fixed size and
//! one response; the guest's pace is all that they wait for.

use std::collections::VecDeque;
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr};

use crate::answer::{answer, refuse};
use crate::counters::{Counters, count};
use crate::http::{REQUEST_BYTES_MAX, Request};
use crate::metadata::Metadata;
use crate::tokens::random;
use crate::wire::{INCOMING_BYTES_MAX, Kind, Wire, kind};

/// As in Firecracker.
const CONNECTIONS_MAX: usize = 30;
const PORT: u16 = 80;
const HARDWARE: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);
/// Bytes handed to the stack at once.
const SEND_BUFFER_BYTES: usize = 4096;
/// A guest that does not acknowledge for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// A connection that was silent for so long makes room for a new one.
const IDLE: Duration = Duration::from_secs(10);

/// A link-local IPv4 address (RFC 3927), by default 169.254.169.254.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(Ipv4Addr);

impl Address {
    /// `None` for an address that is not link-local, or in the first or last 256 of them,
    /// which RFC 3927 keeps for later.
    #[must_use]
    pub fn new(address: Ipv4Addr) -> Option<Self> {
        let usable = (1..=254).contains(&address.octets()[2]);
        (address.is_link_local() && usable).then_some(Self(address))
    }
}

impl Default for Address {
    fn default() -> Self {
        Self(Ipv4Addr::new(169, 254, 169, 254))
    }
}

/// One network device's way to the metadata.
pub struct Endpoint {
    address: Ipv4Addr,
    start: Instant,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    metadata: Arc<Mutex<Metadata>>,
    counters: Arc<Counters>,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("address", &self.address)
            .field("connections", &self.connections.len())
            .finish_non_exhaustive()
    }
}

/// A socket, from when it listens until it is gone.
struct Connection {
    socket: SocketHandle,
    /// Since the guest's first segment.
    open: bool,
    heard: Instant,
    /// A request's beginning.
    received: Vec<u8>,
    /// What is left of a response.
    response: VecDeque<u8>,
    /// After the response.
    closes: bool,
}

impl Endpoint {
    /// Serves `metadata` at `address`.
    ///
    /// # Errors
    /// The host's: it has no random bytes.
    pub fn new(
        address: Address,
        metadata: Arc<Mutex<Metadata>>,
        counters: Arc<Counters>,
        now: Instant,
    ) -> io::Result<Self> {
        let mut config = Config::new(HARDWARE.into());
        // For sequence numbers that other programs of the guest cannot guess.
        config.random_seed = u64::from_le_bytes(random()?);
        let mut wire = Wire::default();
        let mut interface = Interface::new(config, &mut wire, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Whatever address the guest has, it is on this cable. There is room for one.
            let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(address.0, 0)));
        });
        let mut endpoint = Self {
            address: address.0,
            start: now,
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            metadata,
            counters,
        };
        endpoint.listen(now);
        Ok(endpoint)
    }

    /// Whether a frame from the guest, beginning with its Ethernet header, is to be taken
    /// here and not by the network.
    #[must_use]
    pub fn is_for_me(&self, frame: &[u8]) -> bool {
        kind(frame, self.address).is_some()
    }

    /// Takes a frame for which [`Self::is_for_me`] holds; ignores others.
    pub fn take(&mut self, frame: &[u8], now: Instant) {
        let Some(kind) = kind(frame, self.address) else {
            return;
        };
        count(&self.counters.rx_accepted);
        if frame.len() > INCOMING_BYTES_MAX {
            return count(&self.counters.rx_bad_eth);
        }
        let from = EthernetAddress::from_bytes(&frame[6..12]);
        match kind {
            Kind::Unusual => return count(&self.counters.rx_accepted_unusual),
            // The stack answers frames that it takes; the guest is to fetch first. TCP
            // sends again, and so does ARP.
            Kind::Arp | Kind::Tcp(_) if self.wire.is_full() => {
                return count(&self.counters.tx_errors);
            }
            Kind::Arp => {}
            Kind::Tcp(guest) if from.is_unicast() => {
                count(&self.counters.rx_count);
                self.make_room(now);
                self.wire.introduce((from, guest), (HARDWARE, self.address));
            }
            Kind::Tcp(_) => return count(&self.counters.rx_accepted_err),
        }
        self.wire.push(frame, HARDWARE);
        self.advance(now);
    }

    /// The next frame for the guest.
    pub fn next_frame(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.wire.outgoing.is_empty() {
            self.advance(now);
        }
        let frame = self.wire.outgoing.pop_front()?;
        count(&self.counters.tx_frames);
        let bytes = frame.len() as u64;
        self.counters.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
        Some(frame)
    }

    /// When [`Self::next_frame`] is to be called even if nothing happened until then. Not
    /// while a frame waits to be fetched: a guest without room for it is waited for.
    #[must_use]
    pub fn poll_at(&mut self, now: Instant) -> Option<Instant> {
        if !self.wire.outgoing.is_empty() {
            return None;
        }
        let at = self.interface.poll_at(self.clock(now), &self.sockets)?;
        let since_start = u64::try_from(at.total_micros()).unwrap_or(0);
        Some(self.start + Duration::from_micros(since_start))
    }

    /// Time as the stack counts it.
    fn clock(&self, now: Instant) -> smoltcp::time::Instant {
        let since = now.saturating_duration_since(self.start).as_micros();
        smoltcp::time::Instant::from_micros(i64::try_from(since).unwrap_or(i64::MAX))
    }

    /// Runs stack and requests until neither has anything to do.
    fn advance(&mut self, now: Instant) {
        let clock = self.clock(now);
        loop {
            let before = self.wire.outgoing.len();
            self.interface
                .poll(clock, &mut self.wire, &mut self.sockets);
            let made = self.wire.outgoing.len().saturating_sub(before) as u64;
            self.counters.tx_count.fetch_add(made, Ordering::Relaxed);
            if !self.serve(now) {
                return;
            }
        }
    }

    /// Moves every connection on. Returns whether the stack has something to do for it.
    fn serve(&mut self, now: Instant) -> bool {
        let mut moved = false;
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut::<Socket<'_>>(connection.socket);
            if !connection.open && !matches!(socket.state(), State::Listen | State::Closed) {
                connection.open = true;
                connection.heard = now;
                count(&self.counters.connections_created);
            }
            moved |= connection.serve(socket, now, &self.metadata, &self.counters);
        }
        let sockets = &mut self.sockets;
        let counters = &self.counters;
        self.connections.retain(|connection| {
            let gone = sockets.get::<Socket<'_>>(connection.socket).state() == State::Closed;
            if gone {
                sockets.remove(connection.socket);
                if connection.open {
                    count(&counters.connections_destroyed);
                }
            }
            !gone
        });
        if self.connections.iter().all(|connection| connection.open) {
            self.listen(now);
        }
        moved
    }

    /// One more socket that listens, unless there are as many as may be.
    fn listen(&mut self, now: Instant) {
        if self.connections.len() >= CONNECTIONS_MAX {
            return;
        }
        let buffer = |bytes: usize| SocketBuffer::new(vec![0; bytes]);
        let mut socket = Socket::new(buffer(REQUEST_BYTES_MAX), buffer(SEND_BUFFER_BYTES));
        socket.set_timeout(Some(SILENCE_MAX.into()));
        // An answer is not kept back for more of it: there is none.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        if socket.listen(PORT).is_ok() {
            self.connections.push(Connection {
                socket: self.sockets.add(socket),
                open: false,
                heard: now,
                received: Vec::new(),
                response: VecDeque::new(),
                closes: false,
            });
        }
    }

    /// If all connections are in use: gives up the one that was silent longest, if for
    /// long enough, or one that only waits for stray segments.
    fn make_room(&mut self, now: Instant) {
        let in_use = self.connections.iter().all(|connection| connection.open);
        if self.connections.len() < CONNECTIONS_MAX || !in_use {
            return;
        }
        let done = |connection: &Connection| {
            let socket = self.sockets.get::<Socket<'_>>(connection.socket);
            socket.state() == State::TimeWait
        };
        let silent = |connection: &Connection| now.saturating_duration_since(connection.heard);
        let victim = self.connections.iter().position(done).or_else(|| {
            let longest =
                (0..self.connections.len()).max_by_key(|at| silent(&self.connections[*at]));
            longest.filter(|at| silent(&self.connections[*at]) > IDLE)
        });
        if let Some(at) = victim {
            let gone = self.connections.swap_remove(at);
            self.sockets.remove(gone.socket);
            count(&self.counters.connections_destroyed);
            self.listen(now);
        }
    }
}

impl Connection {
    /// Reads what came, answers, hands over what there is room for. Returns whether the
    /// stack has something to do for it.
    fn serve(
        &mut self,
        socket: &mut Socket<'_>,
        now: Instant,
        metadata: &Mutex<Metadata>,
        counters: &Counters,
    ) -> bool {
        let mut moved = false;
        loop {
            moved |= self.send(socket);
            if !self.response.is_empty() {
                return moved;
            }
            if self.closes {
                moved |= socket.may_send();
                socket.close();
                return moved;
            }
            if socket.can_recv() {
                self.heard = now;
                let room = REQUEST_BYTES_MAX - self.received.len();
                let read = socket.recv(|bytes| {
                    let taken = &bytes[..bytes.len().min(room)];
                    self.received.extend_from_slice(taken);
                    (taken.len(), taken.len())
                });
                moved |= read.is_ok_and(|bytes| bytes > 0);
            }
            if !self.answer(now, metadata, counters) {
                if socket.can_recv() {
                    continue;
                }
                if !socket.may_recv() && socket.state() == State::CloseWait {
                    // The guest sends no more, and this is no whole request.
                    self.closes = true;
                    continue;
                }
                return moved;
            }
        }
    }

    /// Answers the first request received. Returns whether there was one.
    fn answer(&mut self, now: Instant, metadata: &Mutex<Metadata>, counters: &Counters) -> bool {
        if self.received.is_empty() {
            return false;
        }
        let bytes = match Request::parse(&self.received) {
            Ok(None) => return false,
            Ok(Some(request)) => {
                let keep_alive = request.keeps_alive();
                let minor_version = request.minor_version;
                let metadata = metadata.lock().unwrap_or_else(PoisonError::into_inner);
                let response = answer(&metadata, &request, now, counters);
                self.closes = !keep_alive;
                let taken = request.bytes;
                self.received.drain(..taken);
                response.bytes(minor_version, keep_alive)
            }
            Err(bad) => {
                count(&counters.rx_accepted_err);
                self.received.clear();
                self.closes = true;
                refuse(bad).bytes(1, false)
            }
        };
        self.response = bytes.into();
        true
    }

    fn send(&mut self, socket: &mut Socket<'_>) -> bool {
        if self.response.is_empty() {
            return false;
        }
        if !socket.may_send() {
            // The guest took no more of it.
            self.response.clear();
            self.closes = true;
            return false;
        }
        let (front, _) = self.response.as_slices();
        let sent = socket.send_slice(front).unwrap_or(0);
        self.response.drain(..sent);
        sent > 0
    }
}

#[cfg(test)]
impl Endpoint {
    /// Connections, those that are only listened for included, and frames that wait.
    pub(crate) fn held(&self) -> (usize, usize) {
        (self.connections.len(), self.wire.outgoing.len())
    }
}
