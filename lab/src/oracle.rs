//! The real CPU: a forked child that loads a state, runs code and stores what
//! came of it. Code, data and state lie in shared memory at fixed addresses.
//!
//! Invariant: between [`kombi_lab_native`] and its end the child's registers are the
//! program's, RSP included; signals come on a stack of their own.
#![allow(unsafe_code)] // fork, mmap, signal handlers, assembly

use std::arch::global_asm;
use std::io;
use std::mem::offset_of;

use x86::xsave as area;

use crate::Error;
use crate::layout::{
    CODE, CODE_LEN, DATA, DATA_LEN, GS_BASE, NO_VECTOR, READ_ONLY, SLOTS, STATE, State,
};

unsafe extern "C" {
    fn kombi_lab_native();
    fn kombi_lab_native_end();
    fn kombi_lab_native_finish();
}

global_asm!(
    ".globl kombi_lab_native",
    "kombi_lab_native:",
    "push rbp", "push rbx", "push r12", "push r13", "push r14", "push r15",
    "mov qword ptr [{S} + {HOST}], rsp",
    "cmp qword ptr [{S} + {AVX}], 0",
    "je 2f",
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 [{S} + {FX}]",
    "jmp 3f",
    "2:",
    "fxrstor64 [{S} + {FX}]",
    "3:",
    "push qword ptr [{S} + {FL}]",
    "popfq",
    "mov rax, qword ptr [{S}]",
    "mov rcx, qword ptr [{S} + 8]",
    "mov rdx, qword ptr [{S} + 16]",
    "mov rbx, qword ptr [{S} + 24]",
    "mov rsp, qword ptr [{S} + 32]",
    "mov rbp, qword ptr [{S} + 40]",
    "mov rsi, qword ptr [{S} + 48]",
    "mov rdi, qword ptr [{S} + 56]",
    "mov r8, qword ptr [{S} + 64]",
    "mov r9, qword ptr [{S} + 72]",
    "mov r10, qword ptr [{S} + 80]",
    "mov r11, qword ptr [{S} + 88]",
    "mov r12, qword ptr [{S} + 96]",
    "mov r13, qword ptr [{S} + 104]",
    "mov r14, qword ptr [{S} + 112]",
    "mov r15, qword ptr [{S} + 120]",
    "jmp qword ptr [{S} + {RIP}]",
    ".globl kombi_lab_native_end",
    "kombi_lab_native_end:",
    "mov qword ptr [{S}], rax",
    "mov qword ptr [{S} + 8], rcx",
    "mov qword ptr [{S} + 16], rdx",
    "mov qword ptr [{S} + 24], rbx",
    "mov qword ptr [{S} + 32], rsp",
    "mov qword ptr [{S} + 40], rbp",
    "mov qword ptr [{S} + 48], rsi",
    "mov qword ptr [{S} + 56], rdi",
    "mov qword ptr [{S} + 64], r8",
    "mov qword ptr [{S} + 72], r9",
    "mov qword ptr [{S} + 80], r10",
    "mov qword ptr [{S} + 88], r11",
    "mov qword ptr [{S} + 96], r12",
    "mov qword ptr [{S} + 104], r13",
    "mov qword ptr [{S} + 112], r14",
    "mov qword ptr [{S} + 120], r15",
    "mov rsp, qword ptr [{S} + {HOST}]",
    "pushfq",
    "pop qword ptr [{S} + {FL}]",
    "cmp qword ptr [{S} + {AVX}], 0",
    "je 2f",
    "mov eax, 7",
    "xor edx, edx",
    "xsave64 [{S} + {FX}]",
    "vzeroupper",
    "jmp 3f",
    "2:",
    "fxsave64 [{S} + {FX}]",
    "3:",
    ".globl kombi_lab_native_finish",
    "kombi_lab_native_finish:",
    "mov rsp, qword ptr [{S} + {HOST}]",
    "cld",
    "fninit",
    "ldmxcsr [{S} + {MX}]",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbx", "pop rbp",
    "ret",
    S = const STATE,
    HOST = const offset_of!(State, host_rsp),
    FX = const offset_of!(State, xsave),
    AVX = const offset_of!(State, avx),
    FL = const offset_of!(State, rflags),
    RIP = const offset_of!(State, rip),
    MX = const offset_of!(State, host_mxcsr),
);

