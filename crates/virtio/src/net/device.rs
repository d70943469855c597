//! The interface: what it offers, what wakes it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ram::GuestMemory;

use super::counters::{Counters, count};
use super::receive::Held;
use super::spec::{
    Config, F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_UFO, F_HOST_TSO4,
    F_HOST_TSO6, F_HOST_UFO, F_MAC, F_MRG_RXBUF, F_MTU, LONG_FRAME, SHORT_FRAME,
};
use crate::poller::{Poller, Token};
use crate::rate_limiter::{Limits, RateLimiter};
use crate::{
    Activation, Bell, DeviceType, Error, EventSource, Interrupt, QueueError, SavedDevice,
    VirtQueue, VirtioDevice,
};

pub(super) const QUEUE_SIZE: u16 = 256;
const RX: u16 = 0;

/// How soon a neighbour is asked again.
const PAUSE: Duration = Duration::from_millis(10);

const LINK: Token = Token(0);
const RX_TIMER: Token = Token(1);
const TX_TIMER: Token = Token(2);
const BELL: Token = Token(3);

/// What the guest handles itself in frames that it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums that are not there yet.
    pub checksum: bool,
    /// Long TCP segments over IPv4.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// Long UDP datagrams.
    pub ufo: bool,
}

impl Offloads {
    pub(super) fn of(features: u64) -> Self {
        // §5.1.3.1: each of the others needs the first.
        let checksum = features & F_GUEST_CSUM != 0;
        let has = |feature| checksum && features & feature != 0;
        Self {
            checksum,
            tso4: has(F_GUEST_TSO4),
            tso6: has(F_GUEST_TSO6),
            ufo: has(F_GUEST_UFO),
        }
    }
}

/// Where the cable leads: each read of the descriptor is one frame behind a header of 12
/// bytes (§5.1.6), each write is one, and neither waits.
pub trait Link: AsFd + Send {
    /// Says what frames to the guest may be like from now on.
    ///
    /// # Errors
    /// The host's: it cannot make them so.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
}

/// Bytes of a frame that say whom it is for: Ethernet's header and the longer one of ARP
/// and plain IPv4.
pub(super) const LOOK_BYTES: usize = 14 + 28;

/// Somebody on the guest's cable who is not behind the link.
pub trait Neighbour: Send {
    /// Whether it takes the frame that begins like this: with Ethernet's header and 28
    /// bytes more, if it is as long. The link does not get it then.
    fn is_for_me(&self, frame: &[u8]) -> bool;

    /// Takes a whole frame.
    fn take(&mut self, frame: &[u8], now: Instant);

    /// Its next frame for the guest, at most 1514 bytes.
    fn next_frame(&mut self, now: Instant) -> Option<Vec<u8>>;

    /// When to ask it for a frame even if the guest sent none until then.
    fn poll_at(&mut self, now: Instant) -> Option<Instant>;
}

/// What an interface is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Its address; the guest takes one by itself if there is none.
    pub mac: Option<[u8; 6]>,
    /// The largest packet, Ethernet's header not counted, that the guest is told of.
    pub mtu: Option<u16>,
    /// Limits of what the guest receives; requests are frames.
    pub rx_limits: Limits,
    /// Limits of what it sends.
    pub tx_limits: Limits,
}

/// A network interface. Wants a place in the event loop ([`EventSource`]) as well as a
/// transport.
pub struct Net {
    pub(super) mtu: Option<u16>,
    pub(super) rx_limiter: RateLimiter,
    pub(super) tx_limiter: RateLimiter,
    pub(super) state: State,
    pub(super) wires: Wires,
}

/// What leads out of the guest.
pub(super) struct Wires {
    /// The guest's address.
    pub(super) mac: Option<[u8; 6]>,
    pub(super) link: Box<dyn Link>,
    /// Until a read finds nothing: whoever polls is told once.
    pub(super) link_has_frames: bool,
    /// The link wakes nobody: the vCPU that writes to it reads what answers at once.
    pub(super) quiet: bool,
    /// Bytes that the next frame is likely to have, going by those before it.
    pub(super) expected: usize,
    /// Where the rest of a frame goes that has more.
    pub(super) overflow: Vec<u8>,
    /// A frame that was read and for which the guest has no room yet.
    pub(super) waiting: Option<Vec<u8>>,
    pub(super) neighbour: Option<Box<dyn Neighbour>>,
    pub(super) poller: Poller,
    pub(super) bell: Bell,
    pub(super) counters: Arc<Counters>,
}

