//! What may be copied: AES, carry-less multiplication, SHA.
//! The columns are explained at [`Row::new`](crate::table::Row::new).

use iced_x86::Code::*;

use crate::table::{Class, Entry, entry};

use Class::*;

#[rustfmt::skip]
pub(super) const AES: &[Entry] = &[
    entry(Aesimc_xmm_xmmm128, Copy, "66 0F 38 DB /r", "Rm", "", ""),
    entry(Aesenc_xmm_xmmm128, Copy, "66 0F 38 DC /r", "Rm", "", ""),
    entry(Aesenclast_xmm_xmmm128, Copy, "66 0F 38 DD /r", "Rm", "", ""),
    entry(Aesdec_xmm_xmmm128, Copy, "66 0F 38 DE /r", "Rm", "", ""),
    entry(Aesdeclast_xmm_xmmm128, Copy, "66 0F 38 DF /r", "Rm", "", ""),
    entry(Aeskeygenassist_xmm_xmmm128_imm8, Copy, "66 0F 3A DF /r ib", "Rmi", "", ""),
];

#[rustfmt::skip]
pub(super) const PCLMULQDQ: &[Entry] = &[
    entry(Pclmulqdq_xmm_xmmm128_imm8, Copy, "66 0F 3A 44 /r ib", "Rmi", "", ""),
];

#[rustfmt::skip]
pub(super) const SHA: &[Entry] = &[
    entry(Sha1nexte_xmm_xmmm128, Copy, "0F 38 C8 /r", "Rm", "", ""),
    entry(Sha1msg1_xmm_xmmm128, Copy, "0F 38 C9 /r", "Rm", "", ""),
    entry(Sha1msg2_xmm_xmmm128, Copy, "0F 38 CA /r", "Rm", "", ""),
    entry(Sha256rnds2_xmm_xmmm128, Copy, "0F 38 CB /r", "Rm", "", ""),
    entry(Sha256msg1_xmm_xmmm128, Copy, "0F 38 CC /r", "Rm", "", ""),
    entry(Sha256msg2_xmm_xmmm128, Copy, "0F 38 CD /r", "Rm", "", ""),
    entry(Sha1rnds4_xmm_xmmm128_imm8, Copy, "0F 3A CC /r ib", "Rmi", "", ""),
];

#[rustfmt::skip]
pub(super) const VEX_AES: &[Entry] = &[
    entry(VEX_Vaesimc_xmm_xmmm128, Copy, "x 66 0F 38 DB /r", "Rm", "", ""),
    entry(VEX_Vaesenc_xmm_xmm_xmmm128, Copy, "x 66 0F 38 DC /r", "Rvm", "", ""),
    entry(VEX_Vaesenclast_xmm_xmm_xmmm128, Copy, "x 66 0F 38 DD /r", "Rvm", "", ""),
    entry(VEX_Vaesdec_xmm_xmm_xmmm128, Copy, "x 66 0F 38 DE /r", "Rvm", "", ""),
    entry(VEX_Vaesdeclast_xmm_xmm_xmmm128, Copy, "x 66 0F 38 DF /r", "Rvm", "", ""),
    entry(VEX_Vaeskeygenassist_xmm_xmmm128_imm8, Copy, "x 66 0F 3A DF /r ib", "Rmi", "", ""),
];

#[rustfmt::skip]
pub(super) const VEX_PCLMULQDQ: &[Entry] = &[
    entry(VEX_Vpclmulqdq_xmm_xmm_xmmm128_imm8, Copy, "x 66 0F 3A 44 /r ib", "Rvmi", "", ""),
];
