//! Signals: host faults inside translated code, the poll page, the vCPU's timer.
//!
//! ```text
//! SIGBUS in a mapped file ──▶ `ram` repairs it
//! SIGSEGV SIGBUS SIGFPE SIGILL SIGTRAP
//!   pc in the code cache ──▶ note it in the context, continue at the exit thunk
//!   pc anywhere else ──────▶ whoever handled it before us
//! timer signal ──▶ request TIMER, close the poll page
//! the same, of the timer for samples ──▶ note pc; close the poll page now and then
//! SIGSYS ──▶ whoever forbade a system call; its handler must be SA_ONSTACK
//! ```
//!
//! Invariant: while [`Armed`] lives, faults of this thread in its code cache come
//! back as exit [`FAULT_EXIT`], on a signal stack of the thread's own, and every
//! signal that is not listed above is blocked: handlers of others may run on the
//! guest's stack pointer otherwise.
//!
//! What is marked async-signal-safe may run at any instruction of the thread.
#![allow(unsafe_code)] // sigaction, sigaltstack, ucontext, timers, mprotect

use std::cell::Cell;
use std::fmt::Write as _;
use std::io;
use std::ptr;
use std::sync::{Arc, OnceLock};

use translator::block::FAULT_EXIT;

use crate::doorbell::{Doorbell, TIMER};
use crate::enter::ContextBox;
use crate::report::{FaultDetails, Words};
use crate::samples::{PERIOD_NANOSECONDS, Samples};

const FAULTS: [i32; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];
const STACK_LEN: usize = 64 << 10;
/// What the signal of the timer for samples carries; that of the other carries 0.
const SAMPLING: usize = 1;

/// What the handlers need to know of the vCPU on this thread.
struct Running {
    code: (u64, u64),
    exit_thunk: u64,
    poll: u64,
    context: *mut translator::context::Context,
    doorbell: *const Doorbell,
    /// Of the last fault in translated code.
    details: Cell<FaultDetails>,
    /// Where samples go, if they are wanted.
    samples: Option<Arc<Samples>>,
}

thread_local! {
    // Const and without destructor: reading it is async-signal-safe.
    static RUNNING: Cell<*const Running> = const { Cell::new(ptr::null()) };
}

static PREVIOUS: OnceLock<Vec<(i32, libc::sigaction)>> = OnceLock::new();

/// Opens or closes the poll page at `poll`. Async-signal-safe.
///
/// `poll` must be the poll page of a context that exists.
fn protect(poll: u64, open: bool) {
    let protection = if open {
        libc::PROT_READ
    } else {
        libc::PROT_NONE
    };
    // SAFETY: the page is a context's own, of which Rust accesses no byte.
    unsafe { libc::mprotect(poll as *mut _, 4096, protection) };
}

/// The poll page of a context, as something that may be closed by any thread.
pub(crate) struct PollPage(u64);

impl PollPage {
    /// The context must outlive the result: `Doorbell` sees to that.
    pub(crate) fn of(context: &ContextBox) -> Self {
        let page = Self(context.poll_page());
        page.open();
        page
    }

    pub(crate) fn open(&self) {
        protect(self.0, true);
    }

    pub(crate) fn close(&self) {
        protect(self.0, false);
    }
}

/// Whether the calling thread is inside a run of this doorbell's vCPU.
pub(crate) fn runs_here(doorbell: &Doorbell) -> bool {
    let running = RUNNING.get();
    // SAFETY: what RUNNING points to lives until `Armed` resets it on this thread.
    !running.is_null() && unsafe { ptr::eq((*running).doorbell, doorbell) }
}

/// The handlers, armed for the vCPU on this thread.
pub(crate) struct Armed {
    running: Box<Running>,
    outer: *const Running,
    mask: libc::sigset_t,
    stack: Vec<u8>,
    outer_stack: libc::stack_t,
    timer: Timer,
    /// Deleted with the rest.
    _sampling: Option<Timer>,
}

/// A timer that signals the thread that made it.
struct Timer(libc::timer_t);

