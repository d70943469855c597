//! Metrics, as Firecracker writes them: one JSON object a line, at the start, each
//! minute and at the end. Counters count from the line before; their names stay.
//!
//! ```json
//! {"utc_timestamp_ms":1790000000000,"put_api_requests":{"drive_count":2,…},…,
//!  "engine":{"name":"soft","exits":{"link":812,…},…}}
//! ```
//! `engine` is there once one was chosen.
//!
//! Invariant: the machine never waits for whoever reads them: a line that a full FIFO
//! does not take is lost, and so is one for which a disk has no room.
//!
//! Left to others: counting.

use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blueprint::MetricsDraft;
use hv_soft::{Counters, EngineStats};
use serde::Serialize;
use serde_json::Value;
use translations::{Counts, Translations};

use crate::filter::Filter;
use crate::whole_lines::WholeLines;

/// Of latencies, and how long something took last: they do not add up, so they are told as they are.
pub(crate) const EXTREMES: [&str; 5] = [
    "min_us",
    "max_us",
    "init_time_us",
    "activate_time_us",
    "config_change_time_us",
];
/// The group of times of single requests, which are told as they are as well.
pub(crate) const LATENCIES: &str = "latencies_us";
/// Firecracker's.
const PERIOD: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Line<'a> {
    utc_timestamp_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    properties: Option<&'a BTreeMap<String, String>>,
    #[serde(flatten)]
    groups: BTreeMap<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    engine: Option<Engine>,
}

/// The software engine's counters, all vCPUs together.
#[derive(Serialize)]
struct Engine {
    name: &'static str,
    /// Ways out of translated code.
    exits: Exits,
    /// Accesses on a copy of their operand.
    bounces: u64,
    translations: Made,
    /// Kept translations; null when none are kept.
    kept: Option<Kept>,
    invalidations: Invalidations,
    tlb: Tlb,
    exceptions: u64,
    page_faults: u64,
    interrupts: u64,
    sleeps: u64,
    timer_sets: u64,
    mmio: u64,
    pio: u64,
    between_vcpus: BetweenVcpus,
}

#[derive(Serialize)]
struct Exits {
    link: u64,
    indirect: u64,
    goto: u64,
    interpret: u64,
    access: u64,
    group: u64,
    poll: u64,
    fault: u64,
    stale: u64,
}

#[derive(Serialize)]
struct Made {
    made: u64,
    recalled: u64,
    again: u64,
    instructions: u64,
    guest_bytes: u64,
    host_bytes: u64,
    tsc_ticks: u64,
}

#[derive(Serialize)]
struct Kept {
    found: u64,
    missed: u64,
    /// Of `found` and `missed` together, since the start; null before there were any.
    hit_rate: Option<f64>,
    /// Now.
    in_file: u32,
}

#[derive(Serialize)]
struct Invalidations {
    pages: u64,
    stores: u64,
    flushes: u64,
}

#[derive(Serialize)]
struct Tlb {
    misses: u64,
    walks: u64,
    flushes: u64,
    space_switches: u64,
}

#[derive(Serialize)]
struct BetweenVcpus {
    asked: u64,
    answered: u64,
    alone: u64,
}

impl Engine {
    fn of(new: &EngineStats, kept: Option<Kept>) -> Self {
        Self {
            name: "soft",
            exits: Exits {
                link: new.links,
                indirect: new.indirect,
                goto: new.gotos,
                interpret: new.interpreted,
                access: new.accesses,
                group: new.groups,
                poll: new.polls,
                fault: new.faults,
                stale: new.stale,
            },
            bounces: new.bounces,
            translations: Made {
                made: new.translations,
                recalled: new.recalled,
                again: new.retranslations,
                instructions: new.translated_instructions,
                guest_bytes: new.guest_bytes,
                host_bytes: new.host_bytes,
                tsc_ticks: new.translation_ticks,
            },
            kept,
            invalidations: Invalidations {
                pages: new.invalidations,
                stores: new.patched,
                flushes: new.code_flushes,
            },
            tlb: Tlb {
                misses: new.tlb_misses(),
                walks: new.walks,
                flushes: new.flushes,
                space_switches: new.space_switches,
            },
            exceptions: new.exceptions,
            page_faults: new.page_faults,
            interrupts: new.interrupts,
            sleeps: new.sleeps,
            timer_sets: new.timer_sets,
            mmio: new.mmio,
            pio: new.pio,
            between_vcpus: BetweenVcpus {
                asked: new.asked,
                answered: new.requests,
                alone: new.alone,
            },
        }
    }
}

