//! Processes that cannot start, and hosts that do not keep to the protocol.

use std::{fs, io::Write, os::unix::fs::PermissionsExt};

use guest_wire::{
    GuestMessage, Hello, HostMessage, MachineSpec, ProcessSpec, StartFailure, StartSpec, VERSION,
    Version, read_hello, write_hello,
};

use crate::host::{Host, process, record_of, shell};

fn check_failure(spec: ProcessSpec, expected: StartFailure, part: &str) {
    match record_of(spec).last {
        Some(GuestMessage::StartFailed { kind, message }) => {
            assert_eq!(kind, expected, "{message}");
            assert!(message.contains(part), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn missing_program_is_not_found() {
    check_failure(
        process(&["no-such-program"]),
        StartFailure::NotFound,
        "\"no-such-program\" not found in PATH",
    );
    check_failure(
        process(&["/no/such"]),
        StartFailure::NotFound,
        "\"/no/such\": No such file or directory",
    );
    check_failure(
        process(&["/etc/passwd/x"]),
        StartFailure::NotFound,
        "Not a directory",
    );
}

#[test]
fn script_without_its_interpreter_is_not_found() {
    let place = tempfile::tempdir().unwrap();
    let script = place.path().join("script");
    fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    check_failure(
        process(&[script.to_str().unwrap()]),
        StartFailure::NotFound,
        "No such file",
    );
}

#[test]
fn program_that_may_not_be_executed_is_not_executable() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("data");
    fs::write(&file, "data").unwrap();
    check_failure(
        process(&[file.to_str().unwrap()]),
        StartFailure::NotExecutable,
        "Permission denied",
    );
    let mut by_path = process(&["data"]);
    by_path.env = vec![format!("PATH={}:/usr/bin", place.path().display())];
    check_failure(by_path, StartFailure::NotExecutable, "Permission denied");
    check_failure(
        process(&["/"]),
        StartFailure::NotExecutable,
        "Permission denied",
    );
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    check_failure(
        process(&[file.to_str().unwrap()]),
        StartFailure::NotExecutable,
        "Exec format error",
    );
}

#[test]
fn unknown_user_is_a_bad_user() {
    let mut spec = process(&["true"]);
    spec.user = String::from("no-such-user");
    check_failure(
        spec,
        StartFailure::BadUser,
        "unable to find user \"no-such-user\"",
    );
}

#[test]
fn working_directory_that_cannot_be_is_bad() {
    let mut spec = process(&["true"]);
    spec.cwd = String::from("/etc/passwd");
    check_failure(spec.clone(), StartFailure::BadCwd, "\"/etc/passwd\"");
    spec.cwd = String::from("relative");
    check_failure(spec, StartFailure::BadCwd, "path is not absolute");
}

#[test]
fn impossible_arguments_are_refused() {
    check_failure(process(&[]), StartFailure::Other, "no command given");
    check_failure(process(&[""]), StartFailure::Other, "no command given");
    check_failure(
        process(&["true", "a\0b"]),
        StartFailure::Other,
        "argument holds a NUL byte",
    );
    let huge = "x".repeat(500_000);
    check_failure(
        process(&["true", &huge]),
        StartFailure::Other,
        "Argument list too long",
    );
}

/// What init says to `host`, and to its console, when it gives up.
fn check_end(host: Host, part: &str) {
    let (record, code, console) = host.into_record_and_console();
    assert_eq!(code, 1);
    assert!(
        console.starts_with("kombi-init: ") && console.contains(part),
        "{console}"
    );
    match record.last {
        Some(GuestMessage::InitFailed { message }) => {
            assert_eq!(console, format!("kombi-init: {message}\n"))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn host_of_another_version_is_refused_naming_both() {
    let mut host = Host::silent();
    assert_eq!(read_hello(&mut host.stream).unwrap(), Hello::OURS);
    let theirs = Version {
        major: VERSION.major + 1,
        minor: 3,
    };
    write_hello(&mut host.stream, Hello { version: theirs }).unwrap();
    check_end(
        host,
        &format!("guest protocol {theirs} does not fit this side's {VERSION}"),
    );
}

#[test]
fn host_that_speaks_something_else_is_refused() {
    let mut host = Host::silent();
    read_hello(&mut host.stream).unwrap();
    host.stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    check_end(host, "does not start with a Kombi greeting");
}

#[test]
fn malformed_frames_end_the_machine() {
    for (frame, part) in [
        (&b"\x01\0\0\0\xff"[..], "holds no known message"),
        (&b"\x02\0\0\0\x05\x05"[..], "1 bytes after its message"),
        (&b"\xff\xff\xff\xff"[..], "longer than the 1048576 allowed"),
    ] {
        let mut host = Host::greeted();
        host.stream.write_all(frame).unwrap();
        check_end(host, part);
        let mut host = Host::running(process(&["sleep", "100"]));
        host.stream.write_all(frame).unwrap();
        check_end(host, part);
    }
}

#[test]
fn messages_out_of_order_end_the_machine() {
    let mut host = Host::greeted();
    host.send(&HostMessage::StdinEof);
    check_end(host, "host sent Stdin before Start");

    let mut host = Host::running(process(&["sleep", "100"]));
    let machine = MachineSpec {
        hostname: String::new(),
        layers: 1,
        keeps: false,
    };
    host.send(&HostMessage::Start(Box::new(StartSpec {
        machine,
        process: shell("echo"),
    })));
    check_end(host, "host sent Start twice");
}

#[test]
fn host_that_never_greets_and_leaves_ends_the_machine() {
    let mut host = Host::silent();
    read_hello(&mut host.stream).unwrap();
    let (code, console) = host.bury();
    assert_eq!(
        (code, console.as_str()),
        (1, "kombi-init: control stream ended before its greeting\n")
    );
}
