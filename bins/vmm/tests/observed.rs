//! What engineers see of a machine from outside: metrics, the engine's trace, and what
//! is said when the engine fails.

mod host;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use host::bare_driver::{BUFFER, WRITE, request};
use host::*;
use serde_json::Value;

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n'), "{text}");
    let parse = |line| serde_json::from_str(line).unwrap();
    text.lines().map(parse).collect()
}

fn number(line: &Value, pointer: &str) -> u64 {
    let value = line.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no {pointer} in {line}"))
}

#[test]
fn metrics_count_what_the_engine_did() {
    let host = Host::new();
    let path = host.path("metrics");
    let output = host.boot(&say("hello"), &["--metrics-path", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let lines = lines(&path);
    let [first, last] = &lines[..] else {
        panic!("{lines:?}");
    };
    assert!(number(first, "/utc_timestamp_ms") > 1_700_000_000_000);
    assert_eq!(number(first, "/engine/translations/made"), 0);
    assert_eq!(last.pointer("/engine/name"), Some(&"soft".into()));
    // Five bytes to the serial port, one to the keyboard controller.
    assert_eq!(number(last, "/engine/pio"), 6);
    assert_eq!(number(last, "/vcpu/exit_io_out"), 6);
    assert_eq!(number(last, "/uart/write_count"), 5);
    assert!(number(last, "/engine/exits/interpret") >= 6);
    let made = number(last, "/engine/translations/made");
    assert!(made >= 6);
    assert_eq!(number(last, "/engine/kept/missed"), made);
    let rate = last.pointer("/engine/kept/hit_rate");
    assert_eq!(rate, Some(&0.0.into()), "{last}");
}

#[test]
fn what_the_guest_says_beyond_the_serial_ports_limit_is_lost() {
    let host = Host::new();
    let path = host.path("metrics");
    let limiter = serde_json::json!({"size": 4, "one_time_burst": 1, "refill_time": 3_600_000});
    let rest = serde_json::json!({"serial": {"rate_limiter": limiter}});
    let config = host.config(&say("hello world"), rest);
    let output = host.run(&config, &["--metrics-path", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stdout, b"hello");
    let last = lines(&path).pop().unwrap();
    assert_eq!(number(&last, "/uart/write_count"), 11);
    assert_eq!(number(&last, "/uart/rate_limiter_dropped_bytes"), 6);
}

/// A read of the first sector, by a guest of a few instructions.
#[test]
fn metrics_count_what_drives_did_each_and_together() {
    let host = Host::new();
    for name in ["first", "second"] {
        std::fs::write(host.path(name), [7; 4096]).unwrap();
    }
    let drive = |id: &str| {
        serde_json::json!({"drive_id": id, "path_on_host": format!("DIR/{id}"), "is_root_device": false,
            "is_read_only": true})
    };
    let drives = serde_json::json!({"drives": [drive("first"), drive("second")]});
    let read = [
        (BUFFER, 16, 0),
        (BUFFER + 512, 512, WRITE),
        (BUFFER + 16, 1, WRITE),
    ];
    let config = host.config(&request(&read, 0, "read\n"), drives);
    let path = host.path("metrics");
    let output = host.run(&config, &["--metrics-path", path.to_str().unwrap()]);
    assert_eq!(output.stdout, b"read\n", "{output:?}");
    let lines = lines(&path);
    let last = lines.last().unwrap();
    for group in ["block", "block_first"] {
        assert_eq!(number(last, &format!("/{group}/read_count")), 1);
        assert_eq!(number(last, &format!("/{group}/read_bytes")), 512);
        assert_eq!(number(last, &format!("/{group}/queue_event_count")), 1);
        let latency = |what| number(last, &format!("/{group}/read_agg/{what}_us"));
        assert!(latency("min") <= latency("max") && latency("max") <= latency("sum"));
    }
    assert_eq!(number(last, "/block_second/read_count"), 0);
    assert_eq!(number(last, "/block/write_count"), 0);
}

/// The guest knows no flush: each write is one that takes time, and is done by the drive's
/// thread, inside of its filter, or by the kernel, which is asked from inside of the filter of
/// who was kicked.
#[test]
fn a_write_that_takes_time_is_handed_on_on_each_engine() {
    let each = ["soft", "kvm"].map(|engine| ["Sync", "Async"].map(|io| (engine, io)));
    for (engine, io_engine) in each.into_iter().flatten() {
        let options = std::fs::File::options().read(true).write(true).clone();
        if engine == "kvm" && options.open("/dev/kvm").is_err() {
            continue;
        }
        // Not in memory, where nothing takes time.
        let disk = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        disk.as_file().set_len(4096).unwrap();
        let host = Host::new();
        let drives = serde_json::json!({"drives": [{"drive_id": "d", "path_on_host": disk.path(),
            "is_root_device": false, "is_read_only": false, "cache_type": "Writeback",
            "io_engine": io_engine}]});
        // The header is the data as well.
        let write = [(BUFFER, 16, 0), (BUFFER, 512, 0), (BUFFER + 512, 1, WRITE)];
        let config = host.config(&request(&write, 1, "written\n"), drives);
        let path = host.path("metrics");
        let args = ["--engine", engine, "--metrics-path", path.to_str().unwrap()];
        let output = host.run(&config, &args);
        assert_eq!(output.stdout, b"written\n", "{engine}: {output:?}");
        assert_eq!(output.status.code(), Some(0), "{engine}: {output:?}");
        assert_eq!(std::fs::read(disk.path()).unwrap()[..4], [1, 0, 0, 0]);
        let lines = lines(&path);
        let last = lines.last().unwrap();
        assert_eq!(number(last, "/block_d/handed_over_count"), 1, "{engine}");
        assert_eq!(number(last, "/block_d/write_count"), 1, "{engine}");
    }
}

#[test]
fn metrics_for_nobody_do_not_keep_a_machine_waiting() {
    let host = Host::new();
    let path = host.path("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    let output = host.boot(HALT, &["--metrics-path", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn the_trace_names_blocks_and_where_they_are_left() {
    let host = Host::new();
    let path = host.path("trace");
    let output = host.boot(&say("hello"), &["--engine-trace", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let lines = lines(&path);
    let of = |event: &str| -> Vec<&Value> {
        lines.iter().filter(|line| line["event"] == event).collect()
    };
    let first = of("block")[0];
    assert_eq!(
        (&first["rip"], &first["mode"], &first["kind"]),
        (&"0x1000000".into(), &"kernel".into(), &"grouped".into())
    );
    assert!(number(first, "/host_bytes") > number(first, "/guest_bytes"));
    let counts = of("counts");
    let sum = |pointer| counts.iter().map(|line| number(line, pointer)).sum::<u64>();
    assert_eq!(sum("/translations/made"), of("block").len() as u64);
    // At least a MOV and an OUT for each byte.
    assert!(sum("/instructions/kernel") >= 12);
    let outs: u64 = of("hot")
        .iter()
        .filter(|line| line["exit"] == "interpret")
        .map(|line| number(line, "/count"))
        .sum();
    assert_eq!(outs, 6);
}

#[test]
fn outputs_that_cannot_be_opened_are_bad_arguments() {
    let host = Host::new();
    for option in ["--metrics-path", "--engine-trace"] {
        let output = host.boot(HALT, &[option, "/none/file"]);
        assert_eq!(output.status.code(), Some(153));
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(words.contains("\"/none/file\""), "{words}");
        assert!(
            words.contains("; give a path that can be written"),
            "{words}"
        );
    }
}

/// What is said when the engine fails so, from behind the filter of system calls.
fn failure(how: &str) -> (std::process::ExitStatus, String) {
    let host = Host::new();
    let rest = serde_json::json!({"serial": {"serial_out_path": "DIR/log"}});
    let config = host.config(&say("hello"), rest);
    let output = host.run(&config, &["--fail-engine", how]);
    (
        output.status,
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[track_caller]
fn assert_says(words: &str, wanted: &[&str]) {
    for part in wanted {
        assert!(words.contains(part), "no {part:?} in {words}");
    }
}

#[test]
fn a_panic_of_the_engine_comes_with_a_report() {
    let (status, words) = failure("panic");
    assert_eq!(status.code(), Some(1), "{words}");
    assert_says(
        &words,
        &[
            "panicked at",
            "the engine failed on vCPU 0: panic: on purpose\n",
            "guest rip 0x100000",
            "rax 0x",
            "code at rip: b0 6c ee b0",
            "translated code was left by exit",
            "at 0x100000",
            "host code at 0x",
            "kombi-vmm: error: the machine stopped: the thread of vCPU 0 panicked",
        ],
    );
}

#[test]
fn a_host_fault_that_is_not_the_guests_comes_with_a_report() {
    let (status, words) = failure("host-fault");
    assert_eq!(status.code(), Some(141), "{words}");
    assert_says(
        &words,
        &[
            "the engine failed on vCPU 0: host signal 5, trap 3",
            "guest rip 0x100000",
            "signal 5, trap 3, address 0x",
            "r15 0x",
            "code at rip: b0 6c ee b0",
            " cc ",
            "kombi-vmm: error: the machine stopped: the engine failed: the soft engine stopped at guest",
        ],
    );
}

#[test]
fn a_jump_out_of_translated_code_comes_with_a_report() {
    let (status, words) = failure("wild-jump");
    assert_eq!(status.signal(), Some(libc::SIGSEGV), "{words}");
    assert_says(
        &words,
        &[
            "kombi: the engine failed: signal 11, trap 14 at host pc 0x0, address 0x0, outside of",
            "guest rip 0x100000",
            "\n  rax 0x",
            "r14 0x0 r15 0x",
        ],
    );
}

#[test]
fn no_configuration_makes_the_engine_fail() {
    let host = Host::new();
    for rest in [
        serde_json::json!({"fail-engine": "panic"}),
        serde_json::json!({"machine-config": {"mem_size_mib": 32, "fail_engine": "panic"}}),
    ] {
        let output = host.run(&host.config(HALT, rest), &[]);
        assert_eq!(output.status.code(), Some(152), "{output:?}");
    }
    // Nor does anybody come upon it.
    let help = std::process::Command::new(VMM)
        .arg("--help")
        .output()
        .unwrap();
    assert!(!String::from_utf8_lossy(&help.stdout).contains("fail-engine"));
}
