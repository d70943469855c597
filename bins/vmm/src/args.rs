//! The command line: Firecracker's options as far as they mean something here,
//! and Kombi's own.

use std::ffi::OsString;
use std::path::PathBuf;

use blueprint::{CpuModel, Engine, LogLevel, LoggerDraft};
use clap::{Parser, ValueEnum};
use rustix::time::{ClockId, clock_gettime};

/// Most characters of `--id`, as in Firecracker.
const ID_BYTES_MAX: usize = 64;

/// Ours, and what tools that look for a version of Firecracker find.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (Firecracker API v1.17.0)");

const EXIT_CODES: &str = "\
Exit codes:
  0    the guest switched itself off or asked for a reset
  1    any other error
  130  stopped by SIGINT
  140  the guest triple-faulted
  141  the engine failed
  143  stopped by SIGTERM
  148  stopped by the filter of system calls
  152  bad configuration: a field, or a file that it names
  153  bad arguments
149 to 151 and 154 to 157 are Firecracker's, for signals; see docs/exit-codes.md.";

/// Runs one virtual machine: what a client of its API asks for, or a configuration file.
/// The guest's serial console is standard input and output.
#[derive(Debug, Parser)]
#[command(name = "kombi-vmm", version = VERSION, after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// The Unix socket of the API: nothing may be at this path yet.
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    pub(crate) api_sock: PathBuf,

    /// The machine's configuration: a JSON file in Firecracker's form, or - for
    /// standard input. The machine starts at once.
    #[arg(long, value_name = "PATH|-")]
    pub(crate) config_file: Option<PathBuf>,

    /// Serve no API.
    #[arg(long, requires = "config_file")]
    pub(crate) no_api: bool,

    /// The machine's name, in the API and the log.
    #[arg(long, default_value = "anonymous-instance", value_parser = parse_id)]
    pub(crate) id: String,

    /// Bytes of one request's body at most.
    #[arg(long, value_name = "BYTES", default_value_t = api::Limits::default().body_bytes)]
    pub(crate) http_api_max_payload_size: usize,

    /// Put this file's JSON into the metadata that the guest can fetch.
    #[arg(long, value_name = "PATH")]
    pub(crate) metadata: Option<PathBuf>,

    /// Bytes of metadata at most. [default: as --http-api-max-payload-size]
    #[arg(long, value_name = "BYTES")]
    pub(crate) mmds_size_limit: Option<usize>,

    /// Log how long after its start the guest's init ran: it writes 123 to a register.
    #[arg(long)]
    pub(crate) boot_timer: bool,

    /// The engine that runs guest code; overrides the configuration's.
    #[arg(long, value_enum)]
    pub(crate) engine: Option<Engine>,

    /// Where the software engine keeps translations of guest code for later machines:
    /// a directory, or off. [default: KOMBI_TRANSLATION_CACHE, or
    /// $XDG_CACHE_HOME/kombi/translations]
    #[arg(long, value_name = "off|DIR", value_parser = clap::builder::OsStringValueParser::new())]
    pub(crate) translation_cache: Option<OsString>,

    /// The guest's CPU; overrides the configuration's.
    #[arg(long, value_enum)]
    pub(crate) cpu_model: Option<CpuModel>,

    /// Append the log to this file in place of standard error.
    #[arg(long, value_name = "PATH")]
    pub(crate) log_path: Option<PathBuf>,

    /// How much to log, in any mixture of cases.
    #[arg(long, value_enum, ignore_case = true, default_value = "info")]
    pub(crate) level: LogLevel,

    /// Log only what this module says, such as virtio.
    #[arg(long)]
    pub(crate) module: Option<String>,

    /// Put the level into each line of the log.
    #[arg(long)]
    pub(crate) show_level: bool,

    /// Put the place in the source into each line of the log.
    #[arg(long)]
    pub(crate) show_log_origin: bool,

    /// Write one JSON object a line to this inherited descriptor when the
    /// machine started and when it stopped.
    #[arg(long, value_name = "N")]
    pub(crate) status_fd: Option<u32>,

    /// Write counters of API, devices and engine to this file or FIFO, one JSON object a
    /// line: at the start, each minute, and at the end, each time what came since the last
    /// one.
    #[arg(long, value_name = "PATH")]
    pub(crate) metrics_path: Option<PathBuf>,

    /// Write what the engine does to this file, one JSON object a line: blocks that it
    /// translated and dropped, why and where it left translated code. Slows the guest.
    #[arg(long, value_name = "PATH")]
    pub(crate) engine_trace: Option<PathBuf>,

    /// Have the engine fail soon, for tests of what is said then.
    #[arg(long, value_enum, hide = true)]
    pub(crate) fail_engine: Option<FailingArg>,

    /// Do not filter system calls, for debugging: a guest that breaks out of the engine
    /// may then do whatever this process may.
    #[arg(long)]
    pub(crate) no_seccomp: bool,

    /// Filters of system calls in place of this program's own: JSON as seccompiler reads
    /// it, with one for each of the threads vmm, api and vcpu. Firecracker's compiled
    /// filters are not taken.
    #[arg(long, value_name = "PATH", conflicts_with = "no_seccomp")]
    pub(crate) seccomp_filter: Option<PathBuf>,

    /// Give up all files but this machine's, the network, other processes and every
    /// privilege before the kernel is read, as far as the host lets users do that. TAP
    /// devices of the configuration are opened before.
    #[arg(long, requires = "config_file", requires = "no_api")]
    pub(crate) jail: bool,

    /// Print the version of the snapshots that this program writes.
    #[arg(long, exclusive = true)]
    pub(crate) snapshot_version: bool,

    /// Print the version of this snapshot, the file that snapshot_path named.
    #[arg(long, value_name = "PATH", exclusive = true)]
    pub(crate) describe_snapshot: Option<PathBuf>,

    /// Print what --jail has on this host.
    #[arg(long, hide = true, exclusive = true)]
    pub(crate) jail_probe: bool,

    /// What the jailer tells: when it started, the processor time that this process had
    /// used when it became the monitor, and what its parents had used (microseconds).
    #[arg(long, value_name = "MICROSECONDS", hide = true)]
    pub(crate) start_time_us: Option<u64>,
    #[arg(long, value_name = "MICROSECONDS", hide = true)]
    pub(crate) start_time_cpu_us: Option<u64>,
    #[arg(long, value_name = "MICROSECONDS", hide = true)]
    pub(crate) parent_cpu_time_us: Option<u64>,

    /// Be killed when the thread that started this process ends.
    #[arg(long)]
    pub(crate) die_with_parent: bool,
}

