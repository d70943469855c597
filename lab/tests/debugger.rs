//! A debugger's means within the guest: `ptrace` with single steps, breakpoints and
//! watchpoints, by a program that says the same on the host.

mod boot;

use std::path::Path;
use std::process::Command;

use boot::Boot;

#[test]
fn a_program_debugs_its_child_in_the_guest_as_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/debugger/traced.c");
    let program = dir.path().join("traced");
    let compiled = Command::new("gcc")
        .args(["-O1", "-static", "-no-pie", "-o"])
        .args([&program, &source])
        .status()
        .expect("gcc is installed");
    assert!(compiled.success());
    let boot = Boot {
        programs: vec![("traced", std::fs::read(&program).unwrap())],
        ..Boot::new()
    };
    let (_, text) = boot.run(
        "traced; grep -o -w -e smep -e smap -e pcid -e umip -e invpcid /proc/cpuinfo; poweroff -f",
    );
    assert!(text.contains("debugger: ok\n"), "{text}");
    let mut shown: Vec<_> = text
        .lines()
        .skip_while(|line| !line.contains("debugger"))
        .skip(1)
        .collect();
    shown.truncate(5);
    shown.sort_unstable();
    assert_eq!(shown, ["invpcid", "pcid", "smap", "smep", "umip"], "{text}");
}
