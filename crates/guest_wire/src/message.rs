//! What the two ends say after their greetings.
//!
//! The encoding numbers variants and fields by position: add variants at the end only (and raise
//! [`VERSION`](crate::VERSION)'s minor); any other change raises its major.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A message of either direction; sealed.
pub trait Message: Serialize + DeserializeOwned + sealed::Sealed {}

impl Message for HostMessage {}
impl Message for GuestMessage {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::HostMessage {}
    impl Sealed for super::GuestMessage {}
}

/// From the host to the guest's init.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// Set the machine up and start its process; once, and before everything else.
    Start(Box<StartSpec>),
    /// Standard input, at most [`STDIO_CHUNK_BYTES_MAX`](crate::STDIO_CHUNK_BYTES_MAX) bytes, and in sum never more than
    /// [`STDIN_CREDIT_BYTES_INITIAL`](crate::STDIN_CREDIT_BYTES_INITIAL) plus what the guest credited since: signals
    /// and resizes must never wait behind a full pipe. Exceeding the credit ends the machine.
    Stdin {
        /// The bytes, as the process will read them.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Standard input ends after the bytes sent so far. On a terminal: its end-of-file character is typed.
    StdinEof,
    /// The user's window has a new size; ignored without a terminal.
    Resize(TerminalSize),
    /// Send a signal to the process; ignored once it has exited.
    Signal {
        /// Linux signal number, 1 to 64; the guest ignores others.
        number: u8,
    },
    /// Kill everything with SIGKILL, sync and power off now. The end of the stream means the same.
    Shutdown,
}

/// From the guest's init to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// The process runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// The process could not be started; nothing follows, the host may close.
    StartFailed {
        /// What kind of failure, for the exit code.
        kind: StartFailure,
        /// One line: the object and the cause.
        message: String,
    },
    /// Bytes that the process wrote to standard output or to its terminal.
    Stdout {
        /// At most [`STDIO_CHUNK_BYTES_MAX`](crate::STDIO_CHUNK_BYTES_MAX).
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Bytes that the process wrote to standard error; never with a terminal.
    Stderr {
        /// At most [`STDIO_CHUNK_BYTES_MAX`](crate::STDIO_CHUNK_BYTES_MAX).
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// The process took (or will never take) this much standard input: the host may send as much more.
    StdinCredit {
        /// Bytes.
        bytes: u32,
    },
    /// The process ended by itself, and all its output was sent before.
    Exited {
        /// Its exit code.
        code: u8,
    },
    /// A signal ended the process, and all its output was sent before.
    Signalled {
        /// Linux signal number.
        number: u8,
        /// Whether it dumped core.
        core: bool,
    },
    /// Init itself cannot go on (no such device, a broken layer, a protocol error); the machine powers off.
    InitFailed {
        /// One line: the object and the cause.
        message: String,
    },
}

/// All that the guest needs to know before it starts its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartSpec {
    /// The machine around the process.
    pub machine: MachineSpec,
    /// The process.
    pub process: ProcessSpec,
}

/// The machine around the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Host name, at most 64 bytes (`__NEW_UTS_LEN`); empty leaves the kernel's.
    pub hostname: String,
    /// Number of EROFS layers, 1 to [`LAYERS_MAX`](crate::LAYERS_MAX). They are the first virtio-blk devices, read-only,
    /// lowest layer first: see [`layer_device_name`].
    pub layers: u16,
    /// Whether what is written goes to the virtio-blk device behind the layers, which has an ext4 file system, and stays
    /// there; otherwise it is in memory, and goes with the machine.
    pub keeps: bool,
}

/// The process, in the terms of an OCI image configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and arguments (entrypoint and command joined). A program without `/` is looked up in the PATH of `env`.
    pub args: Vec<String>,
    /// `NAME=value` each. PATH, HOME, HOSTNAME and, with a terminal, TERM get defaults when missing.
    pub env: Vec<String>,
    /// Working directory, absolute; created when missing; empty means `/`.
    pub cwd: String,
    /// `""`, `user`, `uid`, `user:group`, `uid:gid` and mixtures, looked up in the root's /etc/passwd and /etc/group.
    pub user: String,
    /// A terminal of this size instead of pipes.
    pub terminal: Option<TerminalSize>,
    /// Whether the host will send standard input; otherwise the process reads /dev/null, or a terminal on which nobody
    /// types.
    pub stdin: bool,
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// Why a process could not be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartFailure {
    /// There is no such program, or its interpreter is missing.
    NotFound,
    /// The program is there but cannot be executed.
    NotExecutable,
    /// The user or group is not known in the image.
    BadUser,
    /// The working directory cannot be entered.
    BadCwd,
    /// Anything else: the message says it.
    Other,
}

impl StartFailure {
    /// The exit code that Docker gives to such a failure: 127, 126 or 125.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable => 126,
            Self::BadUser | Self::BadCwd | Self::Other => 125,
        }
    }
}

/// Name in /dev of the block device that holds layer `index` (0 is the lowest): `vda` … `vdz`, `vdaa` …, as Linux's
/// virtio_blk numbers them (`virtblk_name_format`).
#[must_use]
pub fn layer_device_name(index: u16) -> String {
    let mut letters = Vec::new();
    let mut rest = u32::from(index).saturating_add(1);
    while let Some(zero_based) = rest.checked_sub(1) {
        // A remainder of 26 fits a byte.
        letters.push(b'a'.saturating_add((zero_based % 26) as u8));
        rest = zero_based / 26;
    }
    let mut name = String::from("vd");
    name.extend(letters.iter().rev().map(|&letter| char::from(letter)));
    name
}
