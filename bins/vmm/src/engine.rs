//! Which engine runs the machine: the only place of the house that names one. And
//! what the software engine keeps from one machine to the next.

use std::ffi::OsStr;
use std::fs::File;
use std::sync::Arc;

use blueprint::{Blueprint, Engine};
use hv_soft::{Counters, EngineTrace, Failing, Options, SoftHypervisor};
use translations::{Place, Translations};

use crate::failure::Failure;

/// What is to be seen of the engine.
#[derive(Debug, Default)]
pub(crate) struct Watching {
    /// Where its counters go.
    pub(crate) counters: Arc<Counters>,
    /// Where its trace goes.
    pub(crate) trace: Option<File>,
    /// Whether it fails.
    pub(crate) failing: Option<Failing>,
}

impl Watching {
    fn apply(self, mut engine: SoftHypervisor) -> SoftHypervisor {
        engine = engine.counted(self.counters);
        if let Some(file) = self.trace {
            engine = engine.traced(Arc::new(EngineTrace::new(file)));
        }
        match self.failing {
            Some(failing) => engine.failing(failing),
            None => engine,
        }
    }
}

/// The engine for what was asked, and the translations that it keeps: `auto` is the
/// software engine until there is another one.
pub(crate) fn choose(
    asked: &Blueprint,
    translation_cache: Option<&OsStr>,
    watching: Watching,
) -> Result<(SoftHypervisor, Option<Arc<Translations>>), Failure> {
    match asked.engine() {
        Engine::Auto | Engine::Soft => {}
        Engine::Kvm => return Err(Failure::NoSuchEngine { engine: "kvm" }),
    }
    let options = Options {
        cpu_model: asked.cpu_model(),
        count_instructions: watching.trace.is_some(),
        ..Options::default()
    };
    let engine = watching.apply(SoftHypervisor::new(options));
    let Place::Folder(folder) = Place::choose(translation_cache) else {
        return Ok((engine, None));
    };
    // Without them a machine only starts more slowly.
    let warn = |error| tracing::warn!("{}", crate::failure::chain(&error));
    match Translations::open(options.translator(), &folder) {
        Ok((kept, refused)) => {
            refused.into_iter().for_each(warn);
            let kept = Arc::new(kept);
            Ok((engine.with_translations(Arc::clone(&kept)), Some(kept)))
        }
        Err(error) => {
            warn(error);
            Ok((engine, None))
        }
    }
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
