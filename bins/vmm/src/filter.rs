//! The system calls that a thread may make. On a vCPU's: what is left to a guest that
//! found its way out of the engine; docs/engine-security.md says what stands before. On
//! the others, each kind with a list of its own: what is left to who took them over by what
//! they read.
//!
//! Invariant: a call that is not listed is not done. Its thread gets SIGSYS and the
//! process ends with [`exit::FORBIDDEN_CALL`], naming the call; by SIGSYS itself where
//! the handler cannot run.
//!
//! Left to others: that the thread confines itself before it runs guest code
//! (`machine`), that SIGSYS is not blocked in it (`hv_soft`).
#![allow(unsafe_code)] // a signal handler with a stack of its own

mod api;
mod choice;
mod disk;
mod event_loop;
mod every;
#[cfg(test)]
mod exactness;
mod records;
mod signals;

use std::io;
use std::sync::Arc;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

pub(crate) use choice::{API, Choice, DISK, RECORDS, SIGNALS, VCPU, VMM};

use crate::failure::exit;

/// Calls that the engine, the devices and the allocator make with any arguments.
const ANY: &[i64] = &[
    // memory: the allocator, the code cache's pages, the end of the thread
    libc::SYS_brk,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // other threads, and waiting
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_membarrier,
    // the engine's signals and timer
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_delete,
    libc::SYS_getpid,
    libc::SYS_gettid,
    // open files: disks, TAP devices, the console, wake-ups
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    // drives' rings, which are restricted to their files (`ram::ring`)
    libc::SYS_io_uring_enter,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_timerfd_settime,
    libc::SYS_close,
    libc::SYS_getrandom,
    // open sockets: vsock
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_accept4,
    // the end
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Calls that fail rather than end the process: libraries make them and go on
/// without (glibc reads /proc/sys/vm/overcommit_memory when an arena shrinks, a panic
/// looks for its program's symbols).
const REFUSED: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_open,
    libc::SYS_readlink,
    libc::SYS_stat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getcwd,
    libc::SYS_ioctl,
];

// Linux, include/uapi/linux/kvm.h
const KVM_IRQ_LINE: u64 = 0x4008_ae61;
const KVM_GET_IRQCHIP: u64 = 0xc208_ae62;
const KVM_GET_CLOCK: u64 = 0x8030_ae7c;
const KVM_GET_DIRTY_LOG: u64 = 0x4010_ae42;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
// include/uapi/linux/sockios.h, include/uapi/asm-generic/ioctls.h
const SIOCGIFINDEX: u64 = 0x8933;
const FIONBIO: u64 = 0x5421;
// include/uapi/linux/if_tun.h
const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
/// What a network interface asks of its TAP device when a driver comes.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;

/// What a thread that runs a vCPU of KVM's asks of it (Linux, include/uapi/linux/kvm.h).
const KVM: &[u64] = &[
    0xae80, // KVM_RUN
    KVM_IRQ_LINE,
    KVM_SET_USER_MEMORY_REGION, // when memory comes or goes
    0xaead,                     // KVM_KVMCLOCK_CTRL
    0x8090_ae81,                // KVM_GET_REGS, and so on: state
    0xaea3,
    0x4090_ae82,
    0x8138_ae83,
    0x4138_ae84,
    0xc008_ae88,
    0x4008_ae89,
    0x8400_ae8e,
    0x4400_ae8f,
    0x8004_ae98,
    0x4004_ae99,
    0x8040_ae9f,
    0x4040_aea0,
    0x8080_aea1,
    0x4080_aea2,
    0x9000_aea4,
    0x5000_aea5,
    0x8188_aea6,
    0x4188_aea7,
    0xc018_ae85, // KVM_TRANSLATE, KVM_SET_GUEST_DEBUG: hv_kvm's corrections
    0x4048_ae9b,
];

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_GET_GS: u64 = 0x1004;

/// Programs for the kernel: of those that speak, the strictest counts.
#[derive(Clone)]
pub(crate) struct Filter {
    programs: Arc<[BpfProgram]>,
}

