//! What kvm-ioctls leaves unsafe, behind safe functions: memory slots, the page that a
//! vCPU shares with the kernel, extended state, and the signal that interrupts a run.
//!
//! Invariant: guest memory stays mapped for as long as a slot names it ([`Vm`] owns both);
//! what an [`Exit`] borrows lies in the vCPU's shared pages.
#![allow(unsafe_code)] // raw addresses for the kernel, unions that it fills, a signal handler

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_OUT,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irqchip, kvm_run, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{IoEventAddress, VcpuExit, VcpuFd, VmFd};
use ram::{AccessListener, Gpa, GuestRam};
use rustix::mm::{MapFlags, ProtFlags};
use vmm_sys_util::eventfd::EventFd;

use crate::slots::{Slot, slots};

/// A machine of the kernel's, and the memory that its slots name.
#[derive(Debug)]
pub(crate) struct Vm {
    // Before `ram`: the machine goes first.
    fd: VmFd,
    ram: GuestRam,
    slots: Vec<Slot>,
    /// Of each slot, whether KVM knows of it; and whether writes are logged.
    known: Mutex<(Vec<bool>, bool)>,
}

impl Vm {
    /// The machine with what may be reached of `ram`; it follows what comes and goes.
    pub(crate) fn new(fd: VmFd, ram: GuestRam) -> io::Result<Arc<Self>> {
        let slots = slots(ram.regions());
        let known = Mutex::new((vec![false; slots.len()], false));
        let vm = Arc::new(Self {
            fd,
            ram,
            slots,
            known,
        });
        let listener: Arc<dyn AccessListener> = vm.clone();
        vm.ram.listen(Arc::downgrade(&listener));
        vm.follow(|_| true)?;
        Ok(vm)
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Slots that KVM knows of.
    pub(crate) fn slots(&self) -> Vec<Slot> {
        let known = self.known();
        let both = self.slots.iter().zip(&known.0);
        both.filter(|(_, known)| **known)
            .map(|(slot, _)| *slot)
            .collect()
    }

    /// Begins or ends the log of pages that the guest writes.
    pub(crate) fn log_writes(&self, log: bool) -> io::Result<()> {
        let mut known = self.known();
        known.1 = log;
        for (slot, known) in self.slots.iter().zip(&known.0) {
            if *known {
                self.set(slot, slot.len, log)?;
            }
        }
        Ok(())
    }

    /// Has KVM know of those slots that are there now, of those that `concerned` is true of.
    fn follow(&self, concerned: impl Fn(&Slot) -> bool) -> io::Result<()> {
        let mut known = self.known();
        let log = known.1;
        for (slot, known) in self.slots.iter().zip(&mut known.0) {
            let there = concerned(slot) && slot.is_there(&self.ram);
            if concerned(slot) && there != *known {
                self.set(slot, if there { slot.len } else { 0 }, log)?;
                *known = there;
            }
        }
        Ok(())
    }

    /// Says where a slot is; of length 0, that there is none.
    fn set(&self, slot: &Slot, len: u64, log: bool) -> io::Result<()> {
        let mut flags = 0;
        if slot.read_only {
            flags |= KVM_MEM_READONLY;
        }
        if log {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let base = self.ram.host_base().as_ptr() as u64;
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags,
            guest_phys_addr: slot.at.0,
            memory_size: len,
            userspace_addr: base + slot.at.0,
        };
        // SAFETY: a slot is part of a region, which is mapped at `host_base` plus its guest
        // address for as long as `ram` lives: no vCPU of `fd` runs after `self` (`KvmVcpu`
        // holds it).
        unsafe { self.fd.set_user_memory_region(region) }?;
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, (Vec<bool>, bool)> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the kernel add one to `bell` in place of an exit.
    pub(crate) fn ring_on_store(
        &self,
        at: u64,
        value: u32,
        bell: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let own = bell.try_clone_to_owned()?.into_raw_fd();
        // SAFETY: `own` is a descriptor of ours, which `bell` closes.
        let bell = unsafe { EventFd::from_raw_fd(own) };
        self.fd
            .register_ioevent(&bell, &IoEventAddress::Mmio(at), value)?;
        Ok(())
    }
}

impl AccessListener for Vm {
    fn granted(&self, at: Gpa, len: u64) {
        self.follow_range(at, len);
    }

    // A slot that goes is gone for every vCPU when the call returns.
    fn withdrawn(&self, at: Gpa, len: u64) {
        self.follow_range(at, len);
    }
}

impl Vm {
    fn follow_range(&self, at: Gpa, len: u64) {
        if let Err(error) = self.follow(|slot| slot.touches(at, len)) {
            // The guest finds no memory where it was promised some: it sees all ones.
            tracing::error!("KVM does not follow a change of guest memory: {error}");
        }
    }
}

/// The IOAPIC as KVM has it.
#[derive(Debug)]
pub(crate) struct IoApicRegisters {
    pub(crate) id: u32,
    pub(crate) select: u32,
    pub(crate) redirection: [u64; 24],
    /// Lines that are high, and edges that were not delivered.
    pub(crate) waiting: u32,
}

/// The IOAPIC of what KVM gave when it was asked for one.
pub(crate) fn ioapic(chip: &kvm_irqchip) -> IoApicRegisters {
    // SAFETY: every part of the union is numbers, of which any value is one.
    let from = unsafe { chip.chip.ioapic };
    IoApicRegisters {
        id: from.id,
        select: from.ioregsel,
        // SAFETY: as above.
        redirection: from.redirtbl.map(|entry| unsafe { entry.bits }),
        waiting: from.irr,
    }
}

/// Replaces it.
pub(crate) fn set_ioapic(chip: &mut kvm_irqchip, with: &IoApicRegisters) {
    // SAFETY: as above.
    let to = unsafe { &mut chip.chip.ioapic };
    (to.id, to.ioregsel, to.irr) = (with.id, with.select, with.waiting);
    for (entry, bits) in to.redirtbl.iter_mut().zip(with.redirection) {
        entry.bits = bits;
    }
}

/// The route of a line to a pin of a chip.
pub(crate) fn route(line: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi: line,
        type_: kvm_bindings::KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip: chip, pin },
        },
        ..Default::default()
    }
}

