//! Which engine runs the machine: the only place of the house that names one. And
//! what the software engine keeps from one machine to the next.

use std::ffi::OsStr;
use std::sync::Arc;

use blueprint::{Blueprint, Engine};
use hv_soft::{Options, SoftHypervisor};
use translations::{Place, Translations};

use crate::failure::Failure;

/// The engine for what was asked, and the translations that it keeps: `auto` is the
/// software engine until there is another one.
pub(crate) fn choose(
    asked: &Blueprint,
    translation_cache: Option<&OsStr>,
) -> Result<(SoftHypervisor, Option<Arc<Translations>>), Failure> {
    match asked.engine() {
        Engine::Auto | Engine::Soft => {}
        Engine::Kvm => return Err(Failure::NoSuchEngine { engine: "kvm" }),
    }
    let options = Options {
        cpu_model: asked.cpu_model(),
        ..Options::default()
    };
    let engine = SoftHypervisor::new(options);
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
