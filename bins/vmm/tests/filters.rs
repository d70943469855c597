//! Filters of system calls from outside: which threads have them, and what the command
//! line makes of them. What they let pass is tested beside them (`src/filter/`).

mod host;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use host::*;
use rustix::process::{Signal, kill_process};
use serde_json::json;

/// Programs that the kernel asks for a thread's system calls.
fn filters(task: &Path) -> u32 {
    let status = std::fs::read_to_string(task.join("status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp_filters:"));
    line.map_or(0, |count| count.trim().parse().unwrap())
}

/// By the threads' names, more than this test itself runs behind.
fn of_threads(process: &Child) -> BTreeMap<String, u32> {
    let own = filters(Path::new("/proc/self"));
    let tasks = PathBuf::from(format!("/proc/{}/task", process.id()));
    let tasks = std::fs::read_dir(tasks).unwrap().flatten();
    let named = tasks.filter_map(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        Some((name.trim().to_owned(), filters(&task.path()) - own))
    });
    named.collect()
}

fn await_filters(process: &Child, wanted: &[(&str, u32)]) {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let found = of_threads(process);
        // A thread has its name and its filter a moment after its start.
        if wanted
            .iter()
            .all(|(name, count)| found.get(*name) == Some(count))
        {
            return;
        }
        assert!(Instant::now() < until, "{found:?}, not {wanted:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn every_thread_runs_behind_filters_unless_told_otherwise() {
    for (arg, programs) in [(None, 2), (Some("--no-seccomp"), 0)] {
        let host = Host::new();
        std::fs::write(host.path("disk"), [0; 4096]).unwrap();
        let drive = json!({
            "drive_id": "d", "path_on_host": "DIR/disk", "is_root_device": false,
        });
        let config = host.config(
            SPIN,
            json!({
                "serial": {"serial_out_path": "DIR/log"},
                "metrics": {"metrics_path": "DIR/metrics"},
                "drives": [drive],
            }),
        );
        let socket = host.path("api.sock");
        let mut command = Command::new(VMM);
        command
            .arg("--config-file")
            .arg(config)
            .arg("--api-sock")
            .arg(socket)
            .args([
                "--die-with-parent",
                "--level",
                "error",
                "--translation-cache",
            ])
            .arg(host.path("kept"))
            .args(arg)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        let mut threads = vec![
            "vcpu0",
            "kombi-vmm",
            "api",
            "signals",
            "translations",
            "metrics",
        ];
        // Without filters it starts when it is needed.
        threads.extend(arg.is_none().then_some("disk"));
        let wanted: Vec<_> = threads.iter().map(|name| (*name, programs)).collect();
        await_filters(&child, &wanted);
        let found = of_threads(&child);
        assert_eq!(found.len(), threads.len(), "{found:?}");
        kill_process(pid(&child), Signal::TERM).unwrap();
        assert_eq!(finish(child).status.code(), Some(143));
    }
}

#[test]
fn filters_of_a_file_take_the_place_of_our_own() {
    let host = Host::new();
    let config = host.config(HALT, json!({}));
    let any = json!({"default_action": "allow", "filter_action": "trap", "filter": [{"syscall": "ptrace"}]});
    let path = host.path("filters.json");
    let given = json!({"vmm": any, "api": any, "vcpu": any});
    std::fs::write(&path, given.to_string()).unwrap();
    let path = path.to_str().unwrap();
    let output = host.run(&config, &["--seccomp-filter", path]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    // What says so and ends the process is all that is left: the filter is in force.
    let last_words = json!([{"syscall": "write"}, {"syscall": "exit_group"}]);
    let strict = json!({"default_action": "trap", "filter_action": "allow", "filter": last_words});
    let given = json!({"vmm": any, "api": any, "vcpu": strict});
    std::fs::write(path, given.to_string()).unwrap();
    let output = host.run(&host.config(SPIN, json!({})), &["--seccomp-filter", path]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(148), "{output:?}");
    assert!(
        said.contains("is forbidden to the thread that made it"),
        "{said}"
    );
}

#[test]
fn a_file_that_is_no_filter_for_each_thread_is_refused() {
    let host = Host::new();
    let config = host.config(HALT, json!({}));
    let any = json!({"default_action": "allow", "filter_action": "trap", "filter": []});
    for (text, wanted) in [
        (
            "\u{3}\0\0\0\0\0\0\0vmm".to_owned(),
            "filters \"DIR/f\" are refused",
        ),
        (
            json!({"vmm": any, "api": any}).to_string(),
            "it has no filter for thread vcpu",
        ),
        (
            json!({"vmm": {}}).to_string(),
            "filters \"DIR/f\" are refused",
        ),
    ] {
        std::fs::write(host.path("f"), text).unwrap();
        let path = host.path("f");
        let output = host.run(&config, &["--seccomp-filter", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(153), "{output:?}");
        let said = host.anonymous(&output.stderr);
        assert!(said.contains(wanted), "{said}");
        assert!(said.contains("give JSON as seccompiler reads it"), "{said}");
    }
}
