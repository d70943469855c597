//! One conversation with the host, from the greeting to the process's end.
//!
//! ```text
//!   greeting ─▶ Start ─▶ machine made ─▶ process started ─▶ streams and signals ─▶ process ended, output drained ─▶ lingering
//!                             │InitFailed       │StartFailed        │host gone                                    ▲
//!                             └─────────────────┴───────────────────┴─────────────────────────────────────────────┘
//! ```
//!
//! Invariant: one thread, which only ever waits in poll, and never for the host to take output while the host waits for
//! us to take input.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use guest_wire::{GuestMessage, HostMessage, MachineSpec, STDIO_CHUNK_BYTES_MAX, StartSpec};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::WaitStatus,
};

use crate::{
    control::Control,
    descendants,
    error::InitError,
    launch::{self, Running},
    spawn,
    stdio::Output,
};

/// How long a terminal that others still hold may take to show the process's last output.
const DRAIN_TIME_MAX: Duration = Duration::from_millis(500);

/// How long the host may take to close the stream after our last message.
const LINGER_TIME_MAX: Duration = Duration::from_secs(10);

/// The status bit that says "dumped core" (wait(2), WCOREDUMP).
const CORE_DUMPED: i32 = 0x80;

/// Serves one session on `stream`; `make_machine` sets up what is around the process. The error is for the console: the
/// host has heard of it where it could.
pub(crate) fn serve(
    stream: OwnedFd,
    make_machine: impl FnOnce(&MachineSpec) -> Result<(), InitError>,
) -> Result<(), InitError> {
    let mut control = Control::new(stream)?;
    let result = converse(&mut control, make_machine);
    if let Err(error) = &result {
        control.queue(&GuestMessage::InitFailed {
            message: error.line(),
        })?;
    }
    match result {
        Ok(End::Dismissed) | Err(InitError::HostGone) => {}
        Ok(End::Told) | Err(_) => control.linger(LINGER_TIME_MAX),
    }
    result.map(|_end| ())
}

/// How a conversation came to its end.
#[derive(Debug, Clone, Copy)]
enum End {
    /// The host still has our last message to read, and then closes.
    Told,
    /// The host wants us off at once.
    Dismissed,
}

fn converse(
    control: &mut Control,
    make_machine: impl FnOnce(&MachineSpec) -> Result<(), InitError>,
) -> Result<End, InitError> {
    control.await_hello()?;
    let StartSpec { machine, process } = match control.await_message()? {
        Some(HostMessage::Start(spec)) => *spec,
        Some(HostMessage::Shutdown) => return Ok(End::Dismissed),
        None => return Err(InitError::HostGone),
        Some(HostMessage::Stdin { .. } | HostMessage::StdinEof) => return Err(early("Stdin")),
        Some(HostMessage::Resize(_)) => return Err(early("Resize")),
        Some(HostMessage::Signal { .. }) => return Err(early("Signal")),
    };
    make_machine(&machine)?;
    let children =
        spawn::watch_children().map_err(InitError::system("watch", "child processes"))?;
    match launch::launch(process, &machine.hostname) {
        Ok(running) => {
            control.queue(&GuestMessage::Started {
                pid: running.pid.as_raw_nonzero().get().unsigned_abs(),
            })?;
            Conversation {
                control,
                children,
                running,
                ended: None,
                chunk: Vec::with_capacity(STDIO_CHUNK_BYTES_MAX),
            }
            .run()
        }
        Err(error) => {
            control.queue(&GuestMessage::StartFailed {
                kind: error.start_failure(),
                message: error.line(),
            })?;
            Ok(End::Told)
        }
    }
}

fn early(message: &'static str) -> InitError {
    InitError::OutOfOrder {
        message,
        when: "before Start",
    }
}

/// How the process ended, and when we learnt it.
#[derive(Debug, Clone, Copy)]
struct Ended {
    status: WaitStatus,
    at: Instant,
}

/// What one poll found ready.
#[derive(Debug, Clone, Copy, Default)]
struct Ready {
    control: bool,
    children: bool,
    output: bool,
    error: bool,
}

/// The session while its process runs.
#[derive(Debug)]
struct Conversation<'a> {
    control: &'a mut Control,
    /// Readable when children end.
    children: OwnedFd,
    running: Running,
    ended: Option<Ended>,
    /// Scratch for one chunk of output; its capacity is the largest that a message may carry.
    chunk: Vec<u8>,
}

