//! `kombi-vmm`: one process, one machine, from a configuration file to an exit
//! code.
//!
//! Invariant: whatever ends the machine, this process ends with a documented
//! exit code and leaves nothing behind; standard output carries the guest's
//! console and nothing else.
//!
//! Left to others: what a machine is (`machine`), how guest code runs (engines).
#![deny(unsafe_code)]

mod args;
mod engine;
mod failure;
mod filter;
mod metrics;
mod status;
mod surroundings;
mod whole_lines;

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use blueprint::{Blueprint, Draft};
use clap::Parser;
use machine::{Ended, Machine, Outcome, Stdio};
use tracing_subscriber::filter::LevelFilter;

use crate::args::{Args, Level};
use crate::engine::Watching;
use crate::failure::{Failure, exit};
use crate::filter::Filter;
use crate::metrics::Metrics;
use crate::status::Status;
use crate::whole_lines::WholeLines;

/// Bytes of a configuration file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                exit::BAD_ARGUMENTS.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let mut status = Status::default();
    match run(&args, &mut status) {
        Ok(code) => code.into(),
        Err(failure) => {
            let line = failure.line();
            status.stopped("error", Some(&line));
            eprintln!("kombi-vmm: error: {line}");
            failure.exit_code().into()
        }
    }
}

/// Returns the exit code of a machine that ended without a failure of ours.
fn run(args: &Args, status: &mut Status) -> Result<u8, Failure> {
    let host = |doing| move |source| Failure::Host { doing, source };
    if args.die_with_parent {
        surroundings::die_with_parent().map_err(host("tie this process to its parent"))?;
    }
    if let Some(number) = args.status_fd {
        let fd = surroundings::inherited(number)
            .map_err(|source| Failure::StatusFd { number, source })?;
        // A parent that ended before we were tied to it sent no signal.
        if args.die_with_parent && surroundings::nobody_reads(&fd) {
            let source = std::io::ErrorKind::BrokenPipe.into();
            return Err(host("outlive the parent")(source));
        }
        *status = Status::to(fd);
    }
    surroundings::raise_descriptor_limit().map_err(host("raise the limit of descriptors"))?;
    surroundings::block_stop_signals().map_err(host("block signals"))?;
    start_log(args)?;

    let blueprint = read_blueprint(args)?;
    let metrics = output(args.metrics_path.as_deref(), "metrics", WholeLines::open)?;
    let watching = Watching {
        counters: Arc::default(),
        trace: output(args.engine_trace.as_deref(), "the engine's trace", |path| {
            File::create(path)
        })?,
        failing: args.fail_engine.map(Into::into),
    };
    let counters = Arc::clone(&watching.counters);
    let (hypervisor, kept) =
        engine::choose(&blueprint, args.translation_cache.as_deref(), watching)?;
    let stdio = Stdio {
        // Standard input that held the configuration is at its end.
        input: if reads_stdin(args) {
            None
        } else {
            std::io::stdin().as_fd().try_clone_to_owned().ok()
        },
        output: std::io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .map_err(host("duplicate standard output"))?,
    };
    let mut machine = Machine::build(&blueprint, &hypervisor, stdio)
        .map_err(|source| Failure::Build { source })?;

    if !args.no_seccomp {
        let filter = Filter::for_vcpus().map_err(host("make the filter of system calls"))?;
        machine.confine_vcpus(Arc::new(move || filter.confine_this_thread()));
    }

    let stopped_by = Arc::new(AtomicI32::new(0));
    let note = stopped_by.clone();
    surroundings::stop_on_signals(machine.stop_handle(), move |signal| {
        note.store(signal, Ordering::SeqCst)
    })
    .map_err(host("take signals"))?;
    let metrics = metrics
        .map(|to| Metrics::start(to, counters, kept.clone()))
        .transpose()
        .map_err(host("start a thread"))?;
    let running = machine.start().map_err(|source| Failure::Run { source })?;
    status.started();
    tracing::info!(
        id = args.id,
        vcpus = blueprint.vcpus(),
        mib = blueprint.memory_mib(),
        "started"
    );
    if let Some((wall_us, cpu_us)) = args.start_up() {
        tracing::info!(wall_us, cpu_us, "time since the jailer started");
    }
    let ended = running.wait();
    if let Some(metrics) = metrics {
        metrics.end();
    }
    let code = finish(ended, stopped_by.load(Ordering::SeqCst), status);
    if let Some(kept) = kept {
        engine::save(&kept);
    }
    code
}

fn finish(ended: Ended, stopped_by: i32, status: &mut Status) -> Result<u8, Failure> {
    let panic = ended.kernel_panic();
    let outcome = ended.result.map_err(|source| Failure::Run { source })?;
    tracing::info!(%outcome, "stopped");
    let (code, message) = match outcome {
        Outcome::PowerOff | Outcome::Reset => (0, panic),
        Outcome::TripleFault => {
            let message = "the guest triple-faulted".to_owned();
            eprintln!("kombi-vmm: error: {message}; look at its console output");
            (exit::TRIPLE_FAULT, Some(message))
        }
        // Only signals stop a machine.
        Outcome::Stopped => (u8::try_from(128 + stopped_by).unwrap_or(exit::ERROR), None),
    };
    status.stopped(&outcome.to_string(), message.as_deref());
    Ok(code)
}

/// Opens a file that an option names.
fn output<T>(
    path: Option<&Path>,
    what: &'static str,
    open: impl FnOnce(&Path) -> std::io::Result<T>,
) -> Result<Option<T>, Failure> {
    let Some(path) = path else {
        return Ok(None);
    };
    match open(path) {
        Ok(file) => Ok(Some(file)),
        Err(source) => Err(Failure::OpenOutput {
            what,
            path: path.to_path_buf(),
            source,
        }),
    }
}

fn reads_stdin(args: &Args) -> bool {
    args.config_file == Path::new("-")
}

fn read_blueprint(args: &Args) -> Result<Blueprint, Failure> {
    let path = &args.config_file;
    let mut text = Vec::new();
    let source: Result<Box<dyn Read>, _> = if reads_stdin(args) {
        Ok(Box::new(std::io::stdin()))
    } else {
        File::open(path).map(|file| Box::new(file) as Box<dyn Read>)
    };
    source
        .and_then(|source| source.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut text))
        .map_err(|source| Failure::ReadConfig {
            path: path.clone(),
            source,
        })?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(Failure::LongConfig {
            path: path.clone(),
            most: CONFIG_BYTES_MAX,
        });
    }
    let refused = |source| Failure::Config {
        path: path.clone(),
        source,
    };
    let mut draft = Draft::from_json(&text).map_err(refused)?;
    if let Some(engine) = args.engine {
        draft.machine_config.engine = Some(engine);
    }
    if let Some(model) = args.cpu_model {
        draft.machine_config.cpu_model = Some(model);
    }
    draft.check().map_err(refused)
}

fn start_log(args: &Args) -> Result<(), Failure> {
    let level = match args.level {
        Level::Off => LevelFilter::OFF,
        Level::Error => LevelFilter::ERROR,
        Level::Warning => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false);
    match &args.log_path {
        None => log.with_writer(std::io::stderr).init(),
        Some(path) => {
            let file = File::options()
                .append(true)
                .create(true)
                .open(path)
                .map_err(|source| Failure::OpenLog {
                    path: path.clone(),
                    source,
                })?;
            log.with_writer(Arc::new(file)).init();
        }
    }
    Ok(())
}
