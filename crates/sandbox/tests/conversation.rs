//! The whole life of a container with the monitor and the guest played on a stage: what comes back, and what is left
//! behind (nothing).

mod stage;

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use guest_wire::{
    GuestMessage, HostMessage, STDIN_CREDIT_BYTES_INITIAL, StartFailure, TerminalSize, WireError,
};
use sandbox::{Control, Ended, Error, NoControl, Plan, ProcessSpec, Request, Streams};
use stage::{Guest, ORDERLY, Stage, process};

/// Requests that a test writes into a pipe: a byte is a signal, zero a kill by signal 2.
struct Piped(PipeReader);

impl Control for Piped {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }

    fn take(&mut self) -> Option<Request> {
        rustix::io::ioctl_fionbio(&self.0, true).expect("set");
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(1) if byte[0] == 0 => Some(Request::Kill { signal: 2 }),
            Ok(1) if byte[0] == 255 => Some(Request::Resize(TerminalSize {
                rows: 50,
                cols: 132,
            })),
            Ok(1) => Some(Request::Signal(byte[0])),
            Ok(_) | Err(_) => None,
        }
    }
}

fn control() -> (Piped, PipeWriter) {
    let (reader, writer) = std::io::pipe().expect("pipe");
    (Piped(reader), writer)
}

/// Runs to the end; what came to standard output and error.
fn run(
    stage: &Stage,
    plan: Plan,
    process: ProcessSpec,
    stdin: Option<BorrowedFd<'_>>,
    control: &mut dyn Control,
) -> (Result<Ended, Error>, Vec<u8>, Vec<u8>) {
    let (out_reader, out) = std::io::pipe().expect("pipe");
    let (err_reader, err) = std::io::pipe().expect("pipe");
    let read_all = |mut reader: PipeReader| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).expect("read");
            bytes
        })
    };
    let (out_reader, err_reader) = (read_all(out_reader), read_all(err_reader));
    let streams = Streams {
        stdin,
        stdout: out.as_fd(),
        stderr: err.as_fd(),
    };
    let result = plan
        .launch_in(&stage.parent())
        .and_then(|booting| booting.wait_for_guest(control))
        .and_then(|ready| ready.run(process, streams, control));
    drop((out, err));
    let out = out_reader.join().expect("read");
    (result, out, err_reader.join().expect("read"))
}

fn simple(stage: &Stage) -> (Result<Ended, Error>, Vec<u8>, Vec<u8>) {
    run(stage, stage.plan(), process(false), None, &mut NoControl)
}

fn out(bytes: impl Into<Vec<u8>>) -> GuestMessage {
    GuestMessage::Stdout {
        bytes: bytes.into(),
    }
}

#[test]
fn output_and_exit_code_come_back_and_nothing_is_left() {
    let stage = Stage::with_monitor(ORDERLY);
    let guest = stage.guest(|guest| {
        guest.say(&GuestMessage::Started { pid: 7 });
        guest.say(&out("hello "));
        guest.say(&GuestMessage::Stderr {
            bytes: b"oops".to_vec(),
        });
        guest.say(&out("world"));
        guest.say(&GuestMessage::Exited { code: 3 });
    });
    let (result, stdout, stderr) = simple(&stage);
    assert_eq!(result.expect("ended"), Ended::Exited { code: 3 });
    assert_eq!(
        (stdout.as_slice(), stderr.as_slice()),
        (&b"hello world"[..], &b"oops"[..])
    );
    let start = guest.join().expect("played");
    assert_eq!(start.machine.layers, 2);
    assert_eq!(start.machine.hostname, "stage");
    assert_eq!(start.process, process(false));
    stage.is_swept();
}

#[test]
fn the_monitor_gets_the_layers_read_only_and_in_order() {
    let stage = Stage::with_monitor(ORDERLY);
    let _guest = stage.guest(|guest| guest.say(&GuestMessage::Exited { code: 0 }));
    simple(&stage).0.expect("ended");
    let config = std::fs::read(stage.file("vmm.config")).expect("kept");
    let config: serde_json::Value = serde_json::from_slice(&config).expect("JSON");
    for (index, path) in ["/layer a", "/layer b"].iter().enumerate() {
        let drive = &config["drives"][index];
        assert_eq!(drive["path_on_host"], *path);
        assert_eq!(drive["is_read_only"], true);
        assert_eq!(drive["is_root_device"], false);
    }
    assert_eq!(config["machine-config"]["mem_size_mib"], 64);
    assert_eq!(config["machine-config"]["engine"], "soft");
    assert_eq!(config["boot-source"]["kernel_image_path"], "/k");
}

