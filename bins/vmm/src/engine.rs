//! Which engine runs the machine: the only place of the house that names one.

use blueprint::Engine;
use hv_soft::SoftHypervisor;

use crate::failure::Failure;

/// The engine for what was asked: `auto` is the software engine until there is
/// another one.
pub(crate) fn choose(asked: Engine) -> Result<SoftHypervisor, Failure> {
    match asked {
        Engine::Auto | Engine::Soft => Ok(SoftHypervisor::default()),
        Engine::Kvm => Err(Failure::NoSuchEngine { engine: "kvm" }),
    }
}
