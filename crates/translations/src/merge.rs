//! Which records the next file holds: first what this machine used of the old one,
//! in its old order, then what it added, then the rest, until the file is full.
//! What nobody uses falls off the end that way.

use std::collections::{HashMap, HashSet};

use crate::file::{File, SAME_KEY_MAX, build};
use crate::record::{Identity, Record};
use crate::{Settings, folder};

/// Slots and head are on top of it.
const RECORD_BYTES_MAX: usize = folder::FOLDER_BYTES_MAX - (4 << 20);

/// The bytes of the next file. `ours` is what this machine mapped, `now` what is in
/// the folder, `fresh` new sealed records in a row.
pub(crate) fn merge(
    settings: Settings,
    ours: Option<&File>,
    now: Option<&File>,
    fresh: &[u8],
) -> Vec<u8> {
    let mut chosen = Chosen::default();
    if let Some((file, view)) = ours.and_then(|file| Some((file, file.view()?))) {
        let used = view.records().filter(|(at, _)| file.was_used(*at));
        chosen.take(used.map(|(_, record)| record));
    }
    chosen.take(records(fresh));
    if let Some(view) = now.and_then(File::view) {
        chosen.take(view.records().map(|(_, record)| record));
    }
    build(settings, &chosen.records)
}

#[derive(Default)]
struct Chosen<'a> {
    records: Vec<&'a [u8]>,
    bytes: usize,
    known: HashSet<Identity>,
    of_key: HashMap<u64, usize>,
}

impl<'a> Chosen<'a> {
    fn take(&mut self, records: impl Iterator<Item = Record<'a>>) {
        for record in records {
            let len = record.bytes.len();
            let of_key = self.of_key.entry(record.key.hash()).or_insert(0);
            if *of_key >= SAME_KEY_MAX || self.bytes + len > RECORD_BYTES_MAX {
                continue;
            }
            if self.known.insert(record.identity()) {
                *of_key += 1;
                self.bytes += len;
                self.records.push(record.bytes);
            }
        }
    }
}

/// Sealed records in a row.
fn records(bytes: &[u8]) -> impl Iterator<Item = Record<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let record = Record::parse(rest)?;
        rest = rest.get(record.bytes.len()..)?;
        Some(record)
    })
}