/// (address, length) of what is shared with the child.
const SHARED: [(u64, usize); 4] = [
    (STATE, 4096),
    (DATA, DATA_LEN),
    (SLOTS, 4096),
    (CODE, CODE_LEN),
];

/// How long a program may run, in milliseconds.
const PATIENCE_MS: i32 = 10_000;

/// The child and the memory shared with it. One per process: the addresses are.
pub struct Oracle {
    child: libc::pid_t,
    ask: i32,
    answer: i32,
}

/// The address at which native code ends.
#[must_use]
pub fn native_end() -> u64 {
    kombi_lab_native_end as *const () as u64
}

fn host(doing: &'static str) -> Error {
    Error::Host {
        doing,
        source: io::Error::last_os_error(),
    }
}

impl Oracle {
    /// Maps the shared memory and forks the child.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn start() -> Result<Self, Error> {
        for (at, len) in SHARED {
            // SAFETY: NOREPLACE: no existing mapping is touched.
            let got = unsafe {
                libc::mmap(
                    at as *mut libc::c_void,
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                    -1,
                    0,
                )
            };
            if got as u64 != at {
                return Err(host("map memory for the native child"));
            }
        }
        let mut ask = [0; 2];
        let mut answer = [0; 2];
        // SAFETY: both arrays take two descriptors.
        if unsafe { libc::pipe(ask.as_mut_ptr()) | libc::pipe(answer.as_mut_ptr()) } != 0 {
            return Err(host("make pipes"));
        }
        // SAFETY: the child calls nothing but async-signal-safe functions.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: in the child, whose mappings and handlers nobody else uses.
            unsafe { child_main(ask[0], answer[1]) }
        }
        if child < 0 {
            return Err(host("fork"));
        }
        // SAFETY: the child's ends are ours to close.
        unsafe {
            libc::close(ask[0]);
            libc::close(answer[1]);
        }
        Ok(Self {
            child,
            ask: ask[1],
            answer: answer[0],
        })
    }

    /// Writes to shared memory.
    ///
    /// # Panics
    /// When the range is not shared memory.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        assert!(is_shared(at, bytes.len()), "{at:#x} is shared memory");
        // SAFETY: mapped for reading and writing by `start`; the child waits.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
    }

    /// Reads from shared memory.
    ///
    /// # Panics
    /// When the range is not shared memory.
    #[must_use]
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        assert!(is_shared(at, len), "{at:#x} is shared memory");
        // SAFETY: as in `write`.
        unsafe { std::slice::from_raw_parts(at as *const u8, len) }.to_vec()
    }

    /// Runs from `state` to [`native_end`] or to a fault.
    ///
    /// # Errors
    /// [`Error::Child`], after which the oracle is of no more use.
    pub fn run(&mut self, state: &State) -> Result<State, Error> {
        let mut start = state.clone();
        start.vector = NO_VECTOR;
        start.host_mxcsr = 0x1f80;
        start.avx = u64::from(std::is_x86_feature_detected!("avx"));
        // SAFETY: STATE is a page of shared memory, aligned; the child waits.
        unsafe { std::ptr::write(STATE as *mut State, start) };
        let mut byte = 0_u8;
        let mut wait = libc::pollfd {
            fd: self.answer,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one byte each way, one descriptor.
        let done = unsafe {
            libc::write(self.ask, (&raw const byte).cast(), 1) == 1
                && libc::poll(&raw mut wait, 1, PATIENCE_MS) == 1
        };
        if !done {
            return Err(Error::Child {
                how: "does not come to an end",
            });
        }
        // SAFETY: room for one byte.
        if unsafe { libc::read(self.answer, (&raw mut byte).cast(), 1) } != 1 {
            return Err(Error::Child { how: "died" });
        }
        // SAFETY: as above; the child has written and waits again.
        Ok(unsafe { std::ptr::read(STATE as *const State) })
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // SAFETY: our child, our descriptors, our mappings; nothing points there.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
            libc::close(self.ask);
            libc::close(self.answer);
            for (at, len) in SHARED {
                libc::munmap(at as *mut libc::c_void, len);
            }
        }
    }
}

