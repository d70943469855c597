//! Making machines.

use std::sync::Arc;

use hv::{Error, GuestRam, Hypervisor, Interrupts, Partition, Shared};
use ram::AccessListener;
use translations::Translations;
use translator::block::{Block, Request, Thunks};
use x86::cpu_template::CpuTemplate;
use x86::features::{CpuModel, Feature, Features};
use x86::state::VcpuState;

use crate::apic::Chips;
use crate::apic::local::LocalApic;
use crate::blocks::Blocks;
use crate::clock::Clock;
use crate::codebuf::CodeBuf;
use crate::cpu::{Cpu, Phase, Registers};
use crate::debug::Breakpoints;
use crate::decoded::Decoded;
use crate::doorbell::Doorbell;
use crate::enter::{ContextBox, Fpu, exit_thunk};
use crate::guest_ram::Ram;
use crate::machine_state::SoftShared;
use crate::mmu::spaces::Spaces;
use crate::mmu::tlb::{self, Fills, PageSet};
use crate::msr::PLAIN;
use crate::peers::Peers;
use crate::recall::{Confine, Saver};
use crate::stats::EngineStats;
use crate::stepping::Stepping;
use crate::trace::EngineTrace;
use crate::translate::Translating;
use crate::vcpu::SoftVcpu;
use crate::watch::{Counters, Failing, Wanted, Watch};

/// Most vCPUs of a machine: sets of them are bits of a byte.
pub(crate) const VCPUS_MAX: u8 = 8;
/// Smallest code cache: one step of the buffer beyond what a translation may need.
const CODE_CACHE_MIN: usize = 512 << 10;
/// A vCPU's share of the code cache is not smaller than this, if the whole is not:
/// half of what a boot of Linux fills.
const CODE_CACHE_SHARE_MIN: usize = 8 << 20;

/// Settings of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Size of a machine's code cache in bytes, in equal shares for its vCPUs, but
    /// at least 8 MiB each where the whole has that much. A vCPU whose share is full
    /// translates everything anew.
    pub code_cache_bytes: usize,
    /// Count guest instructions in [`EngineStats::instructions`]: costs a few
    /// percent of speed.
    pub count_instructions: bool,
    /// The guests' CPU.
    pub cpu_model: CpuModel,
    /// vCPUs are, two by two, threads of a core.
    pub smt: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            // A compiler's or V8's hot code is some 3 MiB and up; each byte becomes ten.
            code_cache_bytes: 128 << 20,
            count_instructions: false,
            cpu_model: CpuModel::default(),
            smt: false,
        }
    }
}

impl Options {
    /// What the engine asks of the translator: which translations fit.
    #[must_use]
    pub fn translator(&self) -> translator::Options {
        translator::Options {
            count_instructions: self.count_instructions,
        }
    }
}

/// Called with each translation before it can run: what was asked and what came out.
/// For tests that prove something of every block.
pub type Observer = fn(&Request, &Block);

/// The software engine.
#[derive(Clone, Debug, Default)]
pub struct SoftHypervisor {
    options: Options,
    observer: Option<Observer>,
    kept: Option<Arc<Translations>>,
    confine_saver: Option<Confine>,
    wanted: Wanted,
    template: Arc<CpuTemplate>,
}

impl SoftHypervisor {
    /// The engine with settings other than the default.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// The engine that looks for translations in `kept` before it makes them, and adds
    /// there what it made. They must be for [`Options::translator`].
    #[must_use]
    pub fn with_translations(self, kept: Arc<Translations>) -> Self {
        Self {
            kept: Some(kept),
            ..self
        }
    }

    /// The engine whose thread that writes translations calls `confine` before it does
    /// anything: to give up what it does not need. If that fails, translations are written
    /// by [`Translations::save`] only.
    #[must_use]
    pub fn confining_saver(
        mut self,
        confine: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.confine_saver = Some(Confine::new(confine));
        self
    }

