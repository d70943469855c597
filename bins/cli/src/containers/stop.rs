//! `kombi stop` and `kombi kill`.

use std::time::{Duration, Instant};

use containers::{Container, Error};

use super::doorbell::{Wish, say};
use super::{each, failed, signals};
use crate::complaint::Complaint;

const SIGKILL: u8 = 9;
/// From a supervisor's lock to its socket.
const LISTENS: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);
/// From the end of a machine to that of its supervisor.
const AFTERWARDS: Duration = Duration::from_secs(20);

const STOP_AFTER_HELP: &str = "\
Asks the command to end by its stop signal, and ends the machine when it did not in time.";

/// How a container is asked to end.
#[derive(Debug, clap::Args)]
pub(crate) struct Ending {
    /// Seconds until the machine is ended; -1 waits for ever [default: as it was started, or 10].
    #[arg(
        short,
        long,
        visible_alias = "timeout",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    time: Option<i64>,

    /// Signal that asks it to end [default: as it was started].
    #[arg(short, long, value_name = "SIGNAL", value_parser = signals::number)]
    signal: Option<u8>,
}

/// Stop containers.
#[derive(Debug, clap::Args)]
#[command(after_help = STOP_AFTER_HELP)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    ending: Ending,

    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Stops them; goes on after one that fails.
pub(crate) fn stop(args: &StopArgs) -> Result<u8, Complaint> {
    each(&args.containers, |_, container| {
        end(&container, &args.ending)
    })
}

const KILL_AFTER_HELP: &str = "\
KILL ends the machine; any other signal is sent to its command.";

/// Send a signal to the commands of containers.
#[derive(Debug, clap::Args)]
#[command(after_help = KILL_AFTER_HELP)]
pub(crate) struct KillArgs {
    /// Which signal.
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL", value_parser = signals::number)]
    signal: u8,

    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Sends it; goes on after one that fails.
pub(crate) fn kill(args: &KillArgs) -> Result<u8, Complaint> {
    each(&args.containers, |_, container| {
        let name = container.record().name.clone();
        if !container.is_running() {
            return Err(failed(&Error::NotRunning { name }));
        }
        if args.signal != SIGKILL {
            return tell(&container, Wish::Signal(args.signal));
        }
        kill_now(&container)
    })
}

/// Asks a container to end, and ends it when it did not in time.
pub(crate) fn end(container: &Container, ending: &Ending) -> Result<(), Complaint> {
    let usual = i64::from(container.record().stop_timeout_seconds);
    let patience = u64::try_from(ending.time.unwrap_or(usual));
    let patience = patience.ok().map(Duration::from_secs);
    let signal = ending.signal.unwrap_or(container.record().stop_signal);
    // It runs, or it is about to.
    if !container.is_held().map_err(|error| failed(&error))? {
        return Ok(());
    }
    if signal != SIGKILL {
        tell(container, Wish::Signal(signal))?;
        let ended = container.wait(patience).map_err(|error| failed(&error))?;
        if ended.is_some() {
            return Ok(());
        }
    }
    kill_now(container)
}

/// Ends the machine, and waits for it.
pub(crate) fn kill_now(container: &Container) -> Result<(), Complaint> {
    tell(container, Wish::Kill(SIGKILL))?;
    match container.wait(Some(AFTERWARDS)) {
        Ok(Some(_)) => Ok(()),
        Ok(None) => {
            let name = &container.record().name;
            let what = format!("container {name} does not end");
            let pid = container.state().pid.unwrap_or_default();
            let way_out = format!("kill its supervisor, process {pid}: its machine ends with it");
            Err(Complaint::new(what, way_out).with_exit_code(super::EXIT_FAILED))
        }
        Err(error) => Err(failed(&error)),
    }
}

fn tell(container: &Container, wish: Wish) -> Result<(), Complaint> {
    let end = Instant::now() + LISTENS;
    loop {
        match say(container.dir(), wish) {
            Ok(()) => return Ok(()),
            // It went meanwhile.
            Err(_) if !container.is_held().unwrap_or(false) => return Ok(()),
            // It has the lock and does not listen yet.
            Err(_) if Instant::now() < end => std::thread::sleep(PAUSE),
            Err(error) => return Err(unheard(container, &error)),
        }
    }
}

fn unheard(container: &Container, error: &std::io::Error) -> Complaint {
    let name = &container.record().name;
    let complaint = Complaint::caused(error, Some("try again, or kill its supervisor"));
    let complaint = complaint.about(format!("the supervisor of container {name}"));
    complaint.with_exit_code(super::EXIT_FAILED)
}
