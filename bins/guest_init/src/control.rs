//! The guest's end of the control stream, without ever waiting on it.
//!
//! Invariant: what waits to be sent stays near [`OUTBOX_BYTES_MAX`], because callers stop reading output while
//! [`Control::has_room`] is false.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use guest_wire::{
    FrameDecoder, GuestMessage, Hello, HostMessage, STDIO_CHUNK_BYTES_MAX, WireError, encode,
    write_hello,
};
use rustix::{
    buffer::spare_capacity,
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::error::InitError;

/// Output waiting for the host beyond which the process's output stays in its pipes.
const OUTBOX_BYTES_MAX: usize = 256 << 10;

/// Bytes of the outbox that may be sent and not yet freed.
const OUTBOX_SENT_BYTES_MAX: usize = 64 << 10;

/// The control stream.
#[derive(Debug)]
pub(crate) struct Control {
    stream: OwnedFd,
    decoder: FrameDecoder,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    /// Bytes of `outbox` that the kernel took already.
    sent: usize,
}

impl Control {
    /// Takes a connected stream and queues our greeting.
    pub(crate) fn new(stream: OwnedFd) -> Result<Self, InitError> {
        rustix::io::ioctl_fionbio(&stream, true)
            .map_err(InitError::system("make non-blocking", "control stream"))?;
        let mut outbox = Vec::new();
        write_hello(&mut outbox, Hello::OURS)?;
        let inbox = Vec::with_capacity(STDIO_CHUNK_BYTES_MAX);
        Ok(Self {
            stream,
            decoder: FrameDecoder::new(),
            inbox,
            outbox,
            sent: 0,
        })
    }

    /// What to poll the stream for.
    pub(crate) fn interest(&self) -> PollFlags {
        if self.sent < self.outbox.len() {
            PollFlags::IN | PollFlags::OUT
        } else {
            PollFlags::IN
        }
    }

    /// Whether more output may be queued.
    pub(crate) fn has_room(&self) -> bool {
        self.outbox.len().saturating_sub(self.sent) < OUTBOX_BYTES_MAX
    }

    /// Queues a message; [`Control::flush`] sends it.
    pub(crate) fn queue(&mut self, message: &GuestMessage) -> Result<(), InitError> {
        if self.sent > OUTBOX_SENT_BYTES_MAX {
            self.outbox.drain(..self.sent.min(self.outbox.len()));
            self.sent = 0;
        }
        Ok(encode(message, &mut self.outbox)?)
    }

    /// Sends what the stream takes now.
    pub(crate) fn flush(&mut self) -> Result<(), InitError> {
        while let Some(rest) = self.outbox.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::io::write(&self.stream, rest) {
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(InitError::HostGone),
                Err(errno) => return Err(stream_error(errno)),
            }
        }
        self.outbox.clear();
        self.sent = 0;
        Ok(())
    }

    /// Reads once; false when the host closed its end.
    pub(crate) fn fill(&mut self) -> Result<bool, InitError> {
        self.inbox.clear();
        match rustix::io::read(&self.stream, spare_capacity(&mut self.inbox)) {
            Ok(0) | Err(Errno::CONNRESET) => Ok(false),
            Ok(_) => {
                self.decoder.feed(&self.inbox);
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(errno) => Err(stream_error(errno)),
        }
    }

    /// The next whole message read so far.
    pub(crate) fn next(&mut self) -> Result<Option<HostMessage>, InitError> {
        Ok(self.decoder.take_message()?)
    }

    /// Waits for the host's greeting and checks its version.
    pub(crate) fn await_hello(&mut self) -> Result<(), InitError> {
        loop {
            if let Some(hello) = self.decoder.take_hello()? {
                hello.agree()?;
                return Ok(());
            }
            if !self.wait_and_fill()? {
                return Err(WireError::NoHello.into());
            }
        }
    }

    /// Waits for the next message; `None` when the host closed its end.
    pub(crate) fn await_message(&mut self) -> Result<Option<HostMessage>, InitError> {
        loop {
            if let Some(message) = self.next()? {
                return Ok(Some(message));
            }
            if !self.wait_and_fill()? {
                return Ok(None);
            }
        }
    }

    fn wait_and_fill(&mut self) -> Result<bool, InitError> {
        self.flush()?;
        self.poll(None)?;
        self.fill()
    }

    /// Sends everything queued, then waits until the host closes the stream or says
    /// [`Shutdown`](HostMessage::Shutdown), both within `limit`. Errors end it too: there is nobody left to tell.
    pub(crate) fn linger(&mut self, limit: Duration) {
        let start = Instant::now();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() || self.flush().is_err() || self.poll(Some(left)).is_err() {
                return;
            }
            if !matches!(self.fill(), Ok(true)) {
                return;
            }
            loop {
                match self.next() {
                    Ok(Some(HostMessage::Shutdown)) | Err(_) => return,
                    // Input and signals for a process that is no more.
                    Ok(Some(
                        HostMessage::Start(_)
                        | HostMessage::Stdin { .. }
                        | HostMessage::StdinEof
                        | HostMessage::Resize(_)
                        | HostMessage::Signal { .. },
                    )) => {}
                    Ok(None) => break,
                }
            }
        }
    }

    fn poll(&self, limit: Option<Duration>) -> Result<(), InitError> {
        let timeout = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match poll(
            &mut [PollFd::new(&self.stream, self.interest())],
            timeout.as_ref(),
        ) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(stream_error(errno)),
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn stream_error(errno: Errno) -> InitError {
    InitError::Wire(WireError::Stream(io::Error::from(errno)))
}