impl Filter {
    /// The filter for threads that run vCPUs of the software engine, and the handler that
    /// says what it forbade.
    ///
    /// # Errors
    /// The host's; what the list itself has wrong.
    pub(crate) fn for_translated_code() -> io::Result<Self> {
        let refused = || {
            let mut rules = plain(REFUSED);
            let other = SeccompCmpOp::Ne;
            rules.insert(libc::SYS_ioctl, one_of(1, &other, &[TUNSETOFFLOAD])?);
            Ok(rules)
        };
        Self::of(allowed, refused, libc::EACCES)
    }

    /// The same for vCPUs of KVM's. All they ask of devices by ioctl is KVM's, and that.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn for_kvm() -> io::Result<Self> {
        let allowed = || {
            let mut rules = allowed()?;
            let requests = [KVM, &[TUNSETOFFLOAD]].concat();
            let is = SeccompCmpOp::Eq;
            rules.insert(libc::SYS_ioctl, one_of(1, &is, &requests)?);
            Ok(rules)
        };
        let refused = || {
            let mut rules = plain(REFUSED);
            rules.remove(&libc::SYS_ioctl);
            Ok(rules)
        };
        Self::of(allowed, refused, libc::EACCES)
    }

    /// The filter for the event loop.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn for_event_loop() -> io::Result<Self> {
        let allowed = || {
            let mut rules = common(&[event_loop::ANY])?;
            let is = SeccompCmpOp::Eq;
            rules.insert(libc::SYS_socket, one_of(0, &is, &[libc::AF_UNIX as u64])?);
            let requests = one_of(1, &is, event_loop::REQUESTS)?;
            rules.insert(libc::SYS_ioctl, requests);
            // No ring is made any more, so there is none that is not restricted.
            let register = one_of(1, &is, event_loop::REGISTER)?;
            rules.insert(libc::SYS_io_uring_register, register);
            Ok(rules)
        };
        Self::of(allowed, || Ok(Rules::new()), libc::EACCES)
    }

    /// The filter for the API's threads.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn for_api() -> io::Result<Self> {
        let allowed = || {
            let mut rules = common(&[api::ANY])?;
            let is = SeccompCmpOp::Eq;
            rules.insert(libc::SYS_socket, one_of(0, &is, &[libc::AF_UNIX as u64])?);
            rules.insert(libc::SYS_prctl, one_of(0, &is, api::PRCTL)?);
            rules.insert(libc::SYS_ioctl, one_of(1, &is, api::REQUESTS)?);
            let register = one_of(1, &is, api::REGISTER)?;
            rules.insert(libc::SYS_io_uring_register, register);
            let descriptors = [every::DESCRIPTORS, api::COPIES].concat();
            rules.insert(libc::SYS_fcntl, one_of(1, &is, &descriptors)?);
            // Flags of clone3(2) are out of a filter's sight: the C library does without it
            // where it is not there.
            rules.insert(libc::SYS_clone, one_of(0, &is, &[api::A_THREAD])?);
            rules.insert(libc::SYS_clone3, Vec::new());
            Ok(rules)
        };
        Self::of(allowed, || Ok(plain(&[libc::SYS_clone3])), libc::ENOSYS)
    }

    /// The filter for threads that wait for disks. Those of KVM's machines raise interrupts
    /// by ioctl.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn for_disks() -> io::Result<Self> {
        let allowed = || {
            let mut rules = common(&[disk::ANY, disk::REFUSED])?;
            let requests = one_of(1, &SeccompCmpOp::Eq, disk::REQUESTS)?;
            rules.insert(libc::SYS_ioctl, requests);
            Ok(rules)
        };
        Self::of(allowed, || Ok(plain(disk::REFUSED)), libc::EACCES)
    }

    /// The filter for threads that write what is to last.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn for_records() -> io::Result<Self> {
        let allowed = || common(&[records::ANY]);
        Self::of(allowed, || Ok(Rules::new()), libc::EACCES)
    }

    /// The filter for the thread that takes signals.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn for_signals() -> io::Result<Self> {
        let allowed = || common(&[signals::ANY, signals::REFUSED]);
        Self::of(allowed, || Ok(plain(signals::REFUSED)), libc::EACCES)
    }

    fn of(
        allowed: impl FnOnce() -> Result<Rules, seccompiler::BackendError>,
        refused: impl FnOnce() -> Result<Rules, seccompiler::BackendError>,
        errno: i32,
    ) -> io::Result<Self> {
        install_handler()?;
        let bad = |error: seccompiler::BackendError| io::Error::other(error.to_string());
        let allowed = allowed().map_err(bad)?;
        let refused = refused().map_err(bad)?;
        let compile = |rules, otherwise, matching| {
            SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64)
                .and_then(BpfProgram::try_from)
        };
        let programs = [
            compile(
                refused,
                SeccompAction::Allow,
                SeccompAction::Errno(errno as u32),
            ),
            compile(allowed, SeccompAction::Trap, SeccompAction::Allow),
        ];
        let [first, second] = programs;
        Ok(Self {
            programs: Arc::from([first.map_err(bad)?, second.map_err(bad)?]),
        })
    }

    /// Confines the calling thread for the rest of its life.
    ///
    /// # Errors
    /// The host's: its kernel may have no seccomp.
    pub(crate) fn confine_this_thread(&self) -> io::Result<()> {
        for program in self.programs.iter() {
            seccompiler::apply_filter(program)
                .map_err(|error| io::Error::other(error.to_string()))?;
        }
        Ok(())
    }
}

