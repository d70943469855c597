//! Sets of small numbers that are mostly empty: a load of CR3 goes through several,
//! and must not look at every word of them.

/// A set of numbers below a bound, with a bit in `summary` for each word of `words`
/// that may not be zero.
pub(super) struct Bits {
    words: Box<[u64]>,
    summary: Box<[u64]>,
}

impl Bits {
    /// For numbers below `len`, a multiple of 64.
    pub(super) fn new(len: usize) -> Self {
        let words = len / 64;
        Self {
            words: vec![0; words].into_boxed_slice(),
            summary: vec![0; words.div_ceil(64)].into_boxed_slice(),
        }
    }

    #[inline]
    pub(super) fn set(&mut self, i: usize) {
        let word = i / 64;
        self.words[word] |= 1 << (i % 64);
        self.summary[word / 64] |= 1 << (word % 64);
    }

    #[inline]
    pub(super) fn unset(&mut self, i: usize) {
        self.words[i / 64] &= !(1 << (i % 64));
    }

    pub(super) fn contains(&self, i: usize) -> bool {
        self.words[i / 64] >> (i % 64) & 1 != 0
    }

    /// Calls `f` for each number, ascending, and empties the set.
    #[inline]
    pub(super) fn drain(&mut self, mut f: impl FnMut(usize)) {
        for (s, summary) in self.summary.iter_mut().enumerate() {
            for w in ones(std::mem::take(summary)) {
                let w = s * 64 + w;
                for i in ones(std::mem::take(&mut self.words[w])) {
                    f(w * 64 + i);
                }
            }
        }
    }

    /// Calls `f` for each number, ascending.
    #[inline]
    pub(super) fn each(&self, mut f: impl FnMut(usize)) {
        for (s, summary) in self.summary.iter().enumerate() {
            for w in ones(*summary) {
                let w = s * 64 + w;
                for i in ones(self.words[w]) {
                    f(w * 64 + i);
                }
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.drain(|_| {});
    }
}

/// The numbers of the bits that are set, ascending.
pub(super) fn ones(mut left: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
        left &= left - 1;
        Some(bit)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_is_a_set(changes in prop::collection::vec((0_usize..16_384, 0..4), 1..200)) {
            let (mut bits, mut model) = (Bits::new(16_384), BTreeSet::new());
            for (i, change) in changes {
                match change {
                    0 => { bits.unset(i); model.remove(&i); }
                    1 if i % 16 == 0 => {
                        let mut drained = Vec::new();
                        bits.drain(|i| drained.push(i));
                        prop_assert!(drained.iter().eq(&std::mem::take(&mut model)));
                    }
                    _ => { bits.set(i); model.insert(i); }
                }
                prop_assert_eq!(bits.contains(i), model.contains(&i));
            }
            let (mut seen, mut drained) = (Vec::new(), Vec::new());
            bits.each(|i| seen.push(i));
            bits.drain(|i| drained.push(i));
            prop_assert!(seen.iter().eq(&model) && drained.iter().eq(&model));
        }
    }
}
