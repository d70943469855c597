//! A stage on which a script plays the monitor's process and a thread the guest's init.
//!
//! Invariant: [`Stage::is_swept`] is what "nothing left behind" means: no process of the monitor's, no file in the
//! runtime directory. Left to others: real machines (bins/cli/tests).

use std::fs;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use guest_wire::{FrameDecoder, GuestMessage, Hello, HostMessage, StartSpec};
use sandbox::{Engine, Plan, ProcessSpec};

/// Keeps what it is given, says that it runs, and ends orderly when told so.
pub(crate) const ORDERLY: &str = r#"
cat > "$0.config"
echo '{"event":"started"}'
read off < "$0.off"
echo '{"event":"stopped","outcome":"power-off","message":null}'
"#;

pub(crate) struct Stage {
    temp: tempfile::TempDir,
    off: File,
}

impl Stage {
    pub(crate) fn with_monitor(script: &str) -> Self {
        let temp = tempfile::tempdir().expect("temporary directory");
        let path = temp.path().join("vmm");
        let script = format!("#!/bin/sh\necho $$ > \"$0.pid\"\n{script}");
        fs::write(&path, script).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
        let off = temp.path().join("vmm.off");
        rustix::fs::mkfifoat(rustix::fs::CWD, &off, rustix::fs::Mode::RWXU).expect("made");
        let off = File::options()
            .read(true)
            .write(true)
            .open(off)
            .expect("opened");
        Self { temp, off }
    }

    pub(crate) fn plan(&self) -> Plan {
        Plan {
            name: Some("stage".to_owned()),
            hostname: None,
            kernel: "/k".into(),
            initramfs: "/i".into(),
            vmm: self.temp.path().join("vmm"),
            layers: vec!["/layer a".into(), "/layer b".into()],
            upper: None,
            vcpus: 1,
            memory_mib: 64,
            cpu_model: sandbox::CpuModel::default(),
            engine: Engine::Auto,
            translation_cache: None,
            engine_trace: None,
            metrics_path: None,
            boot_timeout: Duration::from_secs(10),
            verbose: false,
        }
    }

    pub(crate) fn parent(&self) -> PathBuf {
        self.temp.path().join("run")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// Plays the guest: calls, greets, takes the start, and goes on with `play`; then the machine powers off.
    pub(crate) fn guest(
        &self,
        play: impl FnOnce(&mut Guest) + Send + 'static,
    ) -> JoinHandle<StartSpec> {
        let socket = self.parent().join("stage/v.sock_1024");
        let mut off = self.off.try_clone().expect("cloned");
        std::thread::spawn(move || {
            let mut guest = Guest::call(&socket);
            guest_wire::write_hello(&mut guest.stream, Hello::OURS).expect("greeted");
            let hello = guest_wire::read_hello(&mut guest.stream).expect("greeted back");
            hello.agree().expect("same version");
            let Some(HostMessage::Start(start)) = guest.hear() else {
                panic!("no start");
            };
            play(&mut guest);
            // Until the host closes.
            while guest.hear().is_some() {}
            off.write_all(b"off\n").expect("told");
            *start
        })
    }

    /// Plays a guest that only says `bytes`.
    pub(crate) fn babbler(&self, bytes: Vec<u8>) -> JoinHandle<()> {
        let socket = self.parent().join("stage/v.sock_1024");
        std::thread::spawn(move || {
            let mut guest = Guest::call(&socket);
            let _ = guest.stream.write_all(&bytes);
            let mut rest = Vec::new();
            let _ = guest.stream.read_to_end(&mut rest);
        })
    }

    pub(crate) fn monitor_pid(&self) -> i32 {
        let text = wait_for(|| {
            fs::read_to_string(self.file("vmm.pid"))
                .ok()
                .filter(|text| text.ends_with('\n'))
        });
        text.trim().parse().expect("a number")
    }

    #[track_caller]
    pub(crate) fn is_swept(&self) {
        let left: Vec<_> = fs::read_dir(self.parent())
            .map(|dir| dir.map(|entry| entry.expect("entry").path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "left behind: {left:?}");
        // Where it is empty the monitor ended before it had written.
        let text = fs::read_to_string(self.file("vmm.pid")).unwrap_or_default();
        if let Ok(pid) = text.trim().parse::<i32>() {
            let process = PathBuf::from(format!("/proc/{pid}"));
            assert!(!process.exists(), "the monitor lives on");
        }
    }
}

pub(crate) struct Guest {
    stream: UnixStream,
    decoder: FrameDecoder,
}

impl Guest {
    fn call(socket: &Path) -> Self {
        Self {
            stream: wait_for(|| UnixStream::connect(socket).ok()),
            decoder: FrameDecoder::new(),
        }
    }

    pub(crate) fn say(&mut self, message: &GuestMessage) {
        guest_wire::write_message(&mut self.stream, message).expect("said");
    }

    /// As when the monitor, which holds the guest's connection, dies.
    pub(crate) fn hang_up(&mut self) {
        self.stream
            .shutdown(std::net::Shutdown::Both)
            .expect("shut down");
    }

    /// `None` when the host has closed, or said nothing for a while.
    pub(crate) fn hear(&mut self) -> Option<HostMessage> {
        self.hear_within(Duration::from_secs(20))
    }

    pub(crate) fn hear_within(&mut self, patience: Duration) -> Option<HostMessage> {
        self.stream.set_read_timeout(Some(patience)).expect("set");
        let mut buffer = vec![0; 1 << 16];
        loop {
            if let Some(message) = self.decoder.take_message().expect("a message") {
                return Some(message);
            }
            match self.stream.read(&mut buffer) {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.decoder.feed(&buffer[..count]),
            }
        }
    }
}

pub(crate) fn process(stdin: bool) -> ProcessSpec {
    ProcessSpec {
        args: vec!["cmd".to_owned()],
        env: Vec::new(),
        cwd: "/".to_owned(),
        user: String::new(),
        terminal: None,
        stdin,
    }
}

pub(crate) fn wait_for<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(got) = attempt() {
            return got;
        }
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}