#[test]
fn a_signal_that_ended_the_command_comes_back() {
    let stage = Stage::with_monitor(ORDERLY);
    let _guest = stage.guest(|guest| {
        guest.say(&GuestMessage::Signalled {
            number: 9,
            core: false,
        });
    });
    let ended = simple(&stage).0.expect("ended");
    assert_eq!(
        (ended, ended.exit_code()),
        (Ended::Signalled { number: 9 }, 137)
    );
    stage.is_swept();
}

#[test]
fn standard_input_goes_only_as_far_as_its_credit() {
    const TOTAL: usize = 1 << 20;
    let stage = Stage::with_monitor(ORDERLY);
    let path = stage.file("input");
    let input: Vec<u8> = (0..TOTAL).map(|i| (i / 251) as u8).collect();
    std::fs::write(&path, &input).expect("written");
    let guest = stage.guest(move |guest| {
        let mut got = Vec::new();
        let take = |guest: &mut Guest, got: &mut Vec<u8>| {
            while let Some(message) = guest.hear_within(Duration::from_millis(300)) {
                match message {
                    HostMessage::Stdin { bytes } => got.extend(bytes),
                    HostMessage::StdinEof => return true,
                    other => panic!("{other:?}"),
                }
            }
            false
        };
        assert!(!take(guest, &mut got));
        assert_eq!(got.len(), STDIN_CREDIT_BYTES_INITIAL as usize);
        guest.say(&GuestMessage::StdinCredit { bytes: 1000 });
        assert!(!take(guest, &mut got));
        assert_eq!(got.len(), STDIN_CREDIT_BYTES_INITIAL as usize + 1000);
        guest.say(&GuestMessage::StdinCredit { bytes: 1 << 30 });
        assert!(take(guest, &mut got));
        assert!(got == input);
        guest.say(&GuestMessage::Exited { code: 0 });
    });
    let file = File::open(path).expect("opened");
    let (result, _, _) = run(
        &stage,
        stage.plan(),
        process(true),
        Some(file.as_fd()),
        &mut NoControl,
    );
    result.expect("ended");
    guest.join().expect("played");
}

#[test]
fn without_standard_input_nothing_is_read() {
    let stage = Stage::with_monitor(ORDERLY);
    let path = stage.file("input");
    std::fs::write(&path, "input").expect("written");
    let guest = stage.guest(|guest| {
        assert_eq!(guest.hear_within(Duration::from_millis(200)), None);
        guest.say(&GuestMessage::Exited { code: 0 });
    });
    let file = File::open(path).expect("opened");
    let (result, _, _) = run(
        &stage,
        stage.plan(),
        process(false),
        Some(file.as_fd()),
        &mut NoControl,
    );
    result.expect("ended");
    guest.join().expect("played");
}

#[test]
fn much_output_arrives_whole_through_a_slow_pipe() {
    let stage = Stage::with_monitor(ORDERLY);
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 7) as u8).collect();
    let expected = bytes.clone();
    let _guest = stage.guest(move |guest| {
        for chunk in bytes.chunks(60_000) {
            guest.say(&out(chunk));
        }
        guest.say(&GuestMessage::Exited { code: 0 });
    });
    let (result, stdout, _) = simple(&stage);
    result.expect("ended");
    assert!(
        stdout == expected,
        "{} bytes of {}",
        stdout.len(),
        expected.len()
    );
}

#[test]
fn signals_pass_a_blocked_output() {
    let stage = Stage::with_monitor(ORDERLY);
    let (reader, writer) = std::io::pipe().expect("pipe");
    let (mut control, mut requests) = control();
    let guest = stage.guest(move |guest| {
        // More than the pipe holds, less than is held for a slow reader.
        guest.say(&out(vec![b'x'; 60_000]));
        guest.say(&out(vec![b'x'; 60_000]));
        requests.write_all(&[15, 255]).expect("asked");
        assert_eq!(guest.hear(), Some(HostMessage::Signal { number: 15 }));
        let size = TerminalSize {
            rows: 50,
            cols: 132,
        };
        assert_eq!(guest.hear(), Some(HostMessage::Resize(size)));
        drop(reader);
    });
    let result = stage
        .plan()
        .launch_in(&stage.parent())
        .and_then(|booting| booting.wait_for_guest(&mut control))
        .and_then(|ready| {
            let streams = Streams {
                stdin: None,
                stdout: writer.as_fd(),
                stderr: writer.as_fd(),
            };
            ready.run(process(false), streams, &mut control)
        });
    let error = result.expect_err("the reader went away");
    assert!(matches!(error, Error::ReaderGone { .. }), "{error}");
    assert_eq!((error.exit_code(), error.is_quiet()), (141, true));
    guest.join().expect("played");
    stage.is_swept();
}

