//! The engine's trace: one JSON object a line, of what it translated and dropped, why
//! it left translated code, and where most often.
//!
//! ```json
//! {"us":812,"vcpu":0,"event":"block","rip":"0x1000000","mode":"kernel","kind":"grouped","kept":false,"instructions":9,"guest_bytes":31,"host_bytes":214}
//! {"us":9120,"vcpu":0,"event":"store","pa":"0x1234","bytes":5,"blocks":1}
//! {"us":9121,"vcpu":0,"event":"drop","page":"0x1000","blocks":12}
//! {"us":9800,"vcpu":0,"event":"flush"}
//! {"us":100031,"vcpu":0,"event":"counts","exits":{"link":812,…},"translations":…}
//! {"us":402113,"vcpu":0,"event":"hot","exit":"access","rip":"0xffff…","mode":"kernel","count":8123}
//! {"us":402114,"vcpu":0,"event":"samples","translated":71,"engine":24}
//! {"us":402114,"vcpu":0,"event":"busy","rip":"0xffff…","mode":"kernel","samples":23,"share":0.242}
//! ```
//!
//! `counts` says what was counted since the one before. The others come at the end:
//! [`HOT_LINES`] places that left translated code most often, and as many blocks that ran
//! when a timer looked.
//!
//! Invariant: a line is never torn by another vCPU's; memory is bounded.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::hash::Hash;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use translator::block::{Block, Exit, FAULT_EXIT, INDIRECT_EXIT, Kind, Request};
use translator::context::Mode;

use crate::cpu::Cpu;
use crate::samples::Samples;
use crate::stats::EngineStats;

/// Lines are written once there are so many bytes of them, or after [`TICK`].
const BUFFER_BYTES: usize = 64 << 10;
/// Time between `counts`.
const TICK: Duration = Duration::from_millis(100);
/// Different places that are counted; more are in `counts` only.
const PLACES_MAX: usize = 1 << 16;
/// `hot` lines of a vCPU, and `busy` lines.
const HOT_LINES: usize = 100;

/// Where a machine's trace goes. What cannot be written is lost.
pub struct EngineTrace {
    to: Mutex<Box<dyn Write + Send>>,
    start: Instant,
}

impl EngineTrace {
    /// Writes to `to`, from the threads of vCPUs: a file rather than a slow reader.
    pub fn new(to: impl Write + Send + 'static) -> Self {
        Self {
            to: Mutex::new(Box::new(to)),
            start: Instant::now(),
        }
    }
}

impl std::fmt::Debug for EngineTrace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineTrace").finish_non_exhaustive()
    }
}

/// What left translated code: why, at which guest address, in which mode.
type Place = (&'static str, u64, &'static str);

