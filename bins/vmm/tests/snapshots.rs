//! Snapshots over the API: a machine is written, its process ends, and others go on from
//! the files. The bare guests run on KVM as well where there is one.

mod host;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use host::monitor::Monitor;
use host::*;
use lab::initramfs::Initramfs;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

/// Writes the bytes 0x40 to 0x7f to the console in turn, for ever: `mov dx, 0x3f8; mov al,
/// 0x40`; OUT; `inc al; and al, 0x3f; or al, 0x40; mov ecx, 4000; dec ecx; jnz` there;
/// `jmp` to the OUT.
const COUNTER: &[u8] = b"\x66\xba\xf8\x03\xb0\x40\xee\xfe\xc0\x24\x3f\x0c\x40\
    \xb9\xa0\x0f\0\0\xff\xc9\x75\xfc\xeb\xee";

/// Where a snapshot lies.
struct Files(Host);

impl Files {
    fn new() -> Self {
        Self(Host::new())
    }

    fn state(&self) -> PathBuf {
        self.0.path("state")
    }

    fn memory(&self) -> PathBuf {
        self.0.path("memory")
    }

    fn create(&self) -> Value {
        json!({"snapshot_path": self.state(), "mem_file_path": self.memory()})
    }

    fn load(&self, resume: bool) -> Value {
        let backend = json!({"backend_type": "File", "backend_path": self.memory()});
        json!({"snapshot_path": self.state(), "mem_backend": backend, "resume_vm": resume})
    }

