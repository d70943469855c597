//! One kept block as bytes.
//!
//! ```text
//! crc len │ va guest_len instructions code_len entries stale mode kind counts features │
//! guest bytes │ consulted: va len bytes … │ exits │ positions │ relocations │ code
//! ```
//!
//! Little-endian, a multiple of eight bytes. The code is that of whatever place it
//! was translated for: its relocations say what must be put in.
//!
//! Invariant: a [`Record`] lies within its bytes, and every position in it within its
//! code and its guest code, whatever the bytes are.

use translator::block::{Block, Consulted, Exit, GuestCode, Kind};
use translator::context::Mode;
use translator::{Relocation, Target};

/// Bytes before the guest's.
const HEAD: usize = 48;
const EXIT: usize = 12;
const CONSULTED_HEAD: usize = 10;
/// Longest code that relocations can speak of.
const CODE_MAX: usize = 1 << 14;
const CROSSES: u8 = 1 << 7;

/// What a block is looked for by. The guest's bytes decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Guest linear address.
    pub va: u64,
    /// Privilege.
    pub mode: Mode,
    /// Form.
    pub kind: Kind,
    /// What the guest may execute: [`translator::Request::features`] as a number.
    pub features: u64,
}

impl Key {
    /// Spreads keys evenly; for finding candidates only.
    pub(crate) fn hash(self) -> u64 {
        let bits = u64::from(self.mode as u8) << 2 | u64::from(kind_number(self.kind));
        let mixed = (self.va ^ bits << 59 ^ self.features.rotate_left(16))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ mixed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
        mixed ^ mixed >> 29
    }
}

fn kind_number(kind: Kind) -> u8 {
    match kind {
        Kind::Grouped => 0,
        Kind::PerAccess => 1,
        Kind::Bounce => 2,
        Kind::Step => 3,
    }
}

fn kind_of(number: u8) -> Option<Kind> {
    [Kind::Grouped, Kind::PerAccess, Kind::Bounce, Kind::Step]
        .into_iter()
        .find(|kind| kind_number(*kind) == number)
}

fn mode_of(number: u8) -> Option<Mode> {
    Mode::ALL.into_iter().find(|mode| *mode as u8 == number)
}

/// Names one record among all: two are taken for the same only when all of this is.
pub(crate) type Identity = (u64, u32, u32);

/// Appends `block`, as it came from the translator, to `out`. False, and nothing
/// appended, for one that cannot be kept: then its guest code is gone already, or
/// it is out of proportion.
pub(crate) fn write(key: Key, block: &Block, guest: &dyn GuestCode, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let done = write_all(key, block, guest, out).is_some();
    if !done {
        out.truncate(start);
    }
    done
}

fn write_all(key: Key, block: &Block, guest: &dyn GuestCode, out: &mut Vec<u8>) -> Option<()> {
    let start = out.len();
    if block.code.len() >= CODE_MAX {
        return None;
    }
    out.extend([0; 8]);
    out.extend(key.va.to_le_bytes());
    for half in [
        block.guest_len,
        block.instructions,
        u16::try_from(block.code.len()).ok()?,
        block.indirect_entry,
        block.direct_entry,
        u16::try_from(block.stale).ok()?,
    ] {
        out.extend(half.to_le_bytes());
    }
    let crosses = if block.crosses_page { CROSSES } else { 0 };
    out.push(key.mode as u8);
    out.push(kind_number(key.kind) | crosses);
    out.push(u8::try_from(block.consulted.len()).ok()?);
    out.push(0);
    for count in [
        block.exits.len(),
        block.positions.len(),
        block.relocations.len(),
        0,
    ] {
        out.extend(u16::try_from(count).ok()?.to_le_bytes());
    }
    out.extend(key.features.to_le_bytes());
    debug_assert_eq!(out.len() - start, HEAD);
    write_guest(guest, key.va, usize::from(block.guest_len), out)?;
    for Consulted { va, len } in &block.consulted {
        out.extend(va.to_le_bytes());
        out.extend(len.to_le_bytes());
        write_guest(guest, *va, usize::from(*len), out)?;
    }
    for exit in &block.exits {
        out.extend(exit_bytes(*exit));
    }
    for (host, guest) in &block.positions {
        out.extend(host.to_le_bytes());
        out.extend(guest.to_le_bytes());
    }
    for relocation in &block.relocations {
        let at = u16::try_from(relocation.at).ok()?;
        out.extend((at | (relocation.target as u16) << 14).to_le_bytes());
    }
    out.extend(&block.code);
    out.resize(out.len().next_multiple_of(8), 0);
    let len = u32::try_from(out.len() - start).ok()?;
    out.get_mut(start + 4..start + 8)?
        .copy_from_slice(&len.to_le_bytes());
    Some(())
}

