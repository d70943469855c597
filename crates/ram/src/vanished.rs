//! Pages of mapped files that are not there any more: somebody made the file shorter, or
//! its disk cannot be read. The host's CPU answers an access with SIGBUS; here the page
//! becomes zeros of this process, and the access goes on. What the guest stores there is
//! lost, as its file is.
//!
//! ```text
//! SIGBUS at an address of a registered mapping ──▶ zeros from there (file's end) or
//!                                                  there (page unreadable); go on
//! any other ──▶ whoever handled SIGBUS before us
//! ```
//!
//! Invariant: what is registered is mapped until [`Watched`] is dropped, and nothing but
//! its own pages is ever replaced.
//!
//! The kernel itself answers EFAULT where a system call would access such a page, and so
//! may KVM: [`Watched::heal`] does the same without a signal.
#![allow(unsafe_code)] // sigaction, mmap over mapped pages

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

const PAGE: u64 = crate::PAGE_SIZE;
/// Files mapped by one process at a time: machines of tests share theirs.
const SLOTS: usize = 256;

/// One mapped file, as the signal handler finds it.
struct Slot {
    taken: AtomicBool,
    /// First host address; 0 while there is none.
    start: AtomicU64,
    len: AtomicU64,
    file: AtomicI32,
    /// Offset in the file of the first byte.
    from: AtomicU64,
    /// Offset from which everything was replaced by zeros.
    gone: AtomicU64,
}

static MAPPED: [Slot; SLOTS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicU64::new(0),
        len: AtomicU64::new(0),
        file: AtomicI32::new(-1),
        from: AtomicU64::new(0),
        gone: AtomicU64::new(0),
    }
}; SLOTS];

/// What SIGBUS did before.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A mapping whose vanished pages become zeros, until this is dropped.
#[derive(Debug)]
pub(crate) struct Watched {
    slot: usize,
    file: File,
}

impl Watched {
    /// `start` and `len` are a mapping of `file` from offset `from`, in whole pages, that
    /// stays until the result is dropped.
    pub(crate) fn new(start: u64, len: u64, file: OwnedFd, from: u64) -> io::Result<Self> {
        install()?;
        let free = |slot: &Slot| !slot.taken.swap(true, Ordering::SeqCst);
        let index = MAPPED
            .iter()
            .position(free)
            .ok_or_else(|| io::Error::other("too many mapped files in this process"))?;
        let slot = &MAPPED[index];
        slot.len.store(len, Ordering::SeqCst);
        slot.gone.store(len, Ordering::SeqCst);
        slot.from.store(from, Ordering::SeqCst);
        slot.file.store(file.as_raw_fd(), Ordering::SeqCst);
        slot.start.store(start, Ordering::SeqCst);
        Ok(Self {
            slot: index,
            file: file.into(),
        })
    }

    /// Replaces what the file lost since. True if that was something.
    pub(crate) fn heal(&self) -> io::Result<bool> {
        let slot = &MAPPED[self.slot];
        let from = slot.from.load(Ordering::SeqCst);
        let len = self.file.metadata()?.len().saturating_sub(from);
        let end = len.next_multiple_of(PAGE);
        let gone = slot.gone.load(Ordering::SeqCst);
        if end >= gone {
            return Ok(false);
        }
        let start = slot.start.load(Ordering::SeqCst);
        Ok(zeros(start + end, gone - end) && slot.gone.fetch_min(end, Ordering::SeqCst) > end)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let slot = &MAPPED[self.slot];
        slot.start.store(0, Ordering::SeqCst);
        slot.len.store(0, Ordering::SeqCst);
        slot.file.store(-1, Ordering::SeqCst);
        slot.taken.store(false, Ordering::SeqCst);
    }
}

/// Maps zeros over whole pages of a registered mapping. Async-signal-safe.
fn zeros(at: u64, len: u64) -> bool {
    // SAFETY: the callers took the range from a slot: its mapping is there, as somebody
    // is accessing it or owns its `Watched`, and it is guest memory, of which Rust makes
    // no references.
    let mapped = unsafe {
        libc::mmap(
            at as *mut libc::c_void,
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

/// Whether an access to `address` that raised SIGBUS may be tried again: it was to a
/// mapped file, and there are zeros now. Async-signal-safe; of system calls it makes
/// pread and mmap.
pub fn repair(address: u64) -> bool {
    for slot in &MAPPED {
        let start = slot.start.load(Ordering::SeqCst);
        let len = slot.len.load(Ordering::SeqCst);
        let inside = start != 0 && address >= start && address - start < len;
        // What was accessed is mapped, so that its own slot does not change meanwhile.
        if !inside || slot.start.load(Ordering::SeqCst) != start {
            continue;
        }
        let offset = (address - start) & !(PAGE - 1);
        let gone = slot.gone.load(Ordering::SeqCst);
        if offset >= gone {
            // Another thread was faster.
            return true;
        }
        let mut byte = 0_u8;
        // SAFETY: one byte of a live variable.
        let read = unsafe {
            libc::pread(
                slot.file.load(Ordering::SeqCst),
                (&raw mut byte).cast(),
                1,
                (slot.from.load(Ordering::SeqCst) + offset) as i64,
            )
        };
        return match read {
            1 => true,
            0 if zeros(start + offset, gone - offset) => {
                slot.gone.fetch_min(offset, Ordering::SeqCst);
                true
            }
            0 => false,
            _ => zeros(start + offset, PAGE),
        };
    }
    false
}

fn install() -> io::Result<()> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _guard = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and is
    // async-signal-safe; pointers are to live values. What was there is known before
    // the first call.
    let result = unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, ptr::null(), &mut old) != 0 {
            return Err(io::Error::last_os_error());
        }
        let _ = PREVIOUS.set(old);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigfillset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Async-signal-safe.
extern "C" fn on_bus_error(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes valid pointers for SA_SIGINFO handlers; the previous
    // action is called as its flags say. Without one the default action comes back, and
    // the access faults again.
    unsafe {
        if (*info).si_code == libc::BUS_ADRERR && repair((*info).si_addr() as u64) {
            return;
        }
        let Some(old) = PREVIOUS.get() else {
            return;
        };
        match old.sa_sigaction {
            libc::SIG_IGN => {}
            libc::SIG_DFL => {
                libc::signal(signal, libc::SIG_DFL);
            }
            handler if old.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(i32) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}
