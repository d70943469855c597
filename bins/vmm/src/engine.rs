//! Which engine runs the machine: the only place of the house that names one. And
//! what the software engine keeps from one machine to the next.

use std::ffi::OsStr;
use std::fs::File;
use std::sync::Arc;

use blueprint::{Blueprint, Engine};
use hv::{Completion, Hypervisor, Partition};
use hv_kvm::{Kind, KvmHypervisor};
use hv_soft::{Counters, EngineTrace, Failing, Options, SoftHypervisor};
use translations::{Place, Translations};

use crate::args::FailingArg;
use crate::failure::Failure;
use crate::filter::Filter;

/// What is to be seen of the engine, and what its thread may do.
pub(crate) struct Watching {
    /// Where its counters go.
    pub(crate) counters: Arc<Counters>,
    /// Where its trace goes.
    pub(crate) trace: Option<File>,
    /// Whether it fails.
    pub(crate) failing: Option<Failing>,
    /// The filter of the thread that keeps translations.
    pub(crate) of_saver: Option<Filter>,
}

impl From<FailingArg> for Failing {
    fn from(asked: FailingArg) -> Self {
        match asked {
            FailingArg::Panic => Failing::Panic,
            FailingArg::HostFault => Failing::HostFault,
            FailingArg::WildJump => Failing::WildJump,
        }
    }
}

impl Watching {
    fn apply(self, mut engine: SoftHypervisor) -> SoftHypervisor {
        engine = engine.counted(self.counters);
        if let Some(file) = self.trace {
            engine = engine.traced(Arc::new(EngineTrace::new(file)));
        }
        if let Some(filter) = self.of_saver {
            engine = engine.confining_saver(move || filter.confine_this_thread());
        }
        match self.failing {
            Some(failing) => engine.failing(failing),
            None => engine,
        }
    }

    /// KVM, of which there is nothing of this to see.
    fn without(self, engine: KvmHypervisor) -> Chosen {
        if self.trace.is_some() || self.failing.is_some() {
            tracing::warn!("engine kvm has no trace and no failures to order");
        }
        Chosen::Kvm(engine)
    }
}

/// An engine, and the translations that it keeps.
pub(crate) enum Chosen {
    /// The software engine.
    Soft(SoftHypervisor, Option<Arc<Translations>>),
    /// KVM.
    Kvm(KvmHypervisor),
}

/// The engine for what was asked. `auto` is KVM where guests run on the processor, the
/// software engine elsewhere.
pub(crate) fn choose(
    asked: &Blueprint,
    translation_cache: Option<&OsStr>,
    watching: Watching,
) -> Result<Chosen, Failure> {
    let template = asked.cpu_template();
    match asked.engine() {
        Engine::Soft => {}
        Engine::Kvm => {
            let mut engine = open_kvm(asked).map_err(|source| Failure::Engine { source })?;
            if let Ok(Kind::Software { why }) = hv_kvm::probe() {
                tracing::warn!("this KVM is played by software ({why}); --engine soft is faster");
                engine = completed_by_soft(engine, asked);
            }
            return Ok(watching.without(engine));
        }
        Engine::Auto => match hv_kvm::probe() {
            Ok(Kind::Hardware) => {
                tracing::info!("engine kvm: guests run on the processor");
                let engine = open_kvm(asked).map_err(|source| Failure::Engine { source })?;
                return Ok(watching.without(engine));
            }
            Ok(Kind::Software { why }) => {
                tracing::info!("engine soft: there is a KVM, but it is played by software: {why}");
            }
            Err(error) => tracing::info!("engine soft: {}", crate::failure::chain(&error)),
        },
    }
    let options = Options {
        cpu_model: asked.cpu_model(),
        smt: asked.smt(),
        count_instructions: watching.trace.is_some(),
        ..Options::default()
    };
    if !template.msr_modifiers.is_empty() || !template.kvm_capabilities.is_empty() {
        tracing::warn!(
            "cpu-config: the software engine changes read-only MSRs only, and has no capabilities of KVM"
        );
    }
    let engine = SoftHypervisor::new(options).with_template(template.clone());
    let engine = watching.apply(engine);
    let Place::Folder(folder) = Place::choose(translation_cache) else {
        return Ok(Chosen::Soft(engine, None));
    };
    // Without them a machine only starts more slowly.
    let warn = |error| tracing::warn!("{}", crate::failure::chain(&error));
    match Translations::open(options.translator(), &folder) {
        Ok((kept, refused)) => {
            refused.into_iter().for_each(warn);
            let kept = Arc::new(kept);
            let engine = engine.with_translations(Arc::clone(&kept));
            Ok(Chosen::Soft(engine, Some(kept)))
        }
        Err(error) => {
            warn(error);
            Ok(Chosen::Soft(engine, None))
        }
    }
}

fn open_kvm(asked: &Blueprint) -> Result<KvmHypervisor, hv::Error> {
    let options = hv_kvm::Options {
        cpu_model: asked.cpu_model(),
        smt: asked.smt(),
    };
    KvmHypervisor::open_with(options, asked.cpu_template().clone())
}

/// What a KVM played by software cannot emulate, the software engine executes. A processor
/// runs everything itself, and spares the memory that this needs.
fn completed_by_soft(engine: KvmHypervisor, asked: &Blueprint) -> KvmHypervisor {
    let options = Options {
        cpu_model: asked.cpu_model(),
        smt: asked.smt(),
        // Single instructions need no room.
        code_cache_bytes: 0,
        ..Options::default()
    };
    let soft = SoftHypervisor::new(options);
    engine.completed_by(Arc::new(move |memory, vcpus| {
        let mut partition = match soft.create(memory.clone(), vcpus) {
            Ok(partition) => partition,
            Err(error) => {
                tracing::warn!(%error, "instructions that this KVM cannot emulate end the machine");
                return Ok(Vec::new());
            }
        };
        let one = |index| -> Result<Box<dyn Completion>, hv::Error> {
            Ok(Box::new(partition.vcpu(index)?))
        };
        (0..vcpus).map(one).collect()
    }))
}

/// At the machine's end: writes what it added.
pub(crate) fn save(kept: &Translations) {
    let counts = kept.counts();
    tracing::debug!(?counts, "translations");
    match kept.save() {
        Ok(None) => {}
        Ok(Some(saved)) => tracing::debug!(?saved, "translations"),
        Err(error) => tracing::warn!("{}", crate::failure::chain(&error)),
    }
}
