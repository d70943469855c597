//! Our kernel and Debian's on the software engine, from the first instruction to
//! their end.

mod boot;

use std::fs::File;

use boot::Boot;
use machine::{Ended, Outcome};

#[track_caller]
fn assert_outcome(ended: &Ended, text: &str, wanted: Outcome) {
    assert_eq!(*ended.result.as_ref().unwrap(), wanted, "console:\n{text}");
}

#[test]
fn vmlinux_boots_to_init_and_powers_off() {
    let (ended, text) = Boot::new().run("echo from init: $(uname -sm); poweroff -f");
    assert!(text.contains("from init: Linux x86_64\n"), "{text}");
    assert_outcome(&ended, &text, Outcome::PowerOff);
    assert_eq!(ended.kernel_panic(), None);
}

#[test]
fn bzimage_boots_to_init_and_resets() {
    let boot = Boot {
        kernel: "bzImage",
        ..Boot::new()
    };
    let (ended, text) = boot.run("echo from init; reboot -f");
    assert!(text.contains("from init\n"), "{text}");
    assert_outcome(&ended, &text, Outcome::Reset);
}

#[test]
fn init_that_ends_is_a_kernel_panic_in_the_report() {
    let (ended, text) = Boot::new().run("exit 3");
    assert_outcome(&ended, &text, Outcome::Reset);
    let panic = ended.kernel_panic().unwrap();
    assert!(panic.contains("Attempted to kill init"), "{panic}");
}

#[test]
fn disks_entropy_and_their_interrupts_work() {
    check_devices(Boot::new());
}

/// `/tmp` is often in memory, where nothing takes time: these files are where the build is.
#[test]
fn disks_served_by_io_uring_work_under_load() {
    let mut boot = Boot {
        vcpus: 2,
        ..Boot::new()
    };
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (disk, scratch) = (folder.path().join("disk"), folder.path().join("scratch"));
    let content: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
    std::fs::write(&disk, &content).unwrap();
    File::create(&scratch).unwrap().set_len(8 << 20).unwrap();
    boot.rest = serde_json::json!({
        "drives": [
            {"drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": true,
             "io_engine": "Async"},
            {"drive_id": "scratch", "path_on_host": scratch, "is_root_device": false,
             "cache_type": "Writeback", "io_engine": "Async"},
        ],
    });
    let (metrics, counted) = std::sync::mpsc::channel();
    let script = "for n in 0 1 2 3 4 5 6 7; do\n\
             dd if=/dev/vda of=/dev/vdb bs=64k seek=$((n * 16)) conv=notrunc,fsync 2>/dev/null &\n\
         done; wait\n\
         echo 3 > /proc/sys/vm/drop_caches\n\
         for n in 0 1 2 3 4 5 6 7; do\n\
             dd if=/dev/vdb bs=64k skip=$((n * 16)) count=16 2>/dev/null | cmp - /dev/vda || echo differs &\n\
         done; wait; echo compared\n\
         poweroff -f";
    let (ended, text) = boot.run_with(script, |machine| {
        let (_, drive) = machine.handles().drives.pop().unwrap();
        metrics.send(drive.lock().unwrap().metrics()).unwrap();
        |_: &str| {}
    });
    assert!(text.contains("compared\n"), "{text}");
    assert!(!text.contains("differs"), "{text}");
    let written = std::fs::read(&scratch).unwrap();
    assert!(written.chunks(1 << 20).all(|chunk| chunk == content));
    let metrics = counted.recv().unwrap();
    let counted: std::collections::BTreeMap<_, _> = metrics.counters.all().collect();
    assert!(counted["handed_over_count"] > 0, "{counted:?}");
    assert!(counted["flush_count"] > 0, "{counted:?}");
    assert_eq!(counted["execute_fails"], 0, "{counted:?}");
    assert_outcome(&ended, &text, Outcome::PowerOff);
}

#[test]
fn they_work_without_acpi_too() {
    let args = "console=ttyS0 quiet panic=-1 acpi=off";
    check_devices(Boot {
        args,
        ..Boot::new()
    });
}

