//! `kombi run`.
//!
//! Invariant: what was asked ([`RunArgs`]) is checked as far as possible before an image is touched, and the terminal is
//! as before when this returns. Left to others: images (`image`), machines (`sandbox`).

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use image::{Image, ImageError, Reference, Store};
use sandbox::{
    CpuModel, Engine, ImageDefaults, Overrides, Plan, Search, Streams, TerminalSize, process_spec,
};

use crate::complaint::Complaint;
use crate::containers::{DetachArgs, Start};
use crate::images::pull::PullPolicy;
use crate::preparation::Bar;
use crate::signals::Signals;
use crate::terminal::{self, RawMode};
use crate::{env_file, images, quantity};

const AFTER_HELP: &str = "\
IMAGE is one of
  NAME[:TAG|@DIGEST]   an image's name, or the first digits of its identifier; see --pull
  oci:DIR[:TAG]        an OCI image layout
  docker-archive:FILE  what `docker save` writes
  rootfs:DIR           a directory that is the root

Options go before IMAGE; what follows IMAGE is the command's.

Examples:
  kombi run busybox echo hello
  kombi run -it docker-archive:debian.tar bash
  kombi run --memory 1G -e LANG=C.UTF-8 -w /src oci:images/python python3 -c 'print(1)'
  tar c src | kombi run -i oci:images/busybox tar t

Exit code: the command's own, 128 + N when signal N ended it, 127 when it was not found, 126 when it
is not executable, 125 when Kombi itself failed.

Ctrl-C reaches the command; a second Ctrl-C ends the machine (exit code 130). With -t, keys go to
the guest's terminal, Ctrl-C included.";

/// Run a command in a new machine made from an image.
#[derive(Debug, clap::Args)]
#[command(
    after_help = AFTER_HELP,
    override_usage = "kombi run [OPTIONS] IMAGE [COMMAND [ARG...]]"
)]
pub(crate) struct RunArgs {
    /// Pass standard input to the command.
    #[arg(short, long)]
    interactive: bool,

    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,

    /// Set an environment variable; NAME alone takes it from here, or removes the image's.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,

    /// Read environment variables from a file, one NAME=VALUE a line.
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,

    /// Working directory in the machine.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,

    /// User, and group, to run as: names or numbers.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,

    /// Run this in place of the image's entrypoint; empty: no entrypoint.
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,

    /// Processors of the machine, 1 to 8.
    #[arg(long, value_name = "N", default_value = "1", value_parser = quantity::cpus)]
    cpus: u8,

    /// Memory of the machine: 256M, 1G.
    #[arg(short, long, value_name = "SIZE", default_value = "256M", value_parser = quantity::memory_mib)]
    memory: u32,

    /// Who runs the guest's code.
    #[arg(long, value_enum, default_value = "auto")]
    engine: Engine,

    /// Where translations of guest code are kept for later machines: a directory, or off.
    #[arg(long, value_name = "off|DIR")]
    translation_cache: Option<OsString>,

    /// The guest's CPU.
    #[arg(long, value_enum, value_name = "MODEL", default_value = "host")]
    cpu_model: CpuModel,

    /// Write what the software engine does to this file, one JSON object a line; slows the guest.
    #[arg(long, value_name = "FILE")]
    engine_trace: Option<PathBuf>,

    /// Append the software engine's counters to this file or FIFO, one JSON object a line: at the
    /// start, each minute, and at the end, each time what came since the last one.
    #[arg(long, value_name = "FILE")]
    metrics_path: Option<PathBuf>,

    /// Boot this kernel (an uncompressed ELF vmlinux, or a bzImage).
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// Name of the container.
    #[arg(long)]
    name: Option<String>,

    /// Host name in the machine [default: its name].
    #[arg(long)]
    hostname: Option<String>,

    /// Give up when the guest has not booted by then: 30s, 2m.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = quantity::duration)]
    boot_timeout: Duration,

    /// When to ask a registry for the image.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "missing")]
    pull: PullPolicy,

