//! Cgroups of both versions: found, made, written and joined.
//!
//! Invariant: only files directly within ROOT/PARENT/ID are written with what was
//! asked; on the way there only what children inherit (cpuset of version 1) or need
//! switched on (`cgroup.subtree_control` of version 2).
//!
//! Left to others: taking the cgroups away again.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, at};

const MOUNTS: &str = "/proc/mounts";

/// What is done to cgroups before the monitor starts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Cgroups {
    /// Nothing.
    Leave,
    /// This process moves into a cgroup that exists.
    Join(PathBuf),
    /// Cgroups are made and joined.
    Make(Vec<Group>),
}

/// The machine's cgroup in one hierarchy.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    version: u8,
    /// Where the hierarchy is mounted.
    root: PathBuf,
    /// PARENT/ID.
    below: PathBuf,
    /// Names of files of one controller, and what to write.
    properties: Vec<(String, String)>,
}

impl Cgroups {
    /// Looks for the hierarchies that `asked`, a list of `FILE=VALUE`, needs.
    ///
    /// # Errors
    /// What is of another form, not mounted or not available.
    pub(crate) fn check(
        version: u8,
        asked: &[String],
        parent: &Path,
        id: &str,
    ) -> Result<Self, Error> {
        if asked.is_empty() && version == 1 {
            return Ok(Cgroups::Leave);
        }
        let mounts = fs::read_to_string(MOUNTS).map_err(at("read", MOUNTS))?;
        Self::among(&mounts, version, asked, parent, id)
    }

    fn among(
        mounts: &str,
        version: u8,
        asked: &[String],
        parent: &Path,
        id: &str,
    ) -> Result<Self, Error> {
        let hierarchies = hierarchies(mounts, version);
        let Some(first) = hierarchies.first() else {
            return Err(Error::NoHierarchy { version });
        };
        if asked.is_empty() {
            let group = first.root.join(parent);
            return Ok(if group.exists() {
                Cgroups::Join(group)
            } else {
                Cgroups::Leave
            });
        }
        let mut groups: Vec<Group> = Vec::new();
        for asked in asked {
            let (controller, file, value) = parse(asked)?;
            let found = hierarchies
                .iter()
                .find(|hierarchy| hierarchy.has(controller));
            let Some(hierarchy) = found else {
                let controller = controller.to_owned();
                return Err(Error::NoController { controller });
            };
            let property = (file.to_owned(), value.to_owned());
            match groups.iter_mut().find(|group| group.root == hierarchy.root) {
                Some(group) => group.properties.push(property),
                None => groups.push(Group {
                    version,
                    root: hierarchy.root.clone(),
                    below: parent.join(id),
                    properties: vec![property],
                }),
            }
        }
        Ok(Cgroups::Make(groups))
    }

    /// Makes and joins them.
    ///
    /// # Errors
    /// The host's, with the file.
    pub(crate) fn set(&self) -> Result<(), Error> {
        let own = std::process::id();
        match self {
            Cgroups::Leave => Ok(()),
            Cgroups::Join(path) => {
                write(&path.join("cgroup.procs"), &own.to_string()).map_err(|error| match error {
                    Error::Path { source, .. } => Error::JoinParent {
                        path: path.clone(),
                        source,
                    },
                    other => other,
                })
            }
            Cgroups::Make(groups) => {
                // All values first: a cgroup without processors cannot be joined.
                groups.iter().try_for_each(Group::make)?;
                groups.iter().try_for_each(|group| group.join(own))
            }
        }
    }
}

impl Group {
    fn path(&self) -> PathBuf {
        self.root.join(&self.below)
    }

    /// Every cgroup between the root, without it, and the machine's own.
    fn steps(&self) -> Vec<PathBuf> {
        let mut at = self.root.clone();
        self.below
            .iter()
            .map(|part| {
                at.push(part);
                at.clone()
            })
            .collect()
    }

    fn make(&self) -> Result<(), Error> {
        let path = self.path();
        fs::create_dir_all(&path).map_err(at("make cgroup", &path))?;
        for (file, value) in &self.properties {
            let controller = file.split('.').next().unwrap_or_default();
            match self.version {
                1 if controller == "cpuset" => self.inherit_cpuset()?,
                1 => {}
                _ => self.switch_on(controller)?,
            }
            write(&path.join(file), value)?;
        }
        Ok(())
    }