type Rules = std::collections::BTreeMap<i64, Vec<SeccompRule>>;

/// Rules that these calls meet whatever their arguments are.
fn plain(calls: &[i64]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// Rules that one of `values` meets.
fn one_of(
    argument: u8,
    operator: &SeccompCmpOp,
    values: &[u64],
) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rules = values.iter().map(|value| {
        let length = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(argument, length, operator.clone(), *value)?;
        SeccompRule::new(vec![condition])
    });
    rules.collect()
}

/// What every thread may that runs no guest code, and `more` with any arguments.
fn common(more: &[&[i64]]) -> Result<Rules, seccompiler::BackendError> {
    let mut rules = plain(&[&[every::ANY], more].concat().concat());
    rules.extend(nothing_new_and_nobody_else()?);
    let descriptors = one_of(1, &SeccompCmpOp::Eq, every::DESCRIPTORS)?;
    rules.insert(libc::SYS_fcntl, descriptors);
    Ok(rules)
}

/// Nothing new becomes executable; memory is not merged with that of others; abort() and panics signal their own process only.
fn nothing_new_and_nobody_else() -> Result<Rules, seccompiler::BackendError> {
    let no_exec = one_of(2, &SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), &[0])?;
    let own = u64::from(std::process::id());
    let own = one_of(0, &SeccompCmpOp::Eq, &[own])?;
    Ok(Rules::from([
        (libc::SYS_mmap, no_exec.clone()),
        (libc::SYS_mprotect, no_exec),
        (
            libc::SYS_madvise,
            one_of(2, &SeccompCmpOp::Eq, every::ADVICE)?,
        ),
        (libc::SYS_tgkill, own),
    ]))
}

fn allowed() -> Result<Rules, seccompiler::BackendError> {
    let mut rules = plain(&[ANY, REFUSED].concat());
    let mut only = |call, argument, operator: SeccompCmpOp, values: &[u64]| {
        rules.insert(call, one_of(argument, &operator, values)?);
        Ok::<_, seccompiler::BackendError>(())
    };
    only(
        libc::SYS_arch_prctl,
        0,
        SeccompCmpOp::Eq,
        &[ARCH_SET_GS, ARCH_GET_GS],
    )?;
    // std looks whether a descriptor is open before it closes it, in debug builds.
    only(
        libc::SYS_fcntl,
        1,
        SeccompCmpOp::Eq,
        &[libc::F_GETFD as u64, libc::F_GETFL as u64],
    )?;
    // vsock's connections to the host's sockets
    only(
        libc::SYS_socket,
        0,
        SeccompCmpOp::Eq,
        &[libc::AF_UNIX as u64],
    )?;
    // A fault that is nobody's ends the process by its own name.
    let faults = [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGILL,
        libc::SIGTRAP,
    ];
    only(
        libc::SYS_rt_sigaction,
        0,
        SeccompCmpOp::Eq,
        &faults.map(|signal| signal as u64),
    )?;
    rules.extend(nothing_new_and_nobody_else()?);
    Ok(rules)
}

