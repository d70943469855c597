//! What the monitor's jail has on this host, by the monitor's own words.
//!
//! Left to others: what the jail is (docs/jailer.md, `kombi-vmm --jail`).

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

/// What a part is good for, and what brings it where it is missing.
const PARTS: [(&str, &str, &str); 3] = [
    (
        "namespaces",
        "a monitor sees all of this user's files until it is told otherwise by Landlock",
        "let users make user namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0, \
         or the container's seccomp profile)",
    ),
    (
        "landlock",
        "a monitor is kept from files by its namespaces alone",
        "boot a kernel with Landlock (5.13 or later, CONFIG_LSM with landlock in it)",
    ),
    (
        "privileges",
        "a monitor keeps capabilities that it does not need",
        "see the reason",
    ),
];

/// A part of the jail.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Part {
    holds: bool,
    why: Option<String>,
}

/// Every part by its name; none when the monitor cannot be asked.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub(crate) struct Jail(BTreeMap<String, Part>);

impl Jail {
    /// Asks `vmm`, which enters a jail for a moment.
    pub(crate) fn ask(vmm: Option<&Path>) -> Self {
        let answer = vmm.and_then(|vmm| {
            let mut command = Command::new(vmm);
            command.arg("--jail-probe").stdin(Stdio::null());
            command.output().ok()
        });
        let parts = answer.and_then(|answer| serde_json::from_slice(&answer.stdout).ok());
        Self(parts.unwrap_or_default())
    }

    /// In one line.
    pub(crate) fn words(&self) -> String {
        if self.0.is_empty() {
            return "unknown: the monitor cannot be asked".to_owned();
        }
        let parts = self.0.iter().map(|(name, part)| match &part.why {
            None => name.clone(),
            Some(why) => format!("no {name} ({why})"),
        });
        parts.collect::<Vec<_>>().join(", ")
    }

    /// A line for each part that is missing.
    pub(crate) fn advice(&self) -> impl Iterator<Item = String> {
        let missing = |name: &str| self.0.get(name).is_some_and(|part| !part.holds);
        let parts = PARTS.iter().filter(move |(name, _, _)| missing(name));
        parts.map(|(_, consequence, way_out)| format!("{consequence}: {way_out}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_that_cannot_be_asked_is_no_advice() {
        for vmm in [
            None,
            Some(Path::new("/nowhere")),
            Some(Path::new("/bin/false")),
        ] {
            let jail = Jail::ask(vmm);
            assert!(jail.words().starts_with("unknown"));
            assert_eq!(jail.advice().count(), 0);
        }
    }

    #[test]
    fn what_is_missing_is_told_with_its_reason_and_a_way_out() {
        let parts = r#"{"landlock":{"holds":true,"why":null},
                        "namespaces":{"holds":false,"why":"not permitted"}}"#;
        let jail = Jail(serde_json::from_str(parts).expect("parts"));
        assert_eq!(jail.words(), "landlock, no namespaces (not permitted)");
        let advice: Vec<_> = jail.advice().collect();
        assert_eq!(advice.len(), 1);
        assert!(advice[0].contains("max_user_namespaces"), "{advice:?}");
    }
}
