//! Proves of one emitted block that it can do no harm, from its host code alone.
//!
//! It decodes what the translator emitted and follows every path through it with
//! symbolic values ([`value`]), knowing the convention of `translator::context` and
//! nothing of how the translator works. It holds for every instruction:
//!
//! - it is on the verifier's own list ([`instructions`]);
//! - a memory operand is a field of the context that translated code may use
//!   ([`fields`]), or an entry of the mode's own TLB by an index within it, or guest
//!   memory: a host address from a TLB entry or the stack's slot whose tag was
//!   compared on this path, by a check that covers the operand from its first to its
//!   last byte and whether it writes; or the bounce operand, in a bounce block;
//! - a jump leads to an instruction of the block, to a thunk, or through the mode's
//!   jump cache; what the engine patches is a jump's distance, or is left alone by
//!   every jump within;
//! - where control leaves, the guest's registers say nothing of host addresses, and
//!   neither does anything that the guest's own instructions read on the way.
//!
//! What it takes from the engine: TLB entries hold pages of guest memory under tags
//! of their own index (an empty one under a tag half a TLB away); an exit that is
//! retried changes no field of the context but the TLB, and the stack's slot only if
//! the exit says so; flags and DF as in `translator::context`.
//!
//! Left to others: whether the code is what the guest's code means (`difference`).

mod fields;
mod instructions;
mod state;
mod step;
mod value;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, Register};
use translator::block::{FIRST_BLOCK_EXIT, POLL_BYTES};
use translator::context::Mode;
use translator::{Block, Exit, Kind, Request};

use state::State;
use step::Stepper;
use value::{Meaning, Symbols, Value};

/// What is wrong with a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Host position.
    pub at: u32,
    /// The instruction there.
    pub instruction: String,
    /// What it must not do.
    pub why: &'static str,
    /// The whole block, an instruction a line.
    pub listing: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            at,
            instruction,
            why,
            listing,
        } = self;
        write!(f, "{at:#x}: {instruction}: {why}\n{listing}")
    }
}

/// What a proof covered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Host instructions in the block.
    pub instructions: u32,
    /// Of them, those that some path from an entry reaches.
    pub reached: u32,
    /// Memory operands that are guest memory or the bounce page.
    pub operands: u32,
}

impl Proof {
    /// Counts another proof in.
    pub fn add(&mut self, other: Self) {
        self.instructions += other.instructions;
        self.reached += other.reached;
        self.operands += other.operands;
    }
}

struct Walk<'a> {
    request: &'a Request,
    block: &'a Block,
    instructions: Vec<Instruction>,
    /// Index of the instruction at a position.
    starts: BTreeMap<u32, usize>,
    /// Where exits are retried, and whether the stack's slot may be another then.
    retries: BTreeMap<u32, bool>,
    stepper: Stepper<'a>,
    states: BTreeMap<u32, State>,
    todo: BTreeSet<u32>,
    reached: BTreeSet<u32>,
}

type Outcome<T> = Result<T, &'static str>;

/// Proves that `block`, the translation for `request`, is harmless.
///
/// # Errors
/// The first [`Violation`] found.
pub fn verify(request: &Request, block: &Block) -> Result<Proof, Violation> {
    let mut decoder = Decoder::with_ip(64, &block.code, request.place, DecoderOptions::NONE);
    let instructions: Vec<_> = decoder.iter().collect();
    let starts = instructions
        .iter()
        .enumerate()
        .map(|(i, ins)| (ins.ip().wrapping_sub(request.place) as u32, i))
        .collect();
    let mut retries = BTreeMap::new();
    for exit in &block.exits {
        if let Some((at, stack)) = retry(exit) {
            *retries.entry(at).or_default() |= stack;
        }
    }
    let mut walk = Walk {
        request,
        block,
        instructions,
        starts,
        retries,
        stepper: Stepper {
            request,
            symbols: Symbols::default(),
            info: iced_x86::InstructionInfoFactory::new(),
            at: 0,
        },
        states: BTreeMap::new(),
        todo: BTreeSet::new(),
        reached: BTreeSet::new(),
    };
    match walk.run() {
        Ok(()) => Ok(Proof {
            instructions: walk.instructions.len() as u32,
            reached: walk.reached.len() as u32,
            operands: walk
                .instructions
                .iter()
                .filter(|ins| reaches_guest_memory(ins))
                .count() as u32,
        }),
        Err((at, why)) => Err(walk.violation(at, why)),
    }
}

