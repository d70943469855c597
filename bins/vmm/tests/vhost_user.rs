//! Drives that another process serves (vhost-user), by qemu-storage-daemon and by some that serve nobody.

mod host;

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use host::bare_driver;
use host::monitor::Monitor;
use host::*;
use serde_json::{Value, json};

/// A process that serves `image` at `socket`.
struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    fn start(image: &Path, socket: PathBuf, writable: bool) -> Self {
        let on = if writable { "on" } else { "off" };
        let read_only = if writable { "off" } else { "on" };
        let image = image.to_str().unwrap();
        let place = socket.to_str().unwrap();
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=f,filename={image},read-only={read_only}"
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={place},writable={on}"
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon is installed (setup/packages.sh test)");
        let until = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < until, "no back end came");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child, socket }
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

fn drive(id: &str, socket: &Path) -> Value {
    json!({"drive_id": id, "is_root_device": false, "socket": socket})
}

/// Reads sector 0 to a page, calls it, reads sector 1 to the same page, calls that.
fn calls_what_it_reads() -> Vec<u8> {
    const PAGE: u32 = bare_driver::BUFFER + 0x5000;
    let buffer = bare_driver::BUFFER;
    let chain = [
        (buffer, 16, 0),
        (PAGE, 512, bare_driver::WRITE),
        (buffer + 32, 1, bare_driver::WRITE),
    ];
    bare_driver::two_reads_called(&chain, PAGE)
}

/// Two sectors of `mov al, LETTER; ret`.
fn two_letters(image: &Path) {
    let mut bytes = vec![0; 1 << 20];
    bytes[..3].copy_from_slice(b"\xb0a\xc3");
    bytes[512..515].copy_from_slice(b"\xb0b\xc3");
    std::fs::write(image, bytes).unwrap();
}

#[test]
fn code_that_is_read_anew_is_executed_anew_also_in_a_jail() {
    for args in [&[][..], &["--jail"]] {
        let host = Host::new();
        let image = host.path("image");
        two_letters(&image);
        let daemon = Daemon::start(&image, host.path("socket"), false);
        let config = host.config(
            &calls_what_it_reads(),
            json!({"drives": [drive("d", &daemon.socket)]}),
        );
        let output = host.run(&config, args);
        let errors = host.anonymous(&output.stderr);
        assert_eq!(output.stdout, b"ab", "{args:?}: {errors}");
    }
}

#[test]
fn what_is_asked_of_such_a_drive_is_checked() {
    let monitor = Monitor::start(&[]);
    let none = monitor.host.path("none");
    let put = |body: Value| monitor.refusal("PUT", "/drives/d", Some(body));
    let said = put(drive("d", &none));
    assert!(
        said.contains("failed to connect to the vhost-user back end at"),
        "{said}"
    );
    assert!(said.contains(none.to_str().unwrap()), "{said}");
    let image = monitor.host.path("image");
    two_letters(&image);
    for (field, value) in [
        ("path_on_host", json!(image)),
        ("is_read_only", json!(true)),
        ("io_engine", json!("Async")),
        ("rate_limiter", json!({})),
    ] {
        let mut body = drive("d", &none);
        body[field] = value;
        let said = put(body);
        assert!(
            said.contains(&format!("has both socket and {field}")),
            "{said}"
        );
    }
    assert_eq!(monitor.get("/vm/config")["drives"], json!([]));
}

#[test]
fn a_back_end_that_says_nothing_keeps_nobody_waiting_and_can_be_replaced() {
    let monitor = Monitor::start(&[]);
    monitor.prepare(&calls_what_it_reads());
    let silent = monitor.host.path("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    monitor.put("/drives/d", drive("d", &silent));
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| monitor.action("InstanceStart"));
        while !starting.is_finished() {
            assert_eq!(monitor.state(), "Not started");
        }
        let (status, body) = starting.join().unwrap();
        assert_eq!(status, 400, "{body}");
        let said = body["fault_message"].as_str().unwrap();
        assert!(
            said.contains("did not say what it offers within 5 s"),
            "{said}"
        );
    });
    let image = monitor.host.path("image");
    two_letters(&image);
    let daemon = Daemon::start(&image, monitor.host.path("socket"), false);
    monitor.put("/drives/d", drive("d", &daemon.socket));
    assert_eq!(monitor.action("InstanceStart"), (204, Value::Null));
    let (code, console, ..) = monitor.end();
    assert_eq!((code, &console[..]), (Some(0), &b"ab"[..]));
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

/// What follows `word` in the next line that begins with it.
fn next(lines: &Receiver<String>, word: &str) -> String {
    let mut seen = String::new();
    loop {
        match lines.recv_timeout(Duration::from_secs(120)) {
            Ok(line) => match line.strip_prefix(word) {
                Some(rest) => return rest.trim().to_owned(),
                None => seen.push_str(&format!("{line}\n")),
            },
            Err(error) => panic!("no line {word:?}: {error}:\n{seen}"),
        }
    }
}

