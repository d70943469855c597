//! The API from outside: a machine's whole life over its socket, what is refused and
//! when, and that nobody waits for anybody.

mod host;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use host::monitor::Monitor;
use host::*;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

/// Writes `a` to the console again and again: `mov dx, 0x3f8; mov al, 0x61; out dx, al;
/// jmp` back to the OUT.
const CHATTER: &[u8] = b"\x66\xba\xf8\x03\xb0\x61\xee\xeb\xfd";

#[test]
fn a_machine_lives_over_the_socket() {
    let monitor = Monitor::start(&["--id", "vm-7"]);
    let instance = monitor.get("/");
    let wanted = json!({
        "app_name": "Firecracker", "id": "vm-7", "state": "Not started", "vmm_version": "1.17.0",
    });
    assert_eq!(instance, wanted);
    assert_eq!(
        monitor.get("/version"),
        json!({"firecracker_version": "1.17.0"})
    );
    monitor.prepare(&say("hello"));
    assert_eq!(monitor.action("InstanceStart"), (204, Value::Null));
    let (code, console, _host, socket) = monitor.end();
    assert_eq!((code, &console[..]), (Some(0), &b"hello"[..]));
    assert!(!socket.exists(), "the socket goes with the process");
}

#[test]
fn a_client_learns_that_a_guest_was_started_which_ends_at_once() {
    for _ in 0..10 {
        let monitor = Monitor::start(&[]);
        monitor.prepare(HALT);
        assert_eq!(monitor.action("InstanceStart"), (204, Value::Null));
        assert_eq!(monitor.end().0, Some(0));
    }
}

#[test]
fn a_fifo_for_a_kernel_is_refused_and_makes_nobody_wait() {
    let monitor = Monitor::start(&[]);
    let fifo = monitor.host.path("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    for body in [
        json!({"kernel_image_path": fifo}),
        json!({"kernel_image_path": VMM, "initrd_path": fifo}),
    ] {
        let got = monitor.refusal("PUT", "/boot-source", Some(body));
        assert!(got.ends_with("is not a file"), "{got}");
    }
    monitor.get("/vm/config");
}

#[test]
fn what_is_asked_for_and_not_there_yet_is_said() {
    let monitor = Monitor::start(&[]);
    let log = monitor.host.path("log");
    monitor.put("/logger", json!({"log_path": log, "level": "Warning"}));
    monitor.prepare(SPIN);
    let more = json!({"track_dirty_pages": true});
    assert_eq!(monitor.ask("PATCH", "/machine-config", Some(more)).0, 204);
    assert_eq!(monitor.action("InstanceStart").0, 204);
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("track_dirty_pages is not there yet"), "{log}");
}

#[test]
fn huge_pages_hold_a_machine_or_it_is_said_how_to_get_them() {
    for pages in ["Transparent", "2M"] {
        let monitor = Monitor::start(&[]);
        monitor.prepare(SPIN);
        let asked = json!({"huge_pages": pages});
        assert_eq!(monitor.ask("PATCH", "/machine-config", Some(asked)).0, 204);
        match monitor.action("InstanceStart") {
            (204, _) => assert_eq!(monitor.state(), "Running"),
            (status, body) => {
                assert_eq!((status, pages), (400, "2M"), "{body}");
                let said = body["fault_message"].as_str().unwrap();
                assert!(said.contains("need 16 huge pages of 2 MiB"), "{said}");
                assert!(said.contains("/proc/sys/vm/nr_hugepages"), "{said}");
                // The client may do without.
                let asked = json!({"huge_pages": "None"});
                assert_eq!(monitor.ask("PATCH", "/machine-config", Some(asked)).0, 204);
                assert_eq!(monitor.action("InstanceStart").0, 204);
            }
        }
    }
}

