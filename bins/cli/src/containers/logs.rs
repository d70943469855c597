//! `kombi logs`.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::time::Duration;

use chrono::{DateTime, Utc};
use containers::Container;
use containers::log::{Entry, Reader, Stream};

use super::{EXIT_FAILED, all, failed};
use crate::complaint::Complaint;

/// How often a log that is followed is looked at.
const PAUSE: Duration = Duration::from_millis(50);

const AFTER_HELP: &str = "\
TIME is RFC 3339 (2026-01-02T15:04:05Z), seconds since 1970, or how long ago: 90s, 10m, 1h30m.
What the command wrote to standard error is printed there.

Examples:
  kombi logs -f --tail 10 web
  kombi logs --since 1h -t web";

/// Print what containers wrote.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct LogsArgs {
    /// Go on printing what it writes until it ends.
    #[arg(short, long)]
    follow: bool,

    /// Print what came since then.
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<DateTime<Utc>>,

    /// Print what came before then.
    #[arg(long, value_name = "TIME", value_parser = time)]
    until: Option<DateTime<Utc>>,

    /// Begin with the last N lines; all of them without.
    #[arg(short = 'n', long, value_name = "N|all", default_value = "all", value_parser = tail)]
    tail: Tail,

    /// Print when each line came.
    #[arg(short, long)]
    timestamps: bool,

    /// Which: its name, or the first digits of its identifier.
    container: String,
}

/// How many lines.
#[derive(Clone, Copy, Debug)]
struct Tail(Option<usize>);

/// Prints them.
pub(crate) fn logs(args: &LogsArgs) -> Result<u8, Complaint> {
    let container = all()?
        .find(&args.container)
        .map_err(|error| failed(&error))?;
    match print(args, &container) {
        Ok(()) => Ok(0),
        Err(Stop::NobodyReads) => Ok(0),
        Err(Stop::Failed(complaint)) => Err(complaint),
    }
}

enum Stop {
    /// As by `| head`.
    NobodyReads,
    Failed(Complaint),
}

impl From<containers::Error> for Stop {
    fn from(error: containers::Error) -> Self {
        Self::Failed(failed(&error))
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => Self::NobodyReads,
            _ => {
                let complaint = Complaint::caused(&error, Some("check where the output goes"));
                let complaint = complaint.about("failed to print the log");
                Self::Failed(complaint.with_exit_code(EXIT_FAILED))
            }
        }
    }
}

fn print(args: &LogsArgs, container: &Container) -> Result<(), Stop> {
    let mut reader = Reader::open(container.dir())?;
    let wanted = |entry: &Entry| {
        let then = DateTime::parse_from_rfc3339(&entry.time).map(|then| then.to_utc());
        then.is_ok_and(|then| {
            args.since.is_none_or(|since| then >= since)
                && args.until.is_none_or(|until| then < until)
        })
    };
    let mut held = VecDeque::new();
    while let Some(entry) = reader.next_entry()? {
        if !wanted(&entry) {
            continue;
        }
        match args.tail.0 {
            None => show(&entry, args.timestamps)?,
            Some(lines) => {
                held.push_back(entry);
                if held.len() > lines {
                    held.pop_front();
                }
            }
        }
    }
    for entry in &held {
        show(entry, args.timestamps)?;
    }
    let over = || args.until.is_some_and(|until| Utc::now() >= until);
    while args.follow && !over() {
        // First whether it runs, then what it wrote: nothing comes behind that.
        let runs = container.is_held()?;
        while let Some(entry) = reader.next_entry()? {
            if wanted(&entry) {
                show(&entry, args.timestamps)?;
            }
        }
        if !runs {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn show(entry: &Entry, timestamps: bool) -> std::io::Result<()> {
    let time = if timestamps {
        format!("{} ", entry.time)
    } else {
        String::new()
    };
    let text = format!("{time}{}", entry.log);
    match entry.stream {
        Stream::Stdout => {
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_bytes())?;
            out.flush()
        }
        Stream::Stderr => std::io::stderr().lock().write_all(text.as_bytes()),
    }
}

fn tail(text: &str) -> Result<Tail, String> {
    match text {
        "all" | "-1" => Ok(Tail(None)),
        _ => text
            .parse()
            .map(|lines| Tail(Some(lines)))
            .map_err(|_| format!("{text:?} is no number of lines; write a whole number, or all")),
    }
}

fn time(text: &str) -> Result<DateTime<Utc>, String> {
    let wrong = || {
        format!(
            "{text:?} is no time; write 2026-01-02T15:04:05Z, seconds since 1970, or 10m for ten minutes ago"
        )
    };
    if let Ok(then) = DateTime::parse_from_rfc3339(text) {
        return Ok(then.to_utc());
    }
    if let Some((seconds, nanoseconds)) = epoch(text) {
        return DateTime::from_timestamp(seconds, nanoseconds).ok_or_else(wrong);
    }
    let ago = ago(text).ok_or_else(wrong)?;
    let ago = chrono::TimeDelta::from_std(ago).map_err(|_| wrong())?;
    Utc::now().checked_sub_signed(ago).ok_or_else(wrong)
}

/// `1136073600` and `1136073600.000000001`.
fn epoch(text: &str) -> Option<(i64, u32)> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(seconds) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    Some((
        seconds.parse().ok()?,
        format!("{fraction:0<9}").parse().ok()?,
    ))
}

/// A duration as Go writes it: `1h30m`, `90s`, `500ms`.
fn ago(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, behind) = rest.split_at(digits);
        let unit = behind
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(behind.len());
        let (unit, behind) = behind.split_at(unit);
        let millis = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return None,
        };
        let count: u64 = number.parse().ok()?;
        sum = sum.checked_add(Duration::from_millis(count.checked_mul(millis)?))?;
        rest = behind;
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_docker_s() {
        let at = |text| time(text).expect(text).timestamp();
        assert_eq!(at("2026-01-02T15:04:05Z"), 1_767_366_245);
        assert_eq!(at("2026-01-02T15:04:05.5+01:00"), 1_767_362_645);
        assert_eq!(at("1136073600"), 1_136_073_600);
        assert_eq!(time("1.5").expect("a time").timestamp_subsec_millis(), 500);
        let hour_and_half = Utc::now().timestamp() - 5400;
        assert!((at("1h30m") - hour_and_half).abs() <= 1);
        for bad in [
            "",
            "x",
            "10",
            "-5m",
            "5",
            "1h30",
            "1.1234567890",
            "99999999999999999999h",
            "5d",
        ] {
            // Bare numbers are seconds since 1970.
            match bad.parse::<u32>() {
                Ok(_) => drop(time(bad).expect(bad)),
                Err(_) => drop(time(bad).expect_err(bad)),
            }
        }
    }
}