/// Says how its disks are, writes one, waits for it to be gone.
const INIT: &str = "#!/bin/busybox sh\n\
    /bin/busybox mount -t devtmpfs d /dev; exec < /dev/ttyS0 > /dev/ttyS0 2>&1\n\
    b=/bin/busybox; $b mount -t proc p /proc; $b mount -t sysfs s /sys\n\
    echo root $($b grep ' / ' /proc/mounts)\n\
    echo disks $($b cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdb/size /sys/block/vdb/queue/write_cache)\n\
    $b dd if=/dev/urandom of=/dev/vdb bs=64k count=100 conv=fsync 2>/dev/null\n\
    sum=$($b head -c 6553600 /dev/vdb | $b md5sum); echo 3 > /proc/sys/vm/drop_caches\n\
    [ \"$sum\" = \"$($b head -c 6553600 /dev/vdb | $b md5sum)\" ] && echo written $sum\n\
    while $b dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; do $b sleep 0.05; done\n\
    echo gone; $b poweroff -f\n";

#[test]
fn linux_has_its_root_and_its_data_with_other_processes() {
    let mut monitor = Monitor::start(&[]);
    let tree = monitor.host.path("tree");
    for folder in ["bin", "sbin", "dev", "proc", "sys"] {
        std::fs::create_dir_all(tree.join(folder)).unwrap();
    }
    std::fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("busybox-static is installed");
    std::fs::write(tree.join("sbin/init"), INIT).unwrap();
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(tree.join("sbin/init"), all).unwrap();
    let (root, data) = (monitor.host.path("root"), monitor.host.path("data"));
    let made = Command::new("mkfs.erofs")
        .arg(&root)
        .arg(&tree)
        .output()
        .expect("erofs-utils is installed");
    assert!(made.status.success(), "{made:?}");
    std::fs::write(&data, vec![0; 8 << 20]).unwrap();
    let root = Daemon::start(&root, monitor.host.path("root.sock"), false);
    let mut served = Daemon::start(&data, monitor.host.path("data.sock"), true);

    let console = lines(&mut monitor);
    monitor.put(
        "/machine-config",
        json!({"vcpu_count": 2, "mem_size_mib": 128, "engine": "soft"}),
    );
    monitor.put(
        "/boot-source",
        json!({"kernel_image_path": kernel(), "boot_args": "console=ttyS0 quiet panic=-1"}),
    );
    let mut asked = drive("data", &served.socket);
    asked["cache_type"] = json!("Writeback");
    monitor.put("/drives/data", asked);
    let mut asked = drive("root", &root.socket);
    asked["is_root_device"] = json!(true);
    monitor.put("/drives/root", asked.clone());
    // Again: the connection before is let go.
    monitor.put("/drives/root", asked);
    assert_eq!(monitor.action("InstanceStart"), (204, Value::Null));
    let mounted = next(&console, "root");
    assert!(mounted.starts_with("/dev/root / erofs ro"), "{mounted}");
    assert_eq!(next(&console, "disks"), "1 0 16384 write back");
    let sum = next(&console, "written");
    let sum = sum.split_whitespace().next().unwrap();
    let written = std::fs::read(&data).unwrap();
    let image = monitor.host.path("written");
    std::fs::write(&image, &written[..6_553_600]).unwrap();
    let summed = Command::new("md5sum")
        .stdin(std::fs::File::open(image).unwrap())
        .output();
    let summed = String::from_utf8(summed.unwrap().stdout).unwrap();
    assert_eq!(summed.split_whitespace().next(), Some(sum));

    let patch = |body: Value| monitor.ask("PATCH", "/drives/data", Some(body));
    let file = patch(json!({"drive_id": "data", "path_on_host": data}));
    assert_eq!(file.0, 400, "{}", file.1);
    let limited = patch(json!({"drive_id": "data", "rate_limiter": {}}));
    assert_eq!(limited.0, 400, "{}", limited.1);
    assert_eq!(patch(json!({"drive_id": "data"})), (204, Value::Null));
    let name = "kombi_vhost_user_block_config_change_time_us{drive=\"data\"}";
    assert!(monitor.counted(name) > 0);
    for drive in ["root", "data"] {
        let name = format!("kombi_vhost_user_block_activate_time_us{{drive=\"{drive}\"}}");
        assert!(monitor.counted(&name) > 0, "{name}");
    }

    let vm = |state| monitor.ask("PATCH", "/vm", Some(json!({"state": state})));
    assert_eq!(vm("Paused").0, 204);
    let files = json!({
        "snapshot_path": monitor.host.path("state"), "mem_file_path": monitor.host.path("memory"),
    });
    let said = monitor.refusal("PUT", "/snapshot/create", Some(files));
    assert!(
        said.contains(
            "devices without snapshot support are present: vhost-user drives \"root\", \"data\""
        ),
        "{said}"
    );
    assert!(!monitor.host.path("state").exists() && !monitor.host.path("memory").exists());
    assert_eq!(vm("Resumed").0, 204);

    served.kill();
    next(&console, "gone");
    assert_eq!(monitor.end().0, Some(0));
}

#[test]
fn a_drive_of_a_file_is_not_asked_anew() {
    let monitor = Monitor::start(&[]);
    monitor.prepare(SPIN);
    let image = monitor.host.path("image");
    two_letters(&image);
    monitor.put(
        "/drives/d",
        json!({"drive_id": "d", "is_root_device": false, "path_on_host": image}),
    );
    assert_eq!(monitor.action("InstanceStart").0, 204);
    let patch = |id: &str| {
        let path = format!("/drives/{id}");
        monitor.refusal("PATCH", &path, Some(json!({"drive_id": id})))
    };
    assert_eq!(
        patch("d"),
        "drive \"d\" is a file: give path_on_host, rate_limiter or both"
    );
    assert_eq!(patch("e"), "there is no drive \"e\"");
}
