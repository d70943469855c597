//! Into translated code and back: the context's memory, the thunks, and the
//! CPU state that Rust does not know of (GS base, x87, MXCSR).
//!
//! Upper halves of YMM registers are the context's, as XMM registers are; the host's
//! calling convention keeps none.
//!
//! Invariant: while a [`Stay`] lives, GS holds the context's address, the x87
//! registers and MXCSR are the guest's, and all signals but the engine's are
//! blocked: translated code has the guest's RSP, and a handler without
//! SA_ONSTACK would write there.
//!
//! Left to others: what is executed (`dispatch`), what faults (`fault`).
#![allow(unsafe_code)] // mmap, inline assembly, arch_prctl

use std::arch::{asm, global_asm};
use std::io;
use std::mem::{offset_of, size_of};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use translator::context::Context;

/// The 512 bytes of FXSAVE64.
#[repr(C, align(16))]
#[derive(Clone)]
pub(crate) struct Fpu(pub(crate) [u8; 512]);

/// MXCSR bits that exist: DAZ included, as on every CPU with BMI2.
pub(crate) const MXCSR_MASK: u32 = 0xffff;

impl Fpu {
    pub(crate) fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.0[24], self.0[25], self.0[26], self.0[27]])
    }
}

/// The context, zeroed, page-aligned, at one place for its whole life.
///
/// The kernel's and the user's jump cache, which are written whole at once and looked
/// into at random, are in a huge page where the host has some: one fault instead of
/// five hundred, and no walk of the host's page tables for a jump.
pub(crate) struct ContextBox {
    at: NonNull<Context>,
}

/// Of the host.
const HUGE_PAGE: usize = 2 << 20;
/// Pages of the TLBs and jump caches that are written at once.
const TABLES: std::ops::Range<usize> =
    offset_of!(Context, tlb) & !0xfff..offset_of!(Context, jumps) & !0xfff;
const JUMPS: std::ops::Range<usize> = TABLES.end..TABLES.end + HUGE_PAGE;
const _: () = assert!(2 * size_of::<translator::context::JumpCache>() == JUMPS.end - JUMPS.start);

// SAFETY: the box owns its memory; other threads only get the poll page's
// address, to change its protection.
unsafe impl Send for ContextBox {}

impl ContextBox {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: a null hint replaces no mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Context>() + HUGE_PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapped = at as usize;
        let start = (mapped + JUMPS.start).next_multiple_of(HUGE_PAGE) - JUMPS.start;
        let end = start + size_of::<Context>();
        let advise = |range: std::ops::Range<usize>, advice| {
            // SAFETY: the range lies in the mapping, which is fresh; no advice given
            // here changes its content. Failure only costs faults.
            unsafe { libc::madvise((start + range.start) as *mut _, range.len(), advice) };
        };
        // SAFETY: both pieces are the mapping's, before and behind the context, and
        // nobody knows of them yet.
        unsafe {
            if start > mapped {
                libc::munmap(at, start - mapped);
            }
            if mapped + HUGE_PAGE > start {
                libc::munmap(end as *mut _, mapped + HUGE_PAGE - start);
            }
        }
        advise(0..size_of::<Context>(), libc::MADV_DONTDUMP);
        advise(JUMPS, libc::MADV_HUGEPAGE);
        advise(TABLES.start..JUMPS.end, libc::MADV_POPULATE_WRITE);
        let at = NonNull::new(start as *mut Context).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at })
    }

    pub(crate) fn poll_page(&self) -> u64 {
        self.at.as_ptr() as u64 + offset_of!(Context, poll) as u64
    }

    pub(crate) fn bounce_page(&self) -> u64 {
        self.at.as_ptr() as u64 + offset_of!(Context, bounce) as u64
    }
}

impl Deref for ContextBox {
    type Target = Context;
    fn deref(&self) -> &Context {
        // SAFETY: zeroed memory is a valid `Context` (integers only), owned by us.
        unsafe { self.at.as_ref() }
    }
}

impl DerefMut for ContextBox {
    fn deref_mut(&mut self) -> &mut Context {
        // SAFETY: as above, and `self` is borrowed exclusively; translated code
        // only runs inside `Stay::enter`, which borrows it exclusively too.
        unsafe { self.at.as_mut() }
    }
}

impl Drop for ContextBox {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, unmapped once.
        let result = unsafe { libc::munmap(self.at.as_ptr().cast(), size_of::<Context>()) };
        debug_assert_eq!(result, 0, "unmapping a context that we mapped");
    }
}

/// A thread's stay in the guest's world: from the start of `run` to its end.
pub(crate) struct Stay {
    host_gs: u64,
    host_fpu: Box<Fpu>,
    _not_send: std::marker::PhantomData<*const ()>,
}

