//! What Landlock is told (Documentation/userspace-api/landlock.rst): the same files as
//! the namespaces show, each with what is done to it; no network; no signals and abstract
//! sockets of others. As much of it as the kernel knows.

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

use super::Visible;

/// The newest version whose rights are handled here.
const KNOWN: ABI = ABI::V7;

/// Restricts this thread and those that it will start.
pub(super) fn restrict(visible: &Visible) -> Result<(), String> {
    let chain = |error: RulesetError| crate::failure::chain(&error);
    match apply(visible).map_err(chain)? {
        RulesetStatus::FullyEnforced => Ok(()),
        RulesetStatus::PartiallyEnforced => {
            tracing::debug!("this kernel knows a part of Landlock's rules only");
            Ok(())
        }
        RulesetStatus::NotEnforced => Err("this kernel has no Landlock".to_owned()),
    }
}

fn apply(visible: &Visible) -> Result<RulesetStatus, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    let read = make_bitflags!(AccessFs::{ReadFile});
    let write = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | IoctlDev});
    let folder = make_bitflags!(AccessFs::{
        ReadFile | WriteFile | Truncate | ReadDir | RemoveFile | MakeReg | MakeSock
    });
    rules = allow(rules, &visible.read, read)?;
    rules = allow(rules, &visible.write, write)?;
    rules = allow(rules, &visible.folders, folder)?;
    Ok(rules.restrict_self()?.ruleset)
}

fn allow(
    mut rules: RulesetCreated,
    paths: &[PathBuf],
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    for path in paths {
        // What is not there is not needed; whoever opens it will say so.
        if let Ok(opened) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(opened, access))?;
        }
    }
    Ok(rules)
}