#[test]
fn a_paused_machine_is_silent_and_a_resumed_one_goes_on() {
    let monitor = Monitor::start(&[]);
    monitor.prepare(CHATTER);
    let console = monitor.host.path("console");
    monitor.put("/serial", json!({"serial_out_path": console}));
    monitor.action("InstanceStart");
    let len = || std::fs::metadata(&console).map_or(0, |file| file.len());
    let grows = || {
        let (before, until) = (len(), Instant::now() + Duration::from_secs(20));
        while len() <= before + 100 {
            assert!(Instant::now() < until, "nothing was written any more");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    grows();
    for _ in 0..3 {
        let state = |state: &str| monitor.ask("PATCH", "/vm", Some(json!({"state": state})));
        assert_eq!(state("Paused").0, 204);
        assert_eq!(monitor.state(), "Paused");
        // What the guest wrote before is still on its way.
        let mut before = len();
        let settled = Instant::now() + Duration::from_secs(20);
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let now = len();
            if now == before {
                break;
            }
            assert!(Instant::now() < settled, "a paused guest writes");
            before = now;
        }
        assert_eq!(state("Resumed").0, 204);
        assert_eq!(monitor.state(), "Running");
        grows();
    }
}

#[test]
fn what_comes_too_early_or_too_late_is_refused() {
    let monitor = Monitor::start(&[]);
    for (method, path, body) in [
        ("PATCH", "/vm", json!({"state": "Paused"})),
        ("PUT", "/actions", json!({"action_type": "FlushMetrics"})),
        ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"})),
        ("PATCH", "/drives/a", json!({"drive_id": "a"})),
        ("PATCH", "/balloon", json!({"amount_mib": 1})),
        (
            "PUT",
            "/snapshot/create",
            json!({"snapshot_path": "/s", "mem_file_path": "/m"}),
        ),
    ] {
        let got = monitor.refusal(method, path, Some(body));
        assert!(got.contains("has not started"), "{method} {path}: {got}");
    }
    let got = monitor.refusal(
        "PUT",
        "/actions",
        Some(json!({"action_type": "InstanceStart"})),
    );
    assert_eq!(got, "there is no kernel: name one with PUT /boot-source");
    monitor.prepare(SPIN);
    monitor.action("InstanceStart");
    assert_eq!(monitor.state(), "Running");
    for (path, body) in [
        ("/actions", json!({"action_type": "InstanceStart"})),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 64}),
        ),
        ("/boot-source", json!({"kernel_image_path": "/k"})),
        ("/entropy", json!({})),
        ("/vsock", json!({"guest_cid": 3, "uds_path": "/s"})),
        ("/logger", json!({})),
        ("/metrics", json!({"metrics_path": "/m"})),
    ] {
        let got = monitor.refusal("PUT", path, Some(body));
        assert!(got.contains("has started already"), "{path}: {got}");
    }
    let drive = json!({"drive_id": "a", "is_root_device": false, "path_on_host": "/d"});
    let got = monitor.refusal("PUT", "/drives/a", Some(drive));
    assert!(got.contains("only be plugged on PCI"), "{got}");
}

#[test]
fn each_request_is_checked_when_it_comes_and_a_refused_one_changes_nothing() {
    let monitor = Monitor::start(&[]);
    let disk = monitor.host.path("disk");
    std::fs::write(&disk, [0; 4096]).unwrap();
    let drive = |id: &str, root: bool, path: &std::path::Path| json!({"drive_id": id, "is_root_device": root, "path_on_host": path});
    monitor.put("/drives/a", drive("a", true, &disk));
    let before = monitor.get("/vm/config");
    let missing = monitor.host.path("missing");
    for (path, body, wanted) in [
        (
            "/drives/b",
            drive("b", true, &disk),
            "both claim to be the root device",
        ),
        (
            "/drives/b",
            drive("b", false, &missing),
            "No such file or directory",
        ),
        (
            "/drives/b",
            drive("b", false, "/dev/null".as_ref()),
            "neither a file nor a block device",
        ),
        (
            "/boot-source",
            json!({"kernel_image_path": missing}),
            "failed to open kernel",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 33, "mem_size_mib": 64}),
            "vcpu_count 33",
        ),
        (
            "/balloon",
            json!({"amount_mib": 129, "deflate_on_oom": true}),
            "more than the machine's 128",
        ),
        (
            "/vsock",
            json!({"guest_cid": 2, "uds_path": "/s"}),
            "guest_cid 2",
        ),
        (
            "/logger",
            json!({"log_path": "/none/log"}),
            "failed to open log",
        ),
        (
            "/metrics",
            json!({"metrics_path": "/none/metrics"}),
            "failed to open",
        ),
    ] {
        let got = monitor.refusal("PUT", path, Some(body));
        assert!(got.contains(wanted), "{path}: {got}");
        assert_eq!(monitor.get("/vm/config"), before, "{path}");
    }
    // The same name again is a new configuration of the same drive.
    monitor.put("/drives/a", drive("a", false, &disk));
    monitor.put("/drives/b", drive("b", true, &disk));
    let drives = monitor.get("/vm/config")["drives"].clone();
    assert_eq!(drives.as_array().unwrap().len(), 2);
    let patched = monitor.ask("PATCH", "/machine-config", Some(json!({"vcpu_count": 2})));
    assert_eq!(patched.0, 204);
    let config = monitor.get("/machine-config");
    let wanted = json!({
        "vcpu_count": 2, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false,
        "huge_pages": "None",
    });
    assert_eq!(config, wanted);
}

