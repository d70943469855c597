//! The jailer from its command line to the inmate, looked at from outside. Where jails
//! are not possible (no root, or a container without mounts and devices) these tests
//! check that the jailer says so.

mod jail;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use jail::*;
use rustix::fs::makedev;
use rustix::io::FdFlags;

#[test]
fn the_inmate_has_its_folder_its_user_its_limits_and_nothing_else() {
    let jail = Jail::new();
    let mut command = jail.command(&["--resource-limit", "fsize=4096", "--", "--more", "x"]);
    command.env("SECRET", "1");
    let secret = File::open("/proc/self/status").unwrap();
    // Left open on purpose: it has no close-on-exec flag.
    rustix::io::fcntl_setfd(secret.as_fd(), FdFlags::empty()).unwrap();
    let Some(inmate) = jail.start(&mut command) else {
        return;
    };

    let ids = |id: u32| vec![id.to_string(); 4];
    assert_eq!(inmate.status("Uid"), ids(UID));
    assert_eq!(inmate.status("Gid"), ids(GID));
    assert_eq!(inmate.status("Groups"), Vec::<String>::new());
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(inmate.status(set), ["0000000000000000"], "{set}");
    }
    let limit = |value: &str| (value.to_owned(), value.to_owned());
    assert_eq!(inmate.limit("Max open files"), limit("2048"));
    assert_eq!(inmate.limit("Max file size"), limit("4096"));
    assert_eq!(inmate.text("environ"), "");
    let mut open: Vec<_> = fs::read_dir(inmate.proc("fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    open.sort();
    assert_eq!(open, ["0", "1", "2"]);

    let args = inmate.text("cmdline");
    let args: Vec<_> = args.trim_end_matches('\0').split('\0').collect();
    assert_eq!(args[..4], ["/inmate", "--id", ID, "--start-time-us"]);
    assert_eq!(
        (args[5], args[7]),
        ("--start-time-cpu-us", "--parent-cpu-time-us")
    );
    for number in [4, 6, 8] {
        args[number].parse::<u64>().unwrap();
    }
    assert_eq!(args[9..], ["--more", "x"]);

    let mounts = inmate.text("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert_eq!(mounts.split(' ').nth(4), Some("/"));
    let mut wanted = vec!["dev", "dev/kvm", "dev/net", "dev/net/tun", "dev/urandom"];
    if fs::read_to_string("/proc/misc")
        .unwrap_or_default()
        .contains("userfaultfd")
    {
        wanted.push("dev/userfaultfd");
    }
    wanted.extend(["inmate", "inmate.pid", "run"]);
    assert_eq!(inmate.sees(), wanted);
    for (node, device) in [
        ("kvm", makedev(10, 232)),
        ("net/tun", makedev(10, 200)),
        ("urandom", makedev(1, 9)),
    ] {
        let found = jail.root().join("dev").join(node).metadata().unwrap();
        assert_eq!((found.rdev(), found.mode()), (device, 0o020_600), "{node}");
        assert_eq!((found.uid(), found.gid()), (UID, GID), "{node}");
    }
    for folder in ["", "dev", "dev/net", "run"] {
        let found = jail.root().join(folder).metadata().unwrap();
        assert_eq!((found.mode(), found.uid()), (0o040_700, UID), "{folder:?}");
    }
}

#[test]
fn a_daemon_has_no_terminal_and_its_own_session() {
    let jail = Jail::new();
    let Some(inmate) = jail.start(&mut jail.command(&["--daemonize"])) else {
        return;
    };
    for stream in ["fd/0", "fd/1", "fd/2"] {
        let file = inmate.proc(stream).metadata().unwrap();
        assert_eq!(file.rdev(), makedev(1, 3), "{stream}");
    }
    let stat = inmate.text("stat");
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let (session, terminal) = (fields[3], fields[4]);
    assert_eq!(terminal, "0");
    assert_ne!(
        session,
        inmate.pid.to_string(),
        "a leader could get a terminal"
    );
    let own = fs::read_to_string("/proc/self/stat").unwrap();
    let own = own.rsplit(") ").next().unwrap().split(' ').nth(3);
    assert_ne!(Some(session), own);
}

/// In a container whose session's leader is outside: getsid(2) says 0 there.
#[test]
fn a_session_without_a_visible_leader_is_none_of_ours() {
    let jail = Jail::new();
    let jailer = jail.command(&["--new-pid-ns"]);
    let mut outside = Command::new("unshare");
    outside
        .args(["--pid", "--fork"])
        .arg(jailer.get_program())
        .args(jailer.get_args());
    if !jails_are_possible() {
        return;
    }
    let output = outside.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let path = jail.root().join("inmate.pid");
    assert_eq!(fs::read_to_string(&path).unwrap(), "2");
    // The number means another process here, which the harness must not kill.
    fs::remove_file(path).unwrap();
}

#[test]
fn in_a_pid_namespace_the_inmate_is_the_first_process() {
    for daemonize in [false, true] {
        let jail = Jail::new();
        let args: &[&str] = &["--new-pid-ns", "--daemonize"];
        let mut command = jail.command(&args[..1 + usize::from(daemonize)]);
        let Some(inmate) = jail.start(&mut command) else {
            return;
        };
        let pids = inmate.status("NSpid");
        assert_eq!(pids.first(), Some(&inmate.pid.to_string()), "{daemonize}");
        assert_eq!(pids.last().map(String::as_str), Some("1"), "{daemonize}");
        assert!(pids.len() > 1, "{pids:?}");
    }
}

#[test]
fn a_network_namespace_is_joined() {
    let jail = Jail::new();
    let other = Command::new("unshare")
        .args(["--net", "sleep", "60"])
        .stderr(Stdio::null())
        .spawn();
    let mut other = other.unwrap();
    let path = format!("/proc/{}/ns/net", other.id());
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    while jails_are_possible() && fs::read_link(&path).unwrap() == own {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let inmate = jail.start(&mut jail.command(&["--netns", &path]));
    let joined = inmate.map(|inmate| fs::read_link(inmate.proc("ns/net")).unwrap());
    let wanted = fs::read_link(&path);
    other.kill().unwrap();
    other.wait().unwrap();
    if let Some(joined) = joined {
        assert_eq!(joined, wanted.unwrap());
    }
}

#[test]
fn a_file_that_is_no_network_namespace_is_refused() {
    let jail = Jail::new();
    let line = jail.refused(&mut jail.command(&["--netns", "/etc/passwd"]));
    if jails_are_possible() {
        assert_eq!(
            line,
            "failed to join network namespace \"/etc/passwd\": Invalid argument (os error 22)"
        );
    }
}

/// Where the hierarchy of this version with this controller is mounted.
fn hierarchy(version: u8, controller: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    mounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        let root = Path::new(fields[1]);
        let there = match (version, fields[2]) {
            (1, "cgroup") => fields[3].split(',').any(|option| option == controller),
            (2, "cgroup2") => fs::read_to_string(root.join("cgroup.controllers"))
                .unwrap_or_default()
                .split_whitespace()
                .any(|name| name == controller),
            _ => false,
        };
        there.then(|| root.to_path_buf())
    })
}

/// Tries a property and looks at the inmate's cgroup; or, where the host does not let
/// cgroups be made, at the refusal.
fn a_cgroup_is_made(version: u8, property: &str, value: &str) {
    let mut jail = Jail::new();
    let parent = format!("kombi-test-{}-{version}", std::process::id());
    let set = format!("{property}={value}");
    let version_word = version.to_string();
    let args = ["--cgroup", &set, "--parent-cgroup", &parent];
    let mut command = jail.command(&args);
    command.args(["--cgroup-version", &version_word]);
    let controller = property.split('.').next().unwrap();
    let Some(root) = hierarchy(version, controller) else {
        let line = jail.refused(&mut command);
        let words = ["no cgroup hierarchy", "is not available", "root"];
        assert!(words.iter().any(|word| line.contains(word)), "{line}");
        return;
    };
    jail.sweep_cgroups(vec![root.join(&parent)]);
    let probe = root.join(format!("{parent}-probe"));
    let writable = fs::create_dir(&probe)
        .and_then(|()| fs::remove_dir(&probe))
        .is_ok();
    if !writable {
        let line = jail.refused(&mut command);
        assert!(line.contains("cgroup") || line.contains("root"), "{line}");
        return;
    }
    let Some(inmate) = jail.start(&mut command) else {
        return;
    };
    let within = format!("/{parent}/{ID}");
    let cgroups = inmate.text("cgroup");
    assert!(
        cgroups.lines().any(|line| line.ends_with(&within)),
        "{cgroups}"
    );
    let written = fs::read_to_string(root.join(&parent).join(ID).join(property)).unwrap();
    assert_eq!(written.trim(), value);
}

#[test]
fn a_cgroup_of_version_one_is_made_and_joined() {
    a_cgroup_is_made(1, "cpu.shares", "20");
}

#[test]
fn a_cpuset_of_version_one_gets_what_it_was_not_told_from_its_parent() {
    a_cgroup_is_made(1, "cpuset.cpus", "0");
}

#[test]
fn a_cgroup_of_version_two_is_made_and_joined() {
    for (property, value) in [("pids.max", "64"), ("hugetlb.2MB.max", "4194304")] {
        a_cgroup_is_made(2, property, value);
    }
}

#[test]
fn without_values_the_parent_cgroup_of_version_two_is_joined() {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let root = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"))
        .map(|line| PathBuf::from(line.split(' ').nth(1).unwrap()));
    let parent = format!("kombi-test-{}-join", std::process::id());
    let mut jail = Jail::new();
    let args = ["--cgroup-version", "2", "--parent-cgroup", &parent];
    match root.map(|root| root.join(&parent)) {
        Some(group) if jails_are_possible() && fs::create_dir(&group).is_ok() => {
            jail.sweep_cgroups(vec![group]);
            let inmate = jail.start(&mut jail.command(&args)).unwrap();
            let cgroups = inmate.text("cgroup");
            let wanted = format!("0::/{parent}");
            assert!(cgroups.lines().any(|line| line == wanted), "{cgroups}");
        }
        Some(_) => drop(jail.start(&mut jail.command(&args))),
        None => {
            let line = jail.refused(&mut jail.command(&args));
            assert!(
                line.starts_with("no cgroup hierarchy of version 2"),
                "{line}"
            );
        }
    }
}

#[test]
fn what_an_earlier_inmate_planted_is_not_followed() {
    type Plant = fn(&Jail);
    let plant: [(&str, Plant); 4] = [
        ("a link for the monitor", |jail| {
            symlink(jail.base().join("outside"), jail.root().join("inmate")).unwrap();
        }),
        ("another name of a file", |jail| {
            let outside = jail.base().join("outside");
            fs::hard_link(outside, jail.root().join("inmate")).unwrap();
        }),
        ("a link for a folder", |jail| {
            fs::create_dir(jail.root().join("elsewhere")).unwrap();
            symlink("elsewhere", jail.root().join("dev")).unwrap();
        }),
        ("a pid file", |jail| {
            symlink("elsewhere", jail.root().join("inmate.pid")).unwrap();
        }),
    ];
    for (what, plant) in plant {
        let jail = Jail::new();
        fs::create_dir_all(jail.root()).unwrap();
        fs::write(jail.base().join("outside"), "untouched").unwrap();
        plant(&jail);
        let line = jail.refused(&mut jail.command(&[]));
        if jails_are_possible() {
            let words = [
                "is not a file",
                "hard links",
                "open folder",
                "make \"/inmate.pid\"",
            ];
            assert!(
                words.iter().any(|word| line.contains(word)),
                "{what}: {line}"
            );
        }
        let outside = fs::read_to_string(jail.base().join("outside")).unwrap();
        assert_eq!(outside, "untouched", "{what}");
        let folder = jail.root().join("elsewhere");
        if folder.exists() {
            assert_ne!(folder.metadata().unwrap().uid(), UID, "{what}");
        }
    }
}

#[test]
fn an_old_monitor_in_the_folder_is_replaced_as_a_whole() {
    let jail = Jail::new();
    fs::create_dir_all(jail.root()).unwrap();
    let old = jail.root().join("inmate");
    fs::write(&old, vec![1_u8; 4 << 20]).unwrap();
    let held = File::options().write(true).open(&old).unwrap();
    let Some(_inmate) = jail.start(&mut jail.command(&[])) else {
        return;
    };
    let copied = fs::read(&old).unwrap();
    assert!(copied == fs::read(jail.program()).unwrap(), "not a copy");
    assert_ne!(
        held.metadata().unwrap().ino(),
        old.metadata().unwrap().ino()
    );
}

#[test]
fn an_ordinary_user_is_told_to_be_root() {
    let jail = Jail::new();
    let jails = jail.base().join("jails");
    fs::create_dir_all(&jails).unwrap();
    fs::set_permissions(&jails, fs::Permissions::from_mode(0o777)).unwrap();
    // The folder that it was built in may be closed to others.
    let jailer = jail.base().join("kombi-jailer");
    fs::copy(JAILER, &jailer).unwrap();
    let mut command = jail.command_of(&jailer, &[]);
    if rustix::process::geteuid().is_root() {
        command.uid(65_534).gid(65_534);
    }
    let line = jail.refused(&mut command);
    assert!(
        line.ends_with("kombi-jailer is to be started as root"),
        "{line}"
    );
}

#[test]
fn a_monitor_that_needs_libraries_is_told_from_one_that_is_missing() {
    let jail = Jail::empty("inmate");
    // A script needs an interpreter, which the jail has not.
    fs::write(jail.program(), "#!/bin/sh\n").unwrap();
    fs::set_permissions(jail.program(), fs::Permissions::from_mode(0o755)).unwrap();
    let line = jail.refused(&mut jail.command(&[]));
    if jails_are_possible() {
        assert_eq!(
            line,
            "failed to become \"/inmate\" in the jail: No such file or directory (os error 2); a \
             program that is not linked statically needs its libraries in the jail's folder"
        );
    }
}

#[test]
fn the_command_line_is_refused_before_anything_is_made() {
    let jail = Jail::new();
    for (args, wanted) in [
        (
            &["--cgroup", "cpu"] as &[&str],
            "cgroup \"cpu\" is not of the form CONTROLLER.PROPERTY=VALUE",
        ),
        (
            &["--parent-cgroup", "../x"],
            "parent cgroup \"../x\" is not a relative path without . and ..",
        ),
        (
            &["--resource-limit", "no-file=x"],
            "resource limit \"no-file=x\" is not a number of 64 bits behind the =",
        ),
    ] {
        assert_eq!(jail.refused(&mut jail.command(args)), wanted);
        assert!(!jail.root().exists(), "{args:?}");
    }
    let line = jail.refused(Command::new(JAILER).args([
        "--id",
        "a_b",
        "--exec-file",
        "/x",
        "--uid",
        "1",
        "--gid",
        "1",
    ]));
    assert_eq!(line, "id \"a_b\" is not 1 to 64 letters, digits or hyphens");
}