fn is_shared(at: u64, len: usize) -> bool {
    SHARED.iter().any(|(start, size)| {
        at >= *start
            && at
                .checked_add(len as u64)
                .is_some_and(|end| end <= start + *size as u64)
    })
}

const ALTERNATE_STACK: usize = 64 << 10;
const ARCH_SET_GS: i32 = 0x1001;

/// # Safety
/// To be called in a forked child only: it never returns.
unsafe fn child_main(ask: i32, answer: i32) -> ! {
    // SAFETY: the ranges are the child's own copies of the shared mappings; the
    // handler only touches STATE and the signal's frame.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::close(ask + 1);
        let rwx = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        libc::mprotect(CODE as *mut libc::c_void, CODE_LEN, rwx);
        libc::mprotect(READ_ONLY as *mut libc::c_void, 4096, libc::PROT_READ);
        let stack = libc::mmap(
            std::ptr::null_mut(),
            ALTERNATE_STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        let alternate = libc::stack_t {
            ss_sp: stack,
            ss_flags: 0,
            ss_size: ALTERNATE_STACK,
        };
        libc::sigaltstack(&raw const alternate, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
        ] {
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
        libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE);
        let mut byte = 0_u8;
        while libc::read(ask, (&raw mut byte).cast(), 1) == 1 {
            kombi_lab_native();
            if libc::write(answer, (&raw const byte).cast(), 1) != 1 {
                break;
            }
        }
        libc::_exit(0)
    }
}

/// RAX to R15 in the order of encodings, as indexes of the signal frame.
const FRAME: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// In the bytes of FXSAVE that software may use: the image is an XSAVE area (Linux,
/// arch/x86/include/uapi/asm/sigcontext.h).
const MAGIC_AT: usize = 464;
const MAGIC: u32 = 0x4650_5853;

/// Async-signal-safe.
///
/// # Safety
/// `image` is a signal frame's x87 image.
unsafe fn take_registers(image: *const u8, into: &mut [u8; area::AVX_BYTES]) {
    // SAFETY: 512 bytes in any case; with the magic number, the header and as much
    // as XSTATE_BV says in standard form.
    unsafe {
        let word = |at: usize| image.add(at).cast::<u32>().read_unaligned();
        std::ptr::copy_nonoverlapping(image, into.as_mut_ptr(), area::LEGACY_BYTES);
        let upper = into[area::YMM_HIGH].as_mut_ptr();
        let len = area::YMM_HIGH.len();
        if word(MAGIC_AT) == MAGIC && u64::from(word(area::XSTATE_BV)) & area::AVX != 0 {
            std::ptr::copy_nonoverlapping(image.add(area::YMM_HIGH.start), upper, len);
        } else {
            std::ptr::write_bytes(upper, 0, len);
        }
    }
}

/// Async-signal-safe: copies the frame to STATE and lets the program end.
extern "C" fn on_fault(_: i32, _: *mut libc::siginfo_t, frame: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext; STATE is mapped; the x87 image is the
    // frame's.
    unsafe {
        let machine = &mut (*frame.cast::<libc::ucontext_t>()).uc_mcontext;
        let state = STATE as *mut State;
        for (to, from) in (*state).gpr.iter_mut().zip(FRAME) {
            *to = machine.gregs[from as usize] as u64;
        }
        (*state).rip = machine.gregs[libc::REG_RIP as usize] as u64;
        (*state).rflags = machine.gregs[libc::REG_EFL as usize] as u64;
        (*state).vector = machine.gregs[libc::REG_TRAPNO as usize] as u64;
        (*state).cr2 = machine.gregs[libc::REG_CR2 as usize] as u64;
        (*state).wrote = machine.gregs[libc::REG_ERR as usize] as u64 >> 1 & 1;
        take_registers(machine.fpregs.cast(), &mut (*state).xsave);
        machine.gregs[libc::REG_RIP as usize] =
            kombi_lab_native_finish as *const () as libc::greg_t;
        machine.gregs[libc::REG_EFL as usize] = 0x202;
    }
}
