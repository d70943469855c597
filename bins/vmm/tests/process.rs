//! The process as others see it: exit codes, one-line errors, status events, and
//! nothing left behind.

mod host;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use host::*;
use rustix::process::{Signal, kill_process};

#[test]
fn each_end_of_a_guest_has_its_exit_code_and_event() {
    for (code, exit, outcome) in [
        (HALT, 0, "power-off"),
        (POWER_OFF, 0, "power-off"),
        (RESET, 0, "reset"),
        (TRIPLE_FAULT, 140, "triple-fault"),
    ] {
        let host = Host::new();
        let rest = serde_json::json!({"serial": {"serial_out_path": "DIR/log"}});
        let output = host.run(&host.config(code, rest), &["--status-fd", "1"]);
        let events = host.anonymous(&output.stdout);
        assert!(
            events.starts_with("{\"event\":\"started\"}\n"),
            "{output:?}"
        );
        assert!(
            events.contains(&format!("\"outcome\":\"{outcome}\"")),
            "{events}"
        );
        assert_eq!(output.status.code(), Some(exit), "{outcome}: {output:?}");
    }
}

#[test]
fn standard_output_is_the_console_and_nothing_else() {
    let output = Host::new().boot(&say("hello\nprompt> "), &[]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello\nprompt> ");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_kernel_panic_on_the_console_is_the_events_message() {
    let host = Host::new();
    let rest = serde_json::json!({"serial": {"serial_out_path": "DIR/log"}});
    let config = host.config(&say("[ 1.0] Kernel panic - not syncing: no init\n"), rest);
    let output = host.run(&config, &["--status-fd", "1"]);
    let last = host
        .anonymous(&output.stdout)
        .lines()
        .last()
        .unwrap()
        .to_owned();
    let wanted =
        r#"{"event":"stopped","outcome":"reset","message":"Kernel panic - not syncing: no init"}"#;
    assert_eq!(last, wanted);
}

#[test]
fn configuration_is_read_from_standard_input() {
    let host = Host::new();
    let config = std::fs::read(host.config(HALT, serde_json::json!({}))).unwrap();
    let mut child = Command::new(VMM)
        .args(["--config-file", "-", "--no-api", "--id", "a-1"])
        .arg("--die-with-parent")
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&config).unwrap();
    assert_eq!(finish(child).status.code(), Some(0));
}

#[test]
fn sigterm_and_sigint_stop_a_guest_that_spins_and_unlink_its_socket() {
    for (signal, exit) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let host = Host::new();
        let rest = serde_json::json!({
            "vsock": {"guest_cid": 3, "uds_path": "DIR/v.sock"},
            "serial": {"serial_out_path": "DIR/log"},
        });
        let mut child = host.start(&host.config(SPIN, rest), &["--status-fd", "1"]);
        let mut events = wait_for_started(&mut child);
        assert!(host.path("v.sock").exists());
        kill_process(pid(&child), signal).unwrap();
        let output = finish(child);
        assert_eq!(output.status.code(), Some(exit), "{output:?}");
        let mut rest = String::new();
        events.read_to_string(&mut rest).unwrap();
        assert_eq!(
            rest,
            "{\"event\":\"stopped\",\"outcome\":\"stopped\",\"message\":null}\n"
        );
        assert!(!host.path("v.sock").exists());
    }
}

#[test]
fn a_killed_parent_leaves_no_machine_behind() {
    let host = Host::new();
    let rest = serde_json::json!({"serial": {"serial_out_path": "DIR/log"}});
    let config = host.config(SPIN, rest);
    // The trailing command keeps the shell from becoming the monitor itself.
    let script = "\"$0\" --no-api --config-file \"$1\" --die-with-parent --status-fd 1; exit";
    let mut shell = Command::new("/bin/sh")
        .args(["-c", script, VMM])
        .arg(&config)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut events = wait_for_started(&mut shell);
    shell.kill().unwrap();
    shell.wait().unwrap();
    // The monitor alone still held the other end.
    let mut rest = String::new();
    events.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "killed, not stopped");
}