    fn names(&self) -> Vec<String> {
        let dir = self.state().parent().unwrap().to_owned();
        let names = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn pause(monitor: &Monitor) {
    assert_eq!(vm(monitor, "Paused"), (204, Value::Null));
}

fn vm(monitor: &Monitor, state: &str) -> (u16, Value) {
    monitor.ask("PATCH", "/vm", Some(json!({"state": state})))
}

/// A machine that counts into `log`, on an engine.
fn counting(engine: &str, log: &Path) -> Option<Monitor> {
    let monitor = Monitor::start(&[]);
    monitor.prepare(COUNTER);
    monitor.put("/serial", json!({"serial_out_path": log}));
    let engine = json!({"engine": engine});
    let patched = monitor.ask("PATCH", "/machine-config", Some(engine));
    assert_eq!(patched.0, 204);
    match monitor.action("InstanceStart") {
        (204, _) => Some(monitor),
        (_, body) => {
            let line = body["fault_message"].as_str().unwrap();
            assert!(line.contains("/dev/kvm"), "{line}");
            None
        }
    }
}

fn len(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.len())
}

fn await_growth(path: &Path) {
    let (until, before) = (Instant::now() + Duration::from_secs(30), len(path));
    while len(path) < before + 70 {
        assert!(Instant::now() < until, "the guest stands still");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn terminate(monitor: Monitor) {
    kill_process(pid(monitor.child.as_ref().unwrap()), Signal::TERM).unwrap();
    assert_eq!(monitor.end().0, Some(143));
}

/// No byte is missing, none is there twice.
fn assert_counted(log: &Path) {
    let bytes = std::fs::read(log).unwrap();
    for (nth, byte) in bytes.iter().enumerate() {
        assert_eq!(usize::from(*byte), 0x40 + nth % 64, "byte {nth}");
    }
}

#[test]
fn a_guest_counts_on_in_other_processes_on_each_engine() {
    for engine in ["soft", "kvm"] {
        let (files, host) = (Files::new(), Host::new());
        let log = host.path("log");
        let Some(first) = counting(engine, &log) else {
            continue;
        };
        await_growth(&log);
        pause(&first);
        first.put("/snapshot/create", files.create());
        assert_eq!(files.names(), ["memory", "state"], "{engine}");
        let memory = std::fs::metadata(files.memory()).unwrap();
        assert_eq!(memory.len(), 32 << 20);
        assert!(memory.blocks() * 512 < 4 << 20, "zeros take no room");
        let config = first.get("/vm/config");
        terminate(first);

        // A machine that waits to be resumed.
        let second = Monitor::start(&[]);
        let at = len(&log);
        second.put("/snapshot/load", files.load(false));
        assert_eq!(second.state(), "Paused");
        assert_eq!(second.get("/vm/config"), config);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(len(&log), at);
        assert_eq!(vm(&second, "Resumed"), (204, Value::Null));
        await_growth(&log);
        // And again, over the files that it came from.
        pause(&second);
        second.put("/snapshot/create", files.create());
        assert_eq!(vm(&second, "Resumed"), (204, Value::Null));
        pause(&second);
        second.put("/snapshot/create", files.create());
        terminate(second);

        let third = Monitor::start(&[]);
        third.put("/snapshot/load", files.load(true));
        assert_eq!(third.state(), "Running");
        await_growth(&log);
        terminate(third);
        assert_counted(&log);
    }
}

#[test]
fn what_cannot_be_written_is_refused_and_leaves_the_machine_and_no_file() {
    let (files, host) = (Files::new(), Host::new());
    let log = host.path("log");
    std::fs::write(&log, "").unwrap();
    let monitor = counting("soft", &log).unwrap();
    let refused = |change: Value, wanted: &str| {
        let mut body = files.create();
        let change = change.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(change);
        let got = monitor.refusal("PUT", "/snapshot/create", Some(body));
        assert!(got.contains(wanted), "{got}");
        assert!(!got.contains('\n'));
        assert!(files.names().is_empty(), "{wanted}: {:?}", files.names());
    };
    refused(json!({}), "pause it");
    pause(&monitor);
    refused(json!({"snapshot_type": "Diff"}), "Diff");
    refused(json!({"mem_file_path": files.state()}), "two files");
    refused(
        json!({"mem_file_path": "/nowhere/memory"}),
        "/nowhere/memory",
    );
    refused(json!({"snapshot_path": "/nowhere/state"}), "/nowhere/state");
    refused(json!({"snapshot_path": "/dev/null"}), "something else");
    refused(json!({"snapshot_path": host.path("")}), "failed to write");
    refused(json!({"more": 1}), "unknown field");
    monitor.put("/snapshot/create", files.create());
    assert_eq!(vm(&monitor, "Resumed"), (204, Value::Null));
    await_growth(&log);
    terminate(monitor);
    assert_counted(&log);

    let monitor = Monitor::start(&[]);
    let got = monitor.refusal("PUT", "/snapshot/create", Some(files.create()));
    assert!(got.contains("has not started"), "{got}");
}

/// Fills memory from 32 MiB to 512 MiB and says so: `mov edi, 0x2000000; mov ecx, 0x7800000;
/// mov eax, 0x5a5a5a5a; rep stosd; mov dx, 0x3f8; out dx, al`; `jmp` to itself.
const FILLER: &[u8] = b"\xbf\0\0\0\x02\xb9\0\0\x80\x07\xb8\x5a\x5a\x5a\x5a\xf3\xab\
    \x66\xba\xf8\x03\xee\xeb\xfe";

#[test]
fn while_a_snapshot_is_written_the_machine_can_be_asked_and_changed() {
    let (files, host) = (Files::new(), Host::new());
    let (disk, log) = (host.path("disk"), host.path("log"));
    std::fs::write(&disk, [0; 4096]).unwrap();
    let monitor = Monitor::start(&[]);
    monitor.prepare(FILLER);
    let memory = json!({"mem_size_mib": 512});
    assert_eq!(monitor.ask("PATCH", "/machine-config", Some(memory)).0, 204);
    monitor.put("/serial", json!({"serial_out_path": log}));
    let drive = json!({"drive_id": "d", "path_on_host": disk, "is_root_device": false});
    monitor.put("/drives/d", drive);
    assert_eq!(monitor.action("InstanceStart").0, 204);
    let until = Instant::now() + Duration::from_secs(60);
    while len(&log) == 0 {
        assert!(Instant::now() < until, "memory is not filled");
        std::thread::sleep(Duration::from_millis(5));
    }
    pause(&monitor);
    std::thread::scope(|scope| {
        let creating = scope.spawn(|| monitor.put("/snapshot/create", files.create()));
        // Its files are there from the beginning, by other names.
        while files.names().is_empty() {
            std::thread::yield_now();
        }
        let mut answered = 0;
        while !creating.is_finished() {
            let limiter = json!({"bandwidth": {"size": 1000 + answered, "refill_time": 100}});
            let patch = json!({"drive_id": "d", "path_on_host": disk, "rate_limiter": limiter});
            assert_eq!(monitor.ask("PATCH", "/drives/d", Some(patch)).0, 204);
            let drive = monitor.get("/vm/config")["drives"][0].clone();
            let size = &drive["rate_limiter"]["bandwidth"]["size"];
            assert_eq!(size, &json!(1000 + answered));
            pause(&monitor);
            answered += 1;
        }
        assert!(answered > 3, "{answered} rounds while it was written");
    });
    // Who resumes while it is written waits for that: the memory is whole.
    std::thread::scope(|scope| {
        let creating = scope.spawn(|| monitor.put("/snapshot/create", files.create()));
        while files.names().len() < 4 && !creating.is_finished() {
            std::thread::yield_now();
        }
        assert_eq!(vm(&monitor, "Resumed"), (204, Value::Null));
    });
    terminate(monitor);
    let restored = Monitor::start(&[]);
    restored.put("/snapshot/load", files.load(true));
    assert_eq!(restored.state(), "Running");
    terminate(restored);
}

/// A snapshot of a machine that does next to nothing.
fn some() -> Files {
    let files = Files::new();
    let monitor = Monitor::start(&[]);
    monitor.prepare(SPIN);
    assert_eq!(monitor.action("InstanceStart").0, 204);
    pause(&monitor);
    monitor.put("/snapshot/create", files.create());
    files
}

#[test]
fn a_load_at_the_wrong_time_or_of_what_is_not_there_changes_nothing() {
    let files = some();
    let monitor = Monitor::start(&[]);
    let with = |change: Value| {
        let mut body = files.load(true);
        let change = change.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(change);
        Some(body)
    };
    for (change, wanted) in [
        (
            json!({"mem_backend": {"backend_type": "Uffd", "backend_path": "/s"}}),
            "Uffd",
        ),
        (json!({"huge_pages": "2M"}), "huge_pages"),
        (json!({"mem_file_path": "/m"}), "mem_backend"),
        (json!({"more": 1}), "unknown field"),
    ] {
        let got = monitor.refusal("PUT", "/snapshot/load", with(change));
        assert!(got.contains(wanted), "{got}");
    }
    // Log and metrics belong to the process.
    monitor.put("/logger", json!({"level": "Error"}));
    let metrics = monitor.host.path("metrics");
    monitor.put("/metrics", json!({"metrics_path": metrics}));
    monitor.put("/snapshot/load", files.load(true));
    assert_eq!(monitor.state(), "Running");
    let config = monitor.get("/vm/config");
    assert_eq!(config["metrics"]["metrics_path"], json!(metrics));
    let got = monitor.refusal("PUT", "/snapshot/load", Some(files.load(true)));
    assert!(got.contains("has started already"), "{got}");

    let monitor = Monitor::start(&[]);
    monitor.prepare(SPIN);
    let got = monitor.refusal("PUT", "/snapshot/load", Some(files.load(true)));
    assert!(got.contains("before anything else"), "{got}");
    assert_eq!(monitor.action("InstanceStart").0, 204);
}

#[test]
fn a_load_that_fails_says_why_in_one_line_and_ends_the_process() {
    let files = some();
    let whole = std::fs::read(files.state()).unwrap();
    let memory = std::fs::read(files.memory()).unwrap();
    let cut = |bytes: &[u8], n: usize| bytes[..n].to_vec();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    type Case = (&'static str, Option<Vec<u8>>, Option<Vec<u8>>, Value);
    let cases: [Case; 9] = [
        (
            "failed to read snapshot",
            None,
            Some(memory.clone()),
            json!({}),
        ),
        (
            "failed to open memory",
            Some(whole.clone()),
            None,
            json!({}),
        ),
        (
            "is not a snapshot",
            Some(b"{}".to_vec()),
            Some(memory.clone()),
            json!({}),
        ),
        (
            "is damaged",
            Some(cut(&whole, 300)),
            Some(memory.clone()),
            json!({}),
        ),
        ("checksum", Some(flipped), Some(memory.clone()), json!({})),
        (
            "memory file has 4096 bytes",
            Some(whole.clone()),
            Some(cut(&memory, 4096)),
            json!({}),
        ),
        (
            "memory file has 0 bytes",
            Some(whole.clone()),
            Some(Vec::new()),
            json!({}),
        ),
        (
            "no vsock",
            Some(whole.clone()),
            Some(memory.clone()),
            json!({"vsock_override": {"uds_path": "/v"}}),
        ),
        (
            "no interface \"e\"",
            Some(whole.clone()),
            Some(memory.clone()),
            json!({"network_overrides": [{"iface_id": "e", "host_dev_name": "t"}]}),
        ),
    ];
    for (wanted, state, memory, change) in cases {
        for (path, bytes) in [(files.state(), state), (files.memory(), memory)] {
            match bytes {
                Some(bytes) => std::fs::write(path, bytes).unwrap(),
                None => std::fs::remove_file(path).unwrap(),
            }
        }
        let monitor = Monitor::start(&[]);
        let mut body = files.load(true);
        let change = change.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(change);
        let got = monitor.refusal("PUT", "/snapshot/load", Some(body));
        assert!(
            got.contains(wanted) && !got.contains('\n'),
            "{wanted}: {got}"
        );
        assert_eq!(monitor.end().0, Some(152), "{wanted}");
    }
}

#[test]
fn versions_are_told_on_the_command_line() {
    let files = some();
    let run = |args: &[&str]| {
        let output = Command::new(VMM).args(args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), text, errors)
    };
    let version = run(&["--snapshot-version"]);
    assert_eq!(version, (Some(0), "v1.0.0\n".into(), String::new()));
    let state = files.state();
    let described = run(&["--describe-snapshot", state.to_str().unwrap()]);
    assert_eq!(described, version);
    let (code, text, errors) = run(&["--describe-snapshot", VMM]);
    assert_eq!((code, text.as_str()), (Some(152), ""));
    assert!(errors.contains("is not a snapshot"), "{errors}");
}

fn kernel() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    let dir = std::env::var_os("KOMBI_TEST_KERNELS").map_or(built, PathBuf::from);
    dir.join("vmlinux")
}

/// Each line of a guest's console, until its process ends.
fn lines(monitor: &mut Monitor) -> Receiver<String> {
    let console = monitor.child.as_mut().unwrap().stdout.take().unwrap();
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).lines().map_while(Result::ok) {
            if sender.send(line.trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    lines
}

/// The next line that begins with `word`: what follows it.
fn next(lines: &Receiver<String>, word: &str) -> String {
    let mut seen = String::new();
    loop {
        match lines.recv_timeout(Duration::from_secs(120)) {
            Ok(line) => match line.strip_prefix(word) {
                Some(rest) => return rest.trim().to_owned(),
                None => seen.push_str(&line),
            },
            Err(error) => panic!("no line {word:?}: {error}: {seen}"),
        }
    }
}

/// Number of the tick, uptime and time of day in hundredths of seconds.
fn tick(lines: &Receiver<String>) -> (u64, u64, u64) {
    let line = next(lines, "tick");
    let words: Vec<u64> = line
        .split_whitespace()
        .map(|word| word.replace('.', "").parse().unwrap())
        .collect();
    let [n, uptime, seconds] = words[..] else {
        panic!("{line}");
    };
    (n, uptime, seconds)
}

/// With disk, entropy, balloon and two vCPUs: the guest counts on, time goes on from where
/// it was, its disk works, each copy's random numbers are its own.
#[test]
fn linux_goes_on_in_several_processes_at_once() {
    let (files, host) = (Files::new(), Host::new());
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let script = "/bin/busybox --install -s /bin; export PATH=/bin\n\
        mount -t proc p /proc; mount -t devtmpfs d /dev; mount -t sysfs s /sys\n\
        echo before > /dev/vda; sync; n=0\n\
        (while :; do n=$((n+1)); [ $n -gt 100000 ] && n=0; done) &\n\
        while :; do n=$((n+1)); read up rest < /proc/uptime; echo tick $n $up $(date +%s)\n\
        echo 3 > /proc/sys/vm/drop_caches; echo disk $(head -c 6 /dev/vda)\n\
        echo random $(head -c 8 /dev/urandom | hexdump -e '8/1 \"%02x\"')\n\
        sleep 0.05; done";
    let initrd = host.path("initrd");
    std::fs::write(&initrd, Initramfs::with_busybox(&busybox, script).finish()).unwrap();
    let disk = host.path("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();

    let mut first = Monitor::start(&[]);
    let console = lines(&mut first);
    first.put(
        "/machine-config",
        json!({"vcpu_count": 2, "mem_size_mib": 128, "engine": "soft"}),
    );
    first.put(
        "/boot-source",
        json!({"kernel_image_path": kernel(), "initrd_path": initrd,
               "boot_args": "console=ttyS0 quiet panic=-1 clocksource=kvm-clock"}),
    );
    first.put(
        "/drives/d",
        json!({"drive_id": "d", "is_root_device": false, "path_on_host": disk, "io_engine": "Async"}),
    );
    first.put("/entropy", json!({}));
    first.put("/balloon", json!({"amount_mib": 0, "deflate_on_oom": true}));
    first.put(
        "/vsock",
        json!({"guest_cid": 3, "uds_path": host.path("vsock")}),
    );
    assert_eq!(first.action("InstanceStart"), (204, Value::Null));
    let mut last = tick(&console);
    while last.0 < 5 {
        last = tick(&console);
    }
    pause(&first);
    first.put("/snapshot/create", files.create());
    for name in [
        "kombi_latencies_us_pause_vm",
        "kombi_latencies_us_vmm_full_create_snapshot",
        "kombi_entropy_entropy_bytes_total",
    ] {
        assert!(first.counted(name) > 0, "{name}");
    }
    // There is a device, whose driver had nothing to say.
    assert_eq!(first.counted("kombi_balloon_inflate_count_total"), 0);
    assert_eq!(first.counted("kombi_vsock_conns_added_total"), 0);
    drop(first);
    while let Ok(line) = console.recv_timeout(Duration::from_secs(5)) {
        if line.starts_with("tick ") && line.split_whitespace().count() == 4 {
            let (sender, one) = channel();
            sender.send(line).unwrap();
            last = tick(&one);
        }
    }
    // Guests whose clock goes on from where it was are behind by as much.
    std::thread::sleep(Duration::from_secs(4));

    let mut machines: Vec<_> = (0..3).map(|_| Monitor::start(&[])).collect();
    let mut randoms = Vec::new();
    for (nth, monitor) in machines.iter_mut().enumerate() {
        let console = lines(monitor);
        let mut body = files.load(true);
        // Each has sockets of its own; one's clock is set.
        let path = host.path(&format!("vsock{nth}"));
        body["vsock_override"] = json!({"uds_path": path});
        body["clock_realtime"] = json!(nth == 2);
        let asked = Instant::now();
        monitor.put("/snapshot/load", body);
        eprintln!("loaded within {:?}", asked.elapsed());
        assert!(path.exists());
        let (number, uptime, seconds) = tick(&console);
        eprintln!("first line within {:?}", asked.elapsed());
        assert!(
            number > last.0 && number <= last.0 + 3,
            "{number} after {last:?}"
        );
        assert!(uptime >= last.1, "{uptime} after {last:?}");
        if nth == 2 {
            let now = std::time::SystemTime::now();
            let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
            assert!(now.abs_diff(seconds) <= 3, "{seconds} at {now}");
        } else {
            let ran = asked.elapsed().as_millis() as u64 / 10;
            assert!(uptime <= last.1 + ran + 100, "{uptime} after {last:?}");
            assert!(seconds >= last.2, "{seconds} after {last:?}");
        }
        assert_eq!(next(&console, "disk"), "before");
        for _ in 0..3 {
            tick(&console);
        }
        randoms.push(next(&console, "random"));
        assert_eq!(monitor.get("/balloon")["amount_mib"], 0);
        for name in [
            "kombi_latencies_us_load_snapshot",
            "kombi_vcpu_exit_mmio_write_total",
            "kombi_uart_write_count_total",
        ] {
            assert!(monitor.counted(name) > 0, "{name}");
        }
    }
    randoms.sort();
    randoms.dedup();
    assert_eq!(randoms.len(), 3, "{randoms:?}");
}
