//! What a host register or a private field of the context may hold: a linear
//! combination of symbols, modulo 2^64, and what is known of the symbols.
//!
//! Invariant: two equal [`Value`]s of one path stand for the same number. A symbol
//! whose definition is about to be executed again must not be in any state then:
//! [`Symbols::born`] tells.

use std::collections::HashMap;

/// A symbol of one block.
pub(crate) type Symbol = u32;

/// Which of the tags of a TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Tag {
    Read,
    Write,
}

/// Which entry of a TLB.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Entry {
    /// The stack's slot.
    Stack,
    /// A constant one.
    Constant(u64),
    /// The one of a linear address.
    Of(Value),
}

/// When a TLB or the stack's slot was changed last: positions of code.
pub(crate) type Version = u32;

/// What a symbol stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Meaning {
    /// A guest register at the block's entry, or what it finds in the context.
    Initial(u32),
    /// The outcome of the instruction at a position, one of several; the guest may
    /// know it.
    Result(u32, u32),
    /// Likewise, at most so much.
    Bounded(u32, u32, u64),
    /// Likewise; says something of the host's addresses, or may.
    Secret(u32, u32),
    /// Where the block's code runs.
    Code,
    /// `Context::bounce_at`.
    Bounce,
    /// The index of an address in the TLB.
    TlbIndex(Value),
    /// The index of an address in the jump cache, and the largest one.
    JumpIndex(Value, u64),
    /// A tag: a linear page address.
    Tag(Tag, Entry, Version),
    /// The host address of an entry's page.
    Host(Entry, Version),
    /// Likewise, less its linear address.
    Addend(Entry, Version),
    /// A value xor a tag.
    Xor(Value, Symbol),
    /// A value without its lowest twelve bits, shifted.
    PageOf(Value),
}

/// A sum of multiples of symbols and a constant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Value {
    /// By symbol, none zero.
    pub(crate) terms: Vec<(Symbol, u64)>,
    pub(crate) constant: u64,
}

impl Value {
    pub(crate) fn constant(constant: u64) -> Self {
        Self {
            terms: Vec::new(),
            constant,
        }
    }

    pub(crate) fn symbol(symbol: Symbol) -> Self {
        Self {
            terms: vec![(symbol, 1)],
            constant: 0,
        }
    }

    pub(crate) fn as_constant(&self) -> Option<u64> {
        self.terms.is_empty().then_some(self.constant)
    }

    /// The symbol, if the value is one.
    pub(crate) fn as_symbol(&self) -> Option<Symbol> {
        self.plus_symbol().filter(|_| self.constant == 0)
    }

    /// The symbol, if the value is one and a constant.
    pub(crate) fn plus_symbol(&self) -> Option<Symbol> {
        match self.terms.as_slice() {
            [(symbol, 1)] => Some(*symbol),
            _ => None,
        }
    }

    /// `self + other * factor`
    pub(crate) fn add(&self, other: &Self, factor: u64) -> Self {
        let mut sum = self.clone();
        for (symbol, n) in &other.terms {
            let n = n.wrapping_mul(factor);
            match sum.terms.binary_search_by_key(symbol, |(s, _)| *s) {
                Ok(i) => {
                    sum.terms[i].1 = sum.terms[i].1.wrapping_add(n);
                    if sum.terms[i].1 == 0 {
                        sum.terms.remove(i);
                    }
                }
                Err(i) if n != 0 => sum.terms.insert(i, (*symbol, n)),
                Err(_) => {}
            }
        }
        sum.constant = sum
            .constant
            .wrapping_add(other.constant.wrapping_mul(factor));
        sum
    }

    pub(crate) fn minus(&self, other: &Self) -> Self {
        self.add(other, u64::MAX)
    }

    pub(crate) fn offset(mut self, by: u64) -> Self {
        self.constant = self.constant.wrapping_add(by);
        self
    }

    /// The value without one times `symbol`.
    pub(crate) fn without(&self, symbol: Symbol) -> Self {
        self.minus(&Self::symbol(symbol))
    }
}

/// The symbols of one block.
#[derive(Default)]
pub(crate) struct Symbols {
    known: HashMap<Meaning, Symbol>,
    meanings: Vec<(Meaning, i64)>,
}

impl Symbols {
    pub(crate) fn get(&mut self, meaning: Meaning) -> Symbol {
        if let Some(symbol) = self.known.get(&meaning) {
            return *symbol;
        }
        let born = match &meaning {
            Meaning::Initial(_) | Meaning::Code | Meaning::Bounce => -1,
            Meaning::Result(at, _) | Meaning::Bounded(at, ..) | Meaning::Secret(at, _) => {
                i64::from(*at)
            }
            Meaning::TlbIndex(value) | Meaning::JumpIndex(value, _) | Meaning::PageOf(value) => {
                self.born(value)
            }
            Meaning::Tag(_, entry, version)
            | Meaning::Host(entry, version)
            | Meaning::Addend(entry, version) => {
                let version = i64::from(*version) - 1;
                match entry {
                    Entry::Of(value) => self.born(value).max(version),
                    Entry::Stack | Entry::Constant(_) => version,
                }
            }
            Meaning::Xor(value, tag) => self.born(value).max(self.meanings[*tag as usize].1),
        };
        let symbol = self.meanings.len() as Symbol;
        self.meanings.push((meaning.clone(), born));
        self.known.insert(meaning, symbol);
        symbol
    }

    pub(crate) fn meaning(&self, symbol: Symbol) -> &Meaning {
        &self.meanings[symbol as usize].0
    }

    /// The last position whose execution gives one of the value's symbols another
    /// meaning, or -1.
    pub(crate) fn born(&self, value: &Value) -> i64 {
        value
            .terms
            .iter()
            .map(|(symbol, _)| self.meanings[*symbol as usize].1)
            .max()
            .unwrap_or(-1)
    }

    /// Whether the guest may see the value: it tells nothing of host addresses.
    pub(crate) fn clean(&self, value: &Value) -> bool {
        value
            .terms
            .iter()
            .all(|(symbol, _)| match self.meaning(*symbol) {
                Meaning::Secret(..)
                | Meaning::Code
                | Meaning::Bounce
                | Meaning::Host(..)
                | Meaning::Addend(..) => false,
                Meaning::Initial(_)
                | Meaning::Result(..)
                | Meaning::Bounded(..)
                | Meaning::Tag(..) => true,
                Meaning::TlbIndex(value)
                | Meaning::JumpIndex(value, _)
                | Meaning::PageOf(value)
                | Meaning::Xor(value, _) => self.clean(value),
            })
    }

    /// An upper bound of a symbol that follows from its meaning alone.
    pub(crate) fn bound(&self, symbol: Symbol) -> Option<u64> {
        match self.meaning(symbol) {
            Meaning::Bounded(_, _, most) => Some(*most),
            Meaning::TlbIndex(_) => Some(translator::context::TLB_ENTRIES as u64 - 1),
            Meaning::JumpIndex(_, most) => Some(*most),
            Meaning::PageOf(_) => Some(u64::MAX >> 12),
            _ => None,
        }
    }
}