impl Kept {
    fn of(now: Counts, before: Counts) -> Self {
        let looked = now.found.saturating_add(now.missed);
        Self {
            found: now.found.saturating_sub(before.found),
            missed: now.missed.saturating_sub(before.missed),
            hit_rate: (looked != 0).then(|| now.found as f64 / looked as f64),
            in_file: now.in_file,
        }
    }
}

/// What counts: totals since the start, by group and name.
type Source = Box<dyn Fn() -> BTreeMap<String, Value> + Send>;

#[derive(Default)]
struct Writer {
    to: Option<WholeLines>,
    id: Option<String>,
    properties: Option<BTreeMap<String, String>>,
    sources: Vec<Source>,
    engine: Option<(Arc<Counters>, Option<Arc<Translations>>)>,
    told: BTreeMap<String, Value>,
    told_of_engine: EngineStats,
    told_of_kept: Counts,
}

impl Writer {
    /// Writes a line, if somebody wants any.
    fn write(&mut self) -> std::io::Result<()> {
        let Some(to) = &mut self.to else {
            return Ok(());
        };
        let totals: BTreeMap<_, _> = self.sources.iter().flat_map(|source| source()).collect();
        let groups = totals
            .iter()
            .map(|(name, now)| {
                let before = self.told.get(name).filter(|_| name != LATENCIES);
                (name.clone(), since(now, before))
            })
            .collect();
        let stats = self.engine.as_ref().map(|(counters, _)| counters.sum());
        let kept = self.engine.as_ref().and_then(|(_, kept)| kept.as_ref());
        let counts = kept.map(|kept| kept.counts());
        let engine = stats.as_ref().map(|stats| {
            let kept = counts.map(|now| Kept::of(now, self.told_of_kept));
            Engine::of(&stats.since(&self.told_of_engine), kept)
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let line = Line {
            utc_timestamp_ms: now.map_or(0, |now| now.as_millis() as u64),
            id: self.id.as_deref(),
            properties: self.properties.as_ref(),
            groups,
            engine,
        };
        // What was not told is told next time.
        to.append(&serde_json::to_vec(&line)?)?;
        self.told = totals;
        self.told_of_engine = stats.unwrap_or_default();
        self.told_of_kept = counts.unwrap_or_default();
        Ok(())
    }

    fn write_or_say(&mut self) {
        if let Err(error) = self.write() {
            tracing::debug!(%error, "metrics are not taken");
        }
    }

    /// Everything since the start, whoever was told of what.
    fn totals(&self) -> BTreeMap<String, Value> {
        let mut totals: BTreeMap<_, _> = self.sources.iter().flat_map(|source| source()).collect();
        if let Some((counters, kept)) = &self.engine {
            let kept = kept
                .as_ref()
                .map(|kept| Kept::of(kept.counts(), Counts::default()));
            let engine = serde_json::to_value(Engine::of(&counters.sum(), kept));
            totals.insert("engine".to_owned(), engine.unwrap_or_default());
        }
        totals
    }
}

/// How much more each number is `now`.
fn since(now: &Value, before: Option<&Value>) -> Value {
    match now {
        Value::Object(members) => {
            let members = members.iter().map(|(name, now)| {
                let before = before.and_then(|before| before.get(name));
                let told = match EXTREMES.contains(&name.as_str()) {
                    true => now.clone(),
                    false => since(now, before),
                };
                (name.clone(), told)
            });
            Value::Object(members.collect())
        }
        now => match (now.as_u64(), before.and_then(Value::as_u64)) {
            (Some(now), Some(before)) => now.saturating_sub(before).into(),
            (Some(_), None) | (None, _) => now.clone(),
        },
    }
}

/// The metrics of this process.
#[derive(Default)]
pub(crate) struct Metrics {
    writer: Arc<Mutex<Writer>>,
    thread: Mutex<Option<(Sender<()>, JoinHandle<()>)>>,
}

impl Metrics {
    /// Takes totals from `source` as well.
    pub(crate) fn add(&self, source: impl Fn() -> BTreeMap<String, Value> + Send + 'static) {
        lock(&self.writer).sources.push(Box::new(source));
    }

    /// Takes those of the engine as well.
    pub(crate) fn watch(&self, counters: Arc<Counters>, kept: Option<Arc<Translations>>) {
        lock(&self.writer).engine = Some((counters, kept));
    }

    /// Writes the first line, and starts the thread that writes the others, behind `filter`
    /// if the calling thread has none.
    ///
    /// # Errors
    /// Why not, in one line; nothing changed then.
    pub(crate) fn configure(
        &self,
        id: &str,
        asked: &MetricsDraft,
        filter: Option<Filter>,
    ) -> Result<(), String> {
        let mut thread = lock(&self.thread);
        if thread.is_some() {
            return Err("metrics are configured already: that can be done once".to_owned());
        }
        let path = &asked.metrics_path;
        let to = WholeLines::open(path)
            .map_err(|error| format!("failed to open {path:?} for metrics: {error}"))?;
        {
            let mut writer = lock(&self.writer);
            writer.to = Some(to);
            writer.id = asked.emit_id.then(|| id.to_owned());
            writer.properties.clone_from(&asked.properties);
            writer.write_or_say();
        }
        let (end, ended) = channel();
        let writer = self.writer.clone();
        let started = std::thread::Builder::new()
            .name("metrics".to_owned())
            .spawn(move || {
                if let Some(Err(error)) = filter.map(|filter| filter.confine_this_thread()) {
                    tracing::warn!(%error, "metrics are written when asked for only");
                    return;
                }
                while ended.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                    lock(&writer).write_or_say();
                }
            })
            .map_err(|error| format!("failed to start a thread for metrics: {error}"))?;
        *thread = Some((end, started));
        Ok(())
    }

    /// Everything that is counted, since the start, by group and name.
    pub(crate) fn totals(&self) -> BTreeMap<String, Value> {
        lock(&self.writer).totals()
    }

    /// Writes a line now.
    ///
    /// # Errors
    /// The host's: then the line was not written.
    pub(crate) fn flush(&self) -> std::io::Result<()> {
        lock(&self.writer).write()
    }

    /// Writes the last line.
    pub(crate) fn end(&self) {
        let Some((end, thread)) = lock(&self.thread).take() else {
            return;
        };
        drop(end);
        if thread.join().is_err() {
            tracing::warn!("metrics panicked");
        }
        lock(&self.writer).write_or_say();
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_count_from_the_line_before() {
        let before = json!({"a": 3, "b": {"c": 1}, "d": "x"});
        let now = json!({"a": 5, "b": {"c": 1, "e": 7}, "d": "y", "f": 1});
        let wanted = json!({"a": 2, "b": {"c": 0, "e": 7}, "d": "y", "f": 1});
        assert_eq!(since(&now, Some(&before)), wanted);
        assert_eq!(since(&now, None), now);
    }

    #[test]
    fn metrics_are_configured_once_and_have_names_and_properties() {
        let dir = tempfile::tempdir().unwrap();
        let asked = |name: &str| MetricsDraft {
            metrics_path: dir.path().join(name),
            emit_id: true,
            properties: Some(BTreeMap::from([("k".to_owned(), "v".to_owned())])),
        };
        let metrics = Metrics::default();
        metrics.add(|| BTreeMap::from([("group".to_owned(), json!({"n": 4}))]));
        assert!(metrics.configure("vm", &asked("none/m"), None).is_err());
        metrics.configure("vm", &asked("m"), None).unwrap();
        assert!(metrics.configure("vm", &asked("m"), None).is_err());
        metrics.flush().unwrap();
        metrics.end();
        let text = std::fs::read_to_string(dir.path().join("m")).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let counts: Vec<_> = lines.iter().map(|line| &line["group"]["n"]).collect();
        assert_eq!(counts, [4, 0, 0]);
        assert_eq!(
            (&lines[0]["id"], &lines[0]["properties"]),
            (&json!("vm"), &json!({"k": "v"}))
        );
        assert!(lines[0].get("engine").is_none());
    }
}
