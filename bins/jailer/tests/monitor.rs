//! The release build of the monitor in a jail: it is static, and boots Linux there.

mod jail;

use std::fs;
use std::path::{Path, PathBuf};

use jail::*;

/// Where `make programs` puts what is released; see `bins/cli/tests/support`.
fn bin_dir() -> PathBuf {
    let dir = std::env::var_os("KOMBI_TEST_BIN_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/release"),
        PathBuf::from,
    );
    for file in ["kombi-vmm", "../guest/vmlinux"] {
        let path = dir.join(file);
        assert!(
            path.is_file(),
            "{} is missing: run make build first",
            path.display()
        );
    }
    dir
}

#[test]
fn the_monitor_boots_linux_in_a_jail() {
    let jail = Jail::empty("kombi-vmm");
    fs::copy(bin_dir().join("kombi-vmm"), jail.program()).unwrap();
    fs::create_dir_all(jail.root()).unwrap();
    let kernel = bin_dir().join("../guest/vmlinux");
    fs::copy(kernel, jail.root().join("vmlinux")).unwrap();
    let config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": "/vmlinux",
            "boot_args": "console=ttyS0 panic=-1 reboot=k",
        },
        "machine-config": {"mem_size_mib": 64, "engine": "soft"},
    });
    fs::write(jail.root().join("config.json"), config.to_string()).unwrap();
    let args = [
        "--new-pid-ns",
        "--",
        "--config-file",
        "/config.json",
        "--no-api",
    ];
    if !jails_are_possible() {
        jail.refused(&mut jail.command(&args));
        return;
    }
    // The jailer ends at once; the monitor holds its streams until the guest ended.
    let output = finish(jail.command(&args).spawn().unwrap());
    let console = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    for words in ["Linux version", "Kernel panic - not syncing: VFS"] {
        assert!(console.contains(words), "{words}: {console}\n{said}");
    }
    assert!(said.contains("time since the jailer started"), "{said}");
    assert!(said.contains("stopped"), "{said}");
}
