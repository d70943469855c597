//! Where log, metrics and console go.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::draft::TokenBucket;

/// The log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggerDraft {
    /// A file or FIFO; what was there before when absent.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// How much.
    #[serde(default)]
    pub level: Option<LogLevel>,
    /// Each line has its level.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Each line has the place in the source that wrote it.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Only what this module writes.
    #[serde(default)]
    pub module: Option<String>,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What went wrong.
    Error,
    /// And what looks wrong.
    #[cfg_attr(feature = "clap", value(alias = "warn"))]
    Warning,
    /// And what happened.
    #[default]
    Info,
    /// And why.
    Debug,
    /// Everything.
    Trace,
}

impl<'de> Deserialize<'de> for LogLevel {
    /// Firecracker takes any mixture of cases.
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        Ok(match name.to_ascii_lowercase().as_str() {
            "off" => Self::Off,
            "error" => Self::Error,
            "warn" | "warning" => Self::Warning,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => {
                let known = &["Off", "Error", "Warning", "Info", "Debug", "Trace"];
                return Err(serde::de::Error::unknown_variant(&name, known));
            }
        })
    }
}

/// The metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsDraft {
    /// A file or FIFO.
    pub metrics_path: PathBuf,
    /// Each line has the machine's name.
    #[serde(default)]
    pub emit_id: bool,
    /// Each line has these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

/// The serial console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialDraft {
    /// A file that takes the console's output in place of standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Bytes of output beyond this limit are dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}
