//! How long the last request of each kind took that changes the whole machine, by
//! Firecracker's names (its metrics' group `latencies_us`). There a thread answers clients
//! and another one does the work (`vmm_…`); here it is one, so both are the same.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use api::{Action, VmState};
use serde_json::{Value, json};

/// Microseconds; 0 before the first.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    full_create_snapshot: AtomicU64,
    load_snapshot: AtomicU64,
    pause_vm: AtomicU64,
    resume_vm: AtomicU64,
}

impl Latencies {
    /// Where the time of `action` goes, if it is told.
    pub(super) fn of(&self, action: &Action) -> Option<&AtomicU64> {
        match action {
            Action::CreateSnapshot(_) => Some(&self.full_create_snapshot),
            Action::LoadSnapshot(_) => Some(&self.load_snapshot),
            Action::PatchVm(VmState::Paused) => Some(&self.pause_vm),
            Action::PatchVm(VmState::Resumed) => Some(&self.resume_vm),
            _ => None,
        }
    }

    /// The group of metrics.
    pub(super) fn groups(&self) -> BTreeMap<String, Value> {
        let all = [
            ("full_create_snapshot", &self.full_create_snapshot),
            ("load_snapshot", &self.load_snapshot),
            ("pause_vm", &self.pause_vm),
            ("resume_vm", &self.resume_vm),
        ];
        let told = all.into_iter().flat_map(|(name, us)| {
            let us = us.load(Ordering::Relaxed);
            [
                (name.to_owned(), json!(us)),
                (format!("vmm_{name}"), json!(us)),
            ]
        });
        let group = Value::Object(told.collect());
        [(crate::metrics::LATENCIES.to_owned(), group)].into()
    }
}

/// What began at `since` has just been done.
pub(super) fn done(latency: &AtomicU64, since: Instant) {
    // 2^64 microseconds are longer than a machine lives.
    let took = since.elapsed().as_micros() as u64;
    latency.store(took.max(1), Ordering::Relaxed);
}