/// Why a run of the kernel's ended.
pub(crate) enum Exit<'a> {
    /// IN, `size` bytes each.
    PortRead {
        port: u16,
        size: usize,
        data: &'a mut [u8],
    },
    /// OUT, `size` bytes each.
    PortWrite {
        port: u16,
        size: usize,
        data: &'a [u8],
    },
    /// A load without memory behind it.
    MmioRead { at: u64, data: &'a mut [u8] },
    /// A store without memory behind it.
    MmioWrite { at: u64, data: &'a [u8] },
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// A triple fault.
    Shutdown,
    /// The processor refused the guest's state.
    FailEntry { reason: u64, cpu: u32 },
    /// The kernel cannot go on.
    InternalError { suberror: u32, data: Vec<u64> },
    /// The guest told its hypervisor something.
    SystemEvent { kind: u32 },
    /// A breakpoint of ours.
    Debug,
    /// Memory that the kernel could not reach.
    MemoryFault { at: u64 },
    /// Anything else.
    Other { reason: u32 },
}

/// Runs guest code until something ends it.
pub(crate) fn run(fd: &mut VcpuFd) -> io::Result<Exit<'_>> {
    match fd.run() {
        Ok(VcpuExit::MemoryFault { gpa, .. }) => return Ok(Exit::MemoryFault { at: gpa }),
        // Looked at below: kvm-ioctls leaves sizes and reasons out.
        Ok(_) => {}
        Err(error) => {
            let error = io::Error::from(error);
            return match error.raw_os_error() {
                // EAGAIN: a CPU that waited for its start may look again.
                Some(libc::EINTR | libc::EAGAIN) => Ok(Exit::Interrupted),
                _ => Err(error),
            };
        }
    }
    let run = fd.get_kvm_run();
    let reason = run.exit_reason;
    let first: *mut u8 = ptr::from_mut::<kvm_run>(run).cast();
    // SAFETY: the exit reason says which part of the union the kernel filled, and the
    // offset of port data lies within the pages that it shares with us.
    unsafe {
        let union = &mut run.__bindgen_anon_1;
        Ok(match reason {
            KVM_EXIT_IO => {
                let io = union.io;
                let (size, port) = (usize::from(io.size), io.port);
                let len = size * io.count as usize;
                let data = std::slice::from_raw_parts_mut(first.add(io.data_offset as usize), len);
                if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                    Exit::PortWrite { port, size, data }
                } else {
                    Exit::PortRead { port, size, data }
                }
            }
            KVM_EXIT_MMIO => {
                let mmio = &mut union.mmio;
                let at = mmio.phys_addr;
                let len = (mmio.len as usize).min(mmio.data.len());
                let data = &mut mmio.data[..len];
                if mmio.is_write != 0 {
                    Exit::MmioWrite { at, data }
                } else {
                    Exit::MmioRead { at, data }
                }
            }
            KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            KVM_EXIT_FAIL_ENTRY => Exit::FailEntry {
                reason: union.fail_entry.hardware_entry_failure_reason,
                cpu: union.fail_entry.cpu,
            },
            KVM_EXIT_INTERNAL_ERROR => {
                let internal = union.internal;
                let len = (internal.ndata as usize).min(internal.data.len());
                Exit::InternalError {
                    suberror: internal.suberror,
                    data: internal.data[..len].to_vec(),
                }
            }
            KVM_EXIT_DEBUG => Exit::Debug,
            KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent {
                kind: union.system_event.type_,
            },
            reason => Exit::Other { reason },
        })
    }
}

