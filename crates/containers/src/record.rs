//! What is known of one container.
//!
//! Invariant: an [`Id`] is 64 lowercase hexadecimal digits, so that it is a file's name.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Digits that people see.
const SHORT_DIGITS: usize = 12;
const DIGITS: usize = 64;

/// A container's identifier: 64 hexadecimal digits, as docker's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

impl Id {
    /// A random one.
    pub(crate) fn random() -> std::io::Result<Self> {
        let mut bytes = [0_u8; DIGITS / 2];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(
            bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        ))
    }

    /// The text, if it is an identifier.
    #[must_use]
    pub fn of(text: &str) -> Option<Self> {
        let digit = |byte: u8| byte.is_ascii_digit() || matches!(byte, b'a'..=b'f');
        (text.len() == DIGITS && text.bytes().all(digit)).then(|| Self(text.to_owned()))
    }

    /// All digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first twelve.
    #[must_use]
    pub fn short(&self) -> &str {
        self.0.get(..SHORT_DIGITS).unwrap_or(&self.0)
    }
}

impl TryFrom<String> for Id {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::of(&text).ok_or("no identifier of a container")
    }
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Given at its making.
    pub id: Id,
    /// Unique among containers.
    pub name: String,
    /// RFC 3339.
    pub created: String,
    /// The image as the user gave it.
    pub image: String,
    /// The digest that it had.
    pub image_digest: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Free-form, the image's included.
    pub labels: BTreeMap<String, String>,
    /// It goes when it ends.
    pub remove_at_end: bool,
    /// Linux number of the signal that asks it to end.
    pub stop_signal: u8,
    /// Seconds between that signal and the machine's end.
    pub stop_timeout_seconds: u32,
    /// How much of what it says is kept.
    pub log: LogOptions,
    /// What the supervisor needs to run it.
    pub task: Value,
}

/// How much of a container's output is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOptions {
    /// Bytes of one file, after which the next one is begun; without, one file grows.
    pub max_size: Option<u64>,
    /// Files, the one that is written included; at least one.
    pub max_file: u32,
}

impl Default for LogOptions {
    /// As docker's json-file driver.
    fn default() -> Self {
        Self {
            max_size: None,
            max_file: 1,
        }
    }
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its command has not started.
    Created,
    /// Its command runs.
    Running,
    /// It is over.
    Exited,
}

impl Phase {
    /// As docker calls it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Exited => "exited",
        }
    }
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Where it is.
    pub phase: Phase,
    /// The supervisor's process, while there is one.
    pub pid: Option<u32>,
    /// RFC 3339.
    pub started: Option<String>,
    /// RFC 3339.
    pub finished: Option<String>,
    /// The command's, or what stands for its failure.
    pub exit_code: Option<u8>,
    /// Why it could not start, or did not end by itself.
    pub error: Option<String>,
}

impl State {
    /// Nothing happened yet.
    #[must_use]
    pub fn created() -> Self {
        Self {
            phase: Phase::Created,
            pid: None,
            started: None,
            finished: None,
            exit_code: None,
            error: None,
        }
    }
}
