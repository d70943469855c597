//! How a caller hears of transfers.
//!
//! Invariant: indices are those of the list that [`Transfers::blobs`] was given. Left to others: drawing anything.

use image::Digest;

/// Hears of transfers, from several threads; every method has an empty default.
pub trait Transfers: Sync {
    /// These blobs are to be transferred, each with its bytes.
    fn blobs(&self, blobs: &[(Digest, u64)]) {
        let _ = blobs;
    }
    /// So much of a blob is there.
    fn bytes(&self, index: usize, bytes: u64) {
        let _ = (index, bytes);
    }
    /// Another process is downloading this blob; waiting for it.
    fn waiting(&self, index: usize) {
        let _ = index;
    }
    /// The registry broke it off; once more.
    fn again(&self, index: usize, reason: &str) {
        let _ = (index, reason);
    }
    /// The blob is there; `already` when nothing had to be done.
    fn done(&self, index: usize, already: bool) {
        let _ = (index, already);
    }
}

/// A listener that does not care.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Transfers for Silent {}
