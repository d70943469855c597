//! The instructions that emitted code may consist of, whatever the translator's own
//! list says: by mnemonic, and by the kinds of their operands.
//!
//! Not here, and so refused: all that is privileged or leaves the process (SYSCALL,
//! SYSENTER, INT, IN, OUT, HLT), far transfers, loads and stores of segment
//! registers, their bases, control and debug registers, the stack instructions
//! (PUSH, POP, CALL, RET, ENTER, LEAVE, PUSHF, POPF), whole-state loads and stores
//! (FXSAVE, XSAVE, FNSTENV and relatives), what shows the host's tables or keys
//! (SGDT, SIDT, SLDT, STR, SMSW, RDPMC, RDTSCP, RDPKRU, CPUID, XGETBV), operands
//! that no check can bound (XLAT, MASKMOVDQU, gathers), and what is for the cache
//! or for transactions (CLFLUSH, XBEGIN).

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// Legacy-encoded instructions that compute: registers, flags, one memory operand.
#[rustfmt::skip]
const COMPUTE: &[Mnemonic] = {
    use Mnemonic::*;
    &[
        // integer
        Adc, Add, And, Bsf, Bsr, Bswap, Bt, Btc, Btr, Bts, Cbw, Cdq, Cdqe, Clc, Cmc, Cmova, Cmovae, Cmovb, Cmovbe,
        Cmove, Cmovg, Cmovge, Cmovl, Cmovle, Cmovne, Cmovno, Cmovnp, Cmovns, Cmovo, Cmovp, Cmovs, Cmp, Cmpxchg,
        Cmpxchg16b, Cmpxchg8b, Cqo, Crc32, Cwd, Cwde, Dec, Div, Idiv, Imul, Inc, Lahf, Lea, Mov, Movbe, Movnti, Movsx,
        Movsxd, Movzx, Mul, Neg, Nop, Not, Or, Popcnt, Lzcnt, Tzcnt, Adcx, Adox, Rcl, Rcr, Rol, Ror, Sahf, Sal, Sar,
        Sbb, Seta, Setae, Setb, Setbe, Sete, Setg, Setge, Setl, Setle, Setne, Setno, Setnp, Setns, Seto, Setp, Sets,
        Shl, Shld, Shr, Shrd, Stc, Sub, Test, Xadd, Xchg, Xor, Rdrand, Rdseed, Rdtsc, Lfence, Mfence, Sfence,
        // x87
        F2xm1, Fabs, Fadd, Faddp, Fbld, Fbstp, Fchs, Fcmovb, Fcmovbe, Fcmove, Fcmovnb, Fcmovnbe, Fcmovne, Fcmovnu,
        Fcmovu, Fcom, Fcomi, Fcomip, Fcomp, Fcompp, Fcos, Fdecstp, Fdiv, Fdivp, Fdivr, Fdivrp, Ffree, Ffreep, Fiadd,
        Ficom, Ficomp, Fidiv, Fidivr, Fild, Fimul, Fincstp, Fist, Fistp, Fisttp, Fisub, Fisubr, Fld, Fld1, Fldcw,
        Fldl2e, Fldl2t, Fldlg2, Fldln2, Fldpi, Fldz, Fmul, Fmulp, Fnclex, Fninit, Fnop, Fnstcw, Fnstsw, Fpatan, Fprem,
        Fprem1, Fptan, Frndint, Fscale, Fsin, Fsincos, Fsqrt, Fst, Fstp, Fstpnce, Fsub, Fsubp, Fsubr, Fsubrp, Ftst,
        Fucom, Fucomi, Fucomip, Fucomp, Fucompp, Fxam, Fxch, Fxtract, Fyl2x, Fyl2xp1, Wait,
        // SHA
        Sha1msg1, Sha1msg2, Sha1nexte, Sha1rnds4, Sha256msg1, Sha256msg2, Sha256rnds2,
        // MMX and SSE
        Addpd, Addps, Addsd, Addss, Addsubpd, Addsubps, Aesdec, Aesdeclast, Aesenc, Aesenclast, Aesimc,
        Aeskeygenassist, Andnpd, Andnps, Andpd, Andps, Blendpd, Blendps, Blendvpd, Blendvps, Cmppd, Cmpps, Cmpsd,
        Cmpss, Comisd, Comiss, Cvtdq2pd, Cvtdq2ps, Cvtpd2dq, Cvtpd2pi, Cvtpd2ps, Cvtpi2pd, Cvtpi2ps, Cvtps2dq,
        Cvtps2pd, Cvtps2pi, Cvtsd2si, Cvtsd2ss, Cvtsi2sd, Cvtsi2ss, Cvtss2sd, Cvtss2si, Cvttpd2dq, Cvttpd2pi,
        Cvttps2dq, Cvttps2pi, Cvttsd2si, Cvttss2si, Divpd, Divps, Divsd, Divss, Dppd, Dpps, Emms, Extractps, Haddpd,
        Haddps, Hsubpd, Hsubps, Insertps, Lddqu, Ldmxcsr, Maxpd, Maxps, Maxsd, Maxss, Minpd, Minps, Minsd, Minss,
        Movapd, Movaps, Movd, Movddup, Movdq2q, Movdqa, Movdqu, Movhlps, Movhpd, Movhps, Movlhps, Movlpd, Movlps,
        Movmskpd, Movmskps, Movntdq, Movntdqa, Movntpd, Movntps, Movntq, Movq, Movq2dq, Movsd, Movshdup, Movsldup,
        Movss, Movupd, Movups, Mpsadbw, Mulpd, Mulps, Mulsd, Mulss, Orpd, Orps, Pabsb, Pabsd, Pabsw, Packssdw,
        Packsswb, Packusdw, Packuswb, Paddb, Paddd, Paddq, Paddsb, Paddsw, Paddusb, Paddusw, Paddw, Palignr, Pand,
        Pandn, Pavgb, Pavgw, Pblendvb, Pblendw, Pclmulqdq, Pcmpeqb, Pcmpeqd, Pcmpeqq, Pcmpeqw, Pcmpestri, Pcmpestri64,
        Pcmpestrm, Pcmpestrm64, Pcmpgtb, Pcmpgtd, Pcmpgtq, Pcmpgtw, Pcmpistri, Pcmpistrm, Pextrb, Pextrd, Pextrq,
        Pextrw, Phaddd, Phaddsw, Phaddw, Phminposuw, Phsubd, Phsubsw, Phsubw, Pinsrb, Pinsrd, Pinsrq, Pinsrw,
        Pmaddubsw, Pmaddwd, Pmaxsb, Pmaxsd, Pmaxsw, Pmaxub, Pmaxud, Pmaxuw, Pminsb, Pminsd, Pminsw, Pminub, Pminud,
        Pminuw, Pmovmskb, Pmovsxbd, Pmovsxbq, Pmovsxbw, Pmovsxdq, Pmovsxwd, Pmovsxwq, Pmovzxbd, Pmovzxbq, Pmovzxbw,
        Pmovzxdq, Pmovzxwd, Pmovzxwq, Pmuldq, Pmulhrsw, Pmulhuw, Pmulhw, Pmulld, Pmullw, Pmuludq, Por, Psadbw, Pshufb,
        Pshufd, Pshufhw, Pshuflw, Pshufw, Psignb, Psignd, Psignw, Pslld, Pslldq, Psllq, Psllw, Psrad, Psraw, Psrld,
        Psrldq, Psrlq, Psrlw, Psubb, Psubd, Psubq, Psubsb, Psubsw, Psubusb, Psubusw, Psubw, Ptest, Punpckhbw,
        Punpckhdq, Punpckhqdq, Punpckhwd, Punpcklbw, Punpckldq, Punpcklqdq, Punpcklwd, Pxor, Rcpps, Rcpss, Roundpd,
        Roundps, Roundsd, Roundss, Rsqrtps, Rsqrtss, Shufpd, Shufps, Sqrtpd, Sqrtps, Sqrtsd, Sqrtss, Stmxcsr, Subpd,
        Subps, Subsd, Subss, Ucomisd, Ucomiss, Unpckhpd, Unpckhps, Unpcklpd, Unpcklps, Xorpd, Xorps,
    ]
};