/// Who does the work.
///
/// A vCPU sends short frames and reads their answers itself, as waking another thread
/// takes longer than that. Of a stream it does nothing: copying long frames, and what the
/// host's network does with them before a write returns, would keep it from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thread {
    Vcpu,
    EventLoop,
}

/// Bytes that go in one direction before the other has its turn.
pub(super) const BYTES_MAX: usize = 4 * LONG_FRAME;

/// Frames of a stream have at least so many bytes: four of Ethernet's.
pub(super) const STREAM: usize = 4 * SHORT_FRAME;

#[derive(Debug)]
pub(super) enum State {
    Idle,
    Live(Box<Live>),
}

#[derive(Debug)]
pub(super) struct Live {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    pub(super) features: u64,
    pub(super) rx: VirtQueue,
    pub(super) tx: VirtQueue,
    /// A frame that is in the guest's buffers and that the limiter keeps from being seen.
    pub(super) held: Option<Held>,
}

impl Live {
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Interrupt,
        features: u64,
        queues: Vec<VirtQueue>,
    ) -> Option<Box<Self>> {
        let [rx, tx] = <[VirtQueue; 2]>::try_from(queues).ok()?;
        Some(Box::new(Self {
            memory,
            interrupt,
            features,
            rx,
            tx,
            held: None,
        }))
    }

    /// Sends, then receives. Returns whether all was sent that may go now.
    fn exchange(
        &mut self,
        tx_limiter: &mut RateLimiter,
        rx_limiter: &mut RateLimiter,
        wires: &mut Wires,
        now: Instant,
        on: Thread,
    ) -> Result<bool, QueueError> {
        let sent = self.transmit(tx_limiter, wires, now, on)?;
        self.receive(rx_limiter, wires, now, on)?;
        Ok(sent)
    }

    /// Whether a frame may be in several buffers.
    pub(super) fn merges(&self) -> bool {
        self.features & F_MRG_RXBUF != 0
    }

    /// Bytes of room that a frame may need, its header included.
    pub(super) fn frame_room(&self) -> usize {
        let long = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_UFO;
        if self.merges() || self.features & long != 0 {
            LONG_FRAME
        } else {
            SHORT_FRAME
        }
    }
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("mac", &self.wires.mac)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Net {
    /// An interface at the near end of `link`.
    ///
    /// # Errors
    /// [`Error::Host`]: no timer, or the link cannot be polled.
    pub fn new(
        settings: Settings,
        link: Box<dyn Link>,
        neighbour: Option<Box<dyn Neighbour>>,
    ) -> Result<Self, Error> {
        let Settings {
            mac,
            mtu,
            rx_limits,
            tx_limits,
        } = settings;
        let limiters = (RateLimiter::new(rx_limits)?, RateLimiter::new(tx_limits)?);
        Self::with(mac, mtu, limiters, link, neighbour)
    }

    pub(super) fn with(
        mac: Option<[u8; 6]>,
        mtu: Option<u16>,
        (rx_limiter, tx_limiter): (RateLimiter, RateLimiter),
        link: Box<dyn Link>,
        neighbour: Option<Box<dyn Neighbour>>,
    ) -> Result<Self, Error> {
        let poller = Poller::new()?;
        let bell = Bell::new()?;
        let polled = [
            (bell.as_fd(), BELL),
            (link.as_fd(), LINK),
            (rx_limiter.fd(), RX_TIMER),
            (tx_limiter.fd(), TX_TIMER),
        ];
        for (fd, token) in polled {
            poller.add(fd, token).map_err(|source| Error::Host {
                doing: "poll a network link",
                source,
            })?;
        }
        Ok(Self {
            mtu,
            rx_limiter,
            tx_limiter,
            state: State::Idle,
            wires: Wires {
                mac,
                link,
                link_has_frames: false,
                quiet: false,
                expected: SHORT_FRAME,
                overflow: Vec::new(),
                waiting: None,
                neighbour,
                poller,
                bell,
                counters: Arc::default(),
            },
        })
    }

    /// What happened.
    pub fn counters(&self) -> Arc<Counters> {
        self.wires.counters.clone()
    }

    /// Replaces the limits that are named; see [`RateLimiter::update`].
    pub fn update_limits(&mut self, rx: Limits, tx: Limits) {
        self.rx_limiter.update(rx);
        self.tx_limiter.update(tx);
    }

    /// The limits of what the guest receives, then of what it sends.
    pub fn limits(&self) -> (Limits, Limits) {
        (self.rx_limiter.limits(), self.tx_limiter.limits())
    }

    /// Makes the link ready for a driver.
    pub(super) fn set_offloads(&mut self, offloads: Offloads) -> Result<(), Error> {
        self.wires.link.set_offloads(offloads).map_err(|source| {
            count(&self.wires.counters.activate_fails);
            Error::Host {
                doing: "set a network link's offloads",
                source,
            }
        })?;
        // What came before there was a driver is still there.
        self.wires.link_has_frames = true;
        Ok(())
    }

    /// Does what there is to do in both directions, on the thread `on`.
    fn exchange(&mut self, on: Thread) -> Result<(), QueueError> {
        let now = Instant::now();
        let State::Live(live) = &mut self.state else {
            return Ok(());
        };
        let done = live.exchange(
            &mut self.tx_limiter,
            &mut self.rx_limiter,
            &mut self.wires,
            now,
            on,
        );
        self.wires.listen();
        let sent = done?;
        let asked = self.wires.neighbour.as_mut();
        let next = asked.and_then(|neighbour| neighbour.poll_at(now));
        // Frames that were left go on with the next round of the event loop. A neighbour
        // that has something to say although it was just asked waits for the guest's
        // buffers: its kick is heard, and the event loop must not spin meanwhile.
        if !sent {
            self.wires.bell.ring();
        }
        if let Some(at) = next {
            let wait = at.saturating_duration_since(now).max(PAUSE);
            self.wires.poller.set_alarm(wait);
        }
        Ok(())
    }
}

