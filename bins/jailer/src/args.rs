//! The command line: the options of Firecracker's jailer.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;

/// Shuts a monitor into a folder, resource limits, cgroups and a user of its own,
/// and becomes it. To be started as root.
///
/// The jail's folder is CHROOT_BASE_DIR/NAME_OF_EXEC_FILE/ID/root; files that the
/// machine needs are put there beforehand, and paths in its configuration are meant
/// inside it.
#[derive(Debug, Parser)]
#[command(name = "kombi-jailer", version)]
pub(crate) struct Args {
    /// The machine's name: 1 to 64 letters, digits or hyphens. The monitor gets it too.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) id: String,

    /// The monitor, linked statically; it is copied into the jail.
    #[arg(long, value_name = "PATH")]
    pub(crate) exec_file: PathBuf,

    /// The user that the monitor runs as.
    #[arg(long)]
    pub(crate) uid: u32,

    /// The group that the monitor runs as.
    #[arg(long)]
    pub(crate) gid: u32,

    /// Where the folders of jails are.
    #[arg(long, value_name = "DIR", default_value = "/srv/jailer")]
    pub(crate) chroot_base_dir: PathBuf,

    /// The network namespace to join: a path such as /var/run/netns/NAME.
    #[arg(long, value_name = "PATH")]
    pub(crate) netns: Option<PathBuf>,

    /// Leave the terminal: a session of its own, standard streams to /dev/null.
    #[arg(long)]
    pub(crate) daemonize: bool,

    /// Make the monitor the first process of a new PID namespace.
    #[arg(long)]
    pub(crate) new_pid_ns: bool,

    /// A cgroup file to write before the monitor starts, such as cpu.shares=10. May be
    /// given several times.
    #[arg(long, value_name = "FILE=VALUE")]
    pub(crate) cgroup: Vec<String>,

    /// The version of the cgroup hierarchy.
    #[arg(long, value_name = "1|2", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub(crate) cgroup_version: u8,

    /// The cgroup in which the machine's own is made. With version 2 and without
    /// --cgroup the monitor is moved into this one itself, if there is such a one.
    /// [default: the name of the exec file]
    #[arg(long, value_name = "RELATIVE_PATH")]
    pub(crate) parent_cgroup: Option<PathBuf>,

    /// A limit: fsize=BYTES, the size of files that the monitor makes, or no-file=N,
    /// one more than the highest descriptor, 2048 unless told. May be given several times.
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) resource_limit: Vec<String>,

    /// What the monitor gets besides --id and the times.
    #[arg(last = true, value_name = "ARGUMENTS OF THE MONITOR")]
    pub(crate) monitor: Vec<OsString>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &[&str] = &[
        "kombi-jailer",
        "--id",
        "a",
        "--exec-file",
        "/x",
        "--uid",
        "1",
        "--gid",
        "2",
    ];

    fn parse(args: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from(LEAST.iter().chain(args))
    }

    #[test]
    fn the_declaration_is_consistent() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn defaults_are_firecrackers() {
        let args = parse(&[]).unwrap();
        assert_eq!(args.chroot_base_dir, PathBuf::from("/srv/jailer"));
        assert_eq!(args.cgroup_version, 1);
        assert!(!args.daemonize && !args.new_pid_ns);
        assert!(args.cgroup.is_empty() && args.monitor.is_empty());
    }

    #[test]
    fn what_follows_two_hyphens_is_the_monitors() {
        let args = parse(&["--", "--config-file", "c", "--no-api", "--id"]).unwrap();
        assert_eq!(args.monitor, ["--config-file", "c", "--no-api", "--id"]);
        assert!(parse(&["stray"]).is_err());
    }

    #[test]
    fn what_firecracker_refuses_is_refused() {
        for args in [
            &["--uid", "3"] as &[&str],
            &["--cgroup-version", "3"],
            &["--cgroup-version", "x"],
            &["--netns"],
            &["--nonsense"],
        ] {
            assert!(parse(args).is_err(), "{args:?}");
        }
        for (at, value) in [(6, "-1"), (6, "4294967296"), (8, "x")] {
            let mut args = LEAST.to_vec();
            args[at] = value;
            assert!(Args::try_parse_from(args).is_err(), "{value}");
        }
        for without in [1, 3, 5, 7] {
            let mut args = LEAST.to_vec();
            args.drain(without..without + 2);
            assert!(Args::try_parse_from(args).is_err());
        }
    }
}