/// Replaces extended state, in XSAVE's standard form.
pub(crate) fn set_xsave(fd: &VcpuFd, xsave: &kvm_xsave) -> io::Result<()> {
    // SAFETY: the kernel reads more than `kvm_xsave` only where a process asked for
    // components of dynamic size (AMX), which this one never does.
    unsafe { fd.set_xsave(xsave) }?;
    Ok(())
}

/// The first page that a vCPU shares with the kernel, mapped once more so that other
/// threads reach `immediate_exit`.
#[derive(Debug)]
pub(crate) struct SharedPage {
    at: NonNull<u8>,
}

// SAFETY: it only gives access to one atomic byte.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

const PAGE: usize = 4096;

impl SharedPage {
    pub(crate) fn map(fd: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor stays open during the call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd() as RawFd) };
        // SAFETY: a null hint without MAP_FIXED never replaces a mapping.
        let at = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd.as_fd(),
                0,
            )
        }?;
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at })
    }

    /// Whether the kernel shall run the guest at all.
    pub(crate) fn set_immediate_exit(&self, yes: bool) {
        // SAFETY: the byte lies in the page, which is mapped until `self` drops, and all
        // that write to it from outside the kernel do so here.
        let byte = unsafe {
            let at = self.at.as_ptr().add(offset_of!(kvm_run, immediate_exit));
            AtomicU8::from_ptr(at)
        };
        byte.store(u8::from(yes), Ordering::SeqCst);
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody else has its address.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), PAGE) };
    }
}

/// The signal that interrupts a run.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 6
}

/// Does nothing: that it was delivered is what counts. Async-signal-safe.
extern "C" fn on_kick(_: libc::c_int) {}

/// Has the kick's signal interrupt system calls and do nothing else.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: the handler has the signature that flags without SA_SIGINFO ask for,
        // and does nothing. Calls that can go on do (SA_RESTART): KVM_RUN is none of them.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as *const () as usize;
            action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
            libc::sigaction(kick_signal(), &action, ptr::null_mut())
        };
        if result == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    });
    installed.map_err(io::Error::from_raw_os_error)
}

/// Lets the kick's signal reach the calling thread; gives the thread's id.
pub(crate) fn listen_for_kicks() -> io::Result<i32> {
    // SAFETY: the set is initialized before use, and the mask is the thread's own.
    let result = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut())
    };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    Ok(rustix::thread::gettid().as_raw_nonzero().get())
}

/// Interrupts what thread `id` of this process does.
pub(crate) fn interrupt(id: i32) {
    // SAFETY: a system call with three numbers. A thread that is gone is an error that
    // matters to nobody.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), id, kick_signal());
    }
}

/// CPU time between two looks at a vCPU that may stand still.
const NUDGE_NANOSECONDS: i64 = 20_000_000;

/// Interrupts runs on this thread from time to time, by the signal of kicks. The time is
/// the thread's: who waits is not woken.
#[derive(Debug)]
pub(crate) struct Nudges(libc::timer_t);

impl Nudges {
    pub(crate) fn start() -> io::Result<Self> {
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: all-zero bytes are a valid sigevent; pointers are to live values.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = kick_signal();
            event.sigev_notify_thread_id = libc::gettid();
            if libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &mut event, &mut timer) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        let period = libc::timespec {
            tv_sec: 0,
            tv_nsec: NUDGE_NANOSECONDS,
        };
        let times = libc::itimerspec {
            it_interval: period,
            it_value: period,
        };
        // SAFETY: the timer was made above and lives as long as `self`.
        unsafe { libc::timer_settime(timer, 0, &times, ptr::null_mut()) };
        Ok(Self(timer))
    }
}

impl Drop for Nudges {
    fn drop(&mut self) {
        // SAFETY: the timer is ours and nobody has its number any more.
        unsafe { libc::timer_delete(self.0) };
    }
}
