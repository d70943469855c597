//! What was asked, checked: [`Args`] becomes a [`Plan`] or one clear error, before
//! anything is changed.
//!
//! Invariant of a [`Plan`]: its paths were looked up and lead where it says; no name in
//! it climbs out of the folder that it is put into.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

use crate::args::Args;
use crate::cgroups::Cgroups;
use crate::error::{Error, at};
use crate::limits::Limits;

/// Most characters of an id, as in Firecracker.
const ID_BYTES_MAX: usize = 64;

/// A jail to be made.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) id: String,
    /// The monitor outside the jail, without links.
    pub(crate) exec_file: PathBuf,
    /// Its name, in the jail's folder too.
    pub(crate) exec_name: OsString,
    /// The jail's folder; it may not exist yet.
    pub(crate) root: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) netns: Option<PathBuf>,
    pub(crate) limits: Limits,
    pub(crate) cgroups: Cgroups,
    pub(crate) daemonize: bool,
    pub(crate) new_pid_ns: bool,
    /// Of /dev/userfaultfd, where the host has it.
    pub(crate) userfaultfd_minor: Option<u32>,
    pub(crate) monitor_args: Vec<OsString>,
}

impl Plan {
    /// Looks up every path and checks every value.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(crate) fn check(args: Args) -> Result<Self, Error> {
        check_id(&args.id)?;
        let exec_file = resolve(&args.exec_file)?;
        let exec_name = match exec_file.file_name() {
            Some(name) if exec_file.is_file() => name.to_owned(),
            _ => {
                return Err(Error::OtherKind {
                    path: exec_file,
                    wanted: "file",
                });
            }
        };
        let base = resolve(&args.chroot_base_dir)?;
        if !base.is_dir() {
            return Err(Error::OtherKind {
                path: base,
                wanted: "directory",
            });
        }
        let parent = args.parent_cgroup.unwrap_or_else(|| (&exec_name).into());
        check_parent_cgroup(&parent)?;
        let cgroups = Cgroups::check(args.cgroup_version, &args.cgroup, &parent, &args.id)?;
        let limits = Limits::check(&args.resource_limit)?;
        let misc = std::fs::read_to_string("/proc/misc").unwrap_or_default();
        Ok(Self {
            root: base.join(&exec_name).join(&args.id).join("root"),
            id: args.id,
            exec_file,
            exec_name,
            uid: args.uid,
            gid: args.gid,
            netns: args.netns,
            limits,
            cgroups,
            daemonize: args.daemonize,
            new_pid_ns: args.new_pid_ns,
            userfaultfd_minor: misc_minor(&misc, "userfaultfd"),
            monitor_args: args.monitor,
        })
    }

    /// The monitor's path within the jail.
    pub(crate) fn inner_exec_file(&self) -> PathBuf {
        Path::new("/").join(&self.exec_name)
    }

    /// Within the jail: the file that says which process the monitor is.
    pub(crate) fn inner_pid_file(&self) -> PathBuf {
        let mut name = self.exec_name.clone();
        name.push(OsStr::new(".pid"));
        Path::new("/").join(name)
    }
}

fn resolve(path: &Path) -> Result<PathBuf, Error> {
    path.canonicalize().map_err(at("find", path))
}

fn check_id(id: &str) -> Result<(), Error> {
    let named = id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if named && !id.is_empty() && id.len() <= ID_BYTES_MAX {
        Ok(())
    } else {
        Err(Error::Id {
            id: id.to_owned(),
            most: ID_BYTES_MAX,
        })
    }
}

fn check_parent_cgroup(path: &Path) -> Result<(), Error> {
    let mut parts = path.components();
    if parts.all(|part| matches!(part, Component::Normal(_))) && !path.as_os_str().is_empty() {
        Ok(())
    } else {
        Err(Error::ParentCgroup {
            path: path.to_path_buf(),
        })
    }
}

