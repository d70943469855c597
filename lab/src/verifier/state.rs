//! What is known at one position of a block, and what remains of it where paths
//! join or code is executed again.

use super::value::{Entry, Meaning, Symbol, Symbols, Tag, Value, Version};

/// `address - tag` is in `low..=high`, signed: the address lies in the tag's page,
/// and so its TLB entry is the address's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InPage {
    pub(crate) tag: Symbol,
    pub(crate) address: Value,
    pub(crate) low: i64,
    pub(crate) high: i64,
}

/// What the last comparison compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    /// Nothing that matters.
    Other,
    /// A value with a constant, sign-extended.
    Constant(Value, i64),
    /// Two values.
    Values(Value, Value),
    /// The direction with zero.
    Direction,
}

/// The private fields of the context that keep values: guest r14 and r15, four
/// temporaries, the saved RCX, the open groups' addends by base.
pub(crate) const CELLS: usize = 7 + 14;
/// The first two cells: the guest's.
pub(crate) const GUEST_CELLS: usize = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) registers: Vec<Value>,
    pub(crate) cells: Vec<Value>,
    pub(crate) in_page: Vec<InPage>,
    /// Values that are at most so much, unsigned.
    pub(crate) at_most: Vec<(Value, u64)>,
    pub(crate) compared: Compared,
    /// DF is clear.
    pub(crate) upwards: bool,
    /// When the TLB changed last.
    pub(crate) tlb: Version,
    /// When the stack's slot changed last.
    pub(crate) slot: Version,
}

impl State {
    /// At an entry: nothing is known, the guest's registers are the guest's.
    pub(crate) fn entry(symbols: &mut Symbols) -> Self {
        let registers = (0..16)
            .map(|r| {
                Value::symbol(symbols.get(if r < 14 {
                    Meaning::Initial(r)
                } else {
                    Meaning::Secret(0, r)
                }))
            })
            .collect();
        let cells = (0..CELLS as u32)
            .map(|c| {
                Value::symbol(symbols.get(if c < GUEST_CELLS as u32 {
                    Meaning::Initial(16 + c)
                } else {
                    Meaning::Secret(0, 16 + c)
                }))
            })
            .collect();
        Self {
            registers,
            cells,
            in_page: Vec::new(),
            at_most: Vec::new(),
            compared: Compared::Other,
            upwards: false,
            tlb: 0,
            slot: 0,
        }
    }

    /// Notes that `address - tag` is in `low..=high`.
    pub(crate) fn learn(&mut self, symbols: &Symbols, mut fact: InPage) {
        let Meaning::Tag(_, entry, _) = symbols.meaning(fact.tag) else {
            return;
        };
        // An entry holds a page that belongs to it, or one that is half the TLB
        // away: an address that is no more than a little below the page is in another
        // entry, and an equal one is in the page.
        let own = match entry {
            Entry::Stack => true,
            Entry::Constant(index) => fact.address.as_constant().is_some_and(|address| {
                address >> 12 & (translator::context::TLB_ENTRIES as u64 - 1) == *index
            }),
            Entry::Of(address) => {
                let own = *address == fact.address;
                if own && fact.low > -4096 {
                    fact.low = fact.low.max(0);
                }
                own
            }
        };
        if !own || *entry != Entry::Stack && (fact.low < 0 || fact.high > 4095) {
            return;
        }
        for known in &mut self.in_page {
            if known.tag != fact.tag {
                continue;
            }
            // The same address, or one at a constant distance.
            if let Some(by) = fact.address.minus(&known.address).as_constant() {
                let by = by as i64;
                if *entry != Entry::Stack && by != 0 {
                    continue;
                }
                known.low = known.low.max(fact.low.saturating_sub(by));
                known.high = known.high.min(fact.high.saturating_sub(by));
                return;
            }
        }
        self.in_page.push(fact);
    }

    /// The least known upper bound.
    pub(crate) fn most(&self, symbols: &Symbols, value: &Value) -> Option<u64> {
        let facts = self
            .at_most
            .iter()
            .filter(|(known, _)| known == value)
            .map(|(_, most)| *most);
        let own = value.as_symbol().and_then(|symbol| symbols.bound(symbol));
        facts.chain(own).chain(value.as_constant()).min()
    }

