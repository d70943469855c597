//! `--jail` from outside: what the process still has, and that machines run in it. Where
//! the host forbids users their namespaces, that it says so and goes on.

mod host;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use host::*;
use serde_json::json;

/// What a jail on this host has, by its own words.
fn holds(part: &str) -> bool {
    let output = Command::new(VMM).arg("--jail-probe").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let parts: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let part = &parts[part];
    let holds = part["holds"].as_bool().unwrap();
    assert_eq!(holds, part["why"].is_null(), "{parts}");
    holds
}

fn link(process: u32, path: &str) -> PathBuf {
    std::fs::read_link(format!("/proc/{process}/{path}")).unwrap()
}

/// Every path from its root on.
fn seen_by(process: u32) -> Vec<String> {
    let root = PathBuf::from(format!("/proc/{process}/root/"));
    let mut seen = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&root).unwrap();
            seen.push(format!("/{}", name.to_str().unwrap()));
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    seen.sort();
    seen
}

fn config(host: &Host, code: &[u8]) -> PathBuf {
    std::fs::create_dir(host.path("run")).unwrap();
    std::fs::write(host.path("disk"), vec![0; 4096]).unwrap();
    std::fs::write(host.path("secret"), "").unwrap();
    host.config(
        code,
        json!({
            "drives": [{"drive_id": "a", "path_on_host": "DIR/disk", "is_root_device": false, "is_read_only": true,
                "io_engine": "Async"}],
            "vsock": {"guest_cid": 3, "uds_path": "DIR/run/v.sock"},
            "serial": {"serial_out_path": "DIR/run/console"},
        }),
    )
}

#[test]
fn a_jailed_monitor_sees_its_machines_files_only_and_may_do_nothing_else() {
    let host = Host::new();
    let config = config(&host, SPIN);
    let metrics = host.path("metrics");
    let metadata = host.path("metadata");
    std::fs::write(&metadata, "{}").unwrap();
    let args = [
        "--metadata",
        metadata.to_str().unwrap(),
        "--jail",
        "--status-fd",
        "1",
        "--metrics-path",
        metrics.to_str().unwrap(),
    ];
    let mut child = host.start(&config, &args);
    let _events = wait_for_started(&mut child);
    let process = child.id();

    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    if holds("namespaces") {
        for namespace in [
            "ns/user",
            "ns/mnt",
            "ns/net",
            "ns/ipc",
            "ns/uts",
            "ns/cgroup",
        ] {
            assert_ne!(
                link(process, namespace),
                link(std::process::id(), namespace),
                "{namespace}"
            );
        }
        let own = host.path("");
        let own = own.to_str().unwrap().trim_end_matches('/');
        let seen = seen_by(process);
        let files: Vec<_> = seen
            .iter()
            .filter_map(|path| path.strip_prefix(own))
            .filter(|path| !path.starts_with("/translations/"))
            .collect();
        let wanted = [
            "",
            "/disk",
            "/kernel",
            "/metadata",
            "/metrics",
            "/run",
            "/run/console",
            "/run/v.sock",
            "/translations",
        ];
        assert_eq!(files, wanted);
        // Besides, only folders on the way, and this test's working directory, empty.
        let folder = std::env::current_dir().unwrap();
        for path in seen.iter().filter(|path| !path.starts_with(own)) {
            let leads = Path::new(own).starts_with(path) || folder.starts_with(path);
            assert!(leads, "{path}");
        }
        let mounts = std::fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap();
        let root = mounts
            .lines()
            .find(|line| line.split(' ').nth(4) == Some("/"));
        assert!(
            root.unwrap().split(' ').nth(5).unwrap().starts_with("ro,"),
            "{mounts}"
        );
    }
    rustix::process::kill_process(pid(&child), rustix::process::Signal::TERM).unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(143), "{output:?}");
    // It could still remove what it made.
    assert!(!host.path("run/v.sock").exists());
    let metrics = std::fs::read_to_string(metrics).unwrap();
    assert!(metrics.lines().count() >= 2, "{metrics}");
}

#[test]
fn a_jailed_machine_runs_to_its_end_and_keeps_its_translations() {
    let host = Host::new();
    let config = config(&host, &say("hello"));
    let output = host.run(&config, &["--jail"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        holds("namespaces") && holds("landlock"),
        said.is_empty(),
        "{said}"
    );
    assert_eq!(
        std::fs::read_to_string(host.path("run/console")).unwrap(),
        "hello"
    );
    assert!(host.path("translations").is_dir());
}

#[test]
fn what_is_missing_is_told_as_without_a_jail() {
    let host = Host::new();
    let config = config(&host, HALT);
    std::fs::remove_file(host.path("kernel")).unwrap();
    let free = host.run(&config, &[]);
    let jailed = host.run(&config, &["--jail"]);
    assert_eq!(free.status.code(), Some(152), "{free:?}");
    assert_eq!(jailed.status.code(), free.status.code());
    let last = |bytes: &[u8]| {
        String::from_utf8_lossy(bytes)
            .lines()
            .last()
            .unwrap()
            .to_owned()
    };
    assert_eq!(last(&jailed.stderr), last(&free.stderr));
}

#[test]
fn relative_paths_mean_the_same_in_the_jail() {
    let host = Host::new();
    let code = say("hello");
    std::fs::write(host.path("kernel"), elf(&code)).unwrap();
    let text = json!({
        "boot-source": {"kernel_image_path": "../here/kernel", "boot_args": ""},
        "machine-config": {"mem_size_mib": 32, "engine": "soft"},
        "vsock": {"guest_cid": 3, "uds_path": "v.sock"},
    });
    std::fs::create_dir(host.path("here")).unwrap();
    std::fs::rename(host.path("kernel"), host.path("here/kernel")).unwrap();
    std::fs::write(host.path("here/config.json"), text.to_string()).unwrap();
    let child = Command::new(VMM)
        .args([
            "--config-file",
            "config.json",
            "--no-api",
            "--jail",
            "--level",
            "warning",
        ])
        .args(["--translation-cache", "off", "--die-with-parent"])
        .current_dir(host.path("here"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello");
    assert!(!host.path("here/v.sock").exists());
}

#[test]
fn a_host_without_user_namespaces_is_told_and_the_machine_runs() {
    // In a user namespace of its own, a test may set how many there may be below: none.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
    let unshared = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "sh", "-c", script, "sh", VMM]);
        command.args(args).output().unwrap()
    };
    let probe = unshared(&["--jail-probe"]);
    if !probe.status.success() {
        // The host has none at all: the probe alone tells.
        assert!(!holds("namespaces"));
        return;
    }
    let parts: serde_json::Value = serde_json::from_slice(&probe.stdout).unwrap();
    let why = parts["namespaces"]["why"].as_str().unwrap();
    assert_eq!(
        why,
        "failed to make namespaces: No space left on device (os error 28)"
    );
    let host = Host::new();
    let config = config(&host, &say("hello"));
    let config = config.to_str().unwrap();
    let output = unshared(&[
        "--config-file",
        config,
        "--no-api",
        "--jail",
        "--level",
        "warning",
        "--translation-cache",
        "off",
    ]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("the jail is without namespaces: failed to make"),
        "{said}"
    );
    assert_eq!(
        std::fs::read_to_string(host.path("run/console")).unwrap(),
        "hello"
    );
}