    /// Documentation/admin-guide/cgroup-v1/cpusets.rst: a new cpuset has neither
    /// processors nor memory, and cannot have what its parent has not.
    fn inherit_cpuset(&self) -> Result<(), Error> {
        for step in self.steps() {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let own = step.join(file);
                if !read(&own)?.is_empty() {
                    continue;
                }
                let inherited = read(&step.with_file_name(file))?;
                if inherited.is_empty() {
                    return Err(Error::NothingToInherit { path: own });
                }
                write(&own, &inherited)?;
            }
        }
        Ok(())
    }

    /// Documentation/admin-guide/cgroup-v2.rst, "Enabling and Disabling": a controller's
    /// files are there where all cgroups above have it switched on for their children.
    fn switch_on(&self, controller: &str) -> Result<(), Error> {
        let mut above = vec![self.root.clone()];
        above.extend(self.steps());
        above.pop();
        for group in above {
            write(
                &group.join("cgroup.subtree_control"),
                &format!("+{controller}"),
            )?;
        }
        Ok(())
    }

    fn join(&self, process: u32) -> Result<(), Error> {
        let file = if self.version == 1 {
            "tasks"
        } else {
            "cgroup.procs"
        };
        write(&self.path().join(file), &process.to_string())
    }
}

/// A mounted hierarchy.
struct Hierarchy {
    root: PathBuf,
    controllers: Vec<String>,
}