    /// Whether `size` bytes at `address` are in memory that a check has shown to be
    /// the guest's, to be written if `write`.
    pub(crate) fn reaches(
        &self,
        symbols: &Symbols,
        address: &Value,
        size: u64,
        write: bool,
    ) -> bool {
        let allows = |tag: Symbol, wanted: &Entry, version: Version| match symbols.meaning(tag) {
            Meaning::Tag(kind, entry, when) => {
                entry == wanted && *when == version && (!write || *kind == Tag::Write)
            }
            _ => false,
        };
        address.terms.iter().any(|(symbol, factor)| {
            *factor == 1
                && match symbols.meaning(*symbol) {
                    Meaning::Addend(entry, version) => {
                        let linear = address.without(*symbol);
                        self.in_page.iter().any(|fact| {
                            let Some(by) = linear.minus(&fact.address).as_constant() else {
                                return false;
                            };
                            allows(fact.tag, entry, *version)
                                && inside(fact.low, fact.high, by as i64, size)
                        })
                    }
                    Meaning::Host(entry, version) => {
                        let offset = address.without(*symbol);
                        self.in_page
                            .iter()
                            .filter(|fact| allows(fact.tag, entry, *version))
                            .any(|fact| self.offset_fits(symbols, &offset, fact, size))
                    }
                    _ => false,
                }
        })
    }

    /// Whether `size` bytes at `offset` in a page whose tag matched stay in it.
    fn offset_fits(&self, symbols: &Symbols, offset: &Value, fact: &InPage, size: u64) -> bool {
        if let Some(offset) = offset.as_constant() {
            return inside(0, 0, offset as i64, size);
        }
        let tag = Value::symbol(fact.tag);
        if let Some(by) = offset.minus(&fact.address.minus(&tag)).as_constant() {
            return inside(fact.low, fact.high, by as i64, size);
        }
        if let Some(symbol) = offset.plus_symbol()
            && let Meaning::Xor(_, xored) = symbols.meaning(symbol)
            && *xored == fact.tag
            && let Some(most) = self.most(symbols, &Value::symbol(symbol))
        {
            return inside(0, most as i64, offset.constant as i64, size);
        }
        false
    }

    /// What is known both here and there, at `at`.
    pub(crate) fn join(&mut self, symbols: &mut Symbols, other: &Self, at: u32) {
        let pairs = self
            .registers
            .iter_mut()
            .chain(&mut self.cells)
            .zip(other.registers.iter().chain(&other.cells));
        for (slot, (mine, theirs)) in pairs.enumerate() {
            if mine != theirs {
                let clean = symbols.clean(mine) && symbols.clean(theirs);
                *mine = unknown(symbols, at, slot, clean);
            }
        }
        self.in_page.retain_mut(|fact| {
            let found = other
                .in_page
                .iter()
                .find(|theirs| theirs.tag == fact.tag && theirs.address == fact.address);
            if let Some(theirs) = found {
                fact.low = fact.low.min(theirs.low);
                fact.high = fact.high.max(theirs.high);
            }
            found.is_some()
        });
        self.at_most.retain(|fact| other.at_most.contains(fact));
        if self.compared != other.compared {
            self.compared = Compared::Other;
        }
        self.upwards &= other.upwards;
        if self.tlb != other.tlb {
            self.tlb = at + 1;
        }
        if self.slot != other.slot {
            self.slot = at + 1;
        }
    }

    /// Forgets what would get another meaning when code from `at` on is executed
    /// again, before control goes there.
    pub(crate) fn rewind(&mut self, symbols: &mut Symbols, at: u32) {
        let stale = i64::from(at);
        let values = self.registers.iter_mut().chain(&mut self.cells);
        for (slot, value) in values.enumerate() {
            if symbols.born(value) >= stale {
                let clean = symbols.clean(value);
                *value = unknown(symbols, at, slot, clean);
            }
        }
        let tag = |symbols: &Symbols, tag: Symbol| symbols.born(&Value::symbol(tag));
        self.in_page
            .retain(|fact| tag(symbols, fact.tag) < stale && symbols.born(&fact.address) < stale);
        self.at_most
            .retain(|(value, _)| symbols.born(value) < stale);
        self.compared = Compared::Other;
        for version in [&mut self.tlb, &mut self.slot] {
            if *version > at {
                *version = at + 1;
            }
        }
    }
}

/// A value at the join at `at`.
fn unknown(symbols: &mut Symbols, at: u32, slot: usize, clean: bool) -> Value {
    // Apart from the results of the instruction there.
    let slot = slot as u32 + 64;
    Value::symbol(symbols.get(if clean {
        Meaning::Result(at, slot)
    } else {
        Meaning::Secret(at, slot)
    }))
}

/// Whether `size` bytes, at `by` from an offset in `low..=high`, stay in a page.
fn inside(low: i64, high: i64, by: i64, size: u64) -> bool {
    let end = high
        .checked_add(by)
        .and_then(|end| end.checked_add(size as i64));
    low.checked_add(by).is_some_and(|start| start >= 0) && end.is_some_and(|end| end <= 4096)
}
