//! `kombi supervise`: the process that holds one container in the background.
//!
//! Invariant: it says `started` once the command runs, or one line of why it does not; and however the container ends,
//! its record says so before the lock goes. The thread that starts the machine is the one that ends it.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use containers::Supervision;
use containers::log::{Stream, Writer};
use rustix::event::{PollFd, PollFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use sandbox::{Ended, Request, Streams};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::detach::{STARTED, Task};
use super::doorbell::{Told, Wishes};
use super::upper;
use crate::complaint::Complaint;

const READ_BYTES: usize = 64 << 10;

/// Hold a container; kombi run -d starts this.
#[derive(Debug, clap::Args)]
pub(crate) struct SuperviseArgs {
    /// Its identifier.
    id: String,
}

/// Holds it to its end.
pub(crate) fn supervise(args: &SuperviseArgs) -> Result<u8, Complaint> {
    // Nothing that happens to who started us, a terminal that goes for one, is about the container.
    let _ = rustix::process::setsid();
    let all = super::all()?;
    let container = all
        .find(&args.id)
        .map_err(|error| super::complaint(&error))?;
    let mut held = container
        .supervise()
        .map_err(|error| super::complaint(&error))?;
    // No directory is kept from being unmounted. There always is a root.
    let _ = std::env::set_current_dir("/");
    let outcome = run(&mut held);
    let (code, why) = match &outcome {
        Ok(ended) => (ended.exit_code(), None),
        Err(complaint) => (complaint.exit_code(), Some(complaint.line())),
    };
    let recorded = held.ended(code, why);
    // Why it failed comes before what else did.
    let ended = outcome?;
    recorded.map_err(|error| super::complaint(&error))?;
    Ok(ended.exit_code())
}

fn run(held: &mut Supervision) -> Result<Ended, Complaint> {
    let failed = |doing: &'static str| {
        move |error: std::io::Error| {
            Complaint::caused(&error, Some("see kombi doctor")).about(doing)
        }
    };
    let task: Task = serde_json::from_value(held.record().task.clone()).map_err(|error| {
        let way_out = "remove the container and run it anew: another version of kombi made it";
        Complaint::caused(&error, Some(way_out)).about("what the container is to run")
    })?;
    let Task { mut plan, process } = task;
    let short = held.record().id.short().to_owned();
    plan.hostname.get_or_insert_with(|| short.clone());
    plan.name = Some(short);
    let upper = held.dir().join(upper::FILE);
    plan.upper = upper.exists().then_some(upper);
    if let Some(layer) = plan.layers.iter().find(|layer| !layer.exists()) {
        let image = &held.record().image;
        return Err(Complaint::new(
            format!("a layer of image {image}, {layer:?}, is gone"),
            "get the image again, then start the container",
        ));
    }

    let wishes = Wishes::new().map_err(failed("failed to make a doorbell"))?;
    wishes
        .listen(held.dir())
        .map_err(failed("failed to listen for other commands"))?;
    // A host that shuts down asks everybody to end.
    let stop_signal = held.record().stop_signal;
    forward(&wishes, stop_signal).map_err(failed("failed to catch signals"))?;

    let writer =
        Writer::open(held.dir(), held.record().log).map_err(|error| super::complaint(&error))?;
    let (stdout, stderr, log) = keep_log(writer).map_err(failed("failed to keep a log"))?;
    let mut on_start = || {
        // A container whose record cannot be written runs all the same, and is found by its lock.
        if let Err(error) = held.started() {
            super::complaint(&error).print();
        }
        let mut out = std::io::stdout();
        let _ = writeln!(out, "{STARTED}").and_then(|()| out.flush());
        be_silent();
    };
    let mut told = Told {
        wishes,
        on_start: &mut on_start,
    };
    let streams = Streams {
        // With -i the command's input stays open, and nobody writes.
        stdin: None,
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
    };
    let ended = plan
        .launch()
        .and_then(|booting| booting.wait_for_guest(&mut told))
        .and_then(|ready| ready.run(process, streams, &mut told));
    drop((stdout, stderr));
    // All that was said is on disk before the end is.
    let _ = log.join();
    match ended {
        // By kombi kill, or by kombi stop when time was up.
        Err(sandbox::Error::Interrupted { signal }) => Ok(Ended::Signalled { number: signal }),
        other => Ok(other?),
    }
}

/// SIGTERM and SIGINT become the container's stop signal.
fn forward(wishes: &Wishes, stop_signal: u8) -> std::io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
    let wishes = wishes.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                wishes.add(Request::Signal(stop_signal));
            }
        })?;
    Ok(())
}

/// Who started us has heard all there is to hear, and may be gone.
fn be_silent() {
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}

/// Writes what comes out of two pipes to a log, on a thread of its own, until both are closed.
fn keep_log(mut writer: Writer) -> std::io::Result<(OwnedFd, OwnedFd, JoinHandle<()>)> {
    let (from_stdout, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (from_stderr, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let thread = std::thread::Builder::new()
        .name("log".into())
        .spawn(move || {
            let mut pipes = [
                Some((Stream::Stdout, from_stdout)),
                Some((Stream::Stderr, from_stderr)),
            ];
            let mut buffer = vec![0; READ_BYTES];
            while pipes.iter().any(Option::is_some) {
                let open = pipes.iter().flatten();
                let mut fds: Vec<_> = open
                    .map(|(_, pipe)| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN))
                    .collect();
                // An interruption is no end.
                let _ = rustix::event::poll(&mut fds, None);
                let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
                drop(fds);
                let open = pipes.iter_mut().filter(|pipe| pipe.is_some());
                for (slot, _) in open.zip(ready).filter(|(_, ready)| *ready) {
                    let Some((stream, pipe)) = slot else { continue };
                    match rustix::io::read(&*pipe, &mut buffer) {
                        Ok(0) => *slot = None,
                        // What a full disk does not take is lost, and nobody waits for it.
                        Ok(n) => drop(writer.write(*stream, buffer.get(..n).unwrap_or_default())),
                        Err(rustix::io::Errno::INTR) => {}
                        Err(_) => *slot = None,
                    }
                }
            }
            let _ = writer.finish();
        })?;
    Ok((stdout, stderr, thread))
}
