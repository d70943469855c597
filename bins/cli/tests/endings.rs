//! The ends of machines that are not their commands': each is told in one line, and nothing is left behind.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{Home, ended, pid_of, refused, signal, stderr, tiny_kernel};

/// `lidt` of an empty table, then `int3`: a fault that nothing can take, three times over.
const TRIPLE_FAULT: [u8; 18] = [
    0x0f, 0x01, 0x1d, 0x01, 0x00, 0x00, 0x00, // lidt [rip + 1]
    0xcc, // int3
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];
/// `jmp $`.
const SPIN: [u8; 2] = [0xeb, 0xfe];

/// Starts a command and waits until it has said `up`.
fn start(home: &Home, script: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let image = home.busybox();
    let script = format!("{script}; echo up; while :; do sleep 1; done");
    let mut child = home.start(&[&image, "sh", "-c", &script]);
    let mut reader = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    reader.read_line(&mut line).expect("read");
    if line != "up\n" {
        let output = child.wait_with_output().expect("ended");
        panic!("{line:?} {}", stderr(&output));
    }
    (child, reader)
}

fn code_and_words(mut child: Child) -> (Option<i32>, String) {
    let mut said = String::new();
    child
        .stderr
        .take()
        .expect("piped")
        .read_to_string(&mut said)
        .expect("read");
    (child.wait().expect("ended").code(), said)
}

#[test]
fn an_interrupt_reaches_the_command() {
    let home = Home::new();
    let (child, mut reader) = start(&home, "trap 'echo caught; exit 5' INT");
    signal(pid_of(&child), Signal::INT);
    let mut rest = String::new();
    reader.read_to_string(&mut rest).expect("read");
    assert_eq!(rest, "caught\n");
    assert_eq!(code_and_words(child), (Some(5), String::new()));
    home.is_swept();
}

#[test]
fn a_signal_ends_a_command_that_does_not_catch_it() {
    for (kind, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let home = Home::new();
        let image = home.busybox();
        let mut child = home.start(&[&image, "sh", "-c", "echo up; exec sleep 1000"]);
        let mut up = [0; 3];
        child
            .stdout
            .take()
            .expect("piped")
            .read_exact(&mut up)
            .expect("read");
        signal(pid_of(&child), kind);
        assert_eq!(code_and_words(child), (Some(code), String::new()));
        home.is_swept();
    }
}

#[test]
fn a_second_interrupt_ends_the_machine() {
    let home = Home::new();
    let (child, mut reader) = start(&home, "trap 'echo caught' INT");
    signal(pid_of(&child), Signal::INT);
    let mut line = String::new();
    reader.read_line(&mut line).expect("read");
    assert_eq!(line, "caught\n");
    signal(pid_of(&child), Signal::INT);
    assert_eq!(code_and_words(child), (Some(130), String::new()));
    home.is_swept();
}

