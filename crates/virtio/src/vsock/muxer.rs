//! All connections of a device: who is connected to whom, and whose turn it is
//! to send to the guest.
//!
//! Invariant: a connection is in `line` exactly once while it has a packet;
//! resets for connections that are not there wait in `resets`, and a guest that
//! does not take them is not listened to any more ([`Muxer::is_clogged`]).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::net::RecvFlags;

use super::connection::{BUFFER_BYTES, Connection, PATIENCE, Verdict};
use super::counters::{Counters, add, count};
use super::listener::Listener;
use super::spec::{HOST_CID, Header, Operation, TYPE_STREAM};
use crate::Buffers;
use crate::poller::{Poller, Token};

/// Connections and greetings at most, as Firecracker.
pub(super) const CONNECTIONS_MAX: usize = 1023;
/// Resets that wait before the guest's packets do.
const RESETS_CLOGGED: usize = 256;
/// Resets that wait at most; further ones are lost, as packets may be.
const RESETS_MAX: usize = 4096;
/// "CONNECT 4294967295\n", and some room for other ways to write it.
const GREETING_BYTES_MAX: usize = 32;
/// Host ports that we hand out: 2^30 to 2^31 - 1.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LISTENER: Token = Token(0);

/// Names a connection, as seen from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

/// Sockets of one device and what they are.
#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    listener: Listener,
    poller: Poller,
    connections: HashMap<Token, (Ports, Connection)>,
    tokens: HashMap<Ports, Token>,
    /// Accepted from the host, which has not said yet what it wants.
    greetings: HashMap<Token, UnixStream>,
    line: VecDeque<Token>,
    resets: VecDeque<Header>,
    /// When to look at connections that were given a time limit.
    deadlines: BTreeSet<(Instant, Token)>,
    next_token: u64,
    next_host_port: u32,
    counters: Arc<Counters>,
}

impl Muxer {
    pub(super) fn new(guest_cid: u64, listener: Listener, poller: Poller) -> Self {
        Self {
            guest_cid,
            listener,
            poller,
            connections: HashMap::new(),
            tokens: HashMap::new(),
            greetings: HashMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            next_token: LISTENER.0 + 1,
            next_host_port: FIRST_HOST_PORT,
            counters: Arc::default(),
        }
    }

    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    pub(super) fn poller(&self) -> &Poller {
        &self.poller
    }

    #[cfg(test)]
    pub(super) fn connection_count(&self) -> usize {
        self.connections.len() + self.greetings.len()
    }

    /// The port that the host's next connection comes from, unless it is taken.
    pub(super) fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// Replaces it.
    pub(super) fn set_next_host_port(&mut self, port: u32) {
        self.next_host_port = FIRST_HOST_PORT | port & (FIRST_HOST_PORT - 1);
    }

    /// Starts to accept connections of the host; those that wait come at once.
    pub(super) fn open(&mut self) -> io::Result<()> {
        self.poller.add(&self.listener, LISTENER)
    }

    /// Ends every connection and accepts no more.
    pub(super) fn close(&mut self) {
        self.poller.remove(&self.listener);
        add(&self.counters.conns_removed, self.connections.len());
        self.connections.clear();
        self.tokens.clear();
        self.greetings.clear();
        self.line.clear();
        self.resets.clear();
        self.deadlines.clear();
    }

    /// Whether the guest has to take packets before it may send more.
    pub(super) fn is_clogged(&self) -> bool {
        self.resets.len() >= RESETS_CLOGGED
    }