const ARCH_SET_GS: i32 = 0x1001;
const ARCH_GET_GS: i32 = 0x1004;

impl Stay {
    /// `fpu` becomes the CPU's x87 state and MXCSR.
    pub(crate) fn begin(context: &ContextBox, fpu: &Fpu) -> io::Result<Self> {
        let mut host_fpu = Box::new(Fpu([0; 512]));
        fxsave(&mut host_fpu);
        let mut host_gs = 0u64;
        // SAFETY: the kernel writes eight bytes to `host_gs`; nothing in this
        // process but translated code uses GS.
        let result = unsafe {
            libc::syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut host_gs)
                | libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, context.at.as_ptr())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        fxrstor(fpu);
        Ok(Self {
            host_gs,
            host_fpu,
            _not_send: std::marker::PhantomData,
        })
    }

    /// Takes the guest's x87 state and MXCSR; XMM registers are the context's.
    pub(crate) fn end(self, fpu: &mut Fpu) {
        fxsave(fpu);
    }

    /// Runs translated code at `context.resume` until it exits, and gives the
    /// number of the exit.
    #[inline]
    pub(crate) fn enter(&self, context: &mut ContextBox) -> u32 {
        let number: u64;
        // SAFETY: GS is the context (invariant); its `resume` is the address of
        // translated code, which keeps to the convention of
        // `translator::context` and comes back through the exit thunk. That
        // restores RSP and the callee-saved registers; the rest is declared.
        unsafe {
            asm!(
                "call {enter}",
                enter = sym kombi_enter,
                in("rdi") context.at.as_ptr(),
                out("rax") number,
                clobber_abi("sysv64"),
            );
        }
        number as u32
    }

    /// Calls `f`, which is not the engine's code, with the host's MXCSR.
    #[inline]
    pub(crate) fn outside<T>(f: impl FnOnce() -> T) -> T {
        let (mut guest, host) = (0u32, 0x1f80_u32);
        // SAFETY: both instructions access the four bytes named. Only rounding
        // and exception masks change, which `f` expects to be the default.
        unsafe {
            asm!("stmxcsr [{g}]", "ldmxcsr [{h}]", g = in(reg) &raw mut guest, h = in(reg) &raw const host, options(nostack));
        }
        let result = f();
        // SAFETY: the value was MXCSR before.
        unsafe { asm!("ldmxcsr [{g}]", g = in(reg) &raw const guest, options(nostack)) };
        result
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        fxrstor(&self.host_fpu);
        // SAFETY: gives GS back what it was.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, self.host_gs) };
    }
}

/// Takes the CPU's x87 state and MXCSR. The addresses of the last x87
/// instruction and operand are the host's, and zeroed.
#[inline(never)]
pub(crate) fn fxsave(into: &mut Fpu) {
    // SAFETY: 512 bytes, aligned to 16.
    unsafe { asm!("fxsave64 [{}]", in(reg) into.0.as_mut_ptr(), options(nostack)) };
    into.0[8..24].fill(0);
}