impl Wires {
    /// More frames are on the link, for the next round of the event loop.
    pub(super) fn come_back(&self) {
        self.poller.again(&self.link, LINK);
    }

    /// Keeps the answer to a frame, which the host gives before the write returns, from
    /// waking the event loop: it would only wait for this device, and waking takes longer than
    /// all the rest. Until [`Wires::listen`].
    pub(super) fn hush(&mut self) {
        if !self.quiet {
            self.quiet = true;
            self.poller.pause(&self.link, LINK);
        }
    }

    /// The link wakes the event loop again, at once if it has frames.
    fn listen(&mut self) {
        if std::mem::take(&mut self.quiet) {
            self.come_back();
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        let given = |given: bool, feature| if given { feature } else { 0 };
        F_CSUM
            | F_GUEST_CSUM
            | F_GUEST_TSO4
            | F_GUEST_TSO6
            | F_GUEST_UFO
            | F_HOST_TSO4
            | F_HOST_TSO6
            | F_HOST_UFO
            | F_MRG_RXBUF
            | given(self.wires.mac.is_some(), F_MAC)
            | given(self.mtu.is_some(), F_MTU)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            mac: self.wires.mac.unwrap_or_default(),
            mtu: self.mtu.unwrap_or_default(),
        };
        crate::device::copy_config(&config.bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        self.set_offloads(Offloads::of(features))?;
        self.state = match Live::new(memory, interrupt, features, queues) {
            Some(live) => State::Live(live),
            None => State::Idle,
        };
        Ok(())
    }

    fn notify(&mut self, queue: u16) -> Result<(), QueueError> {
        let counters = &self.wires.counters;
        count(match queue {
            RX => &counters.rx_queue_event_count,
            _ => &counters.tx_queue_event_count,
        });
        self.exchange(Thread::Vcpu)
    }

    fn bell(&self) -> Option<Bell> {
        Some(self.wires.bell.clone())
    }

    fn save(&mut self) -> Result<SavedDevice, Error> {
        Net::save(self).map(SavedDevice::Net)
    }

    fn restore(
        &mut self,
        saved: &SavedDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        match saved {
            SavedDevice::Net(saved) => saved.put_into(self, memory, interrupt),
            other => Err(other.misplaced()),
        }
    }

    fn reset(&mut self) {
        self.wires.waiting = None;
        self.state = State::Idle;
    }
}

impl EventSource for Net {
    fn fd(&self) -> BorrowedFd<'_> {
        self.wires.poller.as_fd()
    }

    fn on_event(&mut self) {
        let (ready, _) = self.wires.poller.take();
        for event in ready {
            let counters = &self.wires.counters;
            match event.token {
                LINK => {
                    count(&counters.rx_tap_event_count);
                    self.wires.link_has_frames = true;
                }
                RX_TIMER if self.rx_limiter.acknowledge() => {
                    count(&counters.rx_event_rate_limiter_count);
                }
                TX_TIMER if self.tx_limiter.acknowledge() => {
                    count(&counters.tx_rate_limiter_event_count);
                }
                _ => {}
            }
        }
        if let Err(error) = self.exchange(Thread::EventLoop) {
            tracing::warn!(%error, "network interface needs a reset");
            if let State::Live(live) = &self.state {
                live.interrupt.needs_reset();
            }
        }
    }
}