#[test]
fn a_start_that_fails_may_be_tried_again() {
    let monitor = Monitor::start(&[]);
    monitor.prepare(&say("hello"));
    std::fs::write(monitor.host.path("kernel"), b"no kernel").unwrap();
    let (status, body) = monitor.action("InstanceStart");
    assert_eq!(status, 400);
    let message = body["fault_message"].as_str().unwrap();
    assert!(
        message.contains("give an uncompressed ELF vmlinux or a bzImage"),
        "{message}"
    );
    assert_eq!(monitor.state(), "Not started");
    std::fs::write(monitor.host.path("kernel"), elf(&say("hello"))).unwrap();
    assert_eq!(monitor.action("InstanceStart").0, 204);
    assert_eq!(monitor.end().0, Some(0));
}

#[test]
fn a_configuration_file_and_the_api_go_together() {
    let host = Host::new();
    let config = host.config(SPIN, json!({"serial": {"serial_out_path": "DIR/log"}}));
    let monitor = Monitor::start(&["--config-file", config.to_str().unwrap()]);
    assert_eq!(monitor.state(), "Running", "from the first answer on");
    let config = monitor.get("/vm/config");
    assert_eq!(config["machine-config"]["mem_size_mib"], 32);
    let id = pid(monitor.child.as_ref().unwrap());
    kill_process(id, Signal::TERM).unwrap();
    assert_eq!(monitor.end().0, Some(143));
}

#[test]
fn a_signal_ends_a_monitor_whose_machine_never_started() {
    let monitor = Monitor::start(&[]);
    let id = pid(monitor.child.as_ref().unwrap());
    kill_process(id, Signal::TERM).unwrap();
    let (code, _, _host, socket) = monitor.end();
    assert_eq!(code, Some(143));
    assert!(!socket.exists());
}

#[test]
fn a_socket_path_that_is_taken_is_one_line_and_what_is_there_stays() {
    let host = Host::new();
    let path = host.path("s");
    std::fs::write(&path, b"mine").unwrap();
    let output = Command::new(VMM)
        .arg("--api-sock")
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(153), "{output:?}");
    let words = host.anonymous(&output.stderr);
    assert!(
        words.ends_with(
            "kombi-vmm: error: failed to serve the API at \"DIR/s\": Address already in use \
             (os error 98); remove what is there, or give another --api-sock\n"
        ),
        "{words}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn requests_are_counted_in_the_metrics_and_the_log_is_where_it_was_asked_for() {
    let monitor = Monitor::start(&[]);
    let (metrics, log) = (monitor.host.path("metrics"), monitor.host.path("log"));
    monitor.put(
        "/metrics",
        json!({"metrics_path": metrics, "emit_id": true}),
    );
    monitor.put(
        "/logger",
        json!({"log_path": log, "level": "DEBUG", "show_level": true}),
    );
    monitor.prepare(SPIN);
    monitor.refusal(
        "PUT",
        "/boot-source",
        Some(json!({"kernel_image_path": "/none"})),
    );
    monitor.action("InstanceStart");
    assert_eq!(monitor.action("FlushMetrics").0, 204);
    let text = std::fs::read_to_string(&metrics).unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["put_api_requests"]["boot_source_count"], 2, "{last}");
    assert_eq!(last["put_api_requests"]["boot_source_fails"], 1);
    assert_eq!(last["id"], "anonymous-instance");
    assert!(last["engine"]["translations"]["made"].is_u64());
    let log = std::fs::read_to_string(log).unwrap();
    assert!(
        log.contains(":ERROR] API: PUT /boot-source: failed to open kernel"),
        "{log}"
    );
}

