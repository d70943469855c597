//! The file's form: a head, a table of slots, records.
//!
//! ```text
//! 0   "KOMBITRA" format:u32 crc:u32 sources:u64 options:u64 records:u64 slots_log2:u32 entries:u32
//! 64  slots: u64 each, 0 is empty: position of the record / 8 + 1 (low half), hash (high half)
//! …   records, each a multiple of eight bytes
//! ```
//!
//! A record is in the slot that its key's hash says, or the next free one. Little-endian.
//! Records are in the order of their use, so that another boot reads them in a row.
//!
//! Invariant: whatever the bytes are, nothing here panics or runs on for ever, and
//! what is given was intact and of the key that was asked for.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::Settings;
use crate::mapping::Mapping;
use crate::record::{Key, Record};

const MAGIC: &[u8; 8] = b"KOMBITRA";
/// Of this form and of the records'.
const FORMAT: u32 = 1;
const HEAD: usize = 64;
const SLOTS_LOG2_MAX: u32 = 28;
/// Records of one key that are kept and looked at.
pub(crate) const SAME_KEY_MAX: usize = 8;
/// Slots looked at for a key.
const PROBES_MAX: usize = 256;
/// Bytes of records for which there is one bit of [`File::used`]. Hardly any record is
/// shorter; where two share a bit, the one counts as used with the other.
const USED_UNIT: usize = 64;

/// Why a file's contents are not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is not a file of translations, or torn.
    #[error("it is no file of translations, or damaged")]
    Damaged,
    /// Its length is not what it says.
    #[error("it is truncated, or has something behind its end")]
    Length,
    /// Another version made it.
    #[error("another version made it")]
    OtherBuild,
}

/// A file's bytes with their head checked.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    slots: &'a [[u8; 8]],
    records: &'a [u8],
    entries: u32,
}

impl<'a> View<'a> {
    pub(crate) fn of(bytes: &'a [u8], settings: Settings) -> Result<Self, Refused> {
        let head: &[u8; HEAD] = bytes.first_chunk().ok_or(Refused::Length)?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if !head.starts_with(MAGIC) {
            return Err(Refused::Damaged);
        }
        if word(8) != FORMAT {
            return Err(Refused::OtherBuild);
        }
        if word(12) != crc32fast::hash(&head[16..]) {
            return Err(Refused::Damaged);
        }
        if long(16) != settings.sources || long(24) != settings.options {
            return Err(Refused::OtherBuild);
        }
        let (records, slots_log2, entries) = (long(32), word(40), word(44));
        if slots_log2 > SLOTS_LOG2_MAX {
            return Err(Refused::Damaged);
        }
        let slots_len = 8_usize << slots_log2;
        let rest = bytes.get(HEAD..).unwrap_or_default();
        let (slots, all_records) = rest.split_at_checked(slots_len).ok_or(Refused::Length)?;
        if all_records.len() as u64 != records {
            return Err(Refused::Length);
        }
        Ok(Self {
            slots: slots.as_chunks().0,
            records: all_records,
            entries,
        })
    }

    /// Intact records of `key`, each with its position, in the order of their slots.
    fn candidates(self, key: Key) -> impl Iterator<Item = (usize, Record<'a>)> {
        let hash = key.hash();
        let mask = self.slots.len() - 1;
        let first = hash as usize;
        (0..PROBES_MAX.min(self.slots.len()))
            .map(move |i| first.wrapping_add(i) & mask)
            .map_while(move |slot| {
                let bits = u64::from_le_bytes(*self.slots.get(slot)?);
                (bits != 0).then_some(bits)
            })
            .filter(move |bits| bits >> 32 == hash >> 32)
            .filter_map(move |bits| {
                let at = (bits as u32).checked_sub(1)? as usize * 8;
                Some((at, self.record(at)?))
            })
            .filter(move |(_, record)| record.key == key)
            .take(SAME_KEY_MAX)
            .filter(|(_, record)| record.intact())
    }

    /// What is at a position, intact or not.
    fn record(self, at: usize) -> Option<Record<'a>> {
        Record::parse(self.records.get(at..)?)
    }

    /// All intact records in their order, each with where it is; the rest is left
    /// out from the first that is not.
    pub(crate) fn records(self) -> impl Iterator<Item = (usize, Record<'a>)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let record = self.record(at)?;
            let here = at;
            at += record.bytes.len();
            record.intact().then_some((here, record))
        })
    }
}

