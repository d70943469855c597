//! The log, in Firecracker's form, which may change where it goes while it is written:
//!
//! ```text
//! 2026-11-22T23:05:07.123456Z [my-vm:main:WARN:bins/vmm/src/monitor.rs:41] what happened
//! ```
//! Level and origin are there when asked for. Only lines of the log begin without a space.
//!
//! Invariant: nobody waits for whoever reads its file: a line that a full FIFO does not take
//! is counted and lost. Standard error is somebody else's, and is waited for. A place in the source that a guest or a client can make write again
//! and again writes ten lines in five seconds at most.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blueprint::{LogLevel, LoggerDraft};
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use crate::whole_lines::WholeLines;

/// Lines that one place in the source may write in [`PERIOD`].
const LINES_MAX: u32 = 10;
/// The time for them.
const PERIOD: Duration = Duration::from_secs(5);
/// What answers clients logs each request; who has the API's socket may fill the log.
const UNLIMITED: &str = "api";

/// The process's log. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Log(Arc<Shared>);

struct Shared {
    id: String,
    /// As a number, to be asked without the mutex.
    level: AtomicUsize,
    missed: AtomicU64,
    suppressed: AtomicU64,
    settings: Mutex<Settings>,
}

struct Settings {
    to: Option<WholeLines>,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
    /// When each place began to count, and how far it is.
    places: HashMap<Identifier, (Instant, u32)>,
}

impl Log {
    /// Makes it the process's log: to standard error until [`Log::configure`].
    pub(crate) fn start(id: &str) -> Self {
        let log = Self(Arc::new(Shared {
            id: id.to_owned(),
            level: AtomicUsize::new(number(filter(LogLevel::default()))),
            missed: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
            settings: Mutex::new(Settings {
                to: None,
                show_level: false,
                show_origin: false,
                module: None,
                places: HashMap::new(),
            }),
        }));
        // It fails if there is a log already, which only tests have.
        let _ = tracing::subscriber::set_global_default(log.clone());
        log
    }

    /// Changes what `asked` names.
    ///
    /// # Errors
    /// The host's, when it cannot open the file; nothing changes then.
    pub(crate) fn configure(&self, asked: &LoggerDraft) -> std::io::Result<()> {
        let to = asked
            .log_path
            .as_deref()
            .map(|path: &Path| WholeLines::open(path))
            .transpose()?;
        let mut settings = self.settings();
        if to.is_some() {
            settings.to = to;
        }
        settings.show_level = asked.show_level.unwrap_or(settings.show_level);
        settings.show_origin = asked.show_log_origin.unwrap_or(settings.show_origin);
        if asked.module.is_some() {
            settings.module = asked.module.clone();
        }
        drop(settings);
        if let Some(level) = asked.level {
            self.0.level.store(number(filter(level)), Ordering::Relaxed);
            tracing::callsite::rebuild_interest_cache();
        }
        Ok(())
    }

    /// Lines that were lost, and lines that were too many, since the start.
    pub(crate) fn lost(&self) -> (u64, u64) {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        (count(&self.0.missed), count(&self.0.suppressed))
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.0
            .settings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wants(&self, level: Level) -> bool {
        number(LevelFilter::from_level(level)) <= self.0.level.load(Ordering::Relaxed)
    }

    fn line(&self, settings: &Settings, event: &Event<'_>) -> String {
        let mut line = String::new();
        // Writing to a string does not fail.
        let _ = SystemTime.format_time(&mut Writer::new(&mut line));
        let thread = std::thread::current();
        let _ = write!(line, " [{}:{}", self.0.id, thread.name().unwrap_or("-"));
        let metadata = event.metadata();
        if settings.show_level {
            let _ = write!(line, ":{}", metadata.level());
        }
        if let (true, Some(file)) = (settings.show_origin, metadata.file()) {
            let _ = write!(line, ":{file}:{}", metadata.line().unwrap_or(0));
        }
        line.push(']');
        event.record(&mut Fields(&mut line));
        // What follows a line's end is set off, so that nobody takes it for another line.
        line.replace('\r', " ").replace('\n', "\n  ")
    }
}

impl Settings {
    /// Whether `event` is one more than its place may write.
    fn is_too_much(&mut self, event: &Event<'_>) -> bool {
        if event.metadata().target().starts_with(UNLIMITED) {
            return false;
        }
        let now = Instant::now();
        let (began, count) = self
            .places
            .entry(event.metadata().callsite())
            .or_insert((now, 0));
        if now.duration_since(*began) > PERIOD {
            (*began, *count) = (now, 0);
        }
        *count = count.saturating_add(1);
        *count > LINES_MAX
    }
}

impl Subscriber for Log {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if metadata.is_event() && self.wants(*metadata.level()) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && self.wants(*metadata.level())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let now = self.0.level.load(Ordering::Relaxed);
        LEVELS.into_iter().find(|level| number(*level) == now)
    }