impl Timer {
    /// Its signals carry `value`.
    fn new(clock: libc::clockid_t, value: usize) -> io::Result<Self> {
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: all-zero bytes are a valid sigevent; pointers are to live values.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = timer_signal();
            event.sigev_value.sival_ptr = ptr::without_provenance_mut(value);
            event.sigev_notify_thread_id = libc::gettid();
            if libc::timer_create(clock, &mut event, &mut timer) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(timer))
    }

    /// Once in `nanoseconds`, then after `period` again and again unless it is 0.
    fn set(&self, nanoseconds: u64, period: u64) {
        let timespec = |nanoseconds: u64| libc::timespec {
            tv_sec: (nanoseconds / 1_000_000_000) as i64,
            tv_nsec: (nanoseconds % 1_000_000_000) as i64,
        };
        let value = libc::itimerspec {
            it_interval: timespec(period),
            it_value: timespec(nanoseconds),
        };
        // SAFETY: the timer is ours; `value` is read.
        unsafe { libc::timer_settime(self.0, 0, &value, ptr::null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours. A signal that is still pending finds RUNNING reset,
        // or another run, which it makes look once for nothing.
        unsafe { libc::timer_delete(self.0) };
    }
}

impl Armed {
    /// `context` and `doorbell` must outlive the result, which the caller's
    /// `run` guarantees by owning both.
    pub(crate) fn new(
        context: &mut ContextBox,
        doorbell: &Doorbell,
        code: (u64, u64),
        exit_thunk: u64,
        samples: Option<Arc<Samples>>,
    ) -> io::Result<Self> {
        install()?;
        let poll = context.poll_page();
        let context = &raw mut **context;
        let timer = Timer::new(libc::CLOCK_MONOTONIC, 0)?;
        let sampling = match &samples {
            Some(_) => Some(Timer::new(libc::CLOCK_THREAD_CPUTIME_ID, SAMPLING)?),
            None => None,
        };
        let running = Box::new(Running {
            code,
            exit_thunk,
            poll,
            context,
            doorbell,
            details: Cell::default(),
            samples,
        });
        let mut stack = vec![0u8; STACK_LEN];
        let new = libc::stack_t {
            ss_sp: stack.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: STACK_LEN,
        };
        // SAFETY: all-zero bytes are valid values of these plain C structures.
        let (mut outer_stack, mut mask, mut blocked): (
            libc::stack_t,
            libc::sigset_t,
            libc::sigset_t,
        ) = unsafe { std::mem::zeroed() };
        let outer = RUNNING.get();
        // SAFETY: pointers are to live values of the right type; the new signal
        // stack lives until `drop` has put the old one back.
        unsafe {
            libc::sigfillset(&mut blocked);
            for signal in FAULTS.into_iter().chain([timer_signal(), libc::SIGSYS]) {
                libc::sigdelset(&mut blocked, signal);
            }
            libc::sigaltstack(&new, &mut outer_stack);
            RUNNING.set(&raw const *running);
            libc::pthread_sigmask(libc::SIG_SETMASK, &blocked, &mut mask);
        }
        if let Some(sampling) = &sampling {
            sampling.set(PERIOD_NANOSECONDS, PERIOD_NANOSECONDS);
        }
        Ok(Self {
            running,
            outer,
            mask,
            stack,
            outer_stack,
            timer,
            _sampling: sampling,
        })
    }

    /// Of the last fault in translated code.
    pub(crate) fn fault_details(&self) -> FaultDetails {
        self.running.details.get()
    }

    /// Has the timer ring the doorbell in `nanoseconds` (at least one).
    pub(crate) fn set_timer(&self, nanoseconds: u64) {
        self.timer.set(nanoseconds.max(1), 0);
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        debug_assert_eq!(self.stack.len(), STACK_LEN);
        debug_assert!(ptr::eq(RUNNING.get(), &raw const *self.running));
        // SAFETY: undoes `new` in reverse order on the same thread (raw pointers
        // make `self` not Send). Signals of the timers, which go last, find RUNNING
        // reset, and their handler ignores them.
        unsafe {
            RUNNING.set(self.outer);
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.mask, ptr::null_mut());
            libc::sigaltstack(&self.outer_stack, ptr::null_mut());
        }
    }
}

