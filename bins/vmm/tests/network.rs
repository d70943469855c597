//! Network interfaces over the API, in the jail and in the metrics, each test in a network
//! of its own.

mod host;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use host::monitor::Monitor;
use host::*;
use lab::initramfs::Initramfs;
use lab::private_network::{self, GUEST, HOST, Place, TAP};
use serde_json::{Value, json};

/// Whether to go on: this test runs in a network of its own.
fn inside(test: &str) -> bool {
    match private_network::enter(test) {
        Place::Inside => true,
        Place::Done => false,
        Place::Impossible => {
            let monitor = Monitor::start(&[]);
            let interface = json!({"iface_id": "e", "host_dev_name": TAP});
            let got = monitor.refusal("PUT", "/network-interfaces/e", Some(interface));
            assert!(
                got.contains(TAP) || got.contains("/dev/net/tun"),
                "{test}: {got}"
            );
            false
        }
    }
}

fn kernel() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    let dir = std::env::var_os("KOMBI_TEST_KERNELS").map_or(built, PathBuf::from);
    dir.join("vmlinux")
}

/// An initial RAM disk whose init brings up its interface and runs `script`.
fn initrd(host: &Host, script: &str) -> PathBuf {
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let script = format!(
        "/bin/busybox --install -s /bin; export PATH=/bin; mount -t proc p /proc\n\
         ip address add {GUEST}/24 dev eth0; ip link set eth0 up\n{script}\npoweroff -f"
    );
    let path = host.path("initrd");
    std::fs::write(&path, Initramfs::with_busybox(&busybox, &script).finish()).unwrap();
    path
}

#[test]
fn a_tap_device_that_is_missing_wrong_or_taken_is_refused_when_it_is_named() {
    if !inside("a_tap_device_that_is_missing_wrong_or_taken_is_refused_when_it_is_named") {
        return;
    }
    let monitor = Monitor::start(&[]);
    let before = monitor.get("/vm/config");
    let _taken = machine::Tap::open(TAP).unwrap();
    for (name, wanted) in [
        (
            "tap9",
            "there is no network device \"tap9\": make it with ip tuntap add dev tap9 mode tap user $USER",
        ),
        (
            "lo",
            "network device \"lo\" is not a TAP device of one queue",
        ),
        (TAP, "TAP device \"tap0\" is in use by another process"),
    ] {
        let body = json!({"iface_id": "e", "host_dev_name": name});
        let got = monitor.refusal("PUT", "/network-interfaces/e", Some(body));
        assert_eq!(got, wanted);
    }
    assert_eq!(monitor.get("/vm/config"), before);
    // Nobody made the device that is missing.
    assert!(!Path::new("/sys/class/net/tap9").exists());
}

#[test]
fn interfaces_are_checked_together() {
    if !inside("interfaces_are_checked_together") {
        return;
    }
    let monitor = Monitor::start(&[]);
    let body = |id: &str, more: Value| {
        let mut body = json!({"iface_id": id, "host_dev_name": TAP});
        let more = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(more);
        Some(body)
    };
    let got = monitor.refusal("PUT", "/network-interfaces/e", body("e", json!({"mtu": 1})));
    assert!(got.contains("mtu 1"), "{got}");
    let put = |id: &str| {
        monitor.ask(
            "PUT",
            &format!("/network-interfaces/{id}"),
            body(id, json!({})),
        )
    };
    // Again is instead.
    assert_eq!((put("e").0, put("e").0), (204, 204));
    let (status, answer) = put("f");
    let wanted = "interfaces \"e\" and \"f\" have the same host_dev_name \"tap0\"";
    assert_eq!((status, &answer["fault_message"]), (400, &json!(wanted)));

    let config = |version: &str| json!({"version": version, "network_interfaces": ["e"]});
    let got = monitor.refusal("PUT", "/mmds/config", Some(config("V3")));
    assert!(got.contains("unknown variant `V3`"), "{got}");
    monitor.put("/mmds/config", config("V2"));
    assert_eq!(monitor.get("/vm/config")["mmds-config"]["version"], "V2");
}

/// Client, guest and host: limits are changed while frames pass, and the metrics tell.
#[test]
fn a_machine_with_an_interface_runs_is_limited_and_counted() {
    if !inside("a_machine_with_an_interface_runs_is_limited_and_counted") {
        return;
    }
    let monitor = Monitor::start(&[]);
    let script = format!(
        "ping -c 3 -i 0.1 {HOST} | grep -o '3 packets received'\n\
         echo limited > /dev/null; until wget -q -O /go http://169.254.169.254/go; do sleep 0.1; done\n\
         ping -c 3 -i 0.1 -w 30 {HOST} | grep -o '3 packets received'"
    );
    let console = monitor.host.path("console");
    let metrics = monitor.host.path("metrics");
    monitor.put("/metrics", json!({"metrics_path": metrics}));
    monitor.put(
        "/machine-config",
        json!({"vcpu_count": 1, "mem_size_mib": 128, "engine": "soft"}),
    );
    monitor.put(
        "/boot-source",
        json!({
            "kernel_image_path": kernel(),
            "initrd_path": initrd(&monitor.host, &format!("ip route add 169.254.169.254 dev eth0\n{script}")),
            "boot_args": "console=ttyS0 quiet panic=-1",
        }),
    );
    monitor.put("/serial", json!({"serial_out_path": console}));
    let interface =
        json!({"iface_id": "e", "host_dev_name": TAP, "guest_mac": "06:00:00:00:00:01"});
    monitor.put("/network-interfaces/e", interface);
    monitor.put(
        "/mmds/config",
        json!({"version": "V1", "network_interfaces": ["e"]}),
    );
    assert_eq!(monitor.action("InstanceStart").0, 204);
    let limiter = json!({"ops": {"size": 1, "refill_time": 300}});
    let patch = json!({"iface_id": "e", "tx_rate_limiter": limiter});
    assert_eq!(
        monitor.ask("PATCH", "/network-interfaces/e", Some(patch)).0,
        204
    );
    let config = &monitor.get("/vm/config")["network-interfaces"][0];
    assert_eq!(config["tx_rate_limiter"]["ops"]["refill_time"], 300);
    let patch = json!({"iface_id": "other"});
    let got = monitor.refusal("PATCH", "/network-interfaces/other", Some(patch));
    assert_eq!(got, "there is no interface \"other\"");
    monitor.put("/mmds", json!({"go": "on"}));
    let (code, _, host, _) = monitor.end();
    let said = std::fs::read_to_string(host.path("console")).unwrap();
    assert_eq!(said.matches("3 packets received").count(), 2, "{said}");
    assert_eq!(code, Some(0));
    let lines = std::fs::read_to_string(host.path("metrics")).unwrap();
    let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    let count = |group: &str, name: &str| last[group][name].as_u64().unwrap();
    assert!(count("net", "tx_packets_count") >= 6, "{last}");
    assert_eq!(last["net"], last["net_e"]);
    assert!(count("net_e", "tx_rate_limiter_throttled") > 0, "{last}");
    assert!(count("mmds", "rx_count") > 0, "{last}");
}