    /// The engine whose guests' CPU shows what `template` leaves. Features that it takes
    /// away raise #UD, but for those that every x86-64-v2 has, and what it adds is left out; of MSRs it changes those that are
    /// read-only here, such as IA32_ARCH_CAPABILITIES.
    #[must_use]
    pub fn with_template(mut self, template: CpuTemplate) -> Self {
        self.template = Arc::new(template);
        self
    }

    /// The engine that keeps its counters in `counters` too: of one machine.
    #[must_use]
    pub fn counted(mut self, counters: Arc<Counters>) -> Self {
        self.wanted.counters = Some(counters);
        self
    }

    /// The engine that says what it does in `trace`.
    #[must_use]
    pub fn traced(mut self, trace: Arc<EngineTrace>) -> Self {
        self.wanted.trace = Some(trace);
        self
    }

    /// The engine that fails after some translations, for tests of what it says then.
    #[must_use]
    pub fn failing(mut self, failing: Failing) -> Self {
        self.wanted.failing = Some(failing);
        self
    }

    /// The engine that shows each translation to `observer`.
    #[must_use]
    pub fn observed(self, observer: Observer) -> Self {
        Self {
            observer: Some(observer),
            ..self
        }
    }
}

impl Hypervisor for SoftHypervisor {
    type Partition = SoftPartition;

    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn create(&self, memory: GuestRam, vcpus: u8) -> Result<SoftPartition, Error> {
        if vcpus > VCPUS_MAX {
            return Err(Error::TooManyVcpus {
                engine: crate::NAME,
                asked: vcpus,
                most: VCPUS_MAX,
            });
        }
        crate::host_check().map_err(|lacks| Error::HostLacks {
            engine: crate::NAME,
            lacks,
        })?;
        crate::fault::install().map_err(|source| Error::Host {
            doing: "install the signal handlers",
            source,
        })?;
        let cpu_model = self.options.cpu_model;
        let model = cpu_model
            .on(crate::host_features())
            .map_err(|missing| Error::HostLacks {
                engine: crate::NAME,
                lacks: format!(
                    "CPU model {} needs {}; use --cpu-model host",
                    cpu_model.name(),
                    missing.names()
                ),
            })?;
        let model = self.template.left_of(model);
        let bells: Vec<_> = (0..vcpus).map(|_| Arc::new(Doorbell::new())).collect();
        let chips = Arc::new(Chips::new(bells.clone()));
        let pages = Ram::new(memory.clone()).page_end();
        let peers = Arc::new(Peers::new(&bells, pages));
        let listener: Arc<dyn AccessListener> = Arc::clone(&peers) as _;
        memory.listen(Arc::downgrade(&listener));
        let clock = Clock::new();
        let saver = self.kept.as_ref();
        let saver = saver.and_then(|kept| Saver::start(kept, self.confine_saver.clone()));
        let mut cpus = Vec::new();
        for (id, bell) in bells.into_iter().enumerate() {
            let ram = Ram::new(memory.clone());
            let shared = (Arc::clone(&chips), Arc::clone(&peers));
            let mut cpu = new_cpu(id as u32, ram, shared, clock.clone(), self.options, model)?;
            cpu.template.clone_from(&self.template);
            cpu.units_changed();
            cpu.observer = self.observer;
            cpu.watch = Watch::new(&self.wanted, id as u32);
            cpu.kept.clone_from(&self.kept);
            cpu.saver.clone_from(&saver);
            cpus.push(Some(SoftVcpu::new(Box::new(cpu), bell)));
        }
        Ok(SoftPartition { cpus, chips, clock })
    }
}