/// The minor number of a miscellaneous device that the kernel numbers itself, from the
/// text of /proc/misc.
fn misc_minor(misc: &str, device: &str) -> Option<u32> {
    misc.lines().find_map(|line| {
        let (minor, name) = line.trim().split_once(' ')?;
        (name == device).then(|| minor.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use proptest::prelude::*;

    fn plan(base: &Path, more: &[&str]) -> Result<Plan, Error> {
        let exec = base.join("monitor");
        std::fs::write(&exec, "").unwrap();
        let mut args = vec!["kombi-jailer", "--id", "a-1", "--uid", "3", "--gid", "4"];
        let [exec, base] = [exec, base.to_path_buf()].map(|path| path.to_str().unwrap().to_owned());
        args.extend(["--exec-file", &exec, "--chroot-base-dir", &base]);
        args.extend(more);
        Plan::check(Args::try_parse_from(args).unwrap())
    }

    #[test]
    fn the_jails_folder_is_named_after_base_monitor_and_id() {
        let base = tempfile::tempdir().unwrap();
        let plan = plan(base.path(), &[]).unwrap();
        let real = base.path().canonicalize().unwrap();
        assert_eq!(plan.root, real.join("monitor/a-1/root"));
        assert_eq!(plan.inner_exec_file(), Path::new("/monitor"));
        assert_eq!(plan.inner_pid_file(), Path::new("/monitor.pid"));
        assert_eq!((plan.uid, plan.gid), (3, 4));
    }

    #[test]
    fn a_link_to_the_monitor_is_followed_to_its_name() {
        let base = tempfile::tempdir().unwrap();
        let args = |exec: &str| {
            let base = base.path().to_str().unwrap();
            let args = ["kombi-jailer", "--id", "a", "--uid", "3", "--gid", "4"];
            let rest = ["--exec-file", exec, "--chroot-base-dir", base];
            Args::try_parse_from(args.into_iter().chain(rest)).unwrap()
        };
        std::fs::write(base.path().join("real"), "").unwrap();
        let link = base.path().join("link");
        std::os::unix::fs::symlink("real", &link).unwrap();
        let plan = Plan::check(args(link.to_str().unwrap())).unwrap();
        assert_eq!(plan.exec_name, "real");
        let none = Plan::check(args("/none")).unwrap_err().line();
        assert_eq!(
            none,
            "failed to find \"/none\": No such file or directory (os error 2)"
        );
        let folder = Plan::check(args("/proc")).unwrap_err().line();
        assert_eq!(folder, "\"/proc\" is not a file");
    }

    #[test]
    fn paths_that_climb_are_refused() {
        let base = tempfile::tempdir().unwrap();
        for parent in ["..", "a/../b", "/a", "./a"] {
            let error = plan(base.path(), &["--parent-cgroup", parent]).unwrap_err();
            assert!(matches!(error, Error::ParentCgroup { .. }), "{parent:?}");
        }
        plan(base.path(), &["--parent-cgroup", "a/b.slice"]).unwrap();
    }

    #[test]
    fn a_device_is_found_among_the_miscellaneous_ones() {
        let misc = "258 vsock\n 57 userfaultfd\n232 kvm\n";
        assert_eq!(misc_minor(misc, "userfaultfd"), Some(57));
        assert_eq!(misc_minor(misc, "kvm"), Some(232));
        assert_eq!(misc_minor("x userfaultfd\n", "userfaultfd"), None);
        assert_eq!(misc_minor("", "userfaultfd"), None);
    }

    proptest! {
        #[test]
        fn any_id_that_is_taken_is_one_plain_name(id in "[a-z0-9./\\-_\u{e9}]{0,70}") {
            let plain = Path::new(&id).components().count() == 1 && !id.contains(['.', '/', '_', '\u{e9}']);
            prop_assert_eq!(check_id(&id).is_ok(), plain && id.len() <= 64);
        }

        #[test]
        fn any_parent_cgroup_that_is_taken_stays_below_its_root(path in "[a./]{0,12}") {
            if check_parent_cgroup(Path::new(&path)).is_ok() {
                let joined = Path::new("/root").join(&path);
                prop_assert!(joined.starts_with("/root") && !joined.components().any(|part| part == Component::ParentDir));
            }
        }

        #[test]
        fn any_text_as_list_of_devices_is_read_without_harm(text in ".{0,80}") {
            if let Some(minor) = misc_minor(&text, "kvm") {
                prop_assert!(text.contains("kvm") && text.contains(&minor.to_string()));
            }
        }
    }
}
