//! What the translator is asked and what it answers.

use x86::features::Features;

use crate::context::Mode;
use crate::relocation::Relocation;

/// What kind of code is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The normal form: accesses through the same base share one page check.
    Grouped,
    /// Every access has its own check: where a grouped check failed. Entered
    /// only at its direct entry, never from the jump cache.
    PerAccess,
    /// One instruction with one memory operand, which it takes from the host
    /// address in `Context::bounce_at`; ends with [`Exit::Bounced`]. For
    /// page-crossing, memory-mapped and code-page accesses.
    Bounce,
    /// One instruction, however it ends: [`Exit::Goto`] behind it, and
    /// [`Exit::Interpret`] for all that jumps. For single steps. Entered only at its
    /// direct entry, and polls for nothing.
    Step,
}

/// Host addresses that translated code jumps to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Thunks {
    /// Saves the guest's registers and returns to the engine. r15 holds the
    /// exit's number.
    pub exit: u64,
    /// Where an empty jump cache entry leads: [`INDIRECT_EXIT`].
    pub jump_miss: u64,
    /// Refills the stack slot from the TLB, by mode.
    pub stack_refill: [u64; crate::context::MODES],
    /// SYSCALL at CPL 3: see `system_calls.rs`.
    pub system_call: u64,
    /// SYSRET at CPL 0.
    pub system_return: u64,
}

impl Thunks {
    pub(crate) fn stack_refill_of(&self, mode: Mode) -> u64 {
        let [kernel, user, kernel_user_access] = self.stack_refill;
        match mode {
            Mode::Kernel => kernel,
            Mode::User => user,
            Mode::KernelUserAccess => kernel_user_access,
        }
    }
}

/// Host bytes of the read of `Context::poll` before [`Block::direct_entry`].
pub const POLL_BYTES: usize = 9;

/// The exit number of a jump cache miss: the target is in S1 (`scratch[0]`).
pub const INDIRECT_EXIT: u32 = 0;
/// The exit number that a fault handler uses: a host fault, or the poll page.
pub const FAULT_EXIT: u32 = 1;
/// The first number for exits of blocks.
pub const FIRST_BLOCK_EXIT: u32 = 2;

/// One translation wanted.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Guest linear address of the first instruction.
    pub va: u64,
    /// Privilege.
    pub mode: Mode,
    /// Form.
    pub kind: Kind,
    /// What the guest's CPU has, less what is switched off: instructions of other
    /// features are left to the engine. Decides what code comes out.
    pub features: Features,
    /// Host address at which the first byte of code will run.
    pub place: u64,
    /// Number of the first exit of this block.
    pub first_exit: u32,
    /// Where the stubs are.
    pub thunks: Thunks,
}

/// The guest's memory as an instruction fetch sees it.
pub trait GuestCode {
    /// The bytes from `va` to the end of its page, if it may be executed in the
    /// request's mode. Touches no guest-visible state but accessed bits.
    fn tail(&self, va: u64) -> Option<&[u8]>;

    /// Addresses that a block may start at but not run past, nor be entered at by a
    /// jump of its own: breakpoints. Blocks translated with any are not for others.
    fn stops(&self) -> &[u64] {
        &[]
    }
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The fetch at this linear address faults: the first instruction's own
    /// address, or the next page's when it crosses into it.
    Fetch(u64),
    /// [`Kind::Bounce`] was asked of an instruction that is not copied or has
    /// not exactly one memory operand: interpret it.
    NotBounceable,
}

/// Why translated code came back, by exit number. Guest positions (`at`, `next`)
/// are byte offsets from the block's `va`; host positions are byte offsets from
/// its `place`. At every exit the guest's registers are those *before* the
/// instruction at `at`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Go on at a constant target in the block's own page (`target` is the offset
    /// in that page). The engine may link: the rel32 at `patch` then points to
    /// the target's direct entry.
    Link {
        /// Offset of the target in the page of `va`.
        target: u16,
        /// Host position of the rel32.
        patch: u32,
    },
    /// Go on at `va + next`: look for interrupts on the way.
    Goto {
        /// Guest position.
        next: u16,
    },
    /// The engine executes the instruction itself, or raises #UD.
    Interpret {
        /// Guest position.
        at: u16,
    },
    /// A checked access missed the TLB. S1 (`scratch[0]`) is the linear address.
    /// Fill the TLB and resume at `retry`, or execute the whole instruction
    /// otherwise ([`Kind::Bounce`] or interpretation).
    Access {
        /// Guest position.
        at: u16,
        /// Operand size in bytes, at most 64.
        size: u8,
        /// The access writes.
        write: bool,
        /// The stack's slot was asked: fill it too.
        stack: bool,
        /// Host position that does the check again from the guest's registers and
        /// `Context::temp`.
        retry: u32,
    },
    /// A grouped check missed. S1 is the lowest address of the group.
    Group {
        /// Guest position of the first instruction behind the check.
        at: u16,
        /// Bytes that the group spans.
        len: u16,
        /// Some access of it writes.
        write: bool,
        /// It is the stack's.
        stack: bool,
        /// Host position that does the check again.
        retry: u16,
        /// Host position of this exit's five-byte-or-longer sequence, which a
        /// `jmp rel32` to the per-access variant may replace.
        patch: u16,
    },
    /// A bounce block did its instruction. Go on at `va + next`.
    Bounced {
        /// Guest position.
        next: u16,
    },
    /// The block was invalidated and its entry patched: look up `va` again.
    Stale,
}

/// Guest code behind a block or at a target of its jumps that the translator
/// looked at: with other bytes there, the block might have to be another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consulted {
    /// Guest linear address.
    pub va: u64,
    /// Bytes, all in one page.
    pub len: u16,
}

/// A translation. The vectors are reused from call to call.
#[derive(Clone, Debug, Default)]
pub struct Block {
    /// Host code, to be placed at `Request::place`.
    pub code: Vec<u8>,
    /// What of the code depends on `Request::place`, `first_exit` and `thunks`.
    pub relocations: Vec<Relocation>,
    /// What the translation depends on beside its own guest bytes, the request and
    /// the options.
    pub consulted: Vec<Consulted>,
    /// Exits; the first has number `Request::first_exit`.
    pub exits: Vec<Exit>,
    /// (host position, guest position) of each instruction, ascending, hot part
    /// only: for host faults, whose instruction must be found.
    pub positions: Vec<(u16, u16)>,
    /// Host position of the entry that checks S1 against `va`: for the jump cache.
    pub indirect_entry: u16,
    /// Host position of the entry for links to a later address. The engine may
    /// overwrite the five bytes here with a jump to `stale`.
    ///
    /// A [`Kind::Grouped`] block has the entry for links to the same or an earlier
    /// address [`POLL_BYTES`] before: it reads `Context::poll`, so that no guest runs
    /// on for ever.
    pub direct_entry: u16,
    /// Host position of the code behind [`Exit::Stale`].
    pub stale: u32,
    /// Guest bytes translated.
    pub guest_len: u16,
    /// Guest instructions translated.
    pub instructions: u16,
    /// The (only) instruction runs into the next page: the block may be entered
    /// through the jump cache only, whose filler checks both pages.
    pub crosses_page: bool,
}