fn install_handler() -> io::Result<()> {
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, is
    // async-signal-safe and never returns. It runs on a signal stack: a thread that
    // executes guest code has the guest's stack pointer.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_forbidden_call as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Says which call it was and ends the process. Async-signal-safe.
extern "C" fn on_forbidden_call(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// Of `si_syscall` in `siginfo_t` (Linux, include/uapi/asm-generic/siginfo.h):
    /// behind three numbers, padding and an address.
    const NUMBER_AT: usize = 24;
    /// `si_code` of a signal from a filter.
    const SYS_SECCOMP: i32 = 1;
    // SAFETY: the kernel passes a whole siginfo_t of 128 bytes.
    let (number, code) = unsafe {
        let number = info.cast::<u8>().add(NUMBER_AT).cast::<i32>().read();
        (number, (*info).si_code)
    };
    let mut forbidden =
        *b"kombi-vmm: error: system call ..... is forbidden to the thread that made it\n";
    write_number(&mut forbidden[30..35], number);
    let line: &[u8] = if code == SYS_SECCOMP {
        &forbidden
    } else {
        b"kombi-vmm: error: another process sent SIGSYS\n"
    };
    // SAFETY: `line` is a whole buffer; _exit ends the process without running
    // anything of it.
    unsafe {
        libc::write(2, line.as_ptr().cast(), line.len());
        libc::_exit(exit::FORBIDDEN_CALL.into())
    }
}

/// Decimal, right-aligned among dots that become spaces.
fn write_number(into: &mut [u8], number: i32) {
    let mut left = number.unsigned_abs();
    for (i, byte) in into.iter_mut().rev().enumerate() {
        *byte = if left != 0 || i == 0 {
            b'0' + (left % 10) as u8
        } else {
            b' '
        };
        left /= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_right_aligned() {
        for (number, wanted) in [(0, "    0"), (59, "   59"), (12345, "12345")] {
            let mut text = *b".....";
            write_number(&mut text, number);
            assert_eq!(std::str::from_utf8(&text).unwrap(), wanted);
        }
    }

    #[test]
    fn a_forbidden_call_ends_the_process_and_is_named() {
        const CHILD: &str = "KOMBI_TEST_FORBIDDEN_CALL";
        if std::env::var_os(CHILD).is_some() {
            let filter = Filter::for_translated_code().unwrap();
            let _ = std::thread::spawn(move || {
                filter.confine_this_thread().unwrap();
                rustix::process::getppid()
            })
            .join();
            unreachable!("the call was made");
        }
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "filter::tests::a_forbidden_call_ends_the_process_and_is_named",
                "--nocapture",
            ])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert_eq!(child.status.code(), Some(148), "{child:?}");
        let words = String::from_utf8_lossy(&child.stderr);
        let wanted = format!("system call {:5} is forbidden", libc::SYS_getppid);
        assert!(words.contains(&wanted), "{words}");
    }

    #[test]
    fn a_refused_call_fails_and_a_listed_one_works_in_a_confined_thread() {
        let filter = Filter::for_translated_code().unwrap();
        let outcome = std::thread::spawn(move || {
            filter.confine_this_thread().unwrap();
            let opened = std::fs::File::open("/proc/self/status");
            let boxed = vec![0_u8; 8 << 20];
            (opened.map_err(|error| error.kind()).err(), boxed.len())
        });
        let (opened, len) = outcome.join().unwrap();
        assert_eq!(opened, Some(io::ErrorKind::PermissionDenied));
        assert_eq!(len, 8 << 20);
    }
}