fn new_cpu(
    id: u32,
    ram: Ram,
    (chips, peers): (Arc<Chips>, Arc<Peers>),
    clock: Clock,
    options: Options,
    model: Features,
) -> Result<Cpu, Error> {
    let host = |doing| move |source| Error::Host { doing, source };
    let share = (options.code_cache_bytes / peers.count())
        .max(CODE_CACHE_SHARE_MIN.min(options.code_cache_bytes))
        .max(CODE_CACHE_MIN);
    let mut buf = CodeBuf::new(share).map_err(host("reserve the code cache"))?;
    let full = || Error::Host {
        doing: "place the stubs in the code cache",
        source: std::io::ErrorKind::OutOfMemory.into(),
    };
    // Copied into the cache, so that rel32 jumps reach it from everywhere.
    let exit = buf.append(&exit_thunk()).ok_or_else(full)?;
    let exit = buf.address(exit);
    let stubs = translator::stubs(buf.address(buf.used()), exit);
    buf.append(&stubs.code).ok_or_else(full)?;
    let thunks = Thunks {
        exit,
        jump_miss: stubs.jump_miss,
        stack_refill: stubs.stack_refill,
        system_call: stubs.system_call,
        system_return: stubs.system_return,
    };
    let mut context = ContextBox::new().map_err(host("reserve the vCPU's context"))?;
    tlb::initialize(&mut context, thunks.jump_miss);
    context.avx = u64::from(model.has(Feature::Avx));
    let pages = ram.page_end();
    let translator = translator::Translator::new(options.translator());
    let reset = VcpuState::after_reset();
    let mut fpu = Fpu([0; 512]);
    fpu.0.copy_from_slice(&reset.xsave[..512]);
    Ok(Cpu {
        context,
        regs: Registers::at_reset(&reset),
        fpu,
        ram,
        fills: Fills::new(),
        spaces: Spaces::default(),
        written: PageSet::new(pages),
        jump_miss: thunks.jump_miss,
        blocks: Blocks::new(buf, thunks, pages),
        decoded: Decoded::new(),
        translating: Some(Box::new(Translating {
            translator,
            block: translator::Block::default(),
            guest: Vec::new(),
            pool: Vec::new(),
        })),
        apic: LocalApic::new(id, clock.clone()),
        chips,
        clock,
        id,
        cpu_model: options.cpu_model,
        smt: options.smt,
        template: Arc::default(),
        model,
        executable: model,
        halted: false,
        resume: false,
        stepping: Stepping::default(),
        alone: false,
        breakpoints: Breakpoints::default(),
        nmi_pending: false,
        nmi_blocked: false,
        stats: EngineStats::default(),
        watch: Watch::default(),
        rest: crate::rest::Rest::new(),
        observer: None,
        kept: None,
        peers,
        serves: 0,
        // As after RESET: the first vCPU runs, though nothing boots in real mode here
        // (see `set_state`); the others wait for it.
        phase: if id == 0 { Phase::Early } else { Phase::Waits },
        saver: None,
    })
}

impl Registers {
    pub(crate) fn at_reset(state: &VcpuState) -> Self {
        Self {
            cr0: state.cr0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: state.xcr0,
            cpl: 0,
            segments: state.segments,
            tr: state.tr,
            ldtr: state.ldtr,
            gdt: state.gdt,
            idt: state.idt,
            debug: state.debug,
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            plain_msrs: PLAIN.map(|(_, value)| value),
            kvm_system_time: 0,
            kvm_wall_clock: 0,
        }
    }
}

/// One machine on the software engine.
pub struct SoftPartition {
    cpus: Vec<Option<SoftVcpu>>,
    chips: Arc<Chips>,
    clock: Clock,
}

impl Partition for SoftPartition {
    type Vcpu = SoftVcpu;

    fn vcpu(&mut self, index: u8) -> Result<SoftVcpu, Error> {
        let slot = self.cpus.get_mut(usize::from(index));
        slot.and_then(Option::take)
            .ok_or(Error::NoSuchVcpu { index })
    }

    fn interrupts(&self) -> Arc<dyn Interrupts> {
        Arc::clone(&self.chips) as Arc<dyn Interrupts>
    }

    fn shared(&self) -> Arc<dyn Shared> {
        Arc::new(SoftShared::new(&self.chips, &self.clock))
    }
}
