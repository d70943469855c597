//! The life of one machine, from its plan to its end.
//!
//! Invariant: [`Booting`] and [`Ready`] own everything that exists because of the machine, in the order in which it must
//! go: the monitor, the sockets, the directory. Left to others: the conversation while the command runs
//! ([`crate::session`]).

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blueprint::{
    BootSourceDraft, CacheType, CpuModel, Draft, DriveDraft, Engine, EntropyDraft,
    MachineConfigDraft, SerialDraft, VsockDraft,
};
use guest_wire::{
    CONTROL_PORT, FrameDecoder, Hello, HostMessage, MachineSpec, ProcessSpec, StartSpec,
    TerminalSize, WireError,
};
use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};

use crate::control::{Control, Request};
use crate::exit_status::{Ended, signal_name};
use crate::runtime_dir::{RuntimeDir, check_name, random_id, runtime_parent};
use crate::session::{Streams, converse, poll_until};
use crate::vmm_process::VmmProcess;
use crate::{Error, host};

/// Least memory of a machine, in MiB: the kernel, its initial RAM disk unpacked, and a small command.
pub const MEMORY_MIB_LEAST: u32 = 48;
/// The guest's address on its vsock; each machine has a socket directory of its own, so all may have the same.
const GUEST_CID: u64 = 3;
/// How long a monitor may take to go once its conversation ended without a word.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long a machine may take to power off once its command has ended.
const POWER_OFF: Duration = Duration::from_secs(5);

/// The kernel's command line. `panic=-1 reboot=k`: a panic resets at once through the i8042, which ends the monitor.
/// `quiet` keeps the serial port, and the time its interrupts take, for what matters.
const BOOT_ARGS: &str = "console=ttyS0 quiet loglevel=4 reboot=k panic=-1 8250.nr_uarts=1 tsc=reliable \
     no_timer_check mitigations=off random.trust_cpu=on";

/// A machine as it is wanted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// A name that no other running container of this user has; otherwise twelve random hexadecimal digits.
    pub name: Option<String>,
    /// The guest's host name; otherwise its name.
    pub hostname: Option<String>,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk with the guest's init.
    pub initramfs: PathBuf,
    /// The monitor's program.
    pub vmm: PathBuf,
    /// EROFS files, lowest first.
    pub layers: Vec<PathBuf>,
    /// A file with an ext4 file system that keeps what is written; without, that is in the guest's memory.
    pub upper: Option<PathBuf>,
    /// Virtual processors.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Who runs the guest's code.
    pub engine: Engine,
    /// The monitor's `--translation-cache`, where it is not to choose.
    pub translation_cache: Option<OsString>,
    /// The guest's CPU.
    pub cpu_model: CpuModel,
    /// The monitor's `--engine-trace`.
    pub engine_trace: Option<PathBuf>,
    /// The monitor's `--metrics-path`.
    pub metrics_path: Option<PathBuf>,
    /// From the monitor's start to the first word of the guest's init.
    pub boot_timeout: Duration,
    /// Copy the console and the monitor's log to standard error.
    pub verbose: bool,
}

impl Plan {
    /// Looks for what is wrong whatever the image is, and says which engine it will be.
    ///
    /// # Errors
    /// [`Error::TooLittleMemory`], [`Error::Engine`], [`Error::BadName`].
    pub fn check(&self) -> Result<Engine, Error> {
        if self.memory_mib < MEMORY_MIB_LEAST {
            return Err(Error::TooLittleMemory {
                asked_mib: self.memory_mib,
                least_mib: MEMORY_MIB_LEAST,
            });
        }
        if let Some(name) = &self.name {
            check_name(name)?;
        }
        host::check_cpu_model(self.cpu_model)?;
        host::choose_engine(self.engine, self.vcpus)
    }

    /// Starts the monitor. The calling thread must live as long as the machine.
    ///
    /// # Errors
    /// What can be seen to be wrong before the guest runs.
    pub fn launch(self) -> Result<Booting, Error> {
        self.launch_in(&runtime_parent())
    }

