//! What Linux makes of the processors that it is shown.

mod host;

use host::monitor::Monitor;
use lab::initramfs::Initramfs;
use serde_json::json;

/// Which processors Linux takes for threads of one core, by processor.
fn siblings(smt: bool) -> String {
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let script = "/bin/busybox --install -s /bin; export PATH=/bin\n\
        mount -t sysfs s /sys; cd /sys/devices/system/cpu\n\
        echo siblings $(cat cpu[0-9]*/topology/thread_siblings_list)\n\
        poweroff -f";
    let monitor = Monitor::start(&[]);
    let initrd = monitor.host.path("initrd");
    std::fs::write(&initrd, Initramfs::with_busybox(&busybox, script).finish()).unwrap();
    let kernel = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/guest/vmlinux");
    monitor.put(
        "/machine-config",
        json!({"vcpu_count": 4, "mem_size_mib": 128, "engine": "soft", "smt": smt}),
    );
    monitor.put(
        "/boot-source",
        json!({"kernel_image_path": kernel, "initrd_path": initrd,
               "boot_args": "console=ttyS0 quiet panic=-1"}),
    );
    assert_eq!(monitor.action("InstanceStart").0, 204);
    let (code, output, ..) = monitor.end();
    let text = String::from_utf8_lossy(&output).into_owned();
    assert_eq!(code, Some(0), "{text}");
    let line = text.lines().find_map(|line| line.strip_prefix("siblings "));
    line.unwrap_or_else(|| panic!("{text}")).trim().to_owned()
}

#[test]
fn with_smt_processors_are_threads_of_a_core_two_by_two() {
    assert_eq!(siblings(true), "0-1 0-1 2-3 2-3");
    assert_eq!(siblings(false), "0 1 2 3");
}
