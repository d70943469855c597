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
    let features = ["smep", "smap", "pcid", "umip", "invpcid"];
    let (_, text) = boot.run(&format!(
        "traced; for f in {}; do grep -qw $f /proc/cpuinfo && echo shows $f; done; poweroff -f",
        features.join(" ")
    ));
    assert!(text.contains("debugger: ok\n"), "{text}");
    for feature in features {
        assert!(text.contains(&format!("shows {feature}\n")), "{text}");
    }
}
