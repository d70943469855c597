//! What the translator may put before the host's CPU: an explicit list of
//! instruction codes, one line each. It is the security boundary between guest
//! and host: an instruction that is not here is never executed by the host, and
//! one that is here is emitted from its line and its decoded operands, never
//! from the guest's bytes.
//!
//! Left out on purpose: all that is privileged or reads what the host would not
//! show (SGDT, CPUID, RDPMC), segment register loads, far transfers, x87 environment
//! stores (they show host addresses), EVEX. Gathers and masked moves are the engine's:
//! elements that their mask leaves out must not fault.
//!
//! A list belongs to a feature; whoever lacks it does not get its instructions.

mod avx;
mod avx2;
mod bits;
mod control;
mod crypto;
mod fma;
mod integer;
mod mmx;
mod small;
mod sse;
mod sse4;
mod x87;

use iced_x86::Code;
use x86::features::Feature;

use crate::table::{Class, Entry, row};

/// Every list, and the feature that it belongs to.
pub(crate) const LISTS: [(Feature, &[Entry]); 30] = [
    (Feature::Base, control::ROWS),
    (Feature::Base, integer::ROWS),
    (Feature::Fpu, x87::ROWS),
    (Feature::Mmx, mmx::ROWS),
    (Feature::Sse, sse::ROWS),
    (Feature::Sse, sse4::ROWS),
    (Feature::Avx, avx::ROWS),
    (Feature::Avx2, avx2::ROWS),
    (Feature::Fma, fma::FMA),
    (Feature::F16c, fma::F16C),
    (Feature::Bmi1, bits::BMI1),
    (Feature::Bmi2, bits::BMI2),
    (Feature::Lzcnt, bits::LZCNT),
    (Feature::Movbe, bits::MOVBE),
    (Feature::Adx, bits::ADX),
    (Feature::Rdrand, bits::RDRAND),
    (Feature::Rdseed, bits::RDSEED),
    (Feature::Aes, crypto::AES),
    (Feature::Pclmulqdq, crypto::PCLMULQDQ),
    (Feature::Sha, crypto::SHA),
    (Feature::VexAes, crypto::VEX_AES),
    (Feature::VexPclmulqdq, crypto::VEX_PCLMULQDQ),
    (Feature::Tsc, small::TSC),
    (Feature::Rdtscp, small::RDTSCP),
    (Feature::Rdpid, small::RDPID),
    (Feature::Fsgsbase, small::FSGSBASE),
    (Feature::Xsave, small::XSAVE),
    (Feature::Xsaveopt, small::XSAVEOPT),
    (Feature::Clflushopt, small::CLFLUSHOPT),
    (Feature::Clwb, small::CLWB),
];

pub(crate) fn entries() -> impl Iterator<Item = &'static Entry> {
    LISTS.iter().flat_map(|(_, rows)| rows.iter())
}

fn codes(wanted: impl Fn(Class) -> bool) -> impl Iterator<Item = Code> {
    entries()
        .filter(move |entry| wanted(entry.row.class))
        .map(|entry| entry.code)
}

/// Every code on the allow-list that is emitted again for the host, or expressed
/// otherwise; what does nothing is left out. For tests that compare with a CPU.
pub fn allowed_codes() -> impl Iterator<Item = Code> {
    codes(|class| !matches!(class, Class::Nothing | Class::Interpret))
}

/// Codes that the engine executes itself, of those that belong to a feature.
pub fn interpreted_codes() -> impl Iterator<Item = Code> {
    codes(|class| class == Class::Interpret)
}

/// The feature that an instruction belongs to.
#[inline]
pub fn feature(code: Code) -> Feature {
    row(code).feature
}