#[test]
fn a_command_that_cannot_start_has_dockers_exit_code() {
    for (kind, code) in [
        (StartFailure::NotFound, 127),
        (StartFailure::NotExecutable, 126),
        (StartFailure::BadUser, 125),
    ] {
        let stage = Stage::with_monitor(ORDERLY);
        let _guest = stage.guest(move |guest| {
            let message = "cannot run \"cmd\"\x1b[2J".to_owned();
            guest.say(&GuestMessage::StartFailed { kind, message });
        });
        let error = simple(&stage).0.expect_err("did not start");
        assert_eq!(error.exit_code(), code);
        assert_eq!(error.to_string(), "cannot run \"cmd\"\\u{1b}[2J");
        stage.is_swept();
    }
}

#[test]
fn a_failure_of_the_guests_init_is_told() {
    let stage = Stage::with_monitor(ORDERLY);
    let _guest = stage.guest(|guest| {
        let message = "failed to mount /dev/vda".to_owned();
        guest.say(&GuestMessage::InitFailed { message });
    });
    let error = simple(&stage).0.expect_err("failed");
    assert_eq!(
        error.to_string(),
        "guest's init failed: failed to mount /dev/vda"
    );
    stage.is_swept();
}

#[test]
fn a_guest_of_another_version_is_refused_with_both_versions() {
    let stage = Stage::with_monitor(ORDERLY);
    let mut bytes = vec![16, 0, 0, 0];
    bytes.extend_from_slice(b"KOMBIWIR\x09\x00\x00\x00\x00\x00\x00\x00");
    let _guest = stage.babbler(bytes);
    let error = simple(&stage).0.expect_err("refused");
    assert!(
        matches!(error, Error::Wire(WireError::VersionMismatch { .. })),
        "{error:?}"
    );
    stage.is_swept();
}

#[test]
fn a_guest_that_babbles_is_refused() {
    for bytes in [vec![0xff; 100_000], b"GET / HTTP/1.0\r\n\r\n".to_vec()] {
        let stage = Stage::with_monitor(ORDERLY);
        let _guest = stage.babbler(bytes);
        let error = simple(&stage).0.expect_err("refused");
        assert!(
            matches!(error, Error::Wire(WireError::NotHello)),
            "{error:?}"
        );
        stage.is_swept();
    }
}

#[test]
fn a_monitor_that_refuses_is_quoted() {
    let stage = Stage::with_monitor(
        r#"cat > /dev/null
echo '{"event":"stopped","outcome":"error","message":"kernel \"/k\": not an ELF file; give another"}'
exit 152"#,
    );
    let error = simple(&stage).0.expect_err("refused");
    assert_eq!(
        error.to_string(),
        "machine failed to start: kernel \"/k\": not an ELF file; give another"
    );
    assert_eq!((error.way_out(), error.exit_code()), (None, 125));
    stage.is_swept();
}

#[test]
fn a_monitor_that_fails_without_a_status_is_quoted_from_its_log() {
    let stage = Stage::with_monitor("echo 'kombi-vmm: error: no memory' >&2; exit 1");
    let error = simple(&stage).0.expect_err("failed");
    assert_eq!(error.to_string(), "machine failed to start: no memory");
    stage.is_swept();
}

#[test]
fn a_monitor_that_cannot_be_started_is_named() {
    let stage = Stage::with_monitor(ORDERLY);
    let mut plan = stage.plan();
    plan.vmm = "/nowhere/kombi-vmm".into();
    let error = run(&stage, plan, process(false), None, &mut NoControl)
        .0
        .expect_err("missing");
    assert!(error.to_string().contains("/nowhere/kombi-vmm"), "{error}");
    stage.is_swept();
}

