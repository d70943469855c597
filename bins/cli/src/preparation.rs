//! Showing how far the preparation of an image has come, on standard error, when a person is there to see it.
//!
//! Invariant: nothing is drawn for a layer that is ready already, and nothing drawn stays. Left to others: the work.

use std::io::IsTerminal;
use std::time::Duration;

use image::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A line at the bottom of the terminal.
#[derive(Debug)]
pub(crate) struct Bar {
    wanted: bool,
    layers: usize,
    group: Option<MultiProgress>,
    bar: Option<ProgressBar>,
}

impl Bar {
    /// Draws unless `quiet` or without a terminal.
    pub(crate) fn new(quiet: bool) -> Self {
        Self {
            wanted: !quiet && std::io::stderr().is_terminal(),
            layers: 0,
            group: None,
            bar: None,
        }
    }

    /// Draws below the other bars of a group.
    pub(crate) fn below(mut self, group: MultiProgress) -> Self {
        self.group = Some(group);
        self
    }

    fn bar(&mut self, message: String) -> Option<&ProgressBar> {
        if !self.wanted {
            return None;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            // No colours: nothing to switch off for NO_COLOR. A template that does not parse is our mistake, and the
            // default style serves as well.
            let template = "{msg} [{bar:24}] {bytes}/{total_bytes} {elapsed}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            let bar = match &self.group {
                Some(group) => group.add(bar),
                None => bar,
            };
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        bar.set_message(message);
        Some(bar)
    }

    fn label(&self, index: usize) -> String {
        format!("layer {}/{}", index.saturating_add(1), self.layers)
    }
}

impl Progress for Bar {
    fn layers(&mut self, count: usize) {
        self.layers = count;
    }

    fn layer_start(&mut self, index: usize, name: &str, bytes_total: u64) {
        const NAME_CHARS_MAX: usize = 19;
        let name: String = name.chars().take(NAME_CHARS_MAX).collect();
        let label = format!("{} {name}", self.label(index));
        if let Some(bar) = self.bar(label) {
            bar.set_length(bytes_total);
            bar.set_position(0);
        }
    }

    fn layer_bytes(&mut self, _index: usize, bytes_done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes_done);
        }
    }

    fn layer_waiting(&mut self, index: usize) {
        let label = format!("{} waits for another kombi", self.label(index));
        self.bar(label);
    }

    fn layer_done(&mut self, _index: usize, _cached: bool) {}
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