    /// As [`Plan::launch`], with the parent of the runtime directory chosen.
    ///
    /// # Errors
    /// Those of [`Plan::launch`].
    pub fn launch_in(self, runtime_parent: &std::path::Path) -> Result<Booting, Error> {
        let engine = self.check()?;
        let id = match &self.name {
            Some(name) => name.clone(),
            None => random_id()?,
        };
        let started = Instant::now();
        let dir = RuntimeDir::create(runtime_parent, &id)?;
        let draft = self.draft(&dir, engine);
        draft
            .clone()
            .check()
            .map_err(|source| Error::Draft { source })?;

        // Before the monitor, which connects to it as soon as the guest calls.
        let socket = dir.path().join(format!("v.sock_{CONTROL_PORT}"));
        let listener = UnixListener::bind(&socket)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|source| Error::RuntimeDir {
                action: "listen on",
                path: socket,
                source,
            })?;
        let console = dir.path().join("console");
        let vmm = VmmProcess::spawn(&self, &draft, &console)?;
        tracing::debug!(%id, after = ?started.elapsed(), "monitor started");
        Ok(Booting {
            vmm,
            listener,
            dir,
            hostname: self.hostname.unwrap_or(id),
            layers: u16::try_from(self.layers.len()).unwrap_or(u16::MAX),
            keeps: self.upper.is_some(),
            started,
            boot_timeout: self.boot_timeout,
        })
    }

    fn draft(&self, dir: &RuntimeDir, engine: Engine) -> Draft {
        let drives = self
            .layers
            .iter()
            .enumerate()
            .map(|(index, path)| DriveDraft {
                drive_id: format!("layer{index}"),
                path_on_host: Some(path.clone()),
                is_read_only: Some(true),
                ..DriveDraft::default()
            });
        let upper = self.upper.as_ref().map(|path| DriveDraft {
            drive_id: "upper".to_owned(),
            path_on_host: Some(path.clone()),
            is_read_only: Some(false),
            // What the guest has synced stays, whatever becomes of the monitor and the host.
            cache_type: CacheType::Writeback,
            ..DriveDraft::default()
        });
        Draft {
            boot_source: BootSourceDraft {
                kernel_image_path: self.kernel.clone(),
                initrd_path: Some(self.initramfs.clone()),
                boot_args: Some(BOOT_ARGS.to_owned()),
            },
            machine_config: MachineConfigDraft {
                vcpu_count: Some(self.vcpus.into()),
                mem_size_mib: Some(self.memory_mib.into()),
                engine: Some(engine),
                cpu_model: Some(self.cpu_model),
                ..MachineConfigDraft::default()
            },
            drives: drives.chain(upper).collect(),
            vsock: Some(VsockDraft {
                guest_cid: GUEST_CID,
                uds_path: dir.path().join("v.sock"),
                ..VsockDraft::default()
            }),
            entropy: Some(EntropyDraft::default()),
            serial: Some(SerialDraft {
                serial_out_path: Some(dir.path().join("console")),
                ..SerialDraft::default()
            }),
            ..Draft::default()
        }
    }
}

/// A machine whose guest has not called yet.
#[derive(Debug)]
pub struct Booting {
    vmm: VmmProcess,
    listener: UnixListener,
    dir: RuntimeDir,
    hostname: String,
    layers: u16,
    keeps: bool,
    started: Instant,
    boot_timeout: Duration,
}

