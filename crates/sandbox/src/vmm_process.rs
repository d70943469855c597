//! The monitor's process: started, listened to, and certainly gone in the end.
//!
//! Invariants:
//! - The process leads a process group of its own (a terminal's Ctrl-C does not reach it), gets SIGKILL when our thread
//!   dies (`--die-with-parent`: PR_SET_PDEATHSIG is about the *thread* that started it, prctl(2)), and dropping
//!   [`VmmProcess`] kills the group and reaps it. So no path, a panic or SIGKILL of ours included, leaves it behind.
//! - All three of its outputs are drained by [`VmmProcess::drain`] and kept in bounded memory.
//!
//! The three outputs: its standard output carries status lines (so that no descriptor need be inherited beyond the
//! standard ones), standard error its log, and a FIFO the guest's serial console.
//!
//! Left to others: what its end means to a container ([`crate::machine`]).

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use blueprint::Draft;
use rustix::fs::{Mode, OFlags};
use rustix::process::{PidfdFlags, Signal};
use serde::Deserialize;

use crate::Error;
use crate::console::{Tail, printable};
use crate::machine::Plan;

/// Bytes of one status line; a longer one is none.
const STATUS_LINE_BYTES_MAX: usize = 64 << 10;
/// kombi-vmm's exit code for a system call that its filter forbids (docs/exit-codes.md).
const EXIT_FORBIDDEN_CALL: i32 = 148;
/// Where the filter cannot say more (signal(7), x86-64).
const SIGSYS: i32 = 31;
/// Bytes read at once.
const READ_BYTES: usize = 4 << 10;

/// What the monitor says on its status descriptor, one JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Status {
    /// The machine is built and its processor runs.
    Started,
    /// The machine ended.
    Stopped {
        /// How, in the monitor's words.
        outcome: String,
        /// Why, for the reader.
        #[serde(default)]
        message: Option<String>,
    },
    /// What a later monitor may add.
    #[serde(other)]
    Unknown,
}

/// A running, or ended, monitor.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    child: Child,
    /// Readable once the process ended.
    pidfd: OwnedFd,
    /// How it ended, once it was reaped.
    exit: Option<ExitStatus>,
    status: Option<OwnedFd>,
    log: Option<OwnedFd>,
    console: OwnedFd,
    status_bytes: Vec<u8>,
    started: bool,
    stopped: Option<(String, Option<String>)>,
    log_tail: Tail,
    console_tail: Tail,
    /// Copy log and console to our standard error.
    verbose: bool,
}

