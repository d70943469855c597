//! How a caller hears how far the preparation of an image has come.
//!
//! Invariant: calls for one layer come in the order wanted, start, bytes…, done, and layers come lowest first. Left to others:
//! drawing anything.

/// Receives progress; every method has an empty default.
pub trait Progress {
    /// The image has `count` layers.
    fn layers(&mut self, count: usize) {
        let _ = count;
    }
    /// Layer `index` is to be built next. May wait until its blob is in the store: one that is not then is missing.
    fn layer_wanted(&mut self, index: usize) {
        let _ = index;
    }
    /// Layer `index` (0 is the lowest) called `name` is being built from `bytes_total` bytes as stored.
    fn layer_start(&mut self, index: usize, name: &str, bytes_total: u64) {
        let _ = (index, name, bytes_total);
    }
    /// `bytes_done` of the layer's bytes as stored have been read.
    fn layer_bytes(&mut self, index: usize, bytes_done: u64) {
        let _ = (index, bytes_done);
    }
    /// Another process is building this layer; waiting for it.
    fn layer_waiting(&mut self, index: usize) {
        let _ = index;
    }
    /// The layer is ready; `cached` when nothing had to be done.
    fn layer_done(&mut self, index: usize, cached: bool) {
        let _ = (index, cached);
    }
}

/// A listener that does not care.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {}