    /// With -d, remove the container when it ends; without, that is always so.
    #[arg(long)]
    rm: bool,

    #[command(flatten)]
    detach: DetachArgs,

    /// Show no progress.
    #[arg(short, long, conflicts_with = "verbose")]
    quiet: bool,

    /// Show the guest's console, the monitor's log and timings on standard error.
    #[arg(short, long)]
    verbose: bool,

    /// The image; behind it the command and its arguments.
    // One list: so everything behind the image belongs to the command, whatever it looks like.
    #[arg(
        value_name = "IMAGE",
        required = true,
        trailing_var_arg = true,
        num_args = 1..
    )]
    words: Vec<String>,
}

/// What becomes of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// It runs before our eyes, and goes with its end.
    Foreground,
    Background,
    /// It is there.
    Made,
}

/// Runs it; returns the command's exit code.
pub(crate) fn run(args: RunArgs) -> Result<u8, Complaint> {
    let life = match args.detach.detach() {
        true => Life::Background,
        false => Life::Foreground,
    };
    live(args, life)
}

/// Makes a container for later.
pub(crate) fn create(args: RunArgs) -> Result<u8, Complaint> {
    live(args, Life::Made)
}

fn live(args: RunArgs, life: Life) -> Result<u8, Complaint> {
    let lasts = life != Life::Foreground;
    start_log(args.verbose);
    let mut words = args.words.into_iter();
    let given = words.next().unwrap_or_default();
    let command: Vec<String> = words.collect();

    // Everything that needs no image comes first: mistakes show at once.
    let reference: Reference = given.parse().map_err(|error| images::complaint(&error))?;
    let own = |name: &str| std::env::var(name).ok();
    let mut env = Vec::new();
    for path in &args.env_file {
        env.extend(env_file::read(path, own)?);
    }
    for given in &args.env {
        env.push(env_file::option(given, own)?);
    }
    let stdin = std::io::stdin();
    if args.tty && args.interactive && !lasts && !stdin.is_terminal() {
        return Err(Complaint::new(
            "standard input is not a terminal",
            "leave out -t",
        ));
    }
    let terminal = args
        .tty
        .then(|| terminal::size().unwrap_or(TerminalSize { rows: 24, cols: 80 }));
    let search = Search {
        kernel: args.kernel,
        ..Search::from_env()
    };
    let mut plan = Plan {
        name: args.name,
        hostname: args.hostname,
        kernel: search.kernel()?,
        initramfs: search.initramfs()?,
        vmm: search.vmm()?,
        layers: Vec::new(),
        upper: None,
        vcpus: args.cpus,
        memory_mib: args.memory,
        engine: args.engine,
        translation_cache: args.translation_cache,
        cpu_model: args.cpu_model,
        engine_trace: args.engine_trace,
        metrics_path: args.metrics_path,
        boot_timeout: args.boot_timeout,
        verbose: args.verbose,
    };
    let log = args.detach.check(lasts)?;
    if lasts {
        // A name among those that outlive us has other rules, and is not the machine's.
        let name = plan.name.take();
        plan.check()?;
        plan.name = name;
    } else {
        plan.check()?;
    }

    let store = Store::default_root()
        .and_then(Store::open)
        .map_err(|error| images::complaint(&error))?;
    // Nobody collects what the machine needs before it has all of it open.
    let hold = store.hold().map_err(|error| images::complaint(&error))?;
    let wanted = Wanted {
        given: &given,
        reference: &reference,
        pull: args.pull,
        quiet: args.quiet,
    };
    let image = prepare(&store, &wanted)?;
    let (digest, labels) = (image.digest.to_string(), image.config.labels);
    let image_stop_signal = image.config.stop_signal;
    let defaults = ImageDefaults {
        entrypoint: image.config.entrypoint,
        cmd: image.config.cmd,
        env: image.config.env,
        user: image.config.user.unwrap_or_default(),
        working_dir: image.config.working_dir.unwrap_or_default(),
    };
    let overrides = Overrides {
        entrypoint: args.entrypoint,
        command,
        env,
        user: args.user,
        cwd: args.workdir,
        terminal,
        stdin: args.interactive,
    };
    let process = process_spec(defaults, overrides)?;
    plan.layers = image.layers;
    if lasts {
        let start = Start {
            args: &args.detach,
            log,
            starts: life == Life::Background,
            remove_at_end: args.rm,
            image: given,
            image_digest: digest,
            image_labels: labels,
            image_stop_signal,
            plan,
            process,
        };
        let started = start.now();
        drop(hold);
        return started;
    }

    // From here on signals are requests; before, they may just end us.
    let mut signals = Signals::catch(args.tty)
        .map_err(|error| Complaint::caused(&error, None).about("failed to catch signals"))?;
    let ready = plan.launch()?.wait_for_guest(&mut signals)?;
    drop(hold);
    let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
    let streams = Streams {
        stdin: args.interactive.then(|| stdin.as_fd()),
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
    };
    let raw = if args.tty && args.interactive {
        let entered = RawMode::enter(stdin.as_fd()).map_err(|error| {
            Complaint::caused(&error, Some("leave out -t")).about("failed to set up the terminal")
        })?;
        Some(entered)
    } else {
        None
    };
    let ended = ready.run(process, streams, &mut signals);
    drop(raw);
    Ok(ended?.exit_code())
}

