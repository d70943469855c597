//! Opening KVM, and making machines.

use std::io::ErrorKind;
use std::sync::Arc;

use hv::{Completion, Error, GuestRam, Hypervisor};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting, Msrs, kvm_enable_cap,
    kvm_msr_entry,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use x86::cpu_template::{CpuTemplate, KvmCapability};
use x86::features::CpuModel;
use x86::guest_cpuid::Place;
use x86::msr;

use crate::cpuid::Supported;
use crate::ioctl::{self, Vm};
use crate::partition::KvmPartition;
use crate::state::Shape;
use crate::vcpu::KvmVcpu;
use crate::{DEVICE, NAME, failed};

/// Most vCPUs of a machine, as Firecracker has it.
const VCPUS_MAX: u8 = 32;
/// Pins of the IOAPIC.
pub(crate) const PINS: u32 = 24;
/// Three pages that Intel's processors without "unrestricted guest" need for real mode,
/// and one for its page table: below the end of the gap in memory, above the APICs.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// What the engine cannot do without.
const NEEDED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "memory slots"),
    (Cap::Irqchip, "interrupt controllers in the kernel"),
    (Cap::ImmediateExit, "immediate exits"),
    (Cap::ExtCpuid, "CPUID tables"),
    (Cap::MpState, "states of multiprocessing"),
    (Cap::VcpuEvents, "pending events"),
    (Cap::Debugregs, "debug registers"),
    (Cap::Xsave, "extended state"),
    (Cap::Xcrs, "extended control registers"),
    (Cap::AdjustClock, "a clock to set"),
    (Cap::IrqRouting, "routes of interrupts"),
    (Cap::SetTssAddr, "the address of the TSS"),
];

/// Settings of the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The guests' CPU.
    pub cpu_model: CpuModel,
    /// vCPUs are, two by two, threads of a core.
    pub smt: bool,
}

/// The KVM engine.
pub struct KvmHypervisor {
    kvm: Kvm,
    options: Options,
    template: CpuTemplate,
    completions: Option<Arc<MakeCompletions>>,
}

/// Makes one for each vCPU of a machine, given its memory and how many it has.
pub type MakeCompletions =
    dyn Fn(&GuestRam, u8) -> Result<Vec<Box<dyn Completion>>, Error> + Send + Sync;

impl std::fmt::Debug for KvmHypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmHypervisor")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl KvmHypervisor {
    /// Opens /dev/kvm.
    ///
    /// # Errors
    /// [`Error::HostLacks`] says what is missing and what to do about it.
    pub fn open(options: Options) -> Result<Self, Error> {
        Self::open_with(options, CpuTemplate::default())
    }

    /// Opens /dev/kvm for guests whose CPU `template` changes: capabilities are looked at
    /// now, CPUID and MSRs when a machine is made.
    ///
    /// # Errors
    /// As [`KvmHypervisor::open`]; [`Error::HostLacks`] names a capability that the template
    /// needs.
    pub fn open_with(options: Options, template: CpuTemplate) -> Result<Self, Error> {
        let lacks = |lacks| Error::HostLacks {
            engine: NAME,
            lacks,
        };
        let kvm = Kvm::new().map_err(|error| {
            let error = std::io::Error::from(error);
            lacks(match error.kind() {
                ErrorKind::NotFound => {
                    format!("there is no {DEVICE}; load kvm_intel or kvm_amd, or try --engine soft")
                }
                ErrorKind::PermissionDenied => format!(
                    "{DEVICE} is not for this user; join the group that it belongs to, or try --engine soft"
                ),
                _ => format!("{DEVICE} cannot be opened ({error}); try --engine soft"),
            })
        })?;
        // The only one there ever was (Linux, Documentation/virt/kvm/api.rst, §4.1).
        if kvm.get_api_version() != 12 {
            return Err(lacks(format!(
                "{DEVICE} is not one of KVM's; try --engine soft"
            )));
        }
        let asked = &template.kvm_capabilities;
        let needed = |cap: Cap| !asked.contains(&KvmCapability::NotNeeded(cap as u32));
        let missing = NEEDED
            .iter()
            .find(|(cap, _)| needed(*cap) && !kvm.check_extension(*cap));
        if let Some((_, name)) = missing {
            return Err(lacks(format!(
                "its KVM has no {name}; use a newer kernel, or try --engine soft"
            )));
        }
        let missing = asked.iter().find_map(|one| match *one {
            KvmCapability::Needed(number) => {
                (kvm.check_extension_raw(number.into()) <= 0).then_some(number)
            }
            KvmCapability::NotNeeded(_) => None,
        });
        if let Some(number) = missing {
            return Err(lacks(format!(
                "its KVM has no capability {number}, which cpu-config needs; leave it out of \
                 kvm_capabilities, or use a newer kernel"
            )));
        }
        Ok(Self {
            kvm,
            options,
            template,
            completions: None,
        })
    }

    /// Has instructions that KVM cannot emulate completed by others, which `make` makes.
    #[must_use]
    pub fn completed_by(mut self, make: Arc<MakeCompletions>) -> Self {
        self.completions = Some(make);
        self
    }

    /// A machine without anything. The kernel starts some threads for it, which a signal
    /// may interrupt.
    pub(crate) fn create_vm(&self) -> Result<VmFd, Error> {
        let mut left = 5_u8;
        loop {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR && left > 0 => left -= 1,
                other => return other.map_err(failed("make a virtual machine")),
            }
        }
    }
}