fn check_devices(mut boot: Boot) {
    let (disk, scratch) = (
        boot.dir.path().join("disk"),
        boot.dir.path().join("scratch"),
    );
    let content: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
    std::fs::write(&disk, &content).unwrap();
    std::fs::write(&scratch, [0; 8192]).unwrap();
    boot.rest = serde_json::json!({
        "drives": [
            {"drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": true},
            {"drive_id": "scratch", "path_on_host": scratch, "is_root_device": false},
        ],
        "entropy": {},
    });
    let (ended, text) = boot.run(
        "dd if=/dev/vda of=/copy bs=64k 2>/dev/null\n\
         echo disk: $(wc -c < /copy) $(dd if=/copy bs=1 skip=1000000 count=4 2>/dev/null | od -An -tu1)\n\
         echo written | dd of=/dev/vdb bs=1 seek=4096 conv=notrunc,fsync 2>/dev/null\n\
         echo x | dd of=/dev/vda 2>&1 | grep -o 'Operation not permitted\\|Read-only\\|I/O error' | head -1\n\
         echo entropy: $(cat /sys/class/misc/hw_random/rng_current)\n\
         poweroff -f",
    );
    assert!(text.contains("disk: 1048576 16 17 18 19\n"), "{text}");
    assert!(text.contains("entropy: virtio_rng"), "{text}");
    assert_eq!(
        &std::fs::read(&scratch).unwrap()[4096..4104],
        b"written\n",
        "{text}"
    );
    assert_eq!(std::fs::read(&disk).unwrap(), content);
    assert_outcome(&ended, &text, Outcome::PowerOff);
}

#[test]
fn a_kernel_without_a_root_says_so() {
    let mut boot = Boot::new();
    boot.args = "console=ttyS0 panic=-1 rdinit=/none root=/dev/none";
    let (ended, text) = boot.run("");
    assert_outcome(&ended, &text, Outcome::Reset);
    assert!(ended.kernel_panic().unwrap().contains("VFS"), "{text}");
}

#[test]
fn debians_cloud_kernel_boots_to_user_space_as_it_is() {
    check_stock_kernel("debian-cloud.bzImage", "-cloud-amd64", 1);
}

#[test]
fn debians_cloud_kernel_boots_with_two_processors() {
    check_stock_kernel("debian-cloud.bzImage", "-cloud-amd64", 2);
}

#[test]
fn debians_cloud_kernel_boots_with_four_processors() {
    check_stock_kernel("debian-cloud.bzImage", "-cloud-amd64", 4);
}

#[test]
fn debians_generic_kernel_boots_to_user_space_as_it_is() {
    check_stock_kernel("debian-generic.bzImage", "-amd64", 1);
}

#[test]
fn debians_generic_kernel_boots_with_two_processors() {
    check_stock_kernel("debian-generic.bzImage", "-amd64", 2);
}

/// A distribution's kernel: compressed, relocatable, with everything compiled in that
/// hardware of thirty years may have; the command line is Firecracker's default.
fn check_stock_kernel(kernel: &'static str, release: &str, vcpus: u8) {
    let boot = Boot {
        kernel,
        args: "console=ttyS0 reboot=k panic=1 pci=off",
        memory_mib: 256,
        vcpus,
        ..Boot::new()
    };
    let (ended, text) = boot.run(
        "echo from init: $(uname -r)\n\
         echo processors: $(nproc)\n\
         for cpu in $(seq 0 $(($(nproc) - 1))); do\n\
             taskset -c $cpu sh -c 'echo on cpu $(awk \"{ print \\$39 }\" /proc/self/stat)'\n\
         done\n\
         echo sum: $(busybox dd if=/dev/urandom bs=64k count=16 2>/dev/null | gzip | gunzip | wc -c)\n\
         dmesg | grep -E 'WARNING|BUG:|Oops|unable to|[Uu]nchecked|self-test.*fail|INFO: rcu|hung|lockup|unstable|Call Trace|failed to come online|not responding' | sed 's/^/complaint: /'\n\
         poweroff -f",
    );
    let from_init = text.lines().find(|line| line.starts_with("from init: 6."));
    assert!(
        from_init.is_some_and(|line| line.ends_with(release)),
        "{text}"
    );
    assert!(text.contains(&format!("processors: {vcpus}\n")), "{text}");
    for cpu in 0..vcpus {
        assert!(text.contains(&format!("on cpu {cpu}\n")), "{text}");
    }
    assert!(text.contains("sum: 1048576\n"), "{text}");
    let complaints = text
        .lines()
        .filter(|line| line.starts_with("complaint: "))
        // True of a CPU that has no microcode to mitigate it.
        .filter(|line| !line.contains("RETBleed"));
    assert_eq!(complaints.collect::<Vec<_>>(), [""; 0], "{text}");
    assert_outcome(&ended, &text, Outcome::PowerOff);
}