fn write_guest(guest: &dyn GuestCode, va: u64, len: usize, out: &mut Vec<u8>) -> Option<()> {
    let first = guest.tail(va)?;
    let own = len.min(first.len());
    out.extend(first.get(..own)?);
    if own < len {
        let next = guest.tail((va | 0xfff).wrapping_add(1))?;
        out.extend(next.get(..len - own)?);
    }
    Some(())
}

/// Puts the checksum into a record that [`write`] made.
pub(crate) fn seal(record: &mut [u8]) {
    let crc = record.get(4..).map(crc32fast::hash);
    if let (Some(slot), Some(crc)) = (record.get_mut(..4), crc) {
        slot.copy_from_slice(&crc.to_le_bytes());
    }
}

/// A kept block in its bytes.
#[derive(Clone, Copy)]
pub(crate) struct Record<'a> {
    /// All of it.
    pub(crate) bytes: &'a [u8],
    pub(crate) key: Key,
    kind_bits: u8,
    guest_len: u16,
    instructions: u16,
    indirect: u16,
    direct: u16,
    stale: u16,
    guest: &'a [u8],
    consulted: &'a [u8],
    exits: &'a [u8],
    positions: &'a [u8],
    relocations: &'a [u8],
    code: &'a [u8],
}

impl<'a> Record<'a> {
    /// The record at the start of `bytes`, unless there is none. Its checksum is not
    /// looked at.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let len = u32::from_le_bytes(*bytes.get(4..)?.first_chunk()?) as usize;
        if !len.is_multiple_of(8) {
            return None;
        }
        let bytes = bytes.get(..len)?;
        let head: &[u8; HEAD] = bytes.first_chunk()?;
        let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let key = Key {
            va: u64::from_le_bytes(*head[8..].first_chunk()?),
            mode: mode_of(head[28])?,
            kind: kind_of(head[29] & !CROSSES)?,
            features: u64::from_le_bytes(*head[40..].first_chunk()?),
        };
        let mut rest = Rest(bytes.get(HEAD..)?);
        let guest = rest.take(usize::from(half(16)))?;
        let consulted = rest.take(consulted_len(rest.0, head[30])?)?;
        let exits = rest.take(usize::from(half(32)) * EXIT)?;
        let positions = rest.take(usize::from(half(34)) * 4)?;
        let relocations = rest.take(usize::from(half(36)) * 2)?;
        let code = rest.take(usize::from(half(20)))?;
        let inside = |at: u16| usize::from(at) < code.len();
        let record = Self {
            bytes,
            key,
            kind_bits: head[29],
            guest_len: half(16),
            instructions: half(18),
            indirect: half(22),
            direct: half(24),
            stale: half(26),
            guest,
            consulted,
            exits,
            positions,
            relocations,
            code,
        };
        // The engine puts a five-byte jump at the direct entry.
        let entry_fits = usize::from(record.direct) + 5 <= code.len();
        (entry_fits && inside(record.indirect) && inside(record.stale)).then_some(record)
    }

    /// Whether the bytes are those that were written.
    pub(crate) fn intact(&self) -> bool {
        let crc = self.bytes.first_chunk().map(|crc| u32::from_le_bytes(*crc));
        crc == self.bytes.get(4..).map(crc32fast::hash)
    }

    pub(crate) fn identity(&self) -> Identity {
        let word = |at| {
            self.bytes
                .get(at..)
                .and_then(<[u8]>::first_chunk)
                .map_or(0, |word| u32::from_le_bytes(*word))
        };
        (self.key.hash(), word(0), word(4))
    }

    /// Whether all guest code that it was made from is what `same` finds.
    pub(crate) fn is_of(&self, mut same: impl FnMut(u64, &[u8]) -> bool) -> bool {
        if !same(self.key.va, self.guest) {
            return false;
        }
        self.consulted_pieces().all(|(va, bytes)| same(va, bytes))
    }

    fn consulted_pieces(&self) -> impl Iterator<Item = (u64, &'a [u8])> {
        let count = self.bytes.get(30).copied().unwrap_or(0);
        let mut rest = self.consulted;
        (0..count).map_while(move |_| {
            let (head, left) = rest.split_at_checked(CONSULTED_HEAD)?;
            let va = u64::from_le_bytes(*head.first_chunk()?);
            let len = u16::from_le_bytes([head[8], head[9]]);
            let (bytes, left) = left.split_at_checked(usize::from(len))?;
            rest = left;
            Some((va, bytes))
        })
    }

    /// Makes `block` the one that was written, and `guest` the code that it stands
    /// for. False, with both in no particular state, when something in it points
    /// outside of it.
    pub(crate) fn read(&self, block: &mut Block, guest: &mut Vec<u8>) -> bool {
        guest.clear();
        guest.extend_from_slice(self.guest);
        block.code.clear();
        block.code.extend_from_slice(self.code);
        block.exits.clear();
        for bytes in self.exits.as_chunks::<EXIT>().0 {
            let Some(exit) = exit_of(bytes, self.code.len(), self.guest_len) else {
                return false;
            };
            block.exits.push(exit);
        }
        block.positions.clear();
        block.positions.extend(
            self.positions
                .as_chunks::<4>()
                .0
                .iter()
                .map(|[a, b, c, d]| (u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d]))),
        );
        block.relocations.clear();
        for bytes in self.relocations.as_chunks::<2>().0 {
            let bits = u16::from_le_bytes(*bytes);
            let Some(target) = Target::from_number((bits >> 14) as u8) else {
                return false;
            };
            block.relocations.push(Relocation {
                at: u32::from(bits & 0x3fff),
                target,
            });
        }
        let exits = |relocation: &&Relocation| relocation.target == Target::Exit;
        if block.relocations.iter().filter(exits).count() != block.exits.len() {
            return false;
        }
        block.consulted.clear();
        block
            .consulted
            .extend(self.consulted_pieces().map(|(va, bytes)| Consulted {
                va,
                len: bytes.len() as u16,
            }));
        block.indirect_entry = self.indirect;
        block.direct_entry = self.direct;
        block.stale = u32::from(self.stale);
        block.guest_len = self.guest_len;
        block.instructions = self.instructions;
        block.crosses_page = self.kind_bits & CROSSES != 0;
        true
    }
}

