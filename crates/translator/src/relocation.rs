//! Moving a finished block: what in its code depends on where it was placed, on
//! its exits' numbers and on the thunks.
//!
//! Invariant: [`place`] of a block that was translated for one place gives, byte
//! for byte, what translating it for the other would give. Nothing else in a
//! block's code is a host address: the context is addressed through GS, jumps
//! within a block are relative.
//!
//! Left to others: keeping blocks (`translations`).

use crate::block::Thunks;
use crate::context::Mode;

/// What is at a [`Relocation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Target {
    /// The number of the block's next exit as 32 bits; behind it a `jmp rel32` to
    /// [`Thunks::exit`].
    Exit = 0,
    /// A rel32 to [`Thunks::jump_miss`].
    JumpMiss = 1,
    /// A rel32 to [`Thunks::stack_refill`] of the block's mode.
    StackRefill = 2,
    /// A rel32 to [`Thunks::system_call`].
    SystemCall = 3,
    /// A rel32 to [`Thunks::system_return`].
    SystemReturn = 4,
}

impl Target {
    /// The target of a number, if it is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        let all = [
            Self::Exit,
            Self::JumpMiss,
            Self::StackRefill,
            Self::SystemCall,
            Self::SystemReturn,
        ];
        all.into_iter().find(|target| *target as u8 == number)
    }
}

/// A piece of code that is other at another place. A block's are in ascending
/// order, its exits' in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// Host position.
    pub at: u32,
    /// What is there.
    pub target: Target,
}

/// Where a block goes.
#[derive(Clone, Copy, Debug)]
pub struct Placing {
    /// As [`crate::Request::place`].
    pub place: u64,
    /// As [`crate::Request::first_exit`].
    pub first_exit: u32,
    /// Where the stubs are.
    pub thunks: Thunks,
    /// The block's.
    pub mode: Mode,
}

/// Makes `code`, a block's with these relocations, what it is at `placing`. False,
/// with `code` in no particular state, when a relocation lies outside of it.
#[must_use]
pub fn place(
    code: &mut [u8],
    relocations: impl IntoIterator<Item = Relocation>,
    placing: &Placing,
) -> bool {
    let mut number = placing.first_exit;
    let mut all_inside = true;
    for Relocation { at, target } in relocations {
        all_inside &= match target {
            Target::Exit => {
                let inside = put(code, at, number as i32);
                number = number.wrapping_add(1);
                inside && put_jump(code, at.wrapping_add(5), placing.place, placing.thunks.exit)
            }
            Target::JumpMiss => put_jump(code, at, placing.place, placing.thunks.jump_miss),
            Target::StackRefill => {
                let stub = placing.thunks.stack_refill_of(placing.mode);
                put_jump(code, at, placing.place, stub)
            }
            Target::SystemCall => put_jump(code, at, placing.place, placing.thunks.system_call),
            Target::SystemReturn => put_jump(code, at, placing.place, placing.thunks.system_return),
        };
    }
    all_inside
}

fn put_jump(code: &mut [u8], at: u32, place: u64, target: u64) -> bool {
    let end = place.wrapping_add(u64::from(at)).wrapping_add(4);
    put(code, at, target.wrapping_sub(end) as i32)
}

fn put(code: &mut [u8], at: u32, value: i32) -> bool {
    let at = at as usize;
    let Some(slot) = code.get_mut(at..at.saturating_add(4)) else {
        return false;
    };
    slot.copy_from_slice(&value.to_le_bytes());
    true
}