#[test]
fn a_killed_monitor_is_told_as_such() {
    let home = Home::new();
    let (child, _reader) = start(&home, ":");
    signal(home.monitor(), Signal::KILL);
    let (code, said) = code_and_words(child);
    assert_eq!(code, Some(125), "{said}");
    assert!(
        said.starts_with("kombi: kombi-vmm was killed by signal 9 (SIGKILL)"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    home.is_swept();
}

#[test]
fn a_monitor_that_its_filter_killed_is_told_as_such() {
    let home = Home::new();
    let (child, _reader) = start(&home, ":");
    signal(home.monitor(), Signal::SYS);
    let (code, said) = code_and_words(child);
    assert_eq!(code, Some(125), "{said}");
    assert!(
        said.starts_with("kombi: the monitor was killed by its system call filter (SIGSYS): "),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    home.is_swept();
}

#[test]
fn a_killed_kombi_takes_its_monitor_along_and_the_next_start_sweeps() {
    let home = Home::new();
    let (mut child, _reader) = start(&home, ":");
    home.monitor();
    child.kill().expect("killed");
    child.wait().expect("reaped");
    let deadline = Instant::now() + Duration::from_secs(5);
    while !home.processes().is_empty() {
        assert!(Instant::now() < deadline, "{:?} live on", home.processes());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(
        fs::read_dir(home.path("run/kombi"))
            .expect("readable")
            .count()
            > 0
    );
    ended(&home.run(&[&home.busybox(), "true"]), 0);
    home.is_swept();
}

#[test]
fn a_closed_pipe_ends_the_machine_quietly() {
    let home = Home::new();
    let mut child = home.start(&[&home.busybox(), "yes"]);
    let mut some = [0; 100];
    child
        .stdout
        .take()
        .expect("piped")
        .read_exact(&mut some)
        .expect("read");
    assert_eq!(code_and_words(child), (Some(141), String::new()));
    home.is_swept();
}

#[test]
fn a_kernel_panic_is_told_with_its_line() {
    let home = Home::new();
    let assets = home.path("assets");
    fs::create_dir(&assets).expect("made");
    let kernel = support::bin_dir().join("../guest/vmlinux");
    std::os::unix::fs::symlink(kernel, assets.join("vmlinux")).expect("linked");
    fs::write(assets.join("initramfs.cpio"), "no archive").expect("written");
    let image = home.busybox();
    let mut command = home.kombi(&["run", &image, "true"]);
    let output = command
        .env("KOMBI_ASSETS", assets)
        .output()
        .expect("started");
    refused(
        &output,
        125,
        &["guest kernel panicked: ", "run again with -v"],
    );
    home.is_swept();
}

#[test]
fn a_triple_fault_is_told_as_such() {
    let home = Home::new();
    let kernel = home.path("kernel");
    tiny_kernel(&kernel, &TRIPLE_FAULT, 0x1000);
    let kernel = kernel.to_str().expect("utf-8");
    let output = home.run(&["--kernel", kernel, &home.busybox(), "true"]);
    refused(&output, 125, &["triple fault", "; "]);
    home.is_swept();
}

#[test]
fn a_guest_that_never_boots_is_given_up_in_time() {
    let home = Home::new();
    let kernel = home.path("kernel");
    tiny_kernel(&kernel, &SPIN, 0x1000);
    let kernel = kernel.to_str().expect("utf-8");
    let image = home.busybox();
    let started = Instant::now();
    let output = home.run(&["--kernel", kernel, "--boot-timeout", "1s", &image, "true"]);
    refused(&output, 125, &["did not boot within 1s", "--boot-timeout"]);
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    home.is_swept();
}

#[test]
fn an_interrupt_while_booting_ends_the_machine() {
    let home = Home::new();
    let kernel = home.path("kernel");
    tiny_kernel(&kernel, &SPIN, 0x1000);
    let image = home.busybox();
    let child = home.start(&["--kernel", kernel.to_str().expect("utf-8"), &image, "true"]);
    home.monitor();
    signal(pid_of(&child), Signal::INT);
    assert_eq!(code_and_words(child), (Some(130), String::new()));
    home.is_swept();
}

#[test]
fn a_bad_kernel_is_refused() {
    let home = Home::new();
    let image = home.busybox();
    let path = home.path("kernel");
    let kernel = path.to_str().expect("utf-8");

    fs::write(&path, "#!/bin/sh\necho no kernel\n").expect("written");
    refused(
        &home.run(&["--kernel", kernel, &image, "true"]),
        125,
        &[kernel, "; "],
    );
    home.is_swept();

    let whole = fs::read(support::bin_dir().join("../guest/vmlinux")).expect("readable");
    fs::write(&path, &whole[..whole.len() / 2]).expect("written");
    refused(
        &home.run(&["--kernel", kernel, &image, "true"]),
        125,
        &[kernel, "; "],
    );
    home.is_swept();

    fs::write(&path, "").expect("written");
    refused(
        &home.run(&["--kernel", kernel, &image, "true"]),
        125,
        &[kernel, "; "],
    );
    home.is_swept();

    tiny_kernel(&path, &SPIN, 1 << 30);
    refused(
        &home.run(&["--kernel", kernel, &image, "true"]),
        125,
        &[kernel, "memory", "; "],
    );
    home.is_swept();
}

#[test]
fn the_least_memory_is_enough_and_less_is_refused() {
    let home = Home::new();
    let image = home.busybox();
    ended(&home.run(&["--memory", "48M", &image, "true"]), 0);
    refused(
        &home.run(&["--memory", "47M", &image, "true"]),
        125,
        &["47 MiB is too little", "raise --memory"],
    );
    home.is_swept();
}
