//! What the translator expresses in its own way or leaves to the engine: clocks, segment
//! bases, XSAVE, cache hints.
//! The columns are explained at [`Row::new`](crate::table::Row::new).

use iced_x86::Code::*;

use crate::table::{Class, Entry, entry};

use Class::*;

#[rustfmt::skip]
pub(super) const TSC: &[Entry] = &[
    entry(Rdtsc, ReadTsc, "0F 31", "", "", "ad"),
];

#[rustfmt::skip]
pub(super) const RDTSCP: &[Entry] = &[
    entry(Rdtscp, ReadTscAux, "0F 01 F9", "", "", "acd"),
];

#[rustfmt::skip]
pub(super) const RDPID: &[Entry] = &[
    entry(Rdpid_r64, ReadTscAux, "F3 0F C7 /7", "M", "", ""),
];

#[rustfmt::skip]
pub(super) const FSGSBASE: &[Entry] = &[
    entry(Rdfsbase_r32, ReadBase, "F3 0F AE /0", "M", "", ""),
    entry(Rdfsbase_r64, ReadBase, "F3 W 0F AE /0", "M", "", ""),
    entry(Rdgsbase_r32, ReadBase, "F3 0F AE /1", "M", "", ""),
    entry(Rdgsbase_r64, ReadBase, "F3 W 0F AE /1", "M", "", ""),
    entry(Wrfsbase_r32, Interpret, "F3 0F AE /2", "m", "", ""),
    entry(Wrfsbase_r64, Interpret, "F3 W 0F AE /2", "m", "", ""),
    entry(Wrgsbase_r32, Interpret, "F3 0F AE /3", "m", "", ""),
    entry(Wrgsbase_r64, Interpret, "F3 W 0F AE /3", "m", "", ""),
];

#[rustfmt::skip]
pub(super) const XSAVE: &[Entry] = &[
    entry(Xgetbv, Interpret, "0F 01 D0", "", "", "ad"),
    entry(Xsetbv, Interpret, "0F 01 D1", "", "", ""),
    entry(Xsave_mem, Interpret, "0F AE /4", "M", "", ""),
    entry(Xsave64_mem, Interpret, "W 0F AE /4", "M", "", ""),
    entry(Xrstor_mem, Interpret, "0F AE /5", "m", "", ""),
    entry(Xrstor64_mem, Interpret, "W 0F AE /5", "m", "", ""),
];

#[rustfmt::skip]
pub(super) const XSAVEOPT: &[Entry] = &[
    entry(Xsaveopt_mem, Interpret, "0F AE /6", "M", "", ""),
    entry(Xsaveopt64_mem, Interpret, "W 0F AE /6", "M", "", ""),
];

#[rustfmt::skip]
pub(super) const CLFLUSHOPT: &[Entry] = &[
    entry(Clflushopt_m8, Nothing, "66 0F AE /7", "m", "", ""),
];

#[rustfmt::skip]
pub(super) const CLWB: &[Entry] = &[
    entry(Clwb_m8, Nothing, "66 0F AE /6", "m", "", ""),
];
