//! Files of the host in the guest's address space, as the drivers of Debian's kernel and
//! of ours use them.

mod boot;

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use boot::Boot;
use machine::Outcome;

/// What drives persistent memory in Debian's kernel, in the order of their dependencies.
const MODULES: [&str; 8] = [
    "virtio_ring.ko",
    "virtio.ko",
    "virtio_mmio.ko",
    "libnvdimm.ko",
    "nd_btt.ko",
    "nd_pmem.ko",
    "nd_virtio.ko",
    "virtio_pmem.ko",
];

fn boot() -> Boot {
    let read = |name| {
        let module = boot::kernel("debian-cloud.modules").join(name);
        (name, std::fs::read(module).unwrap())
    };
    Boot {
        kernel: "debian-cloud.bzImage",
        memory_mib: 256,
        programs: MODULES.map(read).into(),
        ..Boot::new()
    }
}

/// A script that loads the drivers first.
fn with_drivers(script: &str) -> String {
    let modules = MODULES.join(" ");
    format!(
        "for m in {modules}; do insmod /bin/$m; done\n\
         for n in $(seq 100); do [ -e /dev/pmem0 ] && break; sleep 0.1; done\n\
         {script}"
    )
}

/// An ext4 file system with what is in `content`, by e2fsprogs.
fn file_system(image: &Path, content: &Path) {
    File::create(image).unwrap().set_len(24 << 20).unwrap();
    let made = Command::new("/usr/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-b", "4096", "-d"])
        .args([content, image])
        .output()
        .expect("e2fsprogs is installed");
    assert!(made.status.success(), "{made:?}");
}

fn with_pmem(boot: &mut Boot, more: &serde_json::Value) -> std::path::PathBuf {
    let image = boot.dir.path().join("image");
    let mut pmem = serde_json::json!({"id": "files", "path_on_host": image});
    let fields = pmem.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    boot.rest = serde_json::json!({ "pmem": [pmem] });
    image
}

