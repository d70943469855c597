//! Showing blobs that come or go: a bar each on a terminal, a line each without one; nothing when quiet.
//!
//! Invariant: everything goes to standard error, and no bar stays. Left to others: the transfers.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use image::Digest;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use registry::Transfers;

use super::ID_DIGITS;
use crate::preparation::Bar;

/// How much is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Detail {
    Nothing,
    Lines,
    Bars,
}

/// The transfers of one image.
#[derive(Debug)]
pub(super) struct Shown {
    detail: Detail,
    group: MultiProgress,
    /// What is said of a blob that is there now.
    done: &'static str,
    blobs: Mutex<Vec<(String, Option<ProgressBar>)>>,
}

impl Shown {
    pub(super) fn new(quiet: bool, done: &'static str) -> Self {
        let detail = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Detail::Nothing,
            (false, false) => Detail::Lines,
            (false, true) => Detail::Bars,
        };
        Self {
            detail,
            group: MultiProgress::new(),
            done,
            blobs: Mutex::default(),
        }
    }

    /// The bar for layers that are made meanwhile, below the others.
    pub(super) fn unpacking(&self) -> Bar {
        Bar::new(self.detail != Detail::Bars).below(self.group.clone())
    }

    /// A line that stays.
    pub(super) fn say(&self, line: &str) {
        match self.detail {
            Detail::Nothing => {}
            Detail::Lines => eprintln!("{line}"),
            Detail::Bars => {
                let _ = self.group.println(line);
            }
        }
    }

    fn with(&self, index: usize, act: impl FnOnce(&str, Option<&ProgressBar>)) {
        let blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((name, bar)) = blobs.get(index) {
            act(name, bar.as_ref());
        }
    }
}

fn style() -> ProgressStyle {
    // A template that does not parse is our mistake, and the default style serves as well.
    ProgressStyle::with_template("{prefix} {msg:11} [{bar:24}] {bytes}/{total_bytes}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Transfers for Shown {
    fn blobs(&self, blobs: &[(Digest, u64)]) {
        let row = |(digest, size): &(Digest, u64)| {
            let name: String = digest.hex().chars().take(ID_DIGITS).collect();
            let bar = (self.detail == Detail::Bars).then(|| {
                let bar = self.group.add(ProgressBar::new(*size).with_style(style()));
                bar.set_prefix(name.clone());
                bar.set_message("waiting");
                bar.enable_steady_tick(Duration::from_millis(100));
                bar
            });
            (name, bar)
        };
        let rows = blobs.iter().map(row).collect();
        *self.blobs.lock().unwrap_or_else(PoisonError::into_inner) = rows;
    }

    fn bytes(&self, index: usize, bytes: u64) {
        self.with(index, |_, bar| {
            if let Some(bar) = bar {
                bar.set_message("");
                bar.set_position(bytes);
            }
        });
    }

    fn waiting(&self, index: usize) {
        self.with(index, |name, bar| match bar {
            Some(bar) => bar.set_message("other kombi"),
            None => self.say(&format!("{name}: waits for another kombi")),
        });
    }

    fn again(&self, index: usize, reason: &str) {
        self.with(index, |name, bar| match bar {
            Some(bar) => bar.set_message("once more"),
            None => self.say(&format!("{name}: once more: {reason}")),
        });
    }

    fn done(&self, index: usize, already: bool) {
        let said = match already {
            true => "already exists",
            false => self.done,
        };
        self.with(index, |name, bar| match bar {
            Some(bar) => bar.finish_and_clear(),
            None => self.say(&format!("{name}: {said}")),
        });
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = self.group.clear();
    }
}