/// Instructions with a meaning of their own in [`super::step`].
#[rustfmt::skip]
const SPECIAL: &[Mnemonic] = {
    use Mnemonic::*;
    &[
        Cld, Std, Movsb, Movsw, Movsd, Movsq, Stosb, Stosw, Stosd, Stosq, Lodsb, Lodsw, Lodsd, Lodsq, Jmp, Jrcxz,
        Ja, Jae, Jb, Jbe, Je, Jg, Jge, Jl, Jle, Jne, Jno, Jnp, Jns, Jo, Jp, Js,
    ]
};

/// VEX-encoded instructions: of these extensions, and none of [`VEX_REFUSED`].
const VEX: &[CpuidFeature] = &[
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::FMA,
    CpuidFeature::F16C,
    CpuidFeature::BMI1,
    CpuidFeature::BMI2,
    CpuidFeature::AES,
    CpuidFeature::PCLMULQDQ,
];
const VEX_REFUSED: &[Mnemonic] = &[Mnemonic::Vmaskmovdqu];

/// Why an instruction may not be there at all; `None` when it may.
pub(crate) fn refusal(ins: &Instruction) -> Option<&'static str> {
    if ins.is_invalid() {
        return Some("no instruction");
    }
    let code = ins.code();
    if code.is_privileged() || code.is_save_restore_instruction() {
        return Some("privileged, or saves or restores state");
    }
    let listed = match code.encoding() {
        EncodingKind::Legacy => {
            COMPUTE.contains(&ins.mnemonic()) || SPECIAL.contains(&ins.mnemonic())
        }
        EncodingKind::VEX => {
            code.cpuid_features()
                .iter()
                .all(|feature| VEX.contains(feature))
                && !VEX_REFUSED.contains(&ins.mnemonic())
        }
        _ => false,
    };
    if !listed {
        return Some("not on the list");
    }
    if ins.is_vsib() {
        return Some("a vector of addresses");
    }
    // FS is the host's thread; without an override DS and SS have no base.
    if !matches!(ins.segment_prefix(), Register::None | Register::GS) {
        return Some("a segment other than the context's");
    }
    for operand in 0..ins.op_count() {
        let fine = match ins.op_kind(operand) {
            OpKind::Register => {
                let register = ins.op_register(operand);
                register.is_gpr()
                    || register.is_xmm()
                    || register.is_ymm()
                    || register.is_mm()
                    || register.is_st()
            }
            OpKind::Memory | OpKind::NearBranch64 => true,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => ins.is_string_instruction(),
            kind => (OpKind::Immediate8..=OpKind::Immediate32to64).contains(&kind),
        };
        if !fine {
            return Some("an operand of a kind that is not allowed");
        }
    }
    if (ins.has_rep_prefix() || ins.has_repne_prefix()) && !ins.is_string_instruction() {
        return Some("a repeat prefix");
    }
    let computed_jump = matches!(code, Code::Jmp_rm64);
    if ins.mnemonic() == Mnemonic::Jmp && !computed_jump && ins.op0_kind() != OpKind::NearBranch64 {
        return Some("a far jump");
    }
    None
}