/// A root file system with busybox, whose PID 1 is `script`.
fn root(folder: &Path, script: &str) {
    for dir in ["bin", "dev", "proc"] {
        std::fs::create_dir_all(folder.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", folder.join("bin/busybox")).unwrap();
    let init = folder.join("init");
    std::fs::write(&init, script).unwrap();
    std::fs::set_permissions(&init, PermissionsExt::from_mode(0o755)).unwrap();
}

fn contains(image: &Path, text: &str) -> bool {
    let bytes = std::fs::read(image).unwrap();
    bytes
        .windows(text.len())
        .any(|window| window == text.as_bytes())
}

#[test]
fn a_file_system_with_dax_is_read_written_and_flushed() {
    let mut boot = boot();
    let image = with_pmem(&mut boot, &serde_json::json!({}));
    let content = boot.dir.path().join("content");
    std::fs::create_dir(&content).unwrap();
    std::fs::write(content.join("hello"), "of the host\n").unwrap();
    file_system(&image, &content);
    let (flushes, flushed) = std::sync::mpsc::channel();
    let script = with_drivers(
        "mkdir /mnt; mount -t ext4 -o dax /dev/pmem0 /mnt || dmesg | tail\n\
         grep -o 'pmem0.*dax' /proc/mounts\n\
         cat /mnt/hello\n\
         echo \"written by the \"guest > /mnt/new; sync; echo synced\n\
         cp /bin/busybox /mnt/; /mnt/busybox echo run from the file\n\
         umount /mnt; poweroff -f",
    );
    let (ended, text) = boot.run_with(&script, |machine| {
        let (_, pmem) = machine.handles().pmem.pop().unwrap();
        move |line: &str| {
            if line == "synced" {
                let counters = pmem.lock().unwrap().counters();
                let flushed = counters
                    .flush_count
                    .load(std::sync::atomic::Ordering::Relaxed);
                flushes.send(flushed).unwrap();
            }
        }
    });
    assert!(text.contains("dax"), "{text}");
    assert!(text.contains("of the host\n"), "{text}");
    assert!(text.contains("run from the file\n"), "{text}");
    assert!(flushed.recv().unwrap() > 0, "{text}");
    assert!(contains(&image, "written by the guest"));
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}

#[test]
fn a_read_only_file_is_the_root() {
    let mut boot = boot();
    let asked = serde_json::json!({"root_device": true, "read_only": true});
    let image = with_pmem(&mut boot, &asked);
    let root = boot.dir.path().join("root");
    let script = "#!/bin/busybox sh\n\
                  B=/bin/busybox; $B mount -t proc p /proc\n\
                  echo root: $($B awk '$2 == \"/\" { print $1, $3, substr($4, 1, 2) }' /proc/mounts)\n\
                  echo x > /x || echo not writable\n\
                  $B poweroff -f\n";
    self::root(&root, script);
    file_system(&image, &root);
    let before = std::fs::read(&image).unwrap();
    let script = with_drivers(
        "mkdir /new; mount -t ext4 -o ro,dax /dev/pmem0 /new\n\
         echo $(grep -o 'root=.*' /proc/cmdline)\n\
         umount /proc /sys /dev\n\
         exec switch_root /new /init",
    );
    let (ended, text) = boot.run(&script);
    assert!(text.contains("root=/dev/pmem0 ro\n"), "{text}");
    assert!(text.contains("root: /dev/pmem0 ext4 ro\n"), "{text}");
    assert!(text.contains("not writable\n"), "{text}");
    assert!(std::fs::read(&image).unwrap() == before);
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}

#[test]
fn our_kernel_has_its_root_on_a_file_without_an_initramfs() {
    let mut boot = Boot {
        args: "console=ttyS0 quiet panic=-1 init=/init rootflags=dax=always",
        initramfs: false,
        ..Boot::new()
    };
    let asked = serde_json::json!({"root_device": true, "read_only": false});
    let image = with_pmem(&mut boot, &asked);
    let root = boot.dir.path().join("root");
    let script = "#!/bin/busybox sh\n\
                  B=/bin/busybox; $B mount -t proc p /proc\n\
                  $B mount -o remount,rw / && $B mount -t devtmpfs d /dev\n\
                  exec >/dev/console 2>&1\n\
                  echo root: $($B awk '$2 == \"/\" { print $1, $3, $4 }' /proc/mounts)\n\
                  echo \"written by the \"guest > /new; $B sync\n\
                  $B poweroff -f\n";
    self::root(&root, script);
    file_system(&image, &root);
    let (ended, text) = boot.run("");
    assert!(text.contains("root: "), "{text}");
    assert!(
        text.contains(" ext4 rw") && text.contains("dax=always"),
        "{text}"
    );
    assert!(contains(&image, "written by the guest"));
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}

#[test]
fn our_kernel_reads_an_image_in_place() {
    let mut boot = Boot::new();
    let image = with_pmem(&mut boot, &serde_json::json!({"read_only": true}));
    let content = boot.dir.path().join("content");
    std::fs::create_dir(&content).unwrap();
    std::fs::write(content.join("hello"), "of the host\n".repeat(1000)).unwrap();
    let made = Command::new("mkfs.erofs")
        .args(["-T0", "--quiet"])
        .args([&image, &content])
        .output()
        .expect("erofs-utils are installed");
    assert!(made.status.success(), "{made:?}");
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(2 << 20)
        .unwrap();
    let (ended, text) = boot.run(
        "mkdir /mnt; mount -t erofs -o ro,dax=always /dev/pmem0 /mnt || dmesg | tail\n\
         grep -o 'erofs.*dax=always' /proc/mounts\n\
         md5sum /mnt/hello; poweroff -f",
    );
    assert!(text.contains("dax=always"), "{text}");
    let sum = Command::new("md5sum")
        .arg(content.join("hello"))
        .output()
        .unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    assert!(text.contains(sum.split(' ').next().unwrap()), "{text}");
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}

#[test]
fn a_file_that_shrinks_under_the_guest_is_zeros() {
    let mut boot = boot();
    let image = with_pmem(&mut boot, &serde_json::json!({}));
    std::fs::write(&image, vec![b'x'; 4 << 20]).unwrap();
    let script = with_drivers(
        "echo before: $(head -c 3000000 /dev/pmem0 | tail -c 4)\n\
         echo shrink\n\
         sleep 1\n\
         echo 3 > /proc/sys/vm/drop_caches\n\
         echo after: $(head -c 3000000 /dev/pmem0 | tail -c 4 | od -An -tx1)\n\
         echo lost | dd of=/dev/pmem0 bs=4096 seek=700 conv=notrunc,fsync 2>/dev/null\n\
         echo alive\n\
         poweroff -f",
    );
    let (ended, text) = boot.run_with(&script, |_| {
        let image = image.clone();
        move |line: &str| {
            if line == "shrink" {
                let file = File::options().write(true).open(&image).unwrap();
                file.set_len(4096).unwrap();
            }
        }
    });
    assert!(text.contains("before: xxxx\n"), "{text}");
    assert!(text.contains("after: 00 00 00 00\n"), "{text}");
    assert!(text.contains("alive\n"), "{text}");
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 4096);
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}