#[test]
fn a_monitor_killed_in_mid_run_is_told_as_such() {
    let stage = Stage::with_monitor(
        r#"cat > /dev/null
echo '{"event":"started"}'
read off < "$0.off"
kill -9 $$"#,
    );
    // The guest's connection goes with the monitor: here, when its thread ends.
    let _guest = stage.guest(|guest| {
        guest.say(&out("partial"));
        guest.hang_up();
    });
    let (result, stdout, _) = simple(&stage);
    let error = result.expect_err("killed");
    assert!(
        matches!(error, Error::VmmKilled { signal: 9, .. }),
        "{error}"
    );
    assert_eq!(stdout, b"partial");
    stage.is_swept();
}

#[test]
fn a_kernel_panic_is_told_with_its_line() {
    let stage = Stage::with_monitor(
        r#"config=$(cat)
console=${config#*serial_out_path\":\"}
printf '[    0.1] Kernel panic - not syncing: No working init found.\r\n' > "${console%%\"*}"
echo '{"event":"stopped","outcome":"reset","message":null}'"#,
    );
    let error = simple(&stage).0.expect_err("panicked");
    assert_eq!(
        error.to_string(),
        "guest kernel panicked: No working init found."
    );
    stage.is_swept();
}

#[test]
fn a_triple_fault_is_told_as_such() {
    let stage = Stage::with_monitor(
        r#"cat > /dev/null
echo '{"event":"started"}'
echo '{"event":"stopped","outcome":"triple-fault","message":"the guest triple-faulted"}'
exit 140"#,
    );
    let error = simple(&stage).0.expect_err("fault");
    assert!(matches!(error, Error::TripleFault { .. }), "{error}");
    stage.is_swept();
}

#[test]
fn a_guest_that_never_calls_is_given_up_in_time() {
    let stage =
        Stage::with_monitor("cat > /dev/null; echo '{\"event\":\"started\"}'; exec sleep 1000");
    let mut plan = stage.plan();
    plan.boot_timeout = Duration::from_millis(300);
    let started = Instant::now();
    let error = run(&stage, plan, process(false), None, &mut NoControl)
        .0
        .expect_err("late");
    assert!(matches!(error, Error::BootTimeout { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
    stage.is_swept();
}

#[test]
fn a_signal_before_the_command_runs_ends_the_machine() {
    let stage = Stage::with_monitor("cat > /dev/null; exec sleep 1000");
    let (mut control, mut requests) = control();
    requests.write_all(&[15]).expect("asked");
    let error = run(&stage, stage.plan(), process(false), None, &mut control)
        .0
        .expect_err("stopped");
    assert_eq!((error.exit_code(), error.is_quiet()), (143, true));
    stage.is_swept();
}

#[test]
fn a_kill_ends_a_machine_whose_command_does_not_listen() {
    let stage = Stage::with_monitor(ORDERLY);
    let (mut control, mut requests) = control();
    let guest = stage.guest(move |guest| {
        requests.write_all(&[2]).expect("asked");
        assert_eq!(guest.hear(), Some(HostMessage::Signal { number: 2 }));
        requests.write_all(&[0]).expect("asked");
    });
    let error = run(&stage, stage.plan(), process(false), None, &mut control)
        .0
        .expect_err("killed");
    assert_eq!(error.exit_code(), 130);
    guest.join().expect("played");
    stage.is_swept();
}

#[test]
fn a_panic_of_ours_leaves_nothing() {
    let stage = Stage::with_monitor("cat > /dev/null; sleep 1000 & exec sleep 1000");
    let result = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let _booting = stage.plan().launch_in(&stage.parent()).expect("launched");
                stage.monitor_pid();
                panic!("a mistake of ours");
            })
            .join()
    });
    result.expect_err("panicked");
    stage.is_swept();
}

#[test]
fn what_no_machine_can_have_is_refused_before_anything_is_made() {
    let stage = Stage::with_monitor(ORDERLY);
    let mut small = stage.plan();
    small.memory_mib = 8;
    let mut wide = stage.plan();
    wide.vcpus = 9;
    let mut named = stage.plan();
    named.name = Some("../x".to_owned());
    let mut tall = stage.plan();
    tall.layers = vec!["/l".into(); 100];
    for plan in [small, wide, named, tall] {
        let error = plan.launch_in(&stage.parent()).expect_err("refused");
        assert!(error.way_out().is_some(), "{error}");
        assert!(!stage.file("vmm.pid").exists());
        stage.is_swept();
    }
}