/// The bytes of a file with these records, which must be sealed.
pub(crate) fn build(settings: Settings, records: &[&[u8]]) -> Vec<u8> {
    let slots_log2 = (records.len() * 2)
        .next_power_of_two()
        .trailing_zeros()
        .max(4);
    let records_len: usize = records.iter().map(|record| record.len()).sum();
    let slots_len = 8_usize << slots_log2;
    let mut bytes = Vec::with_capacity(HEAD + slots_len + records_len);
    bytes.extend(MAGIC);
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(settings.sources.to_le_bytes());
    bytes.extend(settings.options.to_le_bytes());
    bytes.extend((records_len as u64).to_le_bytes());
    bytes.extend(slots_log2.to_le_bytes());
    bytes.extend((records.len() as u32).to_le_bytes());
    bytes.resize(HEAD, 0);
    let crc = crc32fast::hash(&bytes[16..]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    let mut slots = vec![0_u64; 1 << slots_log2];
    let mut at = 0_usize;
    for record in records {
        if let Some(record) = Record::parse(record) {
            let hash = record.key.hash();
            let mask = slots.len() - 1;
            let free = (0..slots.len())
                .map(|i| (hash as usize).wrapping_add(i) & mask)
                .find(|slot| slots[*slot] == 0);
            if let Some(free) = free {
                slots[free] = hash >> 32 << 32 | (at / 8 + 1) as u64;
            }
        }
        at += record.len();
    }
    bytes.extend(slots.into_iter().flat_map(u64::to_le_bytes));
    records.iter().for_each(|record| bytes.extend(*record));
    bytes
}

/// A mapped file whose head was checked.
#[derive(Debug)]
pub struct File {
    mapping: Mapping,
    slots: usize,
    entries: u32,
    /// A bit for each [`USED_UNIT`] in which a record begins that was used.
    used: Vec<AtomicU64>,
    /// Position behind the record that was found last.
    next: AtomicUsize,
}

impl File {
    pub(crate) fn new(mapping: Mapping, settings: Settings) -> Result<Self, Refused> {
        let view = View::of(mapping.bytes(), settings)?;
        let (slots, entries) = (view.slots.len(), view.entries);
        let words = view.records.len().div_ceil(USED_UNIT * 64);
        Ok(Self {
            mapping,
            slots,
            entries,
            used: (0..words).map(|_| AtomicU64::new(0)).collect(),
            next: AtomicUsize::new(0),
        })
    }

    /// What `new` checked: nobody changes the file.
    pub(crate) fn view(&self) -> Option<View<'_>> {
        let rest = self.mapping.bytes().get(HEAD..)?;
        let (slots, records) = rest.split_at_checked(self.slots * 8)?;
        Some(View {
            slots: slots.as_chunks().0,
            records,
            entries: self.entries,
        })
    }

    /// The record of `key` that `same` says the guest's bytes are those of. Mostly it
    /// is the one behind the last that was found, as a boot takes its way again: then
    /// no slot is looked at.
    pub(crate) fn find(
        &self,
        key: Key,
        mut same: impl FnMut(u64, &[u8]) -> bool,
    ) -> Option<Record<'_>> {
        let view = self.view()?;
        let next = self.next.load(Ordering::Relaxed);
        let in_a_row = view
            .record(next)
            .filter(|record| record.key == key && record.intact() && record.is_of(&mut same));
        let (at, record) = match in_a_row {
            Some(record) => (next, record),
            None => view
                .candidates(key)
                .find(|(_, record)| record.is_of(&mut same))?,
        };
        self.next.store(at + record.bytes.len(), Ordering::Relaxed);
        let unit = at / USED_UNIT;
        if let Some(word) = self.used.get(unit / 64) {
            word.fetch_or(1 << (unit % 64), Ordering::Relaxed);
        }
        Some(record)
    }

    /// Whether the record at a position was found.
    pub(crate) fn was_used(&self, at: usize) -> bool {
        let unit = at / USED_UNIT;
        let word = self.used.get(unit / 64);
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (unit % 64) & 1 != 0)
    }

    /// Records in the file.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.view().map_or(0, |view| view.entries)
    }

    /// Bytes of the file.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mapping.bytes().len()
    }

    /// Whether it holds no record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries() == 0
    }

    pub(crate) fn release(&self) {
        self.mapping.release();
    }
}