impl VmmProcess {
    /// Starts the plan's monitor with `draft`; `console` is where its FIFO is made.
    pub(crate) fn spawn(plan: &Plan, draft: &Draft, console: &Path) -> Result<Self, Error> {
        let channel = |action| move |source| Error::Channel { action, source };
        rustix::fs::mkfifoat(rustix::fs::CWD, console, Mode::RUSR | Mode::WUSR)
            .map_err(|e| channel("make the console's pipe")(e.into()))?;
        // Open for both: the monitor's open finds a reader, and its end is no end of file for us.
        let console = rustix::fs::open(
            console,
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| channel("open the console's pipe")(e.into()))?;

        let config = serde_json::to_vec(draft)
            .map_err(|e| channel("write the machine's configuration")(e.into()))?;
        let mut command = Command::new(&plan.vmm);
        let options = [
            ("--translation-cache", plan.translation_cache.as_deref()),
            (
                "--engine-trace",
                plan.engine_trace.as_deref().map(Path::as_os_str),
            ),
            (
                "--metrics-path",
                plan.metrics_path.as_deref().map(Path::as_os_str),
            ),
        ];
        for (option, value) in options {
            if let Some(value) = value {
                command.arg(option).arg(value);
            }
        }
        let mut child = command
            .args([
                "--no-api",
                "--config-file",
                "-",
                "--jail",
                "--die-with-parent",
            ])
            .args(["--status-fd", "1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|source| Error::SpawnVmm {
                path: plan.vmm.clone(),
                source,
            })?;
        let opened = pidfd_of(&child).and_then(|pidfd| {
            Ok((
                pidfd,
                child.stdout.take().map(nonblocking).transpose()?,
                child.stderr.take().map(nonblocking).transpose()?,
            ))
        });
        let (pidfd, status, log) = match opened {
            Ok(opened) => opened,
            Err(source) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Error::Channel {
                    action: "watch the monitor",
                    source,
                });
            }
        };
        let stdin = child.stdin.take();
        let process = Self {
            child,
            pidfd,
            exit: None,
            status,
            log,
            console,
            status_bytes: Vec::new(),
            started: false,
            stopped: None,
            log_tail: Tail::default(),
            console_tail: Tail::default(),
            verbose: plan.verbose,
        };
        // A monitor that died already will be found out by its exit.
        if let Some(mut stdin) = stdin
            && let Err(source) = stdin.write_all(&config)
            && source.kind() != std::io::ErrorKind::BrokenPipe
        {
            return Err(channel("write the machine's configuration")(source));
        }
        Ok(process)
    }

    /// What to poll for input, so that [`VmmProcess::drain`] has something to do.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let pidfd = self.exit.is_none().then(|| self.pidfd.as_fd());
        let pipes = [self.status.as_ref(), self.log.as_ref(), Some(&self.console)];
        pipes.into_iter().flatten().map(AsFd::as_fd).chain(pidfd)
    }

    /// Takes all that is there to be read, without waiting, and notices the end of the process.
    pub(crate) fn drain(&mut self) {
        // The exit first: what was written before it is then certainly read below.
        if self.exit.is_none() {
            match self.child.try_wait() {
                Ok(exit) => self.exit = exit,
                Err(error) => tracing::warn!(%error, "monitor cannot be waited for"),
            }
        }
        let verbose = self.verbose;
        let mut status_bytes = std::mem::take(&mut self.status_bytes);
        drain_pipe(&mut self.status, |bytes| {
            status_bytes.extend_from_slice(bytes)
        });
        self.status_bytes = status_bytes;
        self.take_status_lines();
        let log_tail = &mut self.log_tail;
        drain_pipe(&mut self.log, |bytes| {
            log_tail.push(bytes);
            show(verbose, bytes);
        });
        let console_tail = &mut self.console_tail;
        read_all(&self.console, |bytes| {
            console_tail.push(bytes);
            show(verbose, bytes);
        });
    }

    fn take_status_lines(&mut self) {
        while let Some(end) = self.status_bytes.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.status_bytes.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Status::Started) => self.started = true,
                Ok(Status::Stopped { outcome, message }) => {
                    self.stopped = Some((outcome, message));
                }
                Ok(Status::Unknown) | Err(_) => {
                    tracing::debug!(line = %String::from_utf8_lossy(&line), "status line not known");
                }
            }
        }
        if self.status_bytes.len() > STATUS_LINE_BYTES_MAX {
            self.status_bytes.clear();
        }
    }

    /// How it ended, once it did and [`VmmProcess::drain`] noticed.
    pub(crate) fn exit(&self) -> Option<ExitStatus> {
        self.exit
    }

    /// Whether its machine ran.
    pub(crate) fn started(&self) -> bool {
        self.started
    }

    /// Outcome and message of its last words.
    pub(crate) fn stopped(&self) -> Option<(&str, Option<&str>)> {
        self.stopped
            .as_ref()
            .map(|(outcome, message)| (outcome.as_str(), message.as_deref()))
    }

    /// The end of its log.
    pub(crate) fn log(&self) -> &Tail {
        &self.log_tail
    }

    /// The end of the guest's console.
    pub(crate) fn console(&self) -> &Tail {
        &self.console_tail
    }

    /// Ends it now.
    pub(crate) fn kill(&mut self) {
        if self.exit.is_some() {
            return;
        }
        // Not reaped yet, so the id is still its own; the group holds what it may have started.
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        let _ = self.child.kill();
        match self.child.wait() {
            Ok(exit) => self.exit = Some(exit),
            Err(error) => tracing::warn!(%error, "monitor cannot be waited for"),
        }
    }

    /// In one line, what the monitor said about its own failure.
    pub(crate) fn own_words(&self) -> String {
        if let Some((outcome, message)) = self.stopped() {
            return printable(message.unwrap_or(outcome));
        }
        self.log()
            .last_line()
            .map(|line| {
                let words = line.strip_prefix("kombi-vmm: ").unwrap_or(&line);
                words.strip_prefix("error: ").unwrap_or(words).to_owned()
            })
            .unwrap_or_else(|| match self.exit {
                Some(exit) => format!("kombi-vmm ended with {exit} and without a word"),
                None => "kombi-vmm said nothing".to_owned(),
            })
    }

    /// Whether it made a system call that its filter forbids.
    pub(crate) fn forbidden_call(&self) -> bool {
        self.exit.is_some_and(|exit| {
            exit.code() == Some(EXIT_FORBIDDEN_CALL) || exit.signal() == Some(SIGSYS)
        })
    }

    /// The signal that killed it.
    pub(crate) fn killed_by(&self) -> Option<i32> {
        self.exit.and_then(|exit| exit.signal())
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn pidfd_of(child: &Child) -> std::io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_child(child);
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

fn nonblocking(pipe: impl Into<OwnedFd>) -> std::io::Result<OwnedFd> {
    let fd = pipe.into();
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

/// The guest's console is a stranger's text: no terminal may obey it.
fn show(verbose: bool, bytes: &[u8]) {
    if !verbose {
        return;
    }
    let mut shown = String::new();
    for c in String::from_utf8_lossy(bytes).chars() {
        match c {
            '\n' | '\t' => shown.push(c),
            '\r' => {}
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    let _ = std::io::stderr().write_all(shown.as_bytes());
}

/// Reads until nothing is left; true at the end of the file.
fn read_all(fd: &OwnedFd, mut take: impl FnMut(&[u8])) -> bool {
    // A guest that prints without end must not keep us here: we come back at the next poll.
    const READS_MAX: u32 = 64;
    let mut buffer = [0_u8; READ_BYTES];
    for _ in 0..READS_MAX {
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) => return true,
            Ok(count) => take(buffer.get(..count).unwrap_or_default()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return false,
            Err(_) => return true,
        }
    }
    false
}

fn drain_pipe(pipe: &mut Option<OwnedFd>, take: impl FnMut(&[u8])) {
    if let Some(fd) = pipe
        && read_all(fd, take)
    {
        *pipe = None;
    }
}