impl Conversation<'_> {
    fn run(mut self) -> Result<End, InitError> {
        // What came together with Start makes the stream readable no more.
        if !self.obey()? {
            return Ok(End::Dismissed);
        }
        self.running.input.deliver();
        loop {
            self.control.flush()?;
            if let Some(ended) = self.ended
                && self.is_drained()
            {
                self.control.queue(&last_words(ended.status))?;
                return Ok(End::Told);
            }
            let ready = self.wait()?;
            if ready.children {
                self.collect();
            }
            if ready.control && !self.hear()? {
                return Ok(End::Dismissed);
            }
            self.running.input.deliver();
            if let Some(bytes) = self.running.input.credit_due() {
                self.control.queue(&GuestMessage::StdinCredit { bytes })?;
            }
            if ready.output {
                self.running.output.read(&mut self.chunk);
                forward(self.control, &mut self.chunk, |bytes| {
                    GuestMessage::Stdout { bytes }
                })?;
            }
            if let Some(error) = self.running.error.as_mut().filter(|_| ready.error) {
                error.read(&mut self.chunk);
                forward(self.control, &mut self.chunk, |bytes| {
                    GuestMessage::Stderr { bytes }
                })?;
            }
        }
    }

    /// Waits until something can be done.
    fn wait(&mut self) -> Result<Ready, InitError> {
        let room = self.control.has_room();
        let output = self.running.output.open().filter(|_| room);
        let error = self
            .running
            .error
            .as_ref()
            .and_then(Output::open)
            .filter(|_| room);
        let never = self.children.as_fd();
        let mut fds = [
            PollFd::from_borrowed_fd(self.control.as_fd(), self.control.interest()),
            PollFd::from_borrowed_fd(self.children.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(output.unwrap_or(never), PollFlags::IN),
            PollFd::from_borrowed_fd(error.unwrap_or(never), PollFlags::IN),
            PollFd::from_borrowed_fd(
                self.running.input.waiting().unwrap_or(never),
                PollFlags::OUT,
            ),
        ];
        // The terminal's time runs only while we could read from it.
        let timeout = self.ended.filter(|_| room).and_then(|ended| {
            Timespec::try_from(DRAIN_TIME_MAX.saturating_sub(ended.at.elapsed())).ok()
        });
        let count = match poll(&mut fds, timeout.as_ref()) {
            Ok(count) => count,
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(source) => return Err(InitError::system("wait for", "events")(source)),
        };
        let [control, children, out, err, _input] = fds.map(|fd| !fd.revents().is_empty());
        let ready = Ready {
            control,
            children,
            output: out && output.is_some(),
            error: err && error.is_some(),
        };
        if count == 0 && self.ended.is_some() {
            self.running.output.close();
            if let Some(error) = &mut self.running.error {
                error.close();
            }
        }
        Ok(ready)
    }

    /// Whether all that the process wrote is on its way.
    fn is_drained(&self) -> bool {
        self.running.output.open().is_none()
            && self.running.error.as_ref().and_then(Output::open).is_none()
    }

    /// Takes note of children that ended.
    fn collect(&mut self) {
        let mut notes = [0; 1024];
        // Signals merge: what counts is that there was one, and which children have ended.
        while let Ok(1..) = rustix::io::read(&self.children, &mut notes) {}
        let watched = if self.ended.is_none() {
            Some(self.running.pid)
        } else {
            None
        };
        if let Some(status) = descendants::reap(watched) {
            self.ended = Some(Ended {
                status,
                at: Instant::now(),
            });
            self.running.output.process_ended();
            if let Some(error) = &mut self.running.error {
                error.process_ended();
            }
        }
    }

    /// Listens to the host; false when it is over.
    fn hear(&mut self) -> Result<bool, InitError> {
        let open = self.control.fill()?;
        if !self.obey()? {
            return Ok(false);
        }
        if open {
            Ok(true)
        } else {
            Err(InitError::HostGone)
        }
    }

    /// Does what the host has said so far; false when it is over.
    fn obey(&mut self) -> Result<bool, InitError> {
        while let Some(message) = self.control.next()? {
            match message {
                HostMessage::Stdin { bytes } => self.running.input.accept(&bytes)?,
                HostMessage::StdinEof => self.running.input.finish(),
                HostMessage::Resize(size) => self.running.output.resize(size),
                HostMessage::Signal { number } => {
                    // Once it has ended, its number may be another's.
                    if self.ended.is_none() {
                        spawn::signal(self.running.pid, number);
                    }
                }
                HostMessage::Shutdown => return Ok(false),
                HostMessage::Start(_) => {
                    return Err(InitError::OutOfOrder {
                        message: "Start",
                        when: "twice",
                    });
                }
            }
        }
        Ok(true)
    }
}

/// Queues `chunk` as a message, and gives it back for the next.
fn forward(
    control: &mut Control,
    chunk: &mut Vec<u8>,
    message: impl FnOnce(Vec<u8>) -> GuestMessage,
) -> Result<(), InitError> {
    if chunk.is_empty() {
        return Ok(());
    }
    let message = message(std::mem::take(chunk));
    control.queue(&message)?;
    if let GuestMessage::Stdout { bytes } | GuestMessage::Stderr { bytes } = message {
        *chunk = bytes;
    }
    Ok(())
}

fn last_words(status: WaitStatus) -> GuestMessage {
    if let Some(number) = status.terminating_signal() {
        let core = status.as_raw() & CORE_DUMPED != 0;
        return GuestMessage::Signalled {
            number: u8::try_from(number).unwrap_or(u8::MAX),
            core,
        };
    }
    // A child that stopped is not reported unless asked for: it has exited.
    let code = status.exit_status().unwrap_or_default();
    GuestMessage::Exited {
        code: u8::try_from(code & 0xff).unwrap_or(u8::MAX),
    }
}

/// Serves a session on standard input, in the root and with the rights that we have. Returns the exit code.
#[cfg_attr(
    test,
    allow(dead_code, reason = "the test harness has its own entry point")
)]
pub(crate) fn run_as_ordinary_process() -> i32 {
    spawn::ignore_broken_pipes();
    let started = rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(InitError::system("adopt", "orphans"))
        .and_then(|()| {
            // Moved, so that the process's own standard input cannot be mixed up with it.
            rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3)
                .map_err(InitError::system("use", "standard input"))
        });
    let result = started.and_then(|stream| serve(stream, |_machine| Ok(())));
    descendants::kill_everything();
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("kombi-init: {}", error.line());
            1
        }
    }
}
