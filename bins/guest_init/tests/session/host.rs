//! The host's end of a session, blocking and simple.

use std::{
    io::Read,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

use guest_wire::{
    GuestMessage, Hello, HostMessage, MachineSpec, ProcessSpec, StartSpec, TerminalSize,
    read_hello, read_message, write_hello, write_message,
};

/// Longer than any session here may take, in the slowest of builds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running kombi-init and our end of its control stream.
pub(crate) struct Host {
    pub(crate) stream: UnixStream,
    pub(crate) init: Child,
}

/// All that a session said up to its process's end.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) credited: u64,
    pub(crate) last: Option<GuestMessage>,
}

impl Record {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A process with our own ids, without standard input or terminal.
pub(crate) fn process(args: &[&str]) -> ProcessSpec {
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    ProcessSpec {
        args: args.iter().map(|&arg| String::from(arg)).collect(),
        env: vec![],
        cwd: String::new(),
        user: format!("{uid}:{gid}"),
        terminal: None,
        stdin: false,
    }
}

pub(crate) fn shell(script: &str) -> ProcessSpec {
    process(&["sh", "-c", script])
}

pub(crate) fn on_terminal(mut spec: ProcessSpec) -> ProcessSpec {
    spec.terminal = Some(TerminalSize { rows: 24, cols: 80 });
    spec.stdin = true;
    spec
}

pub(crate) fn with_stdin(mut spec: ProcessSpec) -> ProcessSpec {
    spec.stdin = true;
    spec
}

/// What a Start for `process` says.
pub(crate) fn start(process: ProcessSpec) -> StartSpec {
    let machine = MachineSpec {
        hostname: String::from("box"),
        layers: 1,
        keeps: false,
    };
    StartSpec { machine, process }
}

impl Host {
    /// Starts kombi-init without saying anything to it.
    pub(crate) fn silent() -> Self {
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let init = Command::new(env!("CARGO_BIN_EXE_kombi-init"))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .env_clear()
            .spawn()
            .unwrap();
        Self { stream, init }
    }

    /// Starts kombi-init and exchanges greetings.
    pub(crate) fn greeted() -> Self {
        let mut host = Self::silent();
        assert_eq!(read_hello(&mut host.stream).unwrap(), Hello::OURS);
        write_hello(&mut host.stream, Hello::OURS).unwrap();
        host
    }

    /// Greets, and asks for `process`.
    pub(crate) fn starting(process: ProcessSpec) -> Self {
        let mut host = Self::greeted();
        host.send(&HostMessage::Start(Box::new(start(process))));
        host
    }

    /// As [`Host::starting`], and waits until it runs.
    pub(crate) fn running(process: ProcessSpec) -> Self {
        let mut host = Self::starting(process);
        let first = host.hear().unwrap();
        assert!(
            matches!(first, GuestMessage::Started { pid: 2.. }),
            "{first:?}"
        );
        host
    }

    pub(crate) fn send(&mut self, message: &HostMessage) {
        write_message(&mut self.stream, message).unwrap();
    }

    pub(crate) fn hear(&mut self) -> Option<GuestMessage> {
        read_message(&mut self.stream).unwrap()
    }

    /// Listens until standard output holds `text`.
    pub(crate) fn hear_text(&mut self, text: &str) -> String {
        let mut heard = String::new();
        while !heard.contains(text) {
            match self.hear() {
                Some(GuestMessage::Stdout { bytes }) => {
                    heard.push_str(&String::from_utf8_lossy(&bytes))
                }
                other => panic!("{other:?} after {heard:?}"),
            }
        }
        heard
    }

    /// Listens until the process has ended or failed to start, closes, and waits for init's own end.
    pub(crate) fn into_record(self) -> Record {
        let (record, code, _) = self.into_record_and_console();
        assert_eq!(code, 0, "{record:?}");
        record
    }

    /// As [`Host::into_record`]: with init's exit code and what it wrote to its console.
    pub(crate) fn into_record_and_console(mut self) -> (Record, i32, String) {
        let mut record = Record::default();
        while let Some(message) = self.hear() {
            match message {
                GuestMessage::Stdout { bytes } => record.stdout.extend(bytes),
                GuestMessage::Stderr { bytes } => record.stderr.extend(bytes),
                GuestMessage::StdinCredit { bytes } => record.credited += u64::from(bytes),
                GuestMessage::Started { .. } => {}
                last => {
                    record.last = Some(last);
                    break;
                }
            }
        }
        let (code, console) = self.bury();
        (record, code, console)
    }

    /// Closes the stream and waits for init's end: its exit code, and what it wrote to its console.
    pub(crate) fn bury(mut self) -> (i32, String) {
        drop(self.stream);
        let mut console = String::new();
        self.init
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut console)
            .unwrap();
        (self.init.wait().unwrap().code().unwrap(), console)
    }
}

/// Everything that `process` said.
pub(crate) fn record_of(process: ProcessSpec) -> Record {
    Host::starting(process).into_record()
}

pub(crate) fn exited(code: u8) -> Option<GuestMessage> {
    Some(GuestMessage::Exited { code })
}

pub(crate) fn signalled(number: u8) -> Option<GuestMessage> {
    Some(GuestMessage::Signalled {
        number,
        core: false,
    })
}