fn reaches_guest_memory(ins: &Instruction) -> bool {
    ins.segment_prefix() == Register::None
        && (ins.is_string_instruction()
            || (ins.memory_base() != Register::None
                && !matches!(ins.mnemonic(), Mnemonic::Lea | Mnemonic::Nop)))
}

impl Walk<'_> {
    fn run(&mut self) -> Result<(), (u32, &'static str)> {
        for (at, i) in &self.starts {
            if let Some(why) = instructions::refusal(&self.instructions[*i]) {
                return Err((*at, why));
            }
        }
        self.patches()?;
        self.entries().map_err(|why| (0, why))?;
        while let Some(start) = self.todo.pop_first() {
            let Some(mut state) = self.states.get(&start).cloned() else {
                continue;
            };
            let mut at = start;
            loop {
                let Some(&i) = self.starts.get(&at) else {
                    return Err((at, "control runs out of the block"));
                };
                self.reached.insert(at);
                self.stepper.at = at;
                let ins = self.instructions[i];
                match self.step(&mut state, &ins, at) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(why) => return Err((at, why)),
                }
                at += ins.len() as u32;
                if self.states.contains_key(&at) || self.retries.contains_key(&at) {
                    self.flow(state, at).map_err(|why| (at, why))?;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Where control may come from outside.
    fn entries(&mut self) -> Outcome<()> {
        let direct = u32::from(self.block.direct_entry);
        let polling = self.polling_entry();
        for (at, s1_is_the_target) in [
            (direct, false),
            (polling, false),
            (self.block.stale, false),
            (u32::from(self.block.indirect_entry), true),
        ] {
            let indirect = s1_is_the_target && self.request.kind == Kind::Grouped;
            if s1_is_the_target && !indirect {
                continue;
            }
            let mut state = State::entry(&mut self.stepper.symbols);
            if indirect {
                let target = self.stepper.symbols.get(Meaning::Initial(14));
                state.registers[14] = Value::symbol(target);
            }
            self.flow(state, at)?;
        }
        Ok(())
    }

    /// Where links to the same or an earlier address lead.
    fn polling_entry(&self) -> u32 {
        let direct = u32::from(self.block.direct_entry);
        if self.request.kind == Kind::Grouped {
            direct.saturating_sub(POLL_BYTES as u32)
        } else {
            direct
        }
    }

    /// What the engine overwrites: five bytes at the direct entry and at a group's
    /// exit, which no jump may lead into; the distances of links.
    fn patches(&self) -> Result<(), (u32, &'static str)> {
        let mut whole = vec![u32::from(self.block.direct_entry)];
        for exit in &self.block.exits {
            match *exit {
                Exit::Group { patch, .. } => whole.push(u32::from(patch)),
                Exit::Link { patch, .. } => {
                    let direct = u32::from(self.block.direct_entry);
                    if (direct..direct + 5).contains(&patch) {
                        return Err((patch, "a link in what else the engine patches"));
                    }
                    let after = patch + 4;
                    let jump = self
                        .starts
                        .range(..patch)
                        .next_back()
                        .map(|(at, i)| (*at, &self.instructions[*i]));
                    let fits = jump.is_some_and(|(at, ins)| {
                        at + ins.len() as u32 == after
                            && matches!(
                                ins.flow_control(),
                                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
                            )
                            && ins.code() != Code::Jmp_rel8_64
                            && ins.len() >= 5
                    });
                    if !fits {
                        return Err((patch, "a link that is no jump's distance"));
                    }
                }
                _ => {}
            }
        }
        for at in whole {
            if !self.starts.contains_key(&at) || at as usize + 5 > self.block.code.len() {
                return Err((at, "a patch in the middle of an instruction"));
            }
            let into = |ins: &&Instruction| {
                let target = self.position(ins.near_branch_target());
                is_branch(ins) && target > at && target < at + 5
            };
            let retried = self.retries.range(at + 1..at + 5).next().is_some();
            if self.instructions.iter().any(|ins| into(&ins)) || retried {
                return Err((at, "a jump into what the engine patches"));
            }
        }
        Ok(())
    }

    fn position(&self, address: u64) -> u32 {
        u32::try_from(address.wrapping_sub(self.request.place)).unwrap_or(u32::MAX)
    }

    /// Lets control go to `at` with `state`.
    fn flow(&mut self, mut state: State, at: u32) -> Outcome<()> {
        if !self.starts.contains_key(&at) {
            return Err("a jump into the middle of an instruction");
        }
        if at <= self.stepper.at {
            state.rewind(&mut self.stepper.symbols, at);
        }
        // Known before the exit is met, so that the first path here learns nothing
        // that would not hold behind the exit.
        if let Some(stack) = self.retries.get(&at) {
            state.tlb = at + 1;
            if *stack {
                state.slot = at + 1;
            }
            self.forget_scratch(&mut state, at, true);
        }
        match self.states.get(&at) {
            None => {
                self.states.insert(at, state);
                self.todo.insert(at);
            }
            Some(known) => {
                let mut joined = known.clone();
                joined.join(&mut self.stepper.symbols, &state, at);
                if joined != *known {
                    self.states.insert(at, joined);
                    self.todo.insert(at);
                }
            }
        }
        Ok(())
    }

    /// One instruction; whether control runs on behind it.
    fn step(&mut self, state: &mut State, ins: &Instruction, at: u32) -> Outcome<bool> {
        if self.is_group_patch(at) {
            self.leaves(state)?;
        }
        match ins.flow_control() {
            FlowControl::Next => {
                self.stepper.instruction(state, ins)?;
                Ok(true)
            }
            FlowControl::ConditionalBranch => {
                let mut taken = state.clone();
                if ins.mnemonic() == Mnemonic::Jrcxz {
                    self.stepper.zero(&mut taken);
                }
                self.branch(taken, ins, at)?;
                self.stepper.not_taken(state, ins);
                Ok(true)
            }
            FlowControl::UnconditionalBranch => {
                self.branch(state.clone(), ins, at)?;
                Ok(false)
            }
            FlowControl::IndirectBranch => {
                self.stepper.jump_cache(state, ins)?;
                self.leaves(state)?;
                Ok(false)
            }
            _ => Err("control goes where it must not"),
        }
    }

    fn branch(&mut self, state: State, ins: &Instruction, at: u32) -> Outcome<()> {
        let target = ins.near_branch_target();
        let position = self.position(target);
        if (position as usize) < self.block.code.len() {
            let link = at + ins.len() as u32 - 4;
            if self
                .block
                .exits
                .iter()
                .any(|exit| matches!(exit, Exit::Link { patch, .. } if *patch == link))
            {
                self.leaves(&state)?;
            }
            // A loop to the block's own start is an entry like any other.
            if position == self.polling_entry() {
                return self.leaves(&state);
            }
            return self.flow(state, position);
        }
        let thunks = &self.request.thunks;
        if target == thunks.exit {
            return self.exit(state);
        }
        if target == thunks.jump_miss {
            if !self.stepper.symbols.clean(&state.registers[14]) {
                return Err("a jump to an address that the guest may not know");
            }
            return self.leaves(&state);
        }
        if target == thunks.stack_refill[self.request.mode as usize] {
            return self.refill(state);
        }
        if target == thunks.system_call && self.request.mode == Mode::User {
            // S1 becomes the guest's RCX.
            if !self.stepper.symbols.clean(&state.registers[14]) {
                return Err("a return address that the guest may not know");
            }
            return self.crossing(state);
        }
        if target == thunks.system_return && self.request.mode == Mode::Kernel {
            return self.crossing(state);
        }
        Err("a jump out of the block")
    }

    /// Through the exit thunk: S2 is the exit's number.
    fn exit(&mut self, state: State) -> Outcome<()> {
        self.leaves(&state)?;
        let number = state.registers[15].as_constant().ok_or("an unknown exit")?;
        let first = u64::from(self.request.first_exit);
        if number < u64::from(FIRST_BLOCK_EXIT) {
            return Err("an exit that is not a block's");
        }
        let exit = usize::try_from(number.wrapping_sub(first))
            .ok()
            .and_then(|index| self.block.exits.get(index))
            .ok_or("an exit of another block")?;
        match retry(exit) {
            Some((at, _)) => self.flow(state, at),
            None => Ok(()),
        }
    }

    /// S1 and S2 hold something else.
    fn forget_scratch(&mut self, state: &mut State, at: u32, s1: bool) {
        for r in 14 + usize::from(!s1)..16 {
            let symbol = self.stepper.symbols.get(Meaning::Secret(at, 40 + r as u32));
            state.registers[r] = Value::symbol(symbol);
        }
        state.compared = state::Compared::Other;
    }

    /// Through the stub that fills the stack's slot: on to five bytes before the
    /// address in S2, or to that address with S1 as it was.
    fn refill(&mut self, mut state: State) -> Outcome<()> {
        let position = self.way_back(&state)?;
        let mut filled = state.clone();
        self.forget_scratch(&mut filled, self.stepper.at, true);
        filled.slot = self.stepper.at + 1;
        let filled_at = position.checked_sub(5).ok_or("no room to return to")?;
        self.flow(filled, filled_at)?;
        self.forget_scratch(&mut state, self.stepper.at, false);
        self.flow(state, position)
    }

    /// Through a stub that crosses to another privilege level, or goes on at the
    /// address in S2 if it cannot.
    fn crossing(&mut self, mut state: State) -> Outcome<()> {
        self.leaves(&state)?;
        let position = self.way_back(&state)?;
        self.forget_scratch(&mut state, self.stepper.at, true);
        self.flow(state, position)
    }

    /// The position in the block whose address S2 is.
    fn way_back(&self, state: &State) -> Outcome<u32> {
        let back = &state.registers[15];
        let position = match back.plus_symbol() {
            Some(symbol) if *self.stepper.symbols.meaning(symbol) == Meaning::Code => back.constant,
            _ => return Err("a return address that is not in the block"),
        };
        u32::try_from(position).map_err(|_| "a return address out of the block")
    }

    /// Control leaves: nothing that the guest sees may tell of host addresses.
    fn leaves(&self, state: &State) -> Outcome<()> {
        let guests = state
            .registers
            .iter()
            .take(14)
            .chain(state.cells.iter().take(state::GUEST_CELLS));
        for value in guests {
            if !self.stepper.symbols.clean(value) {
                return Err("a host address in a guest register on leaving");
            }
        }
        Ok(())
    }

    fn is_group_patch(&self, at: u32) -> bool {
        self.block
            .exits
            .iter()
            .any(|exit| matches!(exit, Exit::Group { patch, .. } if u32::from(*patch) == at))
    }

    fn violation(&self, at: u32, why: &'static str) -> Violation {
        let line = |at: u32, ins: &Instruction| format!("{at:4x}  {ins}\n");
        Violation {
            at,
            instruction: self
                .starts
                .get(&at)
                .map_or_else(String::new, |i| self.instructions[*i].to_string()),
            why,
            listing: self
                .starts
                .iter()
                .map(|(at, i)| line(*at, &self.instructions[*i]))
                .collect(),
        }
    }
}

/// Where an exit is retried, and whether the stack's slot is another then.
fn retry(exit: &Exit) -> Option<(u32, bool)> {
    match *exit {
        Exit::Access { retry, stack, .. } => Some((retry, stack)),
        Exit::Group { retry, stack, .. } => Some((u32::from(retry), stack)),
        _ => None,
    }
}

fn is_branch(ins: &Instruction) -> bool {
    matches!(
        ins.flow_control(),
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
    )
}