#[test]
fn a_parent_that_is_gone_already_gets_no_machine() {
    let host = Host::new();
    let rest = serde_json::json!({"serial": {"serial_out_path": "DIR/log"}});
    let config = host.config(SPIN, rest);
    let mut vmm = Command::new(VMM);
    vmm.args([
        "--no-api",
        "--die-with-parent",
        "--status-fd",
        "1",
        "--config-file",
    ])
    .arg(&config)
    .stderr(Stdio::null());
    // The reading end goes before the monitor starts.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = vmm.stdout(writer).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn bad_configuration_is_one_line_with_object_cause_and_way_out() {
    let host = Host::new();
    let json = |text: &str| {
        let path = host.path("bad.json");
        std::fs::write(&path, text).unwrap();
        path
    };
    let error = |config: &Path, args: &[&str]| {
        let output = host.run(config, args);
        assert_eq!(output.status.code(), Some(152), "{output:?}");
        host.anonymous(&output.stderr)
    };
    assert_eq!(
        error(&host.path("none"), &[]),
        "kombi-vmm: error: failed to read configuration \"DIR/none\": No such file or directory \
         (os error 2); give a readable file, or - for standard input\n"
    );
    assert_eq!(
        error(&json("{"), &[]),
        "kombi-vmm: error: configuration \"DIR/bad.json\" is refused: failed to read the machine \
         configuration: EOF while parsing an object at line 1 column 1\n"
    );
    assert_eq!(
        error(
            &json(r#"{"boot-source": {"kernel_image_path": "/none/vmlinux"}}"#),
            &[]
        ),
        "kombi-vmm: error: the machine cannot be built: failed to open kernel \"/none/vmlinux\": \
         No such file or directory (os error 2); give the path of a readable vmlinux or bzImage\n"
    );
    let config = host.config(HALT, serde_json::json!({}));
    std::fs::write(host.path("kernel"), &elf(HALT)[..100]).unwrap();
    assert_eq!(
        error(&config, &[]),
        "kombi-vmm: error: the machine cannot be built: kernel \"DIR/kernel\" is truncated: its \
         headers want more than its 100 bytes; build or copy the kernel again\n"
    );
}

#[test]
fn a_failure_is_an_event_as_well() {
    let host = Host::new();
    let output = host.run(&host.path("none"), &["--status-fd", "1"]);
    let event = host.anonymous(&output.stdout);
    assert!(event.starts_with("{\"event\":\"stopped\",\"outcome\":\"error\",\"message\":\"failed"));
    assert_eq!(event.lines().count(), 1);
}

#[test]
fn bad_arguments_have_their_own_exit_code_and_help_has_none() {
    let host = Host::new();
    let code = |args: &[&str]| Command::new(VMM).args(args).output().unwrap().status.code();
    assert_eq!(code(&["--no-api"]), Some(153));
    assert_eq!(code(&["--config-file", "c", "--id", "a_b"]), Some(153));
    assert_eq!(
        code(&["--config-file", "c", "--status-fd", "77"]),
        Some(153)
    );
    let log = host.path("no/log");
    assert_eq!(
        code(&["--config-file", "c", "--log-path", log.to_str().unwrap()]),
        Some(153)
    );
    assert_eq!(
        (code(&["--help"]), code(&["--version"])),
        (Some(0), Some(0))
    );
    let help = Command::new(VMM).arg("--help").output().unwrap().stdout;
    assert!(String::from_utf8_lossy(&help).contains("140  the guest triple-faulted"));
}

#[test]
fn the_log_goes_to_its_file() {
    let host = Host::new();
    let log = host.path("vmm.log");
    let config = host.config(HALT, serde_json::json!({}));
    let output = host.run(
        &config,
        &["--log-path", log.to_str().unwrap(), "--level", "Info"],
    );
    assert_eq!(
        (output.status.code(), &output.stderr[..]),
        (Some(0), &b""[..])
    );
    assert!(
        std::fs::read_to_string(log)
            .unwrap()
            .contains("outcome=power-off")
    );
}

#[test]
fn a_socket_takes_status_events_too() {
    let host = Host::new();
    let rest = serde_json::json!({"serial": {"serial_out_path": "DIR/log"}});
    let config = host.config(HALT, rest);
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let child = Command::new(VMM)
        .args(["--no-api", "--config-file"])
        .arg(config)
        .args(["--status-fd", "1", "--die-with-parent"])
        .stdout(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(finish(child).status.code(), Some(0));
    let mut events = String::new();
    ours.read_to_string(&mut events).unwrap();
    assert_eq!(events.lines().count(), 2, "{events}");
}

/// A host that gives no io_uring is played by a filter, which the monitor inherits.
#[test]
fn a_drive_with_io_uring_on_a_host_without_it_is_refused_with_the_way_out() {
    for (errno, cause) in [
        (libc::EPERM, "Operation not permitted (os error 1)"),
        (libc::ENOSYS, "Function not implemented (os error 38)"),
    ] {
        let host = Host::new();
        std::fs::write(host.path("disk"), [0; 512]).unwrap();
        let drive = |io_engine| {
            serde_json::json!({"drives": [{"drive_id": "d", "path_on_host": "DIR/disk",
                "is_root_device": false, "io_engine": io_engine}]})
        };
        std::thread::scope(|scope| {
            let confined = scope.spawn(|| {
                let refused = seccompiler::SeccompFilter::new(
                    [(libc::SYS_io_uring_setup, Vec::new())].into(),
                    seccompiler::SeccompAction::Allow,
                    seccompiler::SeccompAction::Errno(errno as u32),
                    seccompiler::TargetArch::x86_64,
                );
                let program = seccompiler::BpfProgram::try_from(refused.unwrap()).unwrap();
                seccompiler::apply_filter(&program).unwrap();
                let output = host.run(&host.config(HALT, drive("Async")), &[]);
                assert_eq!(output.status.code(), Some(152), "{output:?}");
                assert_eq!(
                    host.anonymous(&output.stderr),
                    format!(
                        "kombi-vmm: error: the machine cannot be built: failed to make drive \"d\": failed to make an io_uring for disk \
                         \"DIR/disk\", whose io_engine is Async: {cause}; use io_engine Sync, or allow io_uring \
                         here: Linux 5.10 or newer, sysctl kernel.io_uring_disabled, filters of system calls\n"
                    )
                );
                let output = host.run(&host.config(HALT, drive("Sync")), &[]);
                assert_eq!(output.status.code(), Some(0), "{output:?}");
            });
            confined.join().unwrap();
        });
    }
}