/// Which image, and how to get it.
struct Wanted<'a> {
    given: &'a str,
    reference: &'a Reference,
    pull: PullPolicy,
    quiet: bool,
}

fn prepare(store: &Store, wanted: &Wanted<'_>) -> Result<Image, Complaint> {
    let started = Instant::now();
    let Wanted {
        reference, quiet, ..
    } = *wanted;
    let told = |error: ImageError| {
        let complaint = images::complaint(&error);
        match error {
            // These name the image themselves.
            ImageError::UnknownReference { .. } | ImageError::NoStoreRoot => complaint,
            _ => complaint.about(format!("image {reference}")),
        }
    };
    let image = match reference {
        Reference::Named(name) => {
            let given = wanted
                .given
                .strip_prefix("docker://")
                .unwrap_or(wanted.given);
            let found = images::pull::find_or_pull(store, given, name, wanted.pull, quiet)?;
            store.prepare_target(&found.entry.target, &mut Bar::new(quiet))
        }
        _ => store.prepare(reference, &mut Bar::new(quiet)),
    };
    let image = image.map_err(told)?;
    tracing::debug!(after = ?started.elapsed(), layers = image.layers.len(), "image ready");
    Ok(image)
}

fn start_log(verbose: bool) {
    use tracing_subscriber::filter::LevelFilter;
    let level = if verbose {
        LevelFilter::DEBUG
    } else {
        LevelFilter::WARN
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .with_writer(std::io::stderr)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    fn parse(words: &[&str]) -> RunArgs {
        let line = ["run"].iter().chain(words);
        Line::try_parse_from(line).expect("understood").run
    }

    #[test]
    fn what_follows_the_image_belongs_to_the_command() {
        let args = parse(&[
            "-i", "-e", "A=1", "oci:x", "sh", "-c", "exit 3", "--env", "-t", "--", "-i",
        ]);
        assert_eq!(
            args.words,
            ["oci:x", "sh", "-c", "exit 3", "--env", "-t", "--", "-i"]
        );
        assert!(args.interactive && !args.tty);
        assert_eq!(args.env, ["A=1"]);
    }

    #[test]
    fn an_option_right_behind_the_image_belongs_to_the_command() {
        let args = parse(&["oci:x", "-t"]);
        assert_eq!(args.words, ["oci:x", "-t"]);
        assert!(!args.tty);
    }

    #[test]
    fn short_options_join_as_everyone_types_them() {
        let args = parse(&["-it", "--rm", "-m512m", "oci:x"]);
        assert!(args.interactive && args.tty && args.rm);
        assert_eq!(args.memory, 512);
    }

    #[test]
    fn without_an_image_it_is_a_mistake() {
        Line::try_parse_from(["run", "-i"]).expect_err("no image");
    }
}