    /// Whether [`Muxer::next_packet`] is worth a call.
    pub(super) fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    /// The next packet for the guest, its data filled into `room`.
    pub(super) fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.line.pop_front() {
            let Some((ports, connection)) = self.connections.get_mut(&token) else {
                continue;
            };
            let ports = *ports;
            connection.in_line = false;
            let packet = connection.next_packet(room);
            self.settle(token);
            if let Some(packet) = packet {
                return Some(Header {
                    len: packet.len,
                    op: packet.op as u16,
                    flags: packet.flags,
                    buf_alloc: BUFFER_BYTES,
                    fwd_cnt: packet.fwd_cnt,
                    ..self.to_guest(ports)
                });
            }
        }
        None
    }

    /// Takes a packet of the guest.
    pub(super) fn guest_sent(&mut self, header: &Header, data: Buffers<'_>) {
        // §5.10.6.1, §5.10.6.4: not from the guest or not for us.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            tracing::debug!(?header, "vsock packet with a wrong context identifier");
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let op = Operation::parse(header.op);
        let known = self
            .tokens
            .get(&ports)
            .copied()
            .filter(|_| header.kind == TYPE_STREAM);
        let Some(token) = known else {
            match op {
                Some(Operation::Request) if header.kind == TYPE_STREAM => {
                    self.guest_connects(ports, header);
                }
                Some(Operation::Reset) => {}
                _ => self.reset(ports, header.kind),
            }
            return;
        };
        if op == Some(Operation::Data) {
            add(&self.counters.tx_bytes_count, data.len());
        }
        let verdict = match self.connections.get_mut(&token) {
            Some((_, connection)) => connection.guest_sent(header, data),
            None => Verdict::Gone,
        };
        self.execute(token, verdict);
    }

    /// Handles what the poller found. Never waits.
    pub(super) fn on_event(&mut self) {
        let (ready, alarm) = self.poller.take();
        for ready in ready {
            if ready.token == LISTENER {
                self.accept();
            } else if self.greetings.contains_key(&ready.token) {
                self.greet(ready.token);
            } else if let Some((_, connection)) = self.connections.get_mut(&ready.token) {
                let verdict = connection.host_ready(ready);
                self.execute(ready.token, verdict);
            }
        }
        if alarm {
            self.expire(Instant::now());
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok(socket) => {
                    if self.is_full() {
                        tracing::warn!("vsock: more than {CONNECTIONS_MAX} connections");
                        continue;
                    }
                    let token = self.new_token();
                    if self.poller.add(&socket, token).is_ok() {
                        self.greetings.insert(token, socket);
                        self.greet(token);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors, say: the next one to connect wakes us.
                    tracing::warn!(%error, "vsock: cannot accept a connection of the host");
                    return;
                }
            }
        }
    }

    /// Reads "CONNECT <port>\n", once it is there as a whole.
    fn greet(&mut self, token: Token) {
        let Some(socket) = self.greetings.get(&token) else {
            return;
        };
        match read_greeting(socket) {
            Greeting::Incomplete => {}
            Greeting::Nonsense => {
                self.greetings.remove(&token);
            }
            Greeting::Connect { guest_port } => {
                let Some(socket) = self.greetings.remove(&token) else {
                    return;
                };
                let Some(host) = self.free_host_port(guest_port) else {
                    return;
                };
                let ports = Ports {
                    host,
                    guest: guest_port,
                };
                self.insert(token, ports, Connection::from_host(socket, host));
            }
        }
    }

    fn guest_connects(&mut self, ports: Ports, request: &Header) {
        if self.is_full() {
            return self.reset(ports, TYPE_STREAM);
        }
        let token = self.new_token();
        let connected = self
            .listener
            .connect_to_port(ports.host)
            .and_then(|socket| self.poller.add(&socket, token).map(|()| socket));
        match connected {
            Ok(socket) => self.insert(token, ports, Connection::from_guest(socket, request)),
            Err(error) => {
                tracing::debug!(port = ports.host, %error, "vsock: nobody listens on the host");
                self.reset(ports, TYPE_STREAM);
            }
        }
    }

    fn insert(&mut self, token: Token, ports: Ports, connection: Connection) {
        count(&self.counters.conns_added);
        self.tokens.insert(ports, token);
        self.connections.insert(token, (ports, connection));
        self.settle(token);
    }

    fn execute(&mut self, token: Token, verdict: Verdict) {
        match verdict {
            Verdict::Keep => self.settle(token),
            Verdict::Gone => {
                self.forget(token);
            }
            Verdict::Reset => {
                if let Some(ports) = self.forget(token) {
                    self.reset(ports, TYPE_STREAM);
                }
            }
        }
    }

    /// Puts a connection that has a packet in line, its time limit down, and has
    /// it polled for what it waits for.
    fn settle(&mut self, token: Token) {
        let Some((_, connection)) = self.connections.get_mut(&token) else {
            return;
        };
        connection.poll_as_needed(&self.poller, token);
        if connection.has_packet() && !connection.in_line {
            connection.in_line = true;
            self.line.push_back(token);
        }
        if let Some(at) = connection.expires()
            && self.deadlines.insert((at, token))
            && self.deadlines.len() == 1
        {
            self.poller.set_alarm(PATIENCE);
        }
    }

    /// Ends connections whose time is over. Limits that were lifted or moved
    /// since are only forgotten.
    fn expire(&mut self, now: Instant) {
        while let Some(&(at, token)) = self.deadlines.first() {
            if at > now {
                self.poller.set_alarm(at - now);
                return;
            }
            self.deadlines.remove(&(at, token));
            let over = self.connections.get(&token).is_some_and(|(_, connection)| {
                connection.expires().is_some_and(|expires| expires <= now)
            });
            if over {
                count(&self.counters.conns_killed);
                self.execute(token, Verdict::Reset);
            }
        }
    }

    /// Drops the connection and with it the socket.
    fn forget(&mut self, token: Token) -> Option<Ports> {
        let (ports, connection) = self.connections.remove(&token)?;
        count(&self.counters.conns_removed);
        self.tokens.remove(&ports);
        if let Some(at) = connection.expires() {
            self.deadlines.remove(&(at, token));
        }
        if connection.in_line {
            self.line.retain(|&other| other != token);
        }
        Some(ports)
    }

    fn reset(&mut self, ports: Ports, kind: u16) {
        if self.resets.len() < RESETS_MAX {
            let op = Operation::Reset as u16;
            self.resets.push_back(Header {
                op,
                kind,
                ..self.to_guest(ports)
            });
        }
    }

    fn to_guest(&self, ports: Ports) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            ..Header::default()
        }
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.greetings.len() >= CONNECTIONS_MAX
    }

    fn new_token(&mut self) -> Token {
        let token = Token(self.next_token);
        self.next_token += 1;
        token
    }

    fn free_host_port(&mut self, guest: u32) -> Option<u32> {
        // One more port than there are connections is enough to find a free one.
        for _ in 0..=CONNECTIONS_MAX {
            let host = self.next_host_port;
            self.next_host_port = FIRST_HOST_PORT | host.wrapping_add(1) & (FIRST_HOST_PORT - 1);
            if !self.tokens.contains_key(&Ports { host, guest }) {
                return Some(host);
            }
        }
        None
    }
}