/// The guest pings on in another process, at the end of another cable.
#[test]
fn a_loaded_machine_goes_on_over_another_tap_device() {
    if !inside("a_loaded_machine_goes_on_over_another_tap_device") {
        return;
    }
    let host = Host::new();
    let ip = |args: &str| {
        let mut ip = Command::new("ip");
        assert!(
            ip.args(args.split(' ')).status().unwrap().success(),
            "ip {args}"
        );
    };
    // To the guest, it is the same host.
    let address = "link set dev tap0 address 02:00:00:00:00:01";
    ip(address);
    let console = host.path("console");
    let pongs = || {
        let said = std::fs::read_to_string(&console).unwrap_or_default();
        said.matches("1 packets received").count()
    };
    let await_pongs = |wanted: usize| {
        let until = Instant::now() + Duration::from_secs(60);
        while pongs() < wanted {
            assert!(Instant::now() < until, "{} of {wanted} answers", pongs());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let script = format!("while :; do ping -c 1 -W 1 {HOST}; sleep 0.1; done");
    let first = Monitor::start(&[]);
    first.put(
        "/machine-config",
        json!({"vcpu_count": 1, "mem_size_mib": 128, "engine": "soft"}),
    );
    first.put(
        "/boot-source",
        json!({
            "kernel_image_path": kernel(),
            "initrd_path": initrd(&host, &script),
            "boot_args": "console=ttyS0 quiet panic=-1",
        }),
    );
    first.put("/serial", json!({"serial_out_path": console}));
    first.put(
        "/network-interfaces/e",
        json!({"iface_id": "e", "host_dev_name": TAP}),
    );
    assert_eq!(first.action("InstanceStart").0, 204);
    await_pongs(3);
    let pause = Some(json!({"state": "Paused"}));
    assert_eq!(first.ask("PATCH", "/vm", pause).0, 204);
    let (state, memory) = (host.path("state"), host.path("memory"));
    first.put(
        "/snapshot/create",
        json!({"snapshot_path": state, "mem_file_path": memory}),
    );
    drop(first);

    ip("link delete tap0");
    ip("tuntap add dev tap1 mode tap");
    ip(&address.replace("tap0", "tap1"));
    ip(&format!("address add {HOST}/24 dev tap1"));
    ip("link set dev tap1 up");
    let before = pongs();
    let body = json!({
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": memory},
        "network_overrides": [{"iface_id": "e", "host_dev_name": "tap1"}],
        "resume_vm": true,
    });
    let second = Monitor::start(&[]);
    second.put("/snapshot/load", body.clone());
    await_pongs(before + 3);
    let config = &second.get("/vm/config")["network-interfaces"][0];
    assert_eq!(config["host_dev_name"], "tap1");
    // One cable has two ends.
    let third = Monitor::start(&[]);
    let got = third.refusal("PUT", "/snapshot/load", Some(body));
    assert!(got.contains("TAP device \"tap1\" is in use"), "{got}");
}

/// TAP devices stay in the network that the jail leaves.
#[test]
fn a_jailed_machine_keeps_its_interface() {
    if !inside("a_jailed_machine_keeps_its_interface") {
        return;
    }
    let host = Host::new();
    let script = format!("ping -c 3 -i 0.1 {HOST} | grep -o '3 packets received'");
    let config = json!({
        "boot-source": {
            "kernel_image_path": kernel(),
            "initrd_path": initrd(&host, &script),
            "boot_args": "console=ttyS0 quiet panic=-1",
        },
        "machine-config": {"mem_size_mib": 128, "engine": "soft"},
        "network-interfaces": [{"iface_id": "e", "host_dev_name": TAP}],
    });
    let path = host.path("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let output = host.run(&path, &["--jail"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("3 packets received"), "{said}");
}

#[test]
fn a_configuration_file_with_a_missing_tap_device_is_refused() {
    for jail in [&[][..], &["--jail"]] {
        let host = Host::new();
        let interface = json!([{"iface_id": "eth0", "host_dev_name": "kombi-none"}]);
        let config = host.config(HALT, json!({"network-interfaces": interface}));
        let output = host.run(&config, jail);
        assert_eq!(output.status.code(), Some(152), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            said.contains("interface \"eth0\": there is no network device \"kombi-none\": make it"),
            "{said}"
        );
    }
}