impl Hypervisor for KvmHypervisor {
    type Partition = KvmPartition;

    fn name(&self) -> &'static str {
        NAME
    }

    fn create(&self, memory: GuestRam, vcpus: u8) -> Result<KvmPartition, Error> {
        let most = VCPUS_MAX.min(u8::try_from(self.kvm.get_max_vcpus()).unwrap_or(u8::MAX));
        if vcpus > most {
            return Err(Error::TooManyVcpus {
                engine: NAME,
                asked: vcpus,
                most,
            });
        }
        let supported = Supported::ask(&self.kvm)?;
        let model = self.options.cpu_model;
        let features = supported.model(model)?;
        ioctl::install_kick_handler().map_err(failed("install a signal handler"))?;

        let fd = self.create_vm()?;
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(failed("place the identity map"))?;
        fd.set_tss_address(TSS).map_err(failed("place the TSS"))?;
        make_chips(&fd)?;
        let completions = self.completions.as_ref();
        let completions = completions.map(|make| make(&memory, vcpus)).transpose()?;
        let mut completions = completions.into_iter().flatten();
        let vm = Vm::new(fd, memory).map_err(failed("give KVM the guest's memory"))?;
        let shape = Shape::new(&self.kvm, features, &self.template)?;
        let mut cpus = Vec::new();
        for id in 0..vcpus {
            let fd = vm
                .fd()
                .create_vcpu(id.into())
                .map_err(failed("make a virtual CPU"))?;
            let khz = fd.get_tsc_khz().unwrap_or(0);
            let place = Place {
                id: id.into(),
                count: vcpus.into(),
                smt: self.options.smt,
            };
            let table = supported.table(model, features, place, khz.into(), &self.template)?;
            fd.set_cpuid2(&table)
                .map_err(failed("give a virtual CPU its CPUID"))?;
            set_first_msrs(&fd)?;
            change_msrs(&fd, &self.template)?;
            let mut cpu = KvmVcpu::new(fd, Arc::clone(&vm), shape.clone())?;
            cpu.completion = completions.next();
            cpus.push(Some(cpu));
        }
        Ok(KvmPartition::new(vm, cpus))
    }
}

/// The interrupt controllers, with lines to the IOAPIC only.
fn make_chips(fd: &VmFd) -> Result<(), Error> {
    // In x2APIC mode ids are 32 bits wide in saved states, as the software engine has them.
    let wide_ids = kvm_enable_cap {
        cap: Cap::X2ApicApi as u32,
        args: [KVM_X2APIC_API_USE_32BIT_IDS.into(), 0, 0, 0],
        ..Default::default()
    };
    fd.enable_cap(&wide_ids)
        .map_err(failed("have wide APIC ids"))?;
    fd.create_irq_chip()
        .map_err(failed("make the interrupt controllers"))?;
    let routes: Vec<_> = (0..PINS)
        .map(|pin| ioctl::route(pin, KVM_IRQCHIP_IOAPIC, pin))
        .collect();
    let routes = KvmIrqRouting::from_entries(&routes).map_err(|_| Error::State {
        engine: NAME,
        why: "it has too many interrupt lines".to_owned(),
    })?;
    fd.set_gsi_routing(&routes)
        .map_err(failed("route the interrupt lines"))
}

/// What firmware would have set: memory is write-back unless the page tables say
/// otherwise, and string instructions are fast (SDM vol. 4, table 2-2).
fn set_first_msrs(fd: &kvm_ioctls::VcpuFd) -> Result<(), Error> {
    const WRITE_BACK_ENABLED: u64 = 0x806;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let first = [
        entry(msr::MTRR_DEF_TYPE, WRITE_BACK_ENABLED),
        entry(msr::MISC_ENABLE, 1),
    ];
    for one in first {
        let Ok(msrs) = Msrs::from_entries(&[one]) else {
            continue;
        };
        let set = fd.set_msrs(&msrs).map_err(failed("set a register"))?;
        if set == 0 {
            tracing::debug!(
                msr = format_args!("{:#x}", one.index),
                "KVM lacks a register that firmware sets"
            );
        }
    }
    Ok(())
}

/// Those of the template: what KVM has them start with, changed.
fn change_msrs(fd: &kvm_ioctls::VcpuFd, template: &CpuTemplate) -> Result<(), Error> {
    let lacks = |lacks| Error::HostLacks {
        engine: NAME,
        lacks,
    };
    let too_many = |_| Error::State {
        engine: NAME,
        why: "one register is more than KVM takes at once".to_owned(),
    };
    for modifier in &template.msr_modifiers {
        let mut one = Msrs::from_entries(&[kvm_msr_entry {
            index: modifier.addr,
            ..Default::default()
        }])
        .map_err(too_many)?;
        let read = fd.get_msrs(&mut one).map_err(failed("read a register"))?;
        if read == 0 {
            return Err(lacks(format!(
                "its KVM has no MSR {:#x}, which cpu-config changes; leave it out of msr_modifiers",
                modifier.addr
            )));
        }
        let mut value = 0;
        for entry in one.as_mut_slice() {
            entry.data = modifier.bitmap.apply(entry.data);
            value = entry.data;
        }
        let set = fd.set_msrs(&one).map_err(failed("set a register"))?;
        if set == 0 {
            return Err(lacks(format!(
                "its KVM refuses {value:#x} in MSR {:#x}, as cpu-config has it; change its bitmap \
                 in msr_modifiers",
                modifier.addr
            )));
        }
    }
    Ok(())
}