impl Args {
    /// Wall and processor time since the jailer started, if one did, in microseconds.
    pub(crate) fn start_up(&self) -> Option<(u64, u64)> {
        let now = |clock| {
            let now = clock_gettime(clock);
            now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
        };
        let wall = now(ClockId::Monotonic).saturating_sub(self.start_time_us?);
        // This process's clock went on when it became the monitor; what was before is told.
        let cpu = now(ClockId::ProcessCPUTime).saturating_sub(self.start_time_cpu_us?);
        Some((
            wall,
            cpu.saturating_add(self.parent_cpu_time_us.unwrap_or(0)),
        ))
    }

    /// What they say of the log.
    pub(crate) fn logger(&self) -> LoggerDraft {
        LoggerDraft {
            log_path: self.log_path.clone(),
            level: Some(self.level),
            show_level: self.show_level.then_some(true),
            show_log_origin: self.show_log_origin.then_some(true),
            module: self.module.clone(),
        }
    }
}

/// `--fail-engine`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum FailingArg {
    /// A panic on a vCPU's thread.
    Panic,
    /// A fault in translated code.
    HostFault,
    /// A jump out of translated code.
    WildJump,
}

fn parse_id(id: &str) -> Result<String, String> {
    let named = id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if named && !id.is_empty() && id.len() <= ID_BYTES_MAX {
        Ok(id.to_owned())
    } else {
        Err(format!(
            "not 1 to {ID_BYTES_MAX} letters, digits or hyphens"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from(["kombi-vmm", "--config-file", "c"].iter().chain(args))
    }

    #[test]
    fn the_declaration_is_consistent() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn firecrackers_options_are_understood() {
        let args = parse(&["--no-api", "--id", "a-1", "--level", "Warning"]).unwrap();
        assert_eq!((args.id.as_str(), args.no_api), ("a-1", true));
        assert!(args.level == LogLevel::Warning);
    }

    #[test]
    fn ids_that_firecracker_refuses_are_refused() {
        for id in ["", "a_b", "a/b", &"x".repeat(65)] {
            assert!(parse(&["--id", id]).is_err(), "{id:?}");
        }
        assert!(parse(&["--id", &"x".repeat(64)]).is_ok());
    }
}
