//! Metrics, as Firecracker writes them: one JSON object a line, at the start, each
//! minute and at the end. Counters count from the line before; their names stay.
//!
//! ```json
//! {"utc_timestamp_ms":1790000000000,"engine":{"name":"soft","exits":{"link":812,…},…}}
//! ```
//!
//! Invariant: the machine never waits for whoever reads them: a line that a full FIFO
//! does not take is lost, and so is one for which a disk has no room.
//!
//! Left to others: counting.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hv_soft::{Counters, EngineStats};
use serde::Serialize;
use translations::{Counts, Translations};

use crate::whole_lines::WholeLines;

/// Firecracker's.
const PERIOD: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Line {
    utc_timestamp_ms: u64,
    engine: Engine,
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

struct Writer {
    to: WholeLines,
    counters: Arc<Counters>,
    kept: Option<Arc<Translations>>,
    told: EngineStats,
    told_of_kept: Counts,
}

impl Writer {
    fn write(&mut self) {
        let stats = self.counters.sum();
        let counts = self.kept.as_ref().map(|kept| kept.counts());
        let kept = counts.map(|now| Kept::of(now, self.told_of_kept));
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let line = Line {
            utc_timestamp_ms: now.map_or(0, |now| now.as_millis() as u64),
            engine: Engine::of(&stats.since(&self.told), kept),
        };
        let written = serde_json::to_vec(&line)
            .map_err(std::io::Error::from)
            .and_then(|line| self.to.append(&line));
        match written {
            // What was not told is told next time.
            Err(error) => tracing::debug!(%error, "metrics are not taken"),
            Ok(()) => {
                self.told = stats;
                self.told_of_kept = counts.unwrap_or_default();
            }
        }
    }
}

/// Metrics of a machine that runs.
pub(crate) struct Metrics {
    end: Sender<()>,
    thread: JoinHandle<()>,
}

impl Metrics {
    /// Writes the first line, and starts the thread that writes the others.
    ///
    /// # Errors
    /// The host's, when it has no thread.
    pub(crate) fn start(
        to: WholeLines,
        counters: Arc<Counters>,
        kept: Option<Arc<Translations>>,
    ) -> std::io::Result<Self> {
        let mut writer = Writer {
            to,
            counters,
            kept,
            told: EngineStats::default(),
            told_of_kept: Counts::default(),
        };
        writer.write();
        let (end, ended) = channel();
        let thread = std::thread::Builder::new()
            .name("metrics".to_owned())
            .spawn(move || {
                while ended.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                    writer.write();
                }
                writer.write();
            })?;
        Ok(Self { end, thread })
    }

    /// Writes the last line.
    pub(crate) fn end(self) {
        drop(self.end);
        if self.thread.join().is_err() {
            tracing::warn!("metrics panicked");
        }
    }
}
