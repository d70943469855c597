//! A directory for one machine, and guests of a few bytes of machine code each.
#![allow(dead_code)] // each test program uses its part

pub(crate) mod bare_driver;
pub(crate) mod monitor;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Pid;
use tempfile::TempDir;

pub(crate) const VMM: &str = env!("CARGO_BIN_EXE_kombi-vmm");
pub(crate) const START: u64 = 16 << 20;

/// `jmp .`
pub(crate) const SPIN: &[u8] = b"\xeb\xfe";
/// `cli; hlt`
pub(crate) const HALT: &[u8] = b"\xfa\xf4";
/// `mov al, 0xfe; out 0x64, al; jmp .`
pub(crate) const RESET: &[u8] = b"\xb0\xfe\xe6\x64\xeb\xfe";
/// `mov dx, 0x600; mov al, 0x34; out dx, al; jmp .`
pub(crate) const POWER_OFF: &[u8] = b"\x66\xba\x00\x06\xb0\x34\xee\xeb\xfe";
/// `ud2` without an interrupt table.
pub(crate) const TRIPLE_FAULT: &[u8] = b"\x0f\x0b";
/// `mov dx, 0x3f8`, then `mov al, byte; out dx, al` each, then RESET.
pub(crate) fn say(text: &str) -> Vec<u8> {
    let mut code = b"\x66\xba\xf8\x03".to_vec();
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]);
    }
    code.extend(RESET);
    code
}

/// An ELF kernel of one segment.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [START, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    image.extend((1_u64 | 5 << 32).to_le_bytes());
    for word in [120, START, START, code.len() as u64, 4096, 4096] {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    image
}

pub(crate) struct Host(TempDir);

impl Host {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A configuration that boots `code`; `rest` are further members, DIR in them
    /// is the directory of this test.
    pub(crate) fn config(&self, code: &[u8], rest: serde_json::Value) -> PathBuf {
        std::fs::write(self.path("kernel"), elf(code)).unwrap();
        let mut config = serde_json::json!({
            "boot-source": {"kernel_image_path": "DIR/kernel", "boot_args": ""},
            "machine-config": {"mem_size_mib": 32, "engine": "soft"},
        });
        config
            .as_object_mut()
            .unwrap()
            .extend(rest.as_object().unwrap().clone());
        let text = config
            .to_string()
            .replace("DIR", self.0.path().to_str().unwrap());
        let path = self.path("config.json");
        std::fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn start(&self, config: &Path, args: &[&str]) -> Child {
        let mut command = Command::new(VMM);
        command
            .args(["--no-api", "--config-file"])
            .arg(config)
            .args(args);
        // A runner that kills a slow test leaves no machine behind.
        command.arg("--die-with-parent");
        command.env("KOMBI_TRANSLATION_CACHE", self.path("translations"));
        if !args.contains(&"--level") {
            command.args(["--level", "warning"]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    pub(crate) fn run(&self, config: &Path, args: &[&str]) -> Output {
        finish(self.start(config, args))
    }

    pub(crate) fn boot(&self, code: &[u8], args: &[&str]) -> Output {
        self.run(&self.config(code, serde_json::json!({})), args)
    }

    /// Stands for the directory in what the process said.
    pub(crate) fn anonymous(&self, text: &[u8]) -> String {
        let text = String::from_utf8_lossy(text);
        text.replace(self.0.path().to_str().unwrap(), "DIR")
    }
}

/// Waits, but not for ever: a machine that hangs must fail its test.
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

pub(crate) fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

pub(crate) fn wait_for_started(child: &mut Child) -> BufReader<std::process::ChildStdout> {
    let mut events = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    events.read_line(&mut line).unwrap();
    assert_eq!(line, "{\"event\":\"started\"}\n");
    events
}