fn timer_signal() -> i32 {
    libc::SIGRTMIN() + 7
}

/// Installs the handlers of this process, once. A thread that runs a vCPU may not be
/// allowed to do it later.
pub(crate) fn install() -> io::Result<()> {
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    static INSTALLING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = INSTALLING
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    // SAFETY: asks for the present action only.
    let ask = |signal| unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(signal, ptr::null(), &mut old) == 0).then_some((signal, old))
    };
    // Known before the first handler can run.
    let _ = PREVIOUS.set(FAULTS.into_iter().filter_map(ask).collect());
    let handlers: [(i32, usize); 6] = [
        (FAULTS[0], on_fault as *const () as usize),
        (FAULTS[1], on_fault as *const () as usize),
        (FAULTS[2], on_fault as *const () as usize),
        (FAULTS[3], on_fault as *const () as usize),
        (FAULTS[4], on_fault as *const () as usize),
        (timer_signal(), on_timer as *const () as usize),
    ];
    for (signal, handler) in handlers {
        // SAFETY: the handlers have the signature that SA_SIGINFO asks for and are
        // async-signal-safe.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigfillset(&mut action.sa_mask);
            libc::sigaction(signal, &action, ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Async-signal-safe.
extern "C" fn on_timer(_: i32, info: *mut libc::siginfo_t, ucontext: *mut libc::c_void) {
    let running = RUNNING.get();
    if running.is_null() {
        return;
    }
    // SAFETY: see `runs_here`; the doorbell lives as long as the run. The kernel passes
    // valid pointers for SA_SIGINFO handlers, and a timer's signal has a value.
    unsafe {
        let running = &*running;
        if (*info).si_value().sival_ptr.addr() != SAMPLING {
            (*running.doorbell).note(TIMER);
            return protect(running.poll, false);
        }
        let Some(samples) = &running.samples else {
            return;
        };
        let registers = &(*ucontext.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let pc = registers[libc::REG_RIP as usize] as u64;
        if pc < running.code.0 || pc >= running.code.1 {
            samples.note_elsewhere();
        } else if samples.note(pc) {
            // Code that never leaves by itself does so at its next block head. Nothing is
            // requested: the page opens with that fault.
            protect(running.poll, false);
        }
    }
}

/// Async-signal-safe.
extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, ucontext: *mut libc::c_void) {
    let running = RUNNING.get();
    // SAFETY: the kernel passes valid pointers for SA_SIGINFO handlers. What
    // RUNNING points to lives as long as the run; the context is not borrowed by
    // Rust code meanwhile, as the pc is inside of translated code.
    unsafe {
        let registers = &mut (*ucontext.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let pc = registers[libc::REG_RIP as usize] as u64;
        // A mapped file became shorter: zeros are in its place now.
        let lost = signal == libc::SIGBUS && (*info).si_code == libc::BUS_ADRERR;
        if lost && ram::repair((*info).si_addr() as u64) {
            return;
        }
        if running.is_null() {
            return chain(signal, info, ucontext);
        }
        let running = &*running;
        if pc < running.code.0 || pc >= running.code.1 {
            tell(signal, info, registers, running);
            return chain(signal, info, ucontext);
        }
        let trap = registers[libc::REG_TRAPNO as usize] as u64;
        let address = (*info).si_addr() as u64;
        let polled = signal == libc::SIGSEGV && trap == 14 && address & !0xfff == running.poll;
        if polled {
            protect(running.poll, true);
        }
        let context = running.context;
        (*context).fault_pc = pc;
        (*context).fault_signal = if polled { 0 } else { signal as u64 };
        (*context).fault_trap = trap;
        let r15 = registers[libc::REG_R15 as usize] as u64;
        running.details.set(FaultDetails { address, r15 });
        registers[libc::REG_R15 as usize] = i64::from(FAULT_EXIT);
        registers[libc::REG_RIP as usize] = running.exit_thunk as i64;
    }
}

/// Says what is known of a fault on a vCPU's thread outside of translated code: the
/// engine is wrong, or translated code jumped out. Async-signal-safe.
///
/// # Safety
/// `info` is a SA_SIGINFO handler's; what `running` names is there.
unsafe fn tell(
    signal: i32,
    info: *mut libc::siginfo_t,
    registers: &[libc::greg_t; 23],
    running: &Running,
) {
    let register = |index: i32| registers[index as usize] as u64;
    let pc = register(libc::REG_RIP);
    // SAFETY: as the caller says.
    let (address, rip, resume) = unsafe {
        let context = running.context;
        let fields = (&raw const (*context).rip, &raw const (*context).resume);
        ((*info).si_addr() as u64, fields.0.read(), fields.1.read())
    };
    let mut words = Words::new();
    // What does not fit is left out.
    let _ = writeln!(
        words,
        "kombi: the engine failed: signal {signal}, trap {} at host pc {pc:#x}, address {address:#x}, \
         outside of translated code\n  guest rip {rip:#x} at the last exit; entered translated code \
         ({:#x} to {:#x}) at {resume:#x}",
        register(libc::REG_TRAPNO),
        running.code.0,
        running.code.1,
    );
    const NAMES: [(&str, i32); 16] = [
        ("rax", libc::REG_RAX),
        ("rcx", libc::REG_RCX),
        ("rdx", libc::REG_RDX),
        ("rbx", libc::REG_RBX),
        ("rsp", libc::REG_RSP),
        ("rbp", libc::REG_RBP),
        ("rsi", libc::REG_RSI),
        ("rdi", libc::REG_RDI),
        ("r8", libc::REG_R8),
        ("r9", libc::REG_R9),
        ("r10", libc::REG_R10),
        ("r11", libc::REG_R11),
        ("r12", libc::REG_R12),
        ("r13", libc::REG_R13),
        ("r14", libc::REG_R14),
        ("r15", libc::REG_R15),
    ];
    for (i, (name, index)) in NAMES.into_iter().enumerate() {
        let space = if i % 4 == 0 { "  " } else { " " };
        let end = if i % 4 == 3 { "\n" } else { "" };
        let _ = write!(words, "{space}{name} {:#x}{end}", register(index));
    }
    // These say where they are; others say what was not there, and it may be the code.
    let at_pc = [libc::SIGILL, libc::SIGFPE, libc::SIGTRAP].contains(&signal);
    if at_pc || address != pc {
        // SAFETY: the instruction at `pc` was fetched; its page holds what is read.
        let code = unsafe {
            let len = 16.min(4096 - (pc & 0xfff) as usize);
            std::slice::from_raw_parts(pc as *const u8, len)
        };
        let _ = write!(words, "  host code at pc:");
        words.hex(code);
        let _ = writeln!(words);
    }
    let words = words.bytes();
    // SAFETY: a whole buffer.
    unsafe { libc::write(2, words.as_ptr().cast(), words.len()) };
}

/// Hands a fault to whoever handled it before. Async-signal-safe.
///
/// # Safety
/// The arguments are those of a SA_SIGINFO handler.
unsafe fn chain(signal: i32, info: *mut libc::siginfo_t, ucontext: *mut libc::c_void) {
    let previous = PREVIOUS
        .get()
        .and_then(|all| all.iter().find(|(s, _)| *s == signal));
    // SAFETY: the action is one that was installed, called as its flags say.
    // Without one the default action comes back and the instruction faults again.
    unsafe {
        match previous {
            Some((_, old)) if old.sa_sigaction == libc::SIG_IGN => {}
            Some((_, old)) if old.sa_sigaction != libc::SIG_DFL => {
                if old.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(old.sa_sigaction);
                    handler(signal, info, ucontext);
                } else {
                    let handler: extern "C" fn(i32) = std::mem::transmute(old.sa_sigaction);
                    handler(signal);
                }
            }
            Some(_) | None => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}
