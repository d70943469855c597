//! What may be copied: bit manipulation and other small extensions of the general registers.
//! The columns are explained at [`Row::new`](crate::table::Row::new).

use iced_x86::Code::*;

use crate::table::{Class, Entry, entry};

use Class::*;

#[rustfmt::skip]
pub(super) const BMI1: &[Entry] = &[
    entry(Tzcnt_r16_rm16, Copy, "F3 o16 0F BC /r", "Rm", ">zc", ""),
    entry(Tzcnt_r32_rm32, Copy, "F3 0F BC /r", "Rm", ">zc", ""),
    entry(Tzcnt_r64_rm64, Copy, "F3 W 0F BC /r", "Rm", ">zc", ""),
    entry(VEX_Andn_r32_r32_rm32, Copy, "x 0F 38 F2 /r", "Rvm", ">oszc", ""),
    entry(VEX_Andn_r64_r64_rm64, Copy, "x W 0F 38 F2 /r", "Rvm", ">oszc", ""),
    entry(VEX_Blsr_r32_rm32, Copy, "x 0F 38 F3 /1", "Vm", ">oszc", ""),
    entry(VEX_Blsr_r64_rm64, Copy, "x W 0F 38 F3 /1", "Vm", ">oszc", ""),
    entry(VEX_Blsmsk_r32_rm32, Copy, "x 0F 38 F3 /2", "Vm", ">oszc", ""),
    entry(VEX_Blsmsk_r64_rm64, Copy, "x W 0F 38 F3 /2", "Vm", ">oszc", ""),
    entry(VEX_Blsi_r32_rm32, Copy, "x 0F 38 F3 /3", "Vm", ">oszc", ""),
    entry(VEX_Blsi_r64_rm64, Copy, "x W 0F 38 F3 /3", "Vm", ">oszc", ""),
    entry(VEX_Bextr_r32_rm32_r32, Copy, "x 0F 38 F7 /r", "Rmv", ">ozc", ""),
    entry(VEX_Bextr_r64_rm64_r64, Copy, "x W 0F 38 F7 /r", "Rmv", ">ozc", ""),
];

#[rustfmt::skip]
pub(super) const BMI2: &[Entry] = &[
    entry(VEX_Bzhi_r32_rm32_r32, Copy, "x 0F 38 F5 /r", "Rmv", ">oszc", ""),
    entry(VEX_Bzhi_r64_rm64_r64, Copy, "x W 0F 38 F5 /r", "Rmv", ">oszc", ""),
    entry(VEX_Pext_r32_r32_rm32, Copy, "x F3 0F 38 F5 /r", "Rvm", "", ""),
    entry(VEX_Pext_r64_r64_rm64, Copy, "x F3 W 0F 38 F5 /r", "Rvm", "", ""),
    entry(VEX_Pdep_r32_r32_rm32, Copy, "x F2 0F 38 F5 /r", "Rvm", "", ""),
    entry(VEX_Pdep_r64_r64_rm64, Copy, "x F2 W 0F 38 F5 /r", "Rvm", "", ""),
    entry(VEX_Mulx_r32_r32_rm32, Copy, "x F2 0F 38 F6 /r", "RVm", "", ""),
    entry(VEX_Mulx_r64_r64_rm64, Copy, "x F2 W 0F 38 F6 /r", "RVm", "", ""),
    entry(VEX_Shlx_r32_rm32_r32, Copy, "x 66 0F 38 F7 /r", "Rmv", "", ""),
    entry(VEX_Shlx_r64_rm64_r64, Copy, "x 66 W 0F 38 F7 /r", "Rmv", "", ""),
    entry(VEX_Sarx_r32_rm32_r32, Copy, "x F3 0F 38 F7 /r", "Rmv", "", ""),
    entry(VEX_Sarx_r64_rm64_r64, Copy, "x F3 W 0F 38 F7 /r", "Rmv", "", ""),
    entry(VEX_Shrx_r32_rm32_r32, Copy, "x F2 0F 38 F7 /r", "Rmv", "", ""),
    entry(VEX_Shrx_r64_rm64_r64, Copy, "x F2 W 0F 38 F7 /r", "Rmv", "", ""),
    entry(VEX_Rorx_r32_rm32_imm8, Copy, "x F2 0F 3A F0 /r ib", "Rmi", "", ""),
    entry(VEX_Rorx_r64_rm64_imm8, Copy, "x F2 W 0F 3A F0 /r ib", "Rmi", "", ""),
];

#[rustfmt::skip]
pub(super) const LZCNT: &[Entry] = &[
    entry(Lzcnt_r16_rm16, Copy, "F3 o16 0F BD /r", "Rm", ">zc", ""),
    entry(Lzcnt_r32_rm32, Copy, "F3 0F BD /r", "Rm", ">zc", ""),
    entry(Lzcnt_r64_rm64, Copy, "F3 W 0F BD /r", "Rm", ">zc", ""),
];

#[rustfmt::skip]
pub(super) const MOVBE: &[Entry] = &[
    entry(Movbe_r16_m16, Copy, "o16 0F 38 F0 /r", "Rm", "", ""),
    entry(Movbe_r32_m32, Copy, "0F 38 F0 /r", "Rm", "", ""),
    entry(Movbe_r64_m64, Copy, "W 0F 38 F0 /r", "Rm", "", ""),
    entry(Movbe_m16_r16, Copy, "o16 0F 38 F1 /r", "Mr", "", ""),
    entry(Movbe_m32_r32, Copy, "0F 38 F1 /r", "Mr", "", ""),
    entry(Movbe_m64_r64, Copy, "W 0F 38 F1 /r", "Mr", "", ""),
];

#[rustfmt::skip]
pub(super) const ADX: &[Entry] = &[
    entry(Adcx_r32_rm32, Copy, "66 0F 38 F6 /r", "Rm", "c>c", ""),
    entry(Adcx_r64_rm64, Copy, "66 W 0F 38 F6 /r", "Rm", "c>c", ""),
    entry(Adox_r32_rm32, Copy, "F3 0F 38 F6 /r", "Rm", "o>o", ""),
    entry(Adox_r64_rm64, Copy, "F3 W 0F 38 F6 /r", "Rm", "o>o", ""),
];

#[rustfmt::skip]
pub(super) const RDRAND: &[Entry] = &[
    entry(Rdrand_r16, Copy, "o16 0F C7 /6", "M", ">oszapc", ""),
    entry(Rdrand_r32, Copy, "0F C7 /6", "M", ">oszapc", ""),
    entry(Rdrand_r64, Copy, "W 0F C7 /6", "M", ">oszapc", ""),
];

#[rustfmt::skip]
pub(super) const RDSEED: &[Entry] = &[
    entry(Rdseed_r16, Copy, "o16 0F C7 /7", "M", ">oszapc", ""),
    entry(Rdseed_r32, Copy, "0F C7 /7", "M", ">oszapc", ""),
    entry(Rdseed_r64, Copy, "W 0F C7 /7", "M", ">oszapc", ""),
];
