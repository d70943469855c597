//! A base folder for jails, an inmate that only waits, and what the host knows of it.
//!
//! Invariant: when a [`Jail`] goes, so do its inmate, its folder and its cgroups.
#![allow(dead_code)] // each test program uses its part

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;

pub(crate) const JAILER: &str = env!("CARGO_BIN_EXE_kombi-jailer");
pub(crate) const ID: &str = "test-1";
pub(crate) const UID: u32 = 12_301;
pub(crate) const GID: u32 = 12_302;

const WAITING: &str = "#include <unistd.h>\nint main(void) { sleep(60); return 7; }\n";

/// Whether this user on this host may make jails: mount and make devices. A container
/// that forbids it must be told so by the jailer; see [`Jail::refused`].
pub(crate) fn jails_are_possible() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let node = folder.path().join("node");
    let device = makedev(10, 200);
    let made = mknodat(CWD, &node, FileType::CharacterDevice, Mode::RUSR, device);
    let unshared = Command::new("unshare")
        .args(["--mount", "--propagation", "slave", "mount", "--bind"])
        .args([folder.path(), folder.path()])
        .stderr(Stdio::null())
        .status();
    made.is_ok() && unshared.is_ok_and(|status| status.success())
}

/// A base folder with the inmate's program, and one jail in it.
pub(crate) struct Jail {
    base: TempDir,
    exec_name: &'static str,
    cgroups: Vec<PathBuf>,
}

impl Jail {
    /// For an inmate that waits to be looked at.
    pub(crate) fn new() -> Self {
        let jail = Self::empty("inmate");
        let source = jail.base.path().join("inmate.c");
        fs::write(&source, WAITING).unwrap();
        let compiled = Command::new("cc")
            .args(["-static", "-o"])
            .arg(jail.program())
            .arg(&source)
            .output()
            .unwrap();
        assert!(compiled.status.success(), "{compiled:?}");
        jail
    }

    /// For a program that the test puts in place.
    pub(crate) fn empty(exec_name: &'static str) -> Self {
        let base = tempfile::Builder::new()
            .prefix("kombi-test-jail-")
            .tempdir()
            .unwrap();
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self {
            base,
            exec_name,
            cgroups: Vec::new(),
        }
    }

    pub(crate) fn base(&self) -> &Path {
        self.base.path()
    }

    /// The inmate's program outside.
    pub(crate) fn program(&self) -> PathBuf {
        self.base.path().join(self.exec_name)
    }

    /// The jail's folder.
    pub(crate) fn root(&self) -> PathBuf {
        let base = self.base.path().join("jails");
        base.join(self.exec_name).join(ID).join("root")
    }

    /// Has cgroups below these removed in the end.
    pub(crate) fn sweep_cgroups(&mut self, parents: Vec<PathBuf>) {
        self.cgroups = parents;
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        self.command_of(Path::new(JAILER), args)
    }

    pub(crate) fn command_of(&self, jailer: &Path, args: &[&str]) -> Command {
        let jails = self.base.path().join("jails");
        fs::create_dir_all(&jails).unwrap();
        let mut command = Command::new(jailer);
        command
            .args([
                "--id",
                ID,
                "--uid",
                &UID.to_string(),
                "--gid",
                &GID.to_string(),
            ])
            .arg("--exec-file")
            .arg(self.program())
            .arg("--chroot-base-dir")
            .arg(jails)
            .args(args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts an inmate and looks at it once it is in. `None`, after a look at what the
    /// jailer said, where the host allows no jails.
    pub(crate) fn start(&self, command: &mut Command) -> Option<Inmate> {
        if !jails_are_possible() {
            self.refused(command);
            return None;
        }
        let mut started = Started(command.spawn().unwrap());
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            if let Some(pid) = self.inmate()
                && fs::read_to_string(format!("/proc/{pid}/comm"))
                    .is_ok_and(|name| name.trim() == self.exec_name)
                && fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|args| args.starts_with(b"/"))
            {
                return Some(Inmate {
                    pid,
                    _jailer: started,
                });
            }
            if let Some(status) = started.0.try_wait().unwrap()
                && !status.success()
            {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = started.0.kill();
        panic!("no inmate: {:?}", read_all(&mut started.0));
    }

    /// Runs the jailer and returns the line with which it refuses.
    pub(crate) fn refused(&self, command: &mut Command) -> String {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        let line = said
            .strip_prefix("kombi-jailer: error: ")
            .unwrap_or_else(|| panic!("{said}"));
        assert_eq!(line.matches('\n').count(), 1, "{said}");
        line.trim_end()
            .replace(self.base.path().to_str().unwrap(), "BASE")
    }

    /// The number in the pid file.
    fn inmate(&self) -> Option<i32> {
        let path = self.root().join(format!("{}.pid", self.exec_name));
        fs::read_to_string(path).ok()?.parse().ok()
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        if let Some(pid) = self.inmate().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
            let until = Instant::now() + Duration::from_secs(5);
            while test_kill_process(pid).is_ok() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        for parent in &self.cgroups {
            // The kernel may need a moment to see that a cgroup is empty.
            for _ in 0..100 {
                let _ = fs::remove_dir(parent.join(ID));
                if fs::remove_dir(parent).is_ok() || !parent.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// The process that was started; killed and waited for when it goes.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn read_all(child: &mut Child) -> (String, String) {
    let mut said = (String::new(), String::new());
    if let Some(stdout) = child.stdout.as_mut() {
        let _ = std::io::Read::read_to_string(stdout, &mut said.0);
    }
    if let Some(stderr) = child.stderr.as_mut() {
        let _ = std::io::Read::read_to_string(stderr, &mut said.1);
    }
    said
}

/// The process in the jail, as /proc shows it to the host.
pub(crate) struct Inmate {
    pub(crate) pid: i32,
    _jailer: Started,
}

impl Inmate {
    pub(crate) fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.pid))
    }

    pub(crate) fn text(&self, file: &str) -> String {
        let bytes = fs::read(self.proc(file)).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    /// The words of a line of /proc/PID/status.
    pub(crate) fn status(&self, field: &str) -> Vec<String> {
        let text = self.text("status");
        let line = text.lines().find_map(|line| line.strip_prefix(field));
        let line = line.unwrap().trim_start_matches(':');
        line.split_whitespace().map(str::to_owned).collect()
    }

    /// A resource limit, soft and hard.
    pub(crate) fn limit(&self, name: &str) -> (String, String) {
        let text = self.text("limits");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        let mut words = line.split_whitespace().map(str::to_owned);
        (words.next().unwrap(), words.next().unwrap())
    }

    /// Every path that it can see, with the root for /.
    pub(crate) fn sees(&self) -> Vec<String> {
        let root = self.proc("root/");
        let mut seen = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                let path = entry.path();
                seen.push(
                    path.strip_prefix(&root)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned(),
                );
                if entry.file_type().unwrap().is_dir() {
                    folders.push(path);
                }
            }
        }
        seen.sort();
        seen
    }
}

/// Waits, but not for ever.
pub(crate) fn finish(mut child: Child) -> Output {
    let until = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}