#[test]
fn no_call_takes_long_while_clients_are_silent_or_slow_to_read() {
    let monitor = Monitor::start(&[]);
    monitor.prepare(SPIN);
    monitor.action("InstanceStart");
    let mut silent: Vec<_> = (0..4)
        .map(|_| UnixStream::connect(&monitor.socket).unwrap())
        .collect();
    for stream in &mut silent {
        stream
            .write_all(b"PUT /mmds HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
            .unwrap();
    }
    // One that asks much and reads nothing.
    let mut full = UnixStream::connect(&monitor.socket).unwrap();
    full.set_nonblocking(true).unwrap();
    while full.write(b"GET /vm/config HTTP/1.1\r\n\r\n").is_ok() {}
    let started = Instant::now();
    for _ in 0..100 {
        monitor.get("/");
    }
    // A hundred in the time that one may take at most if it waited for another.
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
}

/// Switches the keyboard and its interrupt on, waits for a scan code and says `k`: `mov al,
/// 0x60; out 0x64, al; mov al, 0x41; out 0x60, al`, then `in al, 0x64; test al, 1; jz` back,
/// then what [`say`] does.
fn type_to_me() -> Vec<u8> {
    let mut code = b"\xb0\x60\xe6\x64\xb0\x41\xe6\x60\xe4\x64\xa8\x01\x74\xfa".to_vec();
    code.extend(say("k"));
    code
}

#[test]
fn ctrl_alt_del_reaches_a_guest_that_listens_and_is_refused_by_one_that_does_not() {
    let monitor = Monitor::start(&[]);
    monitor.prepare(SPIN);
    monitor.action("InstanceStart");
    let (status, body) = monitor.action("SendCtrlAltDel");
    assert_eq!(status, 400);
    let message = body["fault_message"].as_str().unwrap();
    assert!(
        message.contains("needs a driver for the i8042"),
        "{message}"
    );

    let monitor = Monitor::start(&[]);
    monitor.prepare(&type_to_me());
    monitor.action("InstanceStart");
    let until = Instant::now() + Duration::from_secs(20);
    while monitor.action("SendCtrlAltDel").0 != 204 {
        assert!(Instant::now() < until, "the guest never listened");
    }
    assert_eq!(monitor.end().1, b"k");
}

#[test]
fn a_balloon_is_described_and_refuses_what_its_guest_cannot_do() {
    let monitor = Monitor::start(&[]);
    monitor.prepare(SPIN);
    let asked = json!({
        "amount_mib": 8, "deflate_on_oom": true, "stats_polling_interval_s": 1,
        "free_page_hinting": true, "free_page_reporting": false,
    });
    monitor.put("/balloon", asked.clone());
    assert_eq!(monitor.get("/balloon"), asked);
    monitor.action("InstanceStart");
    assert_eq!(monitor.get("/balloon"), asked);
    let wanted = json!({"target_pages": 2048, "actual_pages": 0, "target_mib": 8, "actual_mib": 0});
    assert_eq!(monitor.get("/balloon/statistics"), wanted);
    assert_eq!(monitor.get("/balloon/hinting/status")["host_cmd"], 0);
    // A guest that spins has no driver.
    for (path, body) in [
        ("/balloon", json!({"amount_mib": 1})),
        ("/balloon/hinting/start", json!({})),
    ] {
        let got = monitor.refusal("PATCH", path, Some(body));
        assert!(got.contains("has not activated"), "{path}: {got}");
    }
    let got = monitor.refusal(
        "PATCH",
        "/balloon/statistics",
        Some(json!({"stats_polling_interval_s": 0})),
    );
    assert!(got.contains("cannot be switched on or off"), "{got}");
}

#[test]
fn memory_that_may_be_plugged_is_described_and_needs_a_driver() {
    let monitor = Monitor::start(&[]);
    monitor.prepare(SPIN);
    let pages = monitor.host.path("pages");
    std::fs::write(&pages, vec![0; 2 << 20]).unwrap();
    monitor.put("/hotplug/memory", json!({"total_size_mib": 256}));
    monitor.put("/pmem/p0", json!({"id": "p0", "path_on_host": pages}));
    monitor.action("InstanceStart");
    let wanted = json!({
        "total_size_mib": 256, "slot_size_mib": 128, "block_size_mib": 2,
        "plugged_size_mib": 0, "requested_size_mib": 0,
    });
    assert_eq!(monitor.get("/hotplug/memory"), wanted);
    let asked = json!({"requested_size_mib": 128});
    let got = monitor.refusal("PATCH", "/hotplug/memory", Some(asked));
    assert!(got.contains("activated"), "{got}");
    let limits = json!({"ops": {"size": 1, "refill_time": 100}});
    let patch = |id: &str| json!({"id": id, "rate_limiter": limits});
    assert_eq!(monitor.ask("PATCH", "/pmem/p0", Some(patch("p0"))).0, 204);
    let got = monitor.refusal("PATCH", "/pmem/p1", Some(patch("p1")));
    assert_eq!(got, "there is no pmem device \"p1\"");
}

#[test]
fn a_running_drive_gets_a_new_file_and_new_limits() {
    for io_engine in ["Sync", "Async"] {
        check_changes_of_a_drive(io_engine);
    }
}

fn check_changes_of_a_drive(io_engine: &str) {
    let monitor = Monitor::start(&[]);
    monitor.prepare(SPIN);
    let (disk, other) = (monitor.host.path("disk"), monitor.host.path("other"));
    std::fs::write(&disk, [0; 512]).unwrap();
    std::fs::write(&other, [0; 1024]).unwrap();
    let limit = json!({"ops": {"size": 5, "refill_time": 100}});
    monitor.put(
        "/drives/a",
        json!({"drive_id": "a", "is_root_device": false, "path_on_host": disk, "rate_limiter": limit,
               "io_engine": io_engine}),
    );
    assert_eq!(monitor.action("InstanceStart").0, 204);
    let patch = |body: Value| monitor.ask("PATCH", "/drives/a", Some(body));
    let limit = json!({"bandwidth": {"size": 7, "one_time_burst": 1, "refill_time": 50}});
    let body = json!({"drive_id": "a", "path_on_host": other, "rate_limiter": limit});
    assert_eq!(patch(body), (204, Value::Null));
    let drive = monitor.get("/vm/config")["drives"][0].clone();
    assert_eq!(drive["path_on_host"], json!(other));
    assert_eq!(drive["rate_limiter"]["bandwidth"]["size"], 7);
    assert_eq!(drive["rate_limiter"]["ops"]["size"], 5);
    let missing = monitor.host.path("missing");
    let body = json!({"drive_id": "a", "path_on_host": missing});
    let got = monitor.refusal("PATCH", "/drives/a", Some(body));
    assert!(
        got.starts_with("failed to change drive \"a\": failed to open disk"),
        "{got}"
    );
    let got = monitor.refusal("PATCH", "/drives/b", Some(json!({"drive_id": "b"})));
    assert_eq!(got, "there is no drive \"b\"");
    assert_eq!(monitor.get("/vm/config")["drives"][0], drive);
}

#[test]
fn metadata_is_put_patched_and_bounded() {
    let host = Host::new();
    let file = host.path("metadata");
    std::fs::write(&file, r#"{"from": "a file"}"#).unwrap();
    let monitor = Monitor::start(&[
        "--metadata",
        file.to_str().unwrap(),
        "--mmds-size-limit",
        "100",
    ]);
    assert_eq!(monitor.get("/mmds"), json!({"from": "a file"}));
    monitor.put("/mmds", json!({"a": {"b": 1, "c": 2}}));
    let patch = json!({"a": {"b": null, "d": "x"}});
    assert_eq!(monitor.ask("PATCH", "/mmds", Some(patch)).0, 204);
    let wanted = json!({"a": {"c": 2, "d": "x"}});
    assert_eq!(monitor.get("/mmds"), wanted);
    let large = json!({"a": "x".repeat(100)});
    for method in ["PUT", "PATCH"] {
        let (status, body) = monitor.ask(method, "/mmds", Some(large.clone()));
        assert_eq!(status, 413, "{body}");
    }
    assert_eq!(monitor.get("/mmds"), wanted);
}

#[test]
fn metrics_are_there_for_prometheus_without_a_file() {
    let monitor = Monitor::start(&[]);
    monitor.get("/version");
    monitor.prepare(SPIN);
    assert_eq!(monitor.action("InstanceStart").0, 204);
    let (head, body) = monitor.metrics();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let kind = "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
    assert!(head.contains(kind), "{head}");
    for line in [
        "# TYPE kombi_put_api_requests_actions_count counter",
        "kombi_put_api_requests_actions_count_total 1",
        "# TYPE kombi_engine_translations_made counter",
        "# EOF",
    ] {
        assert!(body.lines().any(|each| each == line), "{line}: {body}");
    }
}
