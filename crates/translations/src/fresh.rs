//! Blocks that this machine translated and the file does not have.
//!
//! Invariant: a record is in the chain of its key's hash; bytes are only appended.

use std::collections::HashMap;

use crate::file::SAME_KEY_MAX;
use crate::record::{self, Key, Record};
use translator::block::{Block, GuestCode};

/// Most that one machine keeps between two saves.
pub const FRESH_BYTES_MAX: usize = 24 << 20;

#[derive(Default)]
pub(crate) struct Fresh {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    /// First of a hash's entries: its index plus one.
    heads: HashMap<u64, u32>,
}

#[derive(Clone, Copy)]
struct Entry {
    at: u32,
    /// As in `heads`; 0 is none.
    next: u32,
}

impl Fresh {
    /// Keeps a block; what does not fit is not kept.
    pub(crate) fn add(&mut self, key: Key, block: &Block, guest: &dyn GuestCode) {
        let hash = key.hash();
        let at = self.bytes.len();
        if at >= FRESH_BYTES_MAX || self.chain(hash).count() >= SAME_KEY_MAX {
            return;
        }
        if record::write(key, block, guest, &mut self.bytes) {
            let head = self.heads.entry(hash).or_insert(0);
            self.entries.push(Entry {
                at: at as u32,
                next: *head,
            });
            *head = self.entries.len() as u32;
        }
    }

    fn chain(&self, hash: u64) -> impl Iterator<Item = Record<'_>> {
        let mut next = self.heads.get(&hash).copied().unwrap_or(0);
        std::iter::from_fn(move || {
            let entry = self.entries.get(next.checked_sub(1)? as usize)?;
            next = entry.next;
            Record::parse(self.bytes.get(entry.at as usize..)?)
        })
    }

    pub(crate) fn find(
        &self,
        key: Key,
        mut same: impl FnMut(u64, &[u8]) -> bool,
    ) -> Option<Record<'_>> {
        self.chain(key.hash())
            .find(|record| record.key == key && record.is_of(&mut same))
    }

    /// All records in their order, sealed.
    pub(crate) fn into_sealed(mut self) -> Vec<u8> {
        let ends = self.entries.iter().skip(1).map(|entry| entry.at as usize);
        let ends: Vec<_> = ends.chain([self.bytes.len()]).collect();
        for (entry, end) in self.entries.iter().zip(ends) {
            if let Some(record) = self.bytes.get_mut(entry.at as usize..end) {
                record::seal(record);
            }
        }
        self.bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }
}
