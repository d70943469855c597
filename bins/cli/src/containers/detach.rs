//! `kombi run -d`: from what was asked to a container that is supervised.
//!
//! Invariant: when this returns well the command runs and somebody holds the container; when it does not, nobody does,
//! and what became of it is on record.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use containers::{Id, LogOptions, Wanted};
use sandbox::{Plan, ProcessSpec};
use serde::{Deserialize, Serialize};

use super::{signals, upper};
use crate::complaint::Complaint;
use crate::{env_file, quantity};

/// Of a container's disk, which takes what is written to it.
const DISK_BYTES: u64 = 10 << 30;
/// Seconds, as docker's.
const STOP_TIMEOUT_SECONDS: u32 = 10;
const SIGTERM: u8 = 15;
/// What a supervisor says once the command runs.
pub(crate) const STARTED: &str = "started";

/// Options of containers that outlive the command which starts them.
#[derive(Debug, clap::Args)]
pub(crate) struct DetachArgs {
    /// Start it in the background and print its identifier; see kombi ps, logs, stop.
    #[arg(short, long)]
    detach: bool,

    /// Write the container's identifier to this file, which is not there yet.
    #[arg(long, value_name = "FILE")]
    cidfile: Option<PathBuf>,

    /// Note something about the container; see kombi ps --filter.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    label: Vec<String>,

    /// Read labels from a file, one NAME=VALUE a line.
    #[arg(long, value_name = "FILE")]
    label_file: Vec<PathBuf>,

    /// Signal by which kombi stop asks it to end [default: the image's, or TERM].
    #[arg(long, value_name = "SIGNAL", value_parser = signals::number)]
    stop_signal: Option<u8>,

    /// Seconds that kombi stop gives it to end [default: 10].
    #[arg(long, value_name = "SECONDS")]
    stop_timeout: Option<u32>,

    /// Most that it may write to its root, kept until it is removed [default: 10G; with --rm, what it writes is in memory
    /// unless this is given].
    #[arg(long, value_name = "SIZE", value_parser = upper::size)]
    disk: Option<u64>,

    /// How much of what it prints is kept: max-size=SIZE for a file of its log, max-file=N files.
    #[arg(long, value_name = "NAME=VALUE")]
    log_opt: Vec<String>,
}

impl DetachArgs {
    /// Whether it is asked for.
    pub(crate) fn detach(&self) -> bool {
        self.detach
    }

    /// Checks what needs no image.
    pub(crate) fn check(&self, background: bool) -> Result<LogOptions, Complaint> {
        // The others are as in docker where there is nothing to note or to stop: accepted.
        let lasting = [
            (self.cidfile.is_some(), "--cidfile"),
            (self.disk.is_some(), "--disk"),
        ];
        if let Some((_, option)) = lasting.iter().find(|(given, _)| *given && !background) {
            return Err(Complaint::new(
                format!("{option} is about containers in the background"),
                "give -d as well",
            ));
        }
        if let Some(path) = &self.cidfile
            && path.symlink_metadata().is_ok()
        {
            return Err(Complaint::new(
                format!("{path:?} is there already"),
                "remove it, or make sure that its container is gone; or give another --cidfile",
            ));
        }
        log_options(&self.log_opt)
    }

    fn labels(
        &self,
        image: BTreeMap<String, String>,
    ) -> Result<BTreeMap<String, String>, Complaint> {
        let mut labels = image;
        let mut given = Vec::new();
        for path in &self.label_file {
            given.extend(env_file::read(path, |_| None)?);
        }
        given.extend(self.label.iter().cloned());
        for label in given {
            let (name, value) = label.split_once('=').unwrap_or((&label, ""));
            if name.is_empty() {
                return Err(Complaint::new(
                    format!("label {label:?} has no name"),
                    "write --label NAME=VALUE",
                ));
            }
            labels.insert(name.to_owned(), value.to_owned());
        }
        Ok(labels)
    }
}

fn log_options(given: &[String]) -> Result<LogOptions, Complaint> {
    let mut options = LogOptions::default();
    for text in given {
        let bad = || {
            Complaint::new(
                format!("log option {text:?} is not known"),
                "use max-size=10m and max-file=3",
            )
        };
        match text.split_once('=').ok_or_else(bad)? {
            ("max-size", "-1") => options.max_size = None,
            ("max-size", size) => {
                let bytes = quantity::bytes(size).map_err(|_| bad())?;
                options.max_size = Some(Some(bytes).filter(|bytes| *bytes > 0).ok_or_else(bad)?);
            }
            ("max-file", count) => {
                let count = count.parse().map_err(|_| bad())?;
                options.max_file = Some(count).filter(|count| *count > 0).ok_or_else(bad)?;
            }
            _ => return Err(bad()),
        }
    }
    if options.max_file > 1 && options.max_size.is_none() {
        return Err(Complaint::new(
            "log option max-file without max-size means nothing",
            "give max-size as well: --log-opt max-size=10m",
        ));
    }
    Ok(options)
}

/// What a supervisor needs to run a container.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The machine.
    pub(crate) plan: Plan,
    /// What runs in it.
    pub(crate) process: ProcessSpec,
}