impl Hierarchy {
    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

/// Those of a version among the lines of /proc/mounts (proc_mounts(5)).
fn hierarchies(mounts: &str, version: u8) -> Vec<Hierarchy> {
    let of_kind = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let (root, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        let root = PathBuf::from(unescaped(root));
        let controllers = match (version, kind) {
            // Version 1 has its controllers among the options of the mount.
            (1, "cgroup") => options.split(',').map(str::to_owned).collect(),
            (2, "cgroup2") => fs::read_to_string(root.join("cgroup.controllers"))
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
            _ => return None,
        };
        Some(Hierarchy { root, controllers })
    };
    mounts.lines().filter_map(of_kind).collect()
}

/// Blanks and backslashes are written in octal in /proc/mounts.
fn unescaped(path: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(path.to_owned(), |path, (code, byte)| {
        path.replace(code, byte)
    })
}

/// Controller, file and value of `CONTROLLER.PROPERTY=VALUE`.
fn parse(asked: &str) -> Result<(&str, &str, &str), Error> {
    let parts = || {
        let (file, value) = asked.split_once('=')?;
        let (controller, property) = file.split_once('.')?;
        let whole = !controller.is_empty() && !property.is_empty() && !value.is_empty();
        (whole && !file.contains('/')).then_some((controller, file, value))
    };
    parts().ok_or_else(|| Error::CgroupForm {
        asked: asked.to_owned(),
    })
}

/// One write: the kernel takes each as a whole.
fn write(path: &Path, value: &str) -> Result<(), Error> {
    let mut options = fs::OpenOptions::new();
    let write =
        |mut file: fs::File| std::io::Write::write_all(&mut file, format!("{value}\n").as_bytes());
    options
        .write(true)
        .open(path)
        .and_then(write)
        .map_err(at("write", path))
}

fn read(path: &Path) -> Result<String, Error> {
    let text = fs::read_to_string(path).map_err(at("read", path))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Directories that stand for hierarchies: version 1 with cpu and cpuset, version 2.
    struct Host {
        folder: tempfile::TempDir,
        mounts: String,
    }

    impl Host {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let at = |name: &str| {
                let path = folder.path().join(name);
                fs::create_dir(&path).unwrap();
                path
            };
            let [v1, set, v2] = ["cpu,cpuacct", "cpu set", "unified"].map(at);
            fs::write(v2.join("cgroup.controllers"), "cpu io memory\n").unwrap();
            let set = set.to_str().unwrap().replace(' ', "\\040");
            let mounts = format!(
                "proc /proc proc rw 0 0\ncgroup {} cgroup rw,relatime,cpu,cpuacct 0 0\n\
                 cgroup {set} cgroup rw,cpuset 0 0\ncgroup2 {} cgroup2 rw,nsdelegate 0 0\n",
                v1.display(),
                v2.display()
            );
            Self { folder, mounts }
        }

        fn check(&self, version: u8, asked: &[&str]) -> Result<Cgroups, Error> {
            let asked: Vec<_> = asked.iter().map(|text| (*text).to_owned()).collect();
            Cgroups::among(&self.mounts, version, &asked, Path::new("p/q"), "id")
        }

        fn file(&self, path: &str, text: &str) {
            let path = self.folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn text(&self, path: &str) -> String {
            fs::read_to_string(self.folder.path().join(path)).unwrap()
        }
    }

    #[test]
    fn controllers_that_share_a_hierarchy_share_a_cgroup() {
        let host = Host::new();
        let asked = ["cpu.shares=2", "cpuset.cpus=0-1", "cpuacct.usage=0"];
        let Cgroups::Make(groups) = host.check(1, &asked).unwrap() else {
            unreachable!("cgroups were asked for");
        };
        assert_eq!(groups.len(), 2);
        assert_eq!(
            groups[0].path(),
            host.folder.path().join("cpu,cpuacct/p/q/id")
        );
        assert_eq!(groups[0].properties.len(), 2);
        assert_eq!(groups[1].path(), host.folder.path().join("cpu set/p/q/id"));
    }

    #[test]
    fn what_is_not_there_or_of_another_form_is_refused() {
        let host = Host::new();
        for (version, asked) in [
            (1, "memory.limit=1"),
            (2, "cpuset.cpus=1"),
            (1, "nonsense.x=1"),
        ] {
            let error = host.check(version, &[asked]).unwrap_err();
            assert!(matches!(error, Error::NoController { .. }), "{asked}");
        }
        for asked in [
            "",
            "cpu",
            "cpu.shares",
            "cpu.shares=",
            "cpu=1",
            ".x=1",
            "cpu.=1",
            "../cpu.x=1",
        ] {
            let error = host.check(1, &[asked]).unwrap_err();
            assert!(matches!(error, Error::CgroupForm { .. }), "{asked}");
        }
        let error = Cgroups::among("", 2, &[], Path::new("p"), "id").unwrap_err();
        assert!(matches!(error, Error::NoHierarchy { version: 2 }));
    }

    #[test]
    fn a_value_may_contain_what_separates_it_from_its_file() {
        assert_eq!(
            parse("io.max=8:0 rbps=1").unwrap(),
            ("io", "io.max", "8:0 rbps=1")
        );
    }

    #[test]
    fn without_values_version_two_joins_the_parent_if_it_exists() {
        let host = Host::new();
        assert_eq!(host.check(2, &[]).unwrap(), Cgroups::Leave);
        host.file("unified/p/q/cgroup.procs", "");
        let group = host.folder.path().join("unified/p/q");
        let join = host.check(2, &[]).unwrap();
        assert_eq!(join, Cgroups::Join(group));
        join.set().unwrap();
        let own = format!("{}\n", std::process::id());
        assert_eq!(host.text("unified/p/q/cgroup.procs"), own);
    }

    #[test]
    fn a_cpuset_inherits_what_its_parents_have_before_it_is_written() {
        let host = Host::new();
        let own = "cpu set/p/q/id";
        host.file("cpu set/cpuset.cpus", "0-7\n");
        host.file("cpu set/cpuset.mems", "0\n");
        for step in ["cpu set/p", "cpu set/p/q", own] {
            host.file(&format!("{step}/cpuset.cpus"), "\n");
            host.file(&format!("{step}/cpuset.mems"), "\n");
        }
        host.file(&format!("{own}/tasks"), "");
        host.check(1, &["cpuset.cpus=3"]).unwrap().set().unwrap();
        // A kernel's file holds what was written last; here only its first bytes.
        assert!(host.text("cpu set/p/cpuset.cpus").starts_with("0-7\n"));
        assert!(host.text("cpu set/p/q/cpuset.mems").starts_with("0\n"));
        assert!(host.text("cpu set/p/q/id/cpuset.cpus").starts_with("3\n"));
        assert!(host.text("cpu set/p/q/id/cpuset.mems").starts_with("0\n"));
    }

    #[test]
    fn controllers_of_version_two_are_switched_on_down_to_the_parent() {
        let host = Host::new();
        for step in ["unified", "unified/p", "unified/p/q"] {
            host.file(&format!("{step}/cgroup.subtree_control"), "");
        }
        for file in ["memory.max", "cgroup.procs"] {
            host.file(&format!("unified/p/q/id/{file}"), "");
        }
        host.check(2, &["memory.max=4096"]).unwrap().set().unwrap();
        for step in ["unified", "unified/p", "unified/p/q"] {
            assert_eq!(
                host.text(&format!("{step}/cgroup.subtree_control")),
                "+memory\n"
            );
        }
        assert_eq!(host.text("unified/p/q/id/memory.max"), "4096\n");
        assert!(
            !host
                .folder
                .path()
                .join("unified/p/q/id/cgroup.subtree_control")
                .exists()
        );
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let host = Host::new();
        let error = host.check(1, &["cpu.shares=2"]).unwrap().set().unwrap_err();
        let wanted = host.folder.path().join("cpu,cpuacct/p/q/id/cpu.shares");
        assert_eq!(
            error.line(),
            format!("failed to write {wanted:?}: No such file or directory (os error 2)")
        );
    }

    proptest! {
        #[test]
        fn any_text_is_a_property_in_one_file_or_refused(text in "[a-z./= ]{0,20}") {
            if let Ok((controller, file, value)) = parse(&text) {
                prop_assert_eq!(format!("{file}={value}"), text.clone());
                let path = Path::new("/x").join(file);
                prop_assert_eq!(path.parent(), Some(Path::new("/x")));
                prop_assert!(file.starts_with(controller) && !controller.is_empty());
                prop_assert!(file != "." && file != "..");
            }
        }

        #[test]
        fn any_text_as_mounts_is_read_without_harm(text in "[a-z2/\\\\0-9 \n]{0,120}") {
            for version in [1, 2] {
                for found in hierarchies(&text, version) {
                    prop_assert!(found.controllers.len() <= text.len());
                }
            }
        }
    }
}
