//! A machine that boots a kernel with a shell script as PID 1.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hv_soft::{SoftHypervisor, SoftPartition};
use lab::initramfs::Initramfs;
use machine::{Ended, Machine, MetadataService, Network, Outside, Stdio};
use tempfile::TempDir;

/// No guest of these tests takes longer.
const PATIENCE: Duration = Duration::from_secs(180);

/// What `guest/kernel/build.sh` and `guest/debian-kernels.sh` leave, or
/// `KOMBI_TEST_KERNELS` has.
pub(crate) fn kernel(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    let dir = std::env::var_os("KOMBI_TEST_KERNELS").map_or(built, PathBuf::from);
    let path = dir.join(name);
    assert!(
        path.exists(),
        "no kernel {path:?}: run guest/kernel/build.sh and guest/debian-kernels.sh first"
    );
    path
}

pub(crate) struct Boot {
    pub(crate) dir: TempDir,
    pub(crate) kernel: &'static str,
    pub(crate) args: &'static str,
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u8,
    pub(crate) rest: serde_json::Value,
    pub(crate) engine: SoftHypervisor,
    /// Behind the interfaces that `rest` names for it.
    pub(crate) metadata: Option<MetadataService>,
    /// Whether there is an initramfs; without, the script is the guest's own business.
    pub(crate) initramfs: bool,
    /// Programs beside busybox.
    pub(crate) programs: Vec<(&'static str, Vec<u8>)>,
}

impl Boot {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            kernel: "vmlinux",
            args: "console=ttyS0 quiet panic=-1",
            memory_mib: 128,
            vcpus: 1,
            rest: serde_json::json!({}),
            engine: SoftHypervisor::default(),
            metadata: None,
            initramfs: true,
            programs: Vec::new(),
        }
    }

    /// Boots with `script` as PID 1; returns how it ended and what it printed.
    pub(crate) fn run(&self, script: &str) -> (Ended, String) {
        self.run_with(script, |_| |_: &str| {})
    }

    /// As [`Boot::run`]; `meet` sees the machine before it starts, and what it returns
    /// each line of the console.
    pub(crate) fn run_with<L>(
        &self,
        script: &str,
        meet: impl FnOnce(&mut Machine<SoftPartition>) -> L,
    ) -> (Ended, String)
    where
        L: FnMut(&str) + Send + 'static,
    {
        let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
        let mounts = "/bin/busybox --install -s /bin; export PATH=/bin; \
                      mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev";
        let mut disk = Initramfs::with_busybox(&busybox, &format!("{mounts}\n{script}"));
        for (name, program) in &self.programs {
            disk.add_program(name, program);
        }
        let initrd = self.dir.path().join("initrd");
        std::fs::write(&initrd, disk.finish()).unwrap();
        let mut draft = serde_json::json!({
            "boot-source": {
                "kernel_image_path": kernel(self.kernel),
                "initrd_path": initrd,
                "boot_args": self.args,
            },
            "machine-config": {
                "mem_size_mib": self.memory_mib,
                "vcpu_count": self.vcpus,
                "engine": "soft",
            },
        });
        if !self.initramfs {
            let source = draft["boot-source"].as_object_mut().unwrap();
            source.remove("initrd_path");
        }
        draft
            .as_object_mut()
            .unwrap()
            .extend(self.rest.as_object().unwrap().clone());
        let blueprint = blueprint::Draft::from_json(draft.to_string().as_bytes())
            .unwrap()
            .check()
            .unwrap();

        let (ours, theirs) = UnixStream::pair().unwrap();
        let stdio = Stdio {
            input: None,
            output: ours.into(),
        };
        let outside = Outside {
            back_ends: machine::BackEnds::new(),
            stdio,
            network: Network {
                taps: Default::default(),
                metadata: self.metadata.clone(),
            },
        };
        let mut machine = Machine::build(&blueprint, &self.engine, outside).unwrap();
        let mut hear = meet(&mut machine);
        let stop = machine.stop_handle();
        // Ends with the test's process.
        std::thread::spawn(move || {
            std::thread::sleep(PATIENCE);
            stop.stop();
        });
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            let mut line = Vec::new();
            let mut console = BufReader::new(theirs);
            while console.read_until(b'\n', &mut line).unwrap() > 0 {
                let words = String::from_utf8_lossy(&line).replace('\r', "");
                hear(words.trim_end());
                text.push_str(&words);
                line.clear();
            }
            text
        });
        let ended = machine.run().unwrap();
        (ended, reader.join().unwrap())
    }
}