enum Greeting {
    Incomplete,
    Nonsense,
    Connect { guest_port: u32 },
}

fn read_greeting(socket: &UnixStream) -> Greeting {
    let mut bytes = [0; GREETING_BYTES_MAX];
    // What follows the line belongs to the connection: look before taking.
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let peeked = match rustix::net::recv(socket, &mut bytes, flags) {
        Ok((_, 0)) => return Greeting::Nonsense,
        Ok((_, n)) => bytes.get(..n).unwrap_or_default(),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Greeting::Incomplete,
        Err(_) => return Greeting::Nonsense,
    };
    let Some(end) = peeked.iter().position(|&byte| byte == b'\n') else {
        let full = peeked.len() == GREETING_BYTES_MAX;
        return if full {
            Greeting::Nonsense
        } else {
            Greeting::Incomplete
        };
    };
    let (line, _) = peeked.split_at(end);
    let port = std::str::from_utf8(line).ok().and_then(|line| {
        let mut words = line.split_ascii_whitespace();
        let verb = words
            .next()
            .filter(|verb| verb.eq_ignore_ascii_case("connect"));
        let port = words.next()?.parse().ok()?;
        verb.filter(|_| words.next().is_none()).map(|_| port)
    });
    let mut line = [0; GREETING_BYTES_MAX];
    let taken = line
        .get_mut(..=end)
        .map(|line| rustix::net::recv(socket, line, RecvFlags::DONTWAIT));
    match (port, taken) {
        (Some(guest_port), Some(Ok(_))) => Greeting::Connect { guest_port },
        _ => Greeting::Nonsense,
    }
}