/// Loads the CPU's x87 state and MXCSR, the latter without its reserved bits.
#[inline(never)]
pub(crate) fn fxrstor(from: &Fpu) {
    let mut image = from.clone();
    let mxcsr = image.mxcsr() & MXCSR_MASK;
    image.0[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    // SAFETY: 512 bytes, aligned to 16, no reserved bit of MXCSR set. All that
    // Rust keeps in these registers is declared clobbered.
    unsafe {
        asm!("fxrstor64 [{}]", in(reg) image.0.as_ptr(), options(nostack),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _);
    }
}

/// The host's time-stamp counter.
#[inline]
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC; Linux does not forbid it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// A copy of the exit thunk, which addresses nothing but GS and so runs anywhere.
pub(crate) fn exit_thunk() -> Vec<u8> {
    // SAFETY: both symbols delimit code below, which is readable.
    unsafe {
        let start = kombi_exit as *const () as *const u8;
        let end = kombi_exit_end as *const () as *const u8;
        std::slice::from_raw_parts(start, end as usize - start as usize).to_vec()
    }
}

unsafe extern "sysv64" {
    fn kombi_enter();
    fn kombi_exit();
    fn kombi_exit_end();
}

global_asm!(
    ".text",
    // Other codegen units refer to them.
    ".globl kombi_enter, kombi_exit, kombi_exit_end",
    ".hidden kombi_enter, kombi_exit, kombi_exit_end",
    ".balign 16",
    "kombi_enter:",
    "push rbp", "push rbx", "push r12", "push r13", "push r14", "push r15",
    "mov gs:[{HSP}], rsp",
    "movaps xmm0, gs:[{X}+0]", "movaps xmm1, gs:[{X}+16]",
    "movaps xmm2, gs:[{X}+32]", "movaps xmm3, gs:[{X}+48]",
    "movaps xmm4, gs:[{X}+64]", "movaps xmm5, gs:[{X}+80]",
    "movaps xmm6, gs:[{X}+96]", "movaps xmm7, gs:[{X}+112]",
    "movaps xmm8, gs:[{X}+128]", "movaps xmm9, gs:[{X}+144]",
    "movaps xmm10, gs:[{X}+160]", "movaps xmm11, gs:[{X}+176]",
    "movaps xmm12, gs:[{X}+192]", "movaps xmm13, gs:[{X}+208]",
    "movaps xmm14, gs:[{X}+224]", "movaps xmm15, gs:[{X}+240]",
    // Upper halves only where there is something in them: see `translator::context`.
    "cmp qword ptr gs:[{UL}], 0", "jne 3f",
    // What the host left there is not for the guest, and not zero as it expects.
    "cmp qword ptr gs:[{AV}], 0", "je 2f",
    "vzeroupper", "jmp 2f",
    "3:",
    "vinsertf128 ymm0, ymm0, xmmword ptr gs:[{H}+0], 1",
    "vinsertf128 ymm1, ymm1, xmmword ptr gs:[{H}+16], 1",
    "vinsertf128 ymm2, ymm2, xmmword ptr gs:[{H}+32], 1",
    "vinsertf128 ymm3, ymm3, xmmword ptr gs:[{H}+48], 1",
    "vinsertf128 ymm4, ymm4, xmmword ptr gs:[{H}+64], 1",
    "vinsertf128 ymm5, ymm5, xmmword ptr gs:[{H}+80], 1",
    "vinsertf128 ymm6, ymm6, xmmword ptr gs:[{H}+96], 1",
    "vinsertf128 ymm7, ymm7, xmmword ptr gs:[{H}+112], 1",
    "vinsertf128 ymm8, ymm8, xmmword ptr gs:[{H}+128], 1",
    "vinsertf128 ymm9, ymm9, xmmword ptr gs:[{H}+144], 1",
    "vinsertf128 ymm10, ymm10, xmmword ptr gs:[{H}+160], 1",
    "vinsertf128 ymm11, ymm11, xmmword ptr gs:[{H}+176], 1",
    "vinsertf128 ymm12, ymm12, xmmword ptr gs:[{H}+192], 1",
    "vinsertf128 ymm13, ymm13, xmmword ptr gs:[{H}+208], 1",
    "vinsertf128 ymm14, ymm14, xmmword ptr gs:[{H}+224], 1",
    "vinsertf128 ymm15, ymm15, xmmword ptr gs:[{H}+240], 1",
    "2:",
    "push qword ptr gs:[{FL}]", "popfq",
    "mov rax, gs:[{G}+0]", "mov rcx, gs:[{G}+8]", "mov rdx, gs:[{G}+16]", "mov rbx, gs:[{G}+24]",
    "mov rsp, gs:[{G}+32]", "mov rbp, gs:[{G}+40]", "mov rsi, gs:[{G}+48]", "mov rdi, gs:[{G}+56]",
    "mov r8, gs:[{G}+64]", "mov r9, gs:[{G}+72]", "mov r10, gs:[{G}+80]", "mov r11, gs:[{G}+88]",
    "mov r12, gs:[{G}+96]", "mov r13, gs:[{G}+104]",
    "mov r14, gs:[{S}]", "mov r15, gs:[{S}+8]",
    "jmp qword ptr gs:[{RES}]",
    ".balign 16",
    "kombi_exit:",
    "mov gs:[{G}+0], rax", "mov gs:[{G}+8], rcx", "mov gs:[{G}+16], rdx", "mov gs:[{G}+24], rbx",
    "mov gs:[{G}+32], rsp", "mov gs:[{G}+40], rbp", "mov gs:[{G}+48], rsi", "mov gs:[{G}+56], rdi",
    "mov gs:[{G}+64], r8", "mov gs:[{G}+72], r9", "mov gs:[{G}+80], r10", "mov gs:[{G}+88], r11",
    "mov gs:[{G}+96], r12", "mov gs:[{G}+104], r13",
    "mov gs:[{S}], r14", "mov gs:[{S}+8], r15",
    "mov rsp, gs:[{HSP}]",
    "pushfq", "pop qword ptr gs:[{FL}]",
    "cld",
    "movaps gs:[{X}+0], xmm0", "movaps gs:[{X}+16], xmm1",
    "movaps gs:[{X}+32], xmm2", "movaps gs:[{X}+48], xmm3",
    "movaps gs:[{X}+64], xmm4", "movaps gs:[{X}+80], xmm5",
    "movaps gs:[{X}+96], xmm6", "movaps gs:[{X}+112], xmm7",
    "movaps gs:[{X}+128], xmm8", "movaps gs:[{X}+144], xmm9",
    "movaps gs:[{X}+160], xmm10", "movaps gs:[{X}+176], xmm11",
    "movaps gs:[{X}+192], xmm12", "movaps gs:[{X}+208], xmm13",
    "movaps gs:[{X}+224], xmm14", "movaps gs:[{X}+240], xmm15",
    "cmp qword ptr gs:[{UL}], 0", "je 2f",
    "vextractf128 xmmword ptr gs:[{H}+0], ymm0, 1",
    "vextractf128 xmmword ptr gs:[{H}+16], ymm1, 1",
    "vextractf128 xmmword ptr gs:[{H}+32], ymm2, 1",
    "vextractf128 xmmword ptr gs:[{H}+48], ymm3, 1",
    "vextractf128 xmmword ptr gs:[{H}+64], ymm4, 1",
    "vextractf128 xmmword ptr gs:[{H}+80], ymm5, 1",
    "vextractf128 xmmword ptr gs:[{H}+96], ymm6, 1",
    "vextractf128 xmmword ptr gs:[{H}+112], ymm7, 1",
    "vextractf128 xmmword ptr gs:[{H}+128], ymm8, 1",
    "vextractf128 xmmword ptr gs:[{H}+144], ymm9, 1",
    "vextractf128 xmmword ptr gs:[{H}+160], ymm10, 1",
    "vextractf128 xmmword ptr gs:[{H}+176], ymm11, 1",
    "vextractf128 xmmword ptr gs:[{H}+192], ymm12, 1",
    "vextractf128 xmmword ptr gs:[{H}+208], ymm13, 1",
    "vextractf128 xmmword ptr gs:[{H}+224], ymm14, 1",
    "vextractf128 xmmword ptr gs:[{H}+240], ymm15, 1",
    // Rust's SSE code would be slow, and keep what was there.
    "vzeroupper",
    "2:",
    "mov eax, r15d",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbx", "pop rbp",
    "ret",
    "kombi_exit_end:",
    HSP = const offset_of!(Context, host_rsp),
    X = const offset_of!(Context, xmm),
    H = const offset_of!(Context, ymm_high),
    UL = const offset_of!(Context, upper_live),
    AV = const offset_of!(Context, avx),
    FL = const offset_of!(Context, rflags),
    G = const offset_of!(Context, gpr),
    S = const offset_of!(Context, scratch),
    RES = const offset_of!(Context, resume),
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xmm_registers_are_aligned_in_the_context() {
        assert_eq!(offset_of!(Context, xmm) % 16, 0);
        assert_eq!(size_of::<Context>() % 4096, 0);
    }

    #[test]
    fn the_exit_thunk_is_one_piece_of_code() {
        let thunk = exit_thunk();
        assert!(thunk.len() > 100 && thunk.len() < 1024);
        assert_eq!(thunk.last(), Some(&0xc3));
    }

    // As translated code: shows YMM5 in the context, and leaves.
    global_asm!(
        ".globl kombi_show_ymm5",
        ".hidden kombi_show_ymm5",
        "kombi_show_ymm5:",
        "vmovupd gs:[{H}], ymm5",
        "xor r15d, r15d",
        "jmp kombi_exit",
        H = const offset_of!(Context, ymm_high),
    );

    unsafe extern "sysv64" {
        fn kombi_show_ymm5();
    }

    #[test]
    fn what_the_host_leaves_in_upper_halves_does_not_reach_the_guest() {
        if !std::is_x86_feature_detected!("avx") {
            return;
        }
        let mut context = ContextBox::new().unwrap();
        let reset = x86::state::VcpuState::after_reset();
        let mut fpu = Fpu([0; 512]);
        fpu.0.copy_from_slice(&reset.xsave[..512]);
        context.rflags = 2;
        context.avx = 1;
        context.xmm[5] = [1, 2];
        context.resume = kombi_show_ymm5 as *const () as u64;
        let stay = Stay::begin(&context, &fpu).unwrap();
        // SAFETY: the CPU has AVX; the register is declared.
        unsafe { asm!("vcmpps ymm5, ymm5, ymm5, 15", out("ymm5") _, options(nostack)) };
        assert_eq!(stay.enter(&mut context), 0);
        drop(stay);
        assert_eq!(context.ymm_high[..2], [[1, 2], [0, 0]]);
    }
}