/// A block: its guest address and mode.
type Ran = (u64, &'static str);

/// A vCPU's trace.
pub(crate) struct Trace {
    to: Arc<EngineTrace>,
    vcpu: u32,
    lines: String,
    places: HashMap<Place, u64>,
    samples: Arc<Samples>,
    ran: HashMap<Ran, u64>,
    told: EngineStats,
    told_at: Instant,
}

impl Trace {
    pub(crate) fn new(to: Arc<EngineTrace>, vcpu: u32) -> Self {
        Self {
            to,
            vcpu,
            lines: String::with_capacity(BUFFER_BYTES + 4096),
            places: HashMap::new(),
            samples: Arc::default(),
            ran: HashMap::new(),
            told: EngineStats::default(),
            told_at: Instant::now(),
        }
    }

    /// Where the timer's handler leaves what it saw.
    pub(crate) fn samples(&self) -> Arc<Samples> {
        Arc::clone(&self.samples)
    }

    fn line(&mut self, event: &str, rest: std::fmt::Arguments<'_>) {
        let us = self.to.start.elapsed().as_micros();
        let vcpu = self.vcpu;
        // Writing to a string does not fail.
        let _ = writeln!(
            self.lines,
            r#"{{"us":{us},"vcpu":{vcpu},"event":"{event}"{rest}}}"#
        );
        if self.lines.len() >= BUFFER_BYTES {
            self.write();
        }
    }

    fn write(&mut self) {
        let mut to = self.to.to.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = to.write_all(self.lines.as_bytes());
        let _ = to.flush();
        self.lines.clear();
    }

    /// A block was translated, or one that was `kept` placed again.
    pub(crate) fn block(&mut self, request: &Request, block: &Block, kept: bool) {
        self.line(
            "block",
            format_args!(
                r#","rip":"{:#x}","mode":"{}","kind":"{}","kept":{kept},"instructions":{},"guest_bytes":{},"host_bytes":{}"#,
                request.va,
                mode_name(request.mode),
                kind_name(request.kind),
                block.instructions,
                block.guest_len,
                block.code.len(),
            ),
        );
    }

    /// A store overlapped so many blocks.
    pub(crate) fn store(&mut self, pa: u64, bytes: u64, blocks: usize) {
        self.line(
            "store",
            format_args!(r#","pa":"{pa:#x}","bytes":{bytes},"blocks":{blocks}"#),
        );
    }

    /// All blocks of a page went.
    pub(crate) fn drop_page(&mut self, page: u32, blocks: usize) {
        let pa = u64::from(page) << 12;
        self.line(
            "drop",
            format_args!(r#","page":"{pa:#x}","blocks":{blocks}"#),
        );
    }

    /// All blocks went.
    pub(crate) fn flush(&mut self) {
        self.line("flush", format_args!(""));
    }

    fn left(&mut self, place: Place) {
        count(&mut self.places, place);
    }

    /// Time passed.
    pub(crate) fn tick(&mut self, stats: &EngineStats) {
        if self.told_at.elapsed() >= TICK {
            self.counts(stats);
            self.write();
        }
    }

    fn counts(&mut self, stats: &EngineStats) {
        let new = stats.since(&self.told);
        self.told = *stats;
        self.told_at = Instant::now();
        let EngineStats {
            links,
            indirect,
            gotos,
            interpreted,
            accesses,
            groups,
            bounces,
            variants,
            polls,
            faults,
            stale,
            translations,
            recalled,
            retranslations,
            invalidations,
            patched,
            code_flushes,
            walks,
            flushes,
            space_switches,
            exceptions,
            page_faults,
            interrupts,
            sleeps,
            instructions: [kernel, user],
            ..
        } = new;
        let misses = new.tlb_misses();
        self.line(
            "counts",
            format_args!(
                concat!(
                    r#","instructions":{{"kernel":{},"user":{}}}"#,
                    r#","exits":{{"link":{},"indirect":{},"goto":{},"interpret":{},"access":{},"group":{},"#,
                    r#""poll":{},"fault":{},"stale":{}}},"bounces":{},"variants":{}"#,
                    r#","translations":{{"made":{},"recalled":{},"again":{}}}"#,
                    r#","invalidations":{{"pages":{},"stores":{},"flushes":{}}}"#,
                    r#","tlb":{{"misses":{},"walks":{},"flushes":{},"space_switches":{}}}"#,
                    r#","exceptions":{},"page_faults":{},"interrupts":{},"sleeps":{}"#,
                ),
                kernel, user,
                links, indirect, gotos, interpreted, accesses, groups,
                polls, faults, stale, bounces, variants,
                translations, recalled, retranslations,
                invalidations, patched, code_flushes,
                misses, walks, flushes, space_switches,
                exceptions, page_faults, interrupts, sleeps,
            ),
        );
    }

    /// The vCPU is gone.
    pub(crate) fn end(&mut self, stats: &EngineStats) {
        self.counts(stats);
        for ((exit, rip, mode), count) in most(&mut self.places) {
            self.line(
                "hot",
                format_args!(
                    r#","exit":"{exit}","rip":"{rip:#x}","mode":"{mode}","count":{count}"#
                ),
            );
        }
        let (translated, engine) = self.samples.counts();
        self.line(
            "samples",
            format_args!(r#","translated":{translated},"engine":{engine}"#),
        );
        for ((rip, mode), count) in most(&mut self.ran) {
            let share = count as f64 / (translated + engine) as f64;
            self.line(
                "busy",
                format_args!(
                    r#","rip":"{rip:#x}","mode":"{mode}","samples":{count},"share":{share:.3}"#
                ),
            );
        }
        self.write();
    }
}

/// Counts a place, unless there are too many.
fn count<K: Eq + Hash>(counts: &mut HashMap<K, u64>, place: K) {
    if let Some(count) = counts.get_mut(&place) {
        *count += 1;
    } else if counts.len() < PLACES_MAX {
        counts.insert(place, 1);
    }
}

/// Takes the places with the highest counts, in their order.
fn most<K: Ord + Copy>(counts: &mut HashMap<K, u64>) -> impl Iterator<Item = (K, u64)> + use<K> {
    let mut all: Vec<_> = counts.drain().collect();
    all.sort_unstable_by_key(|(place, count)| (Reverse(*count), *place));
    all.into_iter().take(HOT_LINES)
}

impl Cpu {
    /// Finds the blocks that the timer interrupted. Before blocks are flushed.
    pub(crate) fn take_samples(&mut self) {
        let Some(trace) = &mut self.watch.trace else {
            return;
        };
        while let Some(pc) = trace.samples.next() {
            // Stubs that all blocks share are none.
            if let Some((id, _)) = self.blocks.instruction_at(pc) {
                let record = self.blocks.record(id);
                count(&mut trace.ran, (record.va, mode_name(record.mode())));
            }
        }
    }

    /// Translated code was left through exit `number`, which nobody handled yet.
    #[cold]
    pub(crate) fn trace_exit(&mut self, number: u32) {
        self.take_samples();
        let mode = mode_name(self.mode());
        let place = match number {
            INDIRECT_EXIT => ("indirect", self.context.scratch[0], mode),
            FAULT_EXIT => {
                let found = self.blocks.instruction_at(self.context.fault_pc);
                let why = if self.context.fault_signal == 0 {
                    "poll"
                } else {
                    "fault"
                };
                (why, found.map_or(0, |(_, rip)| rip), mode)
            }
            _ => {
                let Some((exit, id)) = self.blocks.exit(number) else {
                    return;
                };
                let (why, at) = describe(&exit);
                (why, self.blocks.record(id).va.wrapping_add(at), mode)
            }
        };
        if let Some(trace) = &mut self.watch.trace {
            trace.left(place);
        }
    }
}

/// Name of an exit, and where in its block it is: at its start where it is behind
/// all that is known.
pub(crate) fn describe(exit: &Exit) -> (&'static str, u64) {
    match *exit {
        Exit::Link { .. } => ("link", 0),
        Exit::Goto { .. } => ("goto", 0),
        Exit::Interpret { at } => ("interpret", at.into()),
        Exit::Access { at, .. } => ("access", at.into()),
        Exit::Group { at, .. } => ("group", at.into()),
        Exit::Bounced { .. } => ("bounced", 0),
        Exit::Stale => ("stale", 0),
    }
}

pub(crate) fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Kernel => "kernel",
        Mode::User => "user",
        Mode::KernelUserAccess => "kernel-user-access",
    }
}

pub(crate) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Grouped => "grouped",
        Kind::PerAccess => "per-access",
        Kind::Bounce => "bounce",
        Kind::Step => "step",
    }
}