/// Bytes of a record that nobody took yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, left) = self.0.split_at_checked(len)?;
        self.0 = left;
        Some(taken)
    }
}

/// Bytes of `count` consulted pieces at the start of `bytes`.
fn consulted_len(bytes: &[u8], count: u8) -> Option<usize> {
    let mut rest = Rest(bytes);
    for _ in 0..count {
        let head = rest.take(CONSULTED_HEAD)?;
        rest.take(usize::from(u16::from_le_bytes([head[8], head[9]])))?;
    }
    Some(bytes.len() - rest.0.len())
}

/// tag, bits (write, stack), three halves, a word.
fn exit_bytes(exit: Exit) -> [u8; EXIT] {
    let bits = |write, stack| u8::from(write) | u8::from(stack) << 1;
    let (tag, bits, halves, word) = match exit {
        Exit::Link { target, patch } => (0, 0, [target, 0, 0], patch),
        Exit::Goto { next } => (1, 0, [next, 0, 0], 0),
        Exit::Interpret { at } => (2, 0, [at, 0, 0], 0),
        Exit::Access {
            at,
            size,
            write,
            stack,
            retry,
        } => (3, bits(write, stack), [at, u16::from(size), 0], retry),
        Exit::Group {
            at,
            len,
            write,
            stack,
            retry,
            patch,
        } => (4, bits(write, stack), [at, len, retry], u32::from(patch)),
        Exit::Bounced { next } => (5, 0, [next, 0, 0], 0),
        Exit::Stale => (6, 0, [0; 3], 0),
    };
    let [[a, b], [c, d], [e, f]] = halves.map(u16::to_le_bytes);
    let [g, h, i, j] = word.to_le_bytes();
    [tag, bits, a, b, c, d, e, f, g, h, i, j]
}

/// The exit, if all of it lies within code and guest code of these lengths.
fn exit_of(bytes: &[u8; EXIT], code_len: usize, guest_len: u16) -> Option<Exit> {
    let [tag, bits, a, b, c, d, e, f, g, h, i, j] = *bytes;
    let [first, second, third] = [[a, b], [c, d], [e, f]].map(u16::from_le_bytes);
    let word = u32::from_le_bytes([g, h, i, j]);
    let (write, stack) = (bits & 1 != 0, bits & 2 != 0);
    // What the engine overwrites is at most five bytes from there.
    let in_code = |at: u32, len: usize| (at as usize) < code_len.saturating_sub(len - 1);
    let (inside, exit) = match tag {
        0 => (
            first < 4096 && in_code(word, 4),
            Exit::Link {
                target: first,
                patch: word,
            },
        ),
        1 => (first <= guest_len, Exit::Goto { next: first }),
        2 => (first <= guest_len, Exit::Interpret { at: first }),
        3 => (
            first < guest_len && (1..=64).contains(&second) && in_code(word, 1),
            Exit::Access {
                at: first,
                size: second as u8,
                write,
                stack,
                retry: word,
            },
        ),
        4 => (
            first < guest_len
                && in_code(u32::from(third), 1)
                && word <= u32::from(u16::MAX)
                && in_code(word, 5),
            Exit::Group {
                at: first,
                len: second,
                write,
                stack,
                retry: third,
                patch: word as u16,
            },
        ),
        5 => (first <= guest_len, Exit::Bounced { next: first }),
        6 => (true, Exit::Stale),
        _ => return None,
    };
    inside.then_some(exit)
}