    fn event(&self, event: &Event<'_>) {
        let mut settings = self.settings();
        let module = event.metadata().module_path().unwrap_or_default();
        if let Some(wanted) = &settings.module
            && !module.starts_with(wanted)
        {
            return;
        }
        if settings.is_too_much(event) {
            self.0.suppressed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let line = self.line(&settings, event);
        let written = match &mut settings.to {
            Some(to) => to.append(line.as_bytes()),
            None => std::io::stderr().write_all(format!("{line}\n").as_bytes()),
        };
        if written.is_err() {
            self.0.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    // No spans: nothing here has any.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// The message, then `name=value`.
struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

const LEVELS: [LevelFilter; 6] = [
    LevelFilter::OFF,
    LevelFilter::ERROR,
    LevelFilter::WARN,
    LevelFilter::INFO,
    LevelFilter::DEBUG,
    LevelFilter::TRACE,
];

fn number(level: LevelFilter) -> usize {
    LEVELS.iter().position(|one| *one == level).unwrap_or(0)
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `write` logs with `asked`.
    fn logged(asked: LoggerDraft, write: impl FnOnce()) -> (Vec<String>, Log) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = Log::start("vm-1");
        log.configure(&LoggerDraft {
            log_path: Some(path.clone()),
            ..asked
        })
        .unwrap();
        tracing::subscriber::with_default(log.clone(), write);
        let text = std::fs::read_to_string(path).unwrap();
        (text.lines().map(str::to_owned).collect(), log)
    }

    #[test]
    fn a_line_has_time_name_thread_and_what_was_asked_for() {
        let asked = LoggerDraft {
            show_level: Some(true),
            show_log_origin: Some(true),
            ..LoggerDraft::default()
        };
        let (lines, _) = logged(asked, || tracing::warn!(n = 5, text = %"a\nb", "hello"));
        let [line, more] = &lines[..] else {
            panic!("{lines:?}");
        };
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
        assert!(rest.starts_with("[vm-1:"), "{rest}");
        assert!(rest.contains(":WARN:bins/vmm/src/log.rs:"), "{rest}");
        assert!(rest.ends_with("] hello n=5 text=a"), "{rest}");
        assert_eq!(more, "  b");
        let (lines, _) = logged(LoggerDraft::default(), || tracing::warn!("hello"));
        assert!(!lines[0].contains("WARN") && !lines[0].contains("log.rs"));
    }

    #[test]
    fn levels_and_modules_choose_lines() {
        let write = || {
            tracing::error!("one");
            tracing::info!("two");
            tracing::debug!("three");
        };
        let level = |level| LoggerDraft {
            level: Some(level),
            ..LoggerDraft::default()
        };
        for (asked, count) in [
            (level(LogLevel::Off), 0),
            (level(LogLevel::Error), 1),
            (level(LogLevel::Info), 2),
            (level(LogLevel::Trace), 3),
        ] {
            assert_eq!(logged(asked.clone(), write).0.len(), count, "{asked:?}");
        }
        let module = |name: &str| LoggerDraft {
            module: Some(name.to_owned()),
            ..LoggerDraft::default()
        };
        assert_eq!(logged(module("kombi_vmm::log"), write).0.len(), 2);
        assert_eq!(logged(module("virtio"), write).0.len(), 0);
    }

    #[test]
    fn one_place_that_writes_again_and_again_is_cut_short() {
        let (lines, log) = logged(LoggerDraft::default(), || {
            for n in 0..50 {
                tracing::warn!(n, "again");
            }
            tracing::warn!("another place");
        });
        assert_eq!(lines.len(), 11, "{lines:?}");
        assert_eq!(log.lost(), (0, 40));
    }
}