impl Booting {
    /// The machine's private directory.
    #[must_use]
    pub fn runtime_dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Waits until the guest's init calls.
    ///
    /// # Errors
    /// What kept the guest from booting, or the request that ended it.
    pub fn wait_for_guest(mut self, control: &mut dyn Control) -> Result<Ready, Error> {
        let deadline = self.started.checked_add(self.boot_timeout);
        let mut stream: Option<UnixStream> = None;
        let mut decoder = FrameDecoder::new();
        let mut resized = None;
        loop {
            resized = before_start(control)?.or(resized);
            // Noticing the end first makes the look at the sockets below the last word on them.
            self.vmm.drain();
            let ended = self.vmm.exit().is_some();
            if stream.is_none() {
                stream = accept(&self.listener)?;
            }
            if let Some(connection) = &stream {
                let open = feed(connection, &mut decoder)?;
                if let Some(hello) = decoder.take_hello().map_err(Error::Wire)? {
                    return self.greet(connection, hello, decoder, resized);
                }
                if !open {
                    self.last_words(control)?;
                    return Err(self.why(Stage::Boot));
                }
            }
            if ended {
                return Err(self.why(Stage::Boot));
            }
            let waiting_for = match &stream {
                Some(connection) => connection.as_fd(),
                None => self.listener.as_fd(),
            };
            let mut fds = vec![PollFd::from_borrowed_fd(waiting_for, PollFlags::IN)];
            let others = self.vmm.fds().chain(control.fd());
            fds.extend(others.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            if !poll_until(&mut fds, deadline)? {
                drop(fds);
                self.vmm.drain();
                return Err(match self.vmm.console().panic_line() {
                    Some(line) => Error::GuestPanicked { line },
                    None => Error::BootTimeout {
                        limit: self.boot_timeout,
                        console: last_console_line(&self.vmm),
                    },
                });
            }
        }
    }

    fn greet(
        self,
        connection: &UnixStream,
        hello: Hello,
        decoder: FrameDecoder,
        resized: Option<TerminalSize>,
    ) -> Result<Ready, Error> {
        hello.agree().map_err(Error::Wire)?;
        tracing::debug!(after = ?self.started.elapsed(), "guest's init called");
        let channel = |source| Error::Channel {
            action: "talk to the guest's init",
            source,
        };
        let stream = connection.try_clone().map_err(channel)?;
        Ok(Ready {
            vmm: self.vmm,
            stream,
            _dir: self.dir,
            decoder,
            hostname: self.hostname,
            layers: self.layers,
            keeps: self.keeps,
            started: self.started,
            resized,
        })
    }

    fn last_words(&mut self, control: &mut dyn Control) -> Result<(), Error> {
        wait_for_exit(&mut self.vmm, control, LAST_WORDS)
    }

    fn why(&self, stage: Stage) -> Error {
        why_it_ended(&self.vmm, stage)
    }
}

/// A machine whose guest waits for a command.
#[derive(Debug)]
pub struct Ready {
    vmm: VmmProcess,
    stream: UnixStream,
    _dir: RuntimeDir,
    decoder: FrameDecoder,
    hostname: String,
    layers: u16,
    keeps: bool,
    started: Instant,
    resized: Option<TerminalSize>,
}

impl Ready {
    /// Runs the command and waits for its end, then for the machine's.
    ///
    /// # Errors
    /// What kept the command from starting or from ending by itself.
    pub fn run(
        mut self,
        mut process: ProcessSpec,
        streams: Streams<'_>,
        control: &mut dyn Control,
    ) -> Result<Ended, Error> {
        if let (Some(terminal), Some(size)) = (&mut process.terminal, self.resized) {
            *terminal = size;
        }
        let machine = MachineSpec {
            hostname: self.hostname.clone(),
            layers: self.layers,
            keeps: self.keeps,
        };
        let mut first_words = Vec::new();
        guest_wire::write_hello(&mut first_words, Hello::OURS).map_err(Error::Wire)?;
        let streams = if process.stdin {
            streams
        } else {
            Streams {
                stdin: None,
                ..streams
            }
        };
        let start = HostMessage::Start(Box::new(StartSpec { machine, process }));
        guest_wire::encode(&start, &mut first_words).map_err(Error::Wire)?;
        let ended = converse(
            &mut self.vmm,
            &self.stream,
            std::mem::take(&mut self.decoder),
            first_words,
            streams,
            control,
        )?;
        let Some(ended) = ended else {
            wait_for_exit(&mut self.vmm, control, LAST_WORDS)?;
            return Err(why_it_ended(&self.vmm, Stage::Run));
        };
        tracing::debug!(after = ?self.started.elapsed(), ?ended, "command ended");
        // The end of the stream makes the guest power off.
        drop(self.stream);
        match wait_for_exit(&mut self.vmm, control, POWER_OFF) {
            Ok(()) | Err(Error::Interrupted { .. }) => {}
            Err(error) => return Err(error),
        }
        if self.vmm.exit().is_none() {
            tracing::debug!("machine did not power off in time");
        }
        tracing::debug!(after = ?self.started.elapsed(), "machine ended");
        Ok(ended)
    }
}

/// When a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Boot,
    Run,
}