/// A container that is to be started.
pub(crate) struct Start<'a> {
    /// The options.
    pub(crate) args: &'a DetachArgs,
    /// Of [`DetachArgs::check`].
    pub(crate) log: LogOptions,
    /// Start it, not only make it.
    pub(crate) starts: bool,
    /// Remove it when it ends.
    pub(crate) remove_at_end: bool,
    /// The image as the user gave it.
    pub(crate) image: String,
    /// Its digest.
    pub(crate) image_digest: String,
    /// Its labels.
    pub(crate) image_labels: BTreeMap<String, String>,
    /// Its stop signal.
    pub(crate) image_stop_signal: Option<String>,
    /// The machine; its name is the container's.
    pub(crate) plan: Plan,
    /// What runs in it.
    pub(crate) process: ProcessSpec,
}

impl Start<'_> {
    /// Makes it, starts it, and prints its identifier once its command runs.
    pub(crate) fn now(mut self) -> Result<u8, Complaint> {
        // An image's own, where it makes no sense, is no reason not to run it.
        let of_image = self.image_stop_signal.as_deref().map(signals::number);
        let stop_signal = self.args.stop_signal.or(of_image.and_then(Result::ok));
        let name = self.plan.name.take();
        self.be_absolute()?;
        let all = super::all()?;
        let command = self.process.args.clone();
        let task = Task {
            plan: self.plan,
            process: self.process,
        };
        let task = serde_json::to_value(&task).map_err(|error| {
            Complaint::caused(&error, Some("use paths in UTF-8")).about("what is to run")
        })?;
        let wanted = Wanted {
            name,
            image: self.image,
            image_digest: self.image_digest,
            command,
            labels: self.args.labels(self.image_labels)?,
            remove_at_end: self.remove_at_end,
            stop_signal: stop_signal.unwrap_or(SIGTERM),
            stop_timeout_seconds: self.args.stop_timeout.unwrap_or(STOP_TIMEOUT_SECONDS),
            log: self.log,
            task,
        };
        let container = all
            .create(wanted)
            .map_err(|error| super::complaint(&error))?;
        let id = container.record().id.clone();
        let undo = |complaint| {
            // It never ran.
            let _ = all.remove(&container);
            complaint
        };
        let usual = (!self.remove_at_end).then_some(DISK_BYTES);
        if let Some(bytes) = self.args.disk.or(usual) {
            upper::make(container.dir(), bytes).map_err(undo)?;
        }
        if let Some(path) = &self.args.cidfile {
            let written = std::fs::File::create_new(path)
                .and_then(|mut file| std::io::Write::write_all(&mut file, id.as_str().as_bytes()));
            if let Err(error) = written {
                // Ours, where it could be made: it was not there before.
                if error.kind() != std::io::ErrorKind::AlreadyExists {
                    let _ = std::fs::remove_file(path);
                }
                let complaint = Complaint::caused(&error, Some("give another --cidfile"));
                return Err(undo(complaint.about(format!("failed to write {path:?}"))));
            }
        }
        if self.starts {
            launch(&id)?;
        }
        println!("{id}");
        Ok(0)
    }

    /// The supervisor works elsewhere.
    fn be_absolute(&mut self) -> Result<(), Complaint> {
        let plan = &mut self.plan;
        let optional = [&mut plan.engine_trace, &mut plan.metrics_path];
        let paths = [&mut plan.kernel, &mut plan.initramfs, &mut plan.vmm]
            .into_iter()
            .chain(plan.layers.iter_mut())
            .chain(optional.into_iter().flatten());
        for path in paths {
            // A program's name without a slash is looked for in PATH.
            if path.components().count() > 1 || path.exists() {
                *path = std::path::absolute(&*path).map_err(|error| {
                    Complaint::caused(&error, Some("give an absolute path"))
                        .about(format!("{path:?}"))
                })?;
            }
        }
        if let Some(cache) = plan
            .translation_cache
            .as_mut()
            .filter(|cache| *cache != "off")
            && let Ok(path) = std::path::absolute(&*cache)
        {
            *cache = path.into_os_string();
        }
        Ok(())
    }
}

/// Starts a supervisor of a container; returns once its command runs.
pub(crate) fn launch(id: &Id) -> Result<(), Complaint> {
    let failed = |error: std::io::Error| {
        Complaint::caused(&error, Some("see kombi doctor")).about("failed to start a supervisor")
    };
    super::descriptors::keep_to_ourselves();
    let own = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new(own)
        .arg0("kombi")
        .args(["supervise", id.as_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // It tells the user itself what keeps it from starting, and is silent from then on.
        .spawn()
        .map_err(failed)?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        let _ = BufReader::new(stdout).read_line(&mut said);
    }
    if said.trim_end() == STARTED {
        return Ok(());
    }
    let code = child.wait().map_err(failed)?.code();
    match code.and_then(|code| u8::try_from(code).ok()) {
        Some(code) if code != 0 => Err(Complaint::told_already(code)),
        _ => Err(Complaint::new(
            "the supervisor ended without a word",
            "see kombi doctor, and how much memory is free",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(given: &[&str]) -> Result<LogOptions, Complaint> {
        log_options(&given.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn log_options_are_docker_s() {
        let both = options(&["max-size=10k", "max-file=3"]).expect("understood");
        assert_eq!((both.max_size, both.max_file), (Some(10 << 10), 3));
        assert_eq!(options(&[]).expect("none").max_size, None);
        for bad in [
            &["max-size"][..],
            &["max-size=x"],
            &["max-size=0"],
            &["max-file=0"],
            &["max-file=2"],
            &["compress=true"],
        ] {
            options(bad).expect_err("refused");
        }
    }
}
