//! A user's home for one test, the programs under test, and small images written by the test itself.
//!
//! Invariant: [`Home::is_swept`] is what "nothing left behind" means: no process, socket, pipe, temporary file or mount.
//! Left to others: what is tried.
#![allow(dead_code)] // each test program uses its part

pub(crate) mod registry;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

/// Where `kombi`, `kombi-vmm` and, in `../guest`, the guest's kernel and init were built: machines run on the release
/// build also when the tests are a debug build. `KOMBI_TEST_BIN_DIR` names another place.
pub(crate) fn bin_dir() -> PathBuf {
    let dir = std::env::var_os("KOMBI_TEST_BIN_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/release"),
        PathBuf::from,
    );
    for file in [
        "kombi",
        "kombi-vmm",
        "../guest/vmlinux",
        "../guest/initramfs.cpio",
    ] {
        let path = dir.join(file);
        assert!(
            path.is_file(),
            "{} is missing: run make build first",
            path.display()
        );
    }
    dir.canonicalize().expect("a path")
}

/// A user's home: an image store, a runtime directory, and room for images.
pub(crate) struct Home {
    temp: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        let temp = tempfile::Builder::new()
            .prefix("kombi-test-")
            .tempdir()
            .expect("temporary directory");
        for folder in ["run", "tmp"] {
            fs::create_dir(temp.path().join(folder)).expect("made");
        }
        Self { temp }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// The program as cargo built it for this test, with assets that look as if they were there: for what must be
    /// refused before a machine is made.
    pub(crate) fn kombi_without_machine(&self, args: &[&str]) -> Command {
        let assets = self.path("assets");
        fs::create_dir_all(&assets).expect("made");
        for file in ["vmlinux", "initramfs.cpio"] {
            fs::write(assets.join(file), "").expect("written");
        }
        let mut command = self.command(Path::new(env!("CARGO_BIN_EXE_kombi")), args);
        command
            .env("KOMBI_ASSETS", assets)
            .env("KOMBI_VMM", "/bin/false");
        command
    }

    /// The program that runs machines.
    pub(crate) fn kombi(&self, args: &[&str]) -> Command {
        self.command(&bin_dir().join("kombi"), args)
    }

    /// A verb that needs no machine, as the test's build has it, to its end.
    pub(crate) fn verb(&self, args: &[&str]) -> Output {
        let mut command = self.kombi_without_machine(args);
        command.output().expect("started")
    }

    /// The same, which must go well; its standard output.
    #[track_caller]
    pub(crate) fn done(&self, args: &[&str]) -> String {
        let output = self.verb(args);
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {told}");
        stdout(&output)
    }

    fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(args)
            .env_remove("KOMBI_ASSETS")
            .env_remove("KOMBI_VMM")
            .env("KOMBI_HOME", self.path("store"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("TMPDIR", self.path("tmp"))
            // One for all tests: their machines boot the same kernel.
            .env("KOMBI_TRANSLATION_CACHE", env!("CARGO_TARGET_TMPDIR"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// `kombi run ARGS`, to its end, which must come within two minutes: a machine that hangs is killed, and the test
    /// fails by the exit code 137.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        let kombi = bin_dir().join("kombi");
        let kombi = kombi.to_str().expect("utf-8");
        let limit = ["--signal=KILL", "120", kombi, "run"];
        let args: Vec<&str> = limit.iter().chain(args).copied().collect();
        self.command(Path::new("timeout"), &args)
            .output()
            .expect("started")
    }

    /// `kombi run ARGS`, not waited for.
    pub(crate) fn start(&self, args: &[&str]) -> Child {
        let args: Vec<&str> = ["run"].iter().chain(args).copied().collect();
        self.kombi(&args)
            .stdin(Stdio::piped())
            .spawn()
            .expect("started")
    }

    /// An image with busybox and its applets, as `oci:DIR`.
    pub(crate) fn busybox(&self) -> String {
        let mut layer = tar::Builder::new(Vec::new());
        for dir in ["bin/", "etc/", "root/", "tmp/", "srv/"] {
            append(&mut layer, dir, 0o755, tar::EntryType::Directory, b"");
        }
        let busybox = fs::read("/bin/busybox").expect("busybox-static is installed");
        append(
            &mut layer,
            "bin/busybox",
            0o755,
            tar::EntryType::Regular,
            &busybox,
        );
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/srv:/bin/sh\n";
        append(
            &mut layer,
            "etc/passwd",
            0o644,
            tar::EntryType::Regular,
            passwd,
        );
        append(
            &mut layer,
            "etc/group",
            0o644,
            tar::EntryType::Regular,
            b"root:x:0:\nuser:x:1000:\n",
        );
        append(
            &mut layer,
            "srv/not-executable",
            0o644,
            tar::EntryType::Regular,
            b"text",
        );
        let applets = Command::new("/bin/busybox")
            .arg("--list")
            .output()
            .expect("runs");
        for applet in String::from_utf8(applets.stdout).expect("utf-8").lines() {
            if applet != "busybox" {
                let mut header = header(0o777, tar::EntryType::Symlink, 0);
                layer
                    .append_link(&mut header, format!("bin/{applet}"), "busybox")
                    .expect("appended");
            }
        }
        let config = r#""Env":["PATH=/bin","FROM_IMAGE=yes"],"Cmd":["sh"],"WorkingDir":"/root""#;
        self.image("busybox", config, &[layer.into_inner().expect("finished")])
    }

    /// An OCI image layout of these layers, as `oci:DIR`; `config` is the inside of the configuration's `config`.
    pub(crate) fn image(&self, name: &str, config: &str, layers: &[Vec<u8>]) -> String {
        let dir = self.path(name);
        fs::create_dir_all(dir.join("blobs/sha256")).expect("made");
        let blob = |bytes: &[u8]| -> (String, usize) {
            let digest = Sha256::digest(bytes);
            let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            fs::write(dir.join("blobs/sha256").join(&hex), bytes).expect("written");
            (format!("sha256:{hex}"), bytes.len())
        };
        let layers: Vec<_> = layers.iter().map(|layer| blob(layer)).collect();
        let diff_ids: Vec<String> = layers
            .iter()
            .map(|(digest, _)| format!("\"{digest}\""))
            .collect();
        let (config, config_size) = blob(
            format!(
                r#"{{"architecture":"amd64","os":"linux","config":{{{config}}},
                "rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
                diff_ids.join(",")
            )
            .as_bytes(),
        );
        let described: Vec<String> = layers
            .iter()
            .map(|(digest, size)| {
                format!(
                    r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{digest}","size":{size}}}"#
                )
            })
            .collect();
        let (manifest, manifest_size) = blob(
            format!(
                r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
                "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":{config_size}}},
                "layers":[{}]}}"#,
                described.join(",")
            )
            .as_bytes(),
        );
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("written");
        fs::write(
            dir.join("index.json"),
            format!(
                r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json",
                "digest":"{manifest}","size":{manifest_size}}}]}}"#
            ),
        )
        .expect("written");
        format!("oci:{}", dir.display())
    }

    /// Processes that were started with this home in their environment, this test's own children included.
    pub(crate) fn processes(&self) -> Vec<(i32, String)> {
        let mark = self.temp.path().as_os_str().as_encoded_bytes().to_vec();
        let entries = fs::read_dir("/proc").expect("readable");
        entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let pid: i32 = path.file_name()?.to_str()?.parse().ok()?;
                let environ = fs::read(path.join("environ")).ok()?;
                let is_ours = environ.windows(mark.len()).any(|window| window == mark);
                let name = fs::read_to_string(path.join("comm")).ok()?;
                (is_ours && pid != i32::try_from(std::process::id()).ok()?)
                    .then(|| (pid, name.trim().to_owned()))
            })
            .collect()
    }

    /// The process id of the one monitor that runs in this home.
    pub(crate) fn monitor(&self) -> i32 {
        wait_for("a monitor", || {
            let all = self.processes();
            all.into_iter()
                .find(|(_, name)| name == "kombi-vmm")
                .map(|(pid, _)| pid)
        })
    }

    /// Nothing is left behind.
    #[track_caller]
    pub(crate) fn is_swept(&self) {
        // A killed process may take a moment to leave /proc.
        let deadline = Instant::now() + Duration::from_secs(2);
        while !self.processes().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(self.processes(), [], "processes are left behind");
        for folder in ["run/kombi", "tmp", "store/tmp"] {
            let left: Vec<_> = fs::read_dir(self.path(folder))
                .map(|dir| dir.map(|entry| entry.expect("entry").path()).collect())
                .unwrap_or_default();
            assert!(left.is_empty(), "files are left behind: {left:?}");
        }
        let mounts = fs::read_to_string("/proc/self/mounts").expect("readable");
        assert!(
            !mounts.contains(self.temp.path().to_str().expect("utf-8")),
            "a mount is left behind"
        );
    }
}

fn header(mode: u32, kind: tar::EntryType, size: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_entry_type(kind);
    header.set_size(u64::try_from(size).expect("fits"));
    header.set_mtime(0);
    header
}

pub(crate) fn append(
    layer: &mut tar::Builder<Vec<u8>>,
    path: &str,
    mode: u32,
    kind: tar::EntryType,
    bytes: &[u8],
) {
    let mut header = header(mode, kind, bytes.len());
    layer
        .append_data(&mut header, path, bytes)
        .expect("appended");
}

/// An ELF kernel that runs `code` at its 64-bit entry, with `memory_bytes` of memory for itself.
pub(crate) fn tiny_kernel(path: &Path, code: &[u8], memory_bytes: u64) {
    const ENTRY: u64 = 0x0100_0000;
    const CODE_OFFSET: u64 = 0x1000;
    let mut elf = Vec::new();
    // ELF header (System V ABI, "Object files"): 64-bit, little-endian, ET_EXEC, EM_X86_64, one program header.
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2_u16, 62] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    elf.extend_from_slice(&1_u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    // Program header: PT_LOAD, readable and executable.
    for word in [1_u32, 5] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    let code_bytes = u64::try_from(code.len()).expect("fits");
    for word in [
        CODE_OFFSET,
        ENTRY,
        ENTRY,
        code_bytes,
        memory_bytes.max(code_bytes),
        0x1000,
    ] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.resize(usize::try_from(CODE_OFFSET).expect("fits"), 0);
    elf.extend_from_slice(code);
    let mut file = fs::File::create(path).expect("made");
    file.write_all(&elf).expect("written");
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// It failed with `code`, and said why in one line that has all of `words` in it.
#[track_caller]
pub(crate) fn refused(output: &Output, code: i32, words: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(
        said.starts_with("kombi: ") && said.lines().count() == 1,
        "not one line: {said}"
    );
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
    assert_eq!(stdout(output), "");
}

/// It ended with `code` and without a complaint.
#[track_caller]
pub(crate) fn ended(output: &Output, code: i32) {
    assert_eq!(
        (output.status.code(), stderr(output).as_str()),
        (Some(code), ""),
        "{}",
        stdout(output)
    );
}

pub(crate) fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(got) = attempt() {
            return got;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a signal.
pub(crate) fn signal(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
    rustix::process::kill_process(pid, signal).expect("sent");
}

pub(crate) fn pid_of(child: &Child) -> i32 {
    i32::try_from(child.id()).expect("fits")
}