/// Requests while there is no process: a new size is for later, everything else ends the machine.
fn before_start(control: &mut dyn Control) -> Result<Option<TerminalSize>, Error> {
    let mut resized = None;
    while let Some(request) = control.take() {
        match request {
            Request::Resize(size) => resized = Some(size),
            Request::Signal(signal) | Request::Kill { signal } => {
                return Err(Error::Interrupted { signal });
            }
        }
    }
    Ok(resized)
}

fn accept(listener: &UnixListener) -> Result<Option<UnixStream>, Error> {
    let channel = |source| Error::Channel {
        action: "take the guest's call",
        source,
    };
    match listener.accept() {
        Ok((stream, _)) => {
            stream.set_nonblocking(true).map_err(channel)?;
            Ok(Some(stream))
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(channel(error)),
    }
}

/// Reads what is there; false at the end of the stream.
fn feed(mut stream: &UnixStream, decoder: &mut FrameDecoder) -> Result<bool, Error> {
    use std::io::{ErrorKind, Read};
    let mut buffer = [0_u8; 4096];
    match stream.read(&mut buffer) {
        Ok(0) => Ok(false),
        Ok(count) => {
            decoder.feed(buffer.get(..count).unwrap_or_default());
            Ok(true)
        }
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(true),
        Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(false),
        Err(e) => Err(Error::Wire(WireError::Stream(e))),
    }
}

/// Waits for the monitor's end, at most `patience`; then it is for the caller to kill it.
fn wait_for_exit(
    vmm: &mut VmmProcess,
    control: &mut dyn Control,
    patience: Duration,
) -> Result<(), Error> {
    let deadline = Instant::now().checked_add(patience);
    loop {
        vmm.drain();
        if vmm.exit().is_some() {
            return Ok(());
        }
        before_start(control)?;
        let fds = vmm.fds().chain(control.fd());
        let mut fds: Vec<_> = fds
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        if !poll_until(&mut fds, deadline)? {
            return Ok(());
        }
    }
}

fn why_it_ended(vmm: &VmmProcess, stage: Stage) -> Error {
    if vmm.exit().is_none() {
        return Error::Protocol {
            what: "it hung up before the command's end",
        };
    }
    if vmm.forbidden_call() {
        return Error::VmmForbidden {
            message: vmm.own_words(),
        };
    }
    if let Some(signal) = vmm.killed_by() {
        return Error::VmmKilled {
            signal,
            name: signal_name(signal),
        };
    }
    if let Some(line) = vmm.console().panic_line() {
        return Error::GuestPanicked { line };
    }
    let console = last_console_line(vmm);
    match vmm.stopped() {
        Some(("triple-fault", _)) => Error::TripleFault { console },
        Some((outcome, message)) if vmm.exit().is_some_and(|exit| !exit.success()) => {
            Error::VmmFailed {
                stage: if stage == Stage::Boot && !vmm.started() {
                    "start"
                } else {
                    "go on"
                },
                message: crate::console::printable(message.unwrap_or(outcome)),
            }
        }
        Some((outcome, _)) => Error::EndedEarly {
            outcome: crate::console::printable(outcome),
            console,
        },
        None => Error::VmmFailed {
            stage: if vmm.started() { "go on" } else { "start" },
            message: vmm.own_words(),
        },
    }
}

fn last_console_line(vmm: &VmmProcess) -> String {
    vmm.console()
        .last_line()
        .map(|line| format!("; last line of its console: {line}"))
        .unwrap_or_default()
}
