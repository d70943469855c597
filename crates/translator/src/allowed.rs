//! What the translator may put before the host's CPU: an explicit list of
//! instruction codes, one line each. It is the security boundary between guest
//! and host: an instruction that is not here is never executed by the host, and
//! one that is here is emitted from its line and its decoded operands, never
//! from the guest's bytes.
//!
//! Left out on purpose: all that is privileged or reads what the host would not
//! show (SGDT, CPUID, RDPMC, RDTSCP), segment register loads, far transfers, x87
//! environment stores (they show host addresses), VEX and EVEX.

mod control;
mod integer;
mod mmx;
mod sse;
mod sse4;
mod x87;

use iced_x86::Code;

use crate::table::{Class, Entry};

/// Every list.
pub(crate) const LISTS: [&[Entry]; 6] = [
    control::ROWS,
    integer::ROWS,
    x87::ROWS,
    mmx::ROWS,
    sse::ROWS,
    sse4::ROWS,
];

/// Every code on the allow-list that is emitted again for the host, or expressed
/// otherwise; what does nothing is left out. For tests that compare with a CPU.
pub fn allowed_codes() -> impl Iterator<Item = Code> {
    LISTS
        .iter()
        .flat_map(|list| list.iter())
        .filter(|entry| entry.row.class != Class::Nothing)
        .map(|entry| entry.code)
}
