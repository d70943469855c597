//! Our own Linux kernel on /dev/kvm, whatever plays it, up to programs of its users. Where
//! that is software it takes minutes: `make test-kvm-linux` runs this, `make test` does not.

mod host;

use std::io::{BufRead, BufReader};
use std::path::Path;

use host::*;
use lab::initramfs::Initramfs;

/// Files, a pipe, a clock, a signal: what a kernel and its users do to each other.
const SCRIPT: &str = "
B=/bin/busybox
echo init runs
$B mount -t proc p /proc && $B mount -t devtmpfs d /dev
read system < /proc/sys/kernel/ostype; echo piped $system | $B cat
$B sleep 0.2 && echo slept
$B sleep 1000 & kill $!; wait $!; echo killed with $?
$B reboot -f
";

#[test]
fn linux_boots_on_kvm_and_runs_programs() {
    let host = Host::new();
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let disk = Initramfs::with_busybox(&busybox, SCRIPT).finish();
    std::fs::write(host.path("initrd"), disk).unwrap();
    let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest/vmlinux");
    assert!(kernel.exists(), "no kernel {kernel:?}: run make kernel");
    let rest = serde_json::json!({
        "boot-source": {
            "kernel_image_path": kernel,
            "initrd_path": "DIR/initrd",
            "boot_args": "console=ttyS0 panic=-1 reboot=k",
        },
        "machine-config": {"mem_size_mib": 128},
    });
    let config = host.config(RESET, rest);
    let mut child = host.start(&config, &["--engine", "kvm", "--level", "info"]);
    let mut console = BufReader::new(child.stdout.take().unwrap());
    let mut line = Vec::new();
    let mut said = Vec::new();
    while console.read_until(b'\n', &mut line).unwrap() > 0 {
        let words = String::from_utf8_lossy(&line).trim_end().to_owned();
        println!("{words}");
        said.push(words);
        line.clear();
    }
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    println!("{errors}");
    if std::fs::File::open("/dev/kvm").is_err() {
        assert_eq!(output.status.code(), Some(152), "{errors}");
        return;
    }
    for words in ["init runs", "piped Linux", "slept", "killed with 143"] {
        assert!(said.iter().any(|line| line == words), "no {words:?}");
    }
    assert_eq!(output.status.code(), Some(0), "{errors}");
}
