//! `--cpu-model` in whole machines: programs for a larger CPU than the guest's die of
//! it, others do what they do natively.

mod support;

use std::process::Command;

use support::{Home, ended, refused, stdout};

/// The program's image, and what it prints on this host.
fn v3_program(home: &Home) -> (String, String) {
    let path = home.path("v3");
    let built = Command::new("gcc")
        .args([
            "-O3",
            "-ffast-math",
            "-march=x86-64-v3",
            "-static",
            "-pthread",
            "-o",
        ])
        .arg(&path)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/v3_program.c"))
        .status()
        .expect("gcc is installed");
    assert!(built.success());
    let native = Command::new(&path).output().expect("runs");
    let program = std::fs::read(&path).expect("built");
    let mut layer = tar::Builder::new(Vec::new());
    support::append(&mut layer, "v3", 0o755, tar::EntryType::Regular, &program);
    let image = home.image("v3-image", "", &[layer.into_inner().expect("finished")]);
    (image, stdout(&native))
}

fn host_has_v3() -> bool {
    ["avx2", "bmi2", "fma", "movbe", "f16c"]
        .iter()
        .all(|name| std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains(name)))
}

#[test]
fn a_program_for_x86_64_v3_does_as_natively_or_dies_of_sigill() {
    if !host_has_v3() {
        return;
    }
    let home = Home::new();
    let (image, native) = v3_program(&home);
    assert!(native.lines().count() == 9, "{native}");
    for model in ["v3", "host"] {
        let output = home.run(&["--cpu-model", model, &image, "/v3"]);
        ended(&output, 0);
        assert_eq!(stdout(&output), native, "{model}");
    }
    for model in ["v2", "baseline"] {
        let output = home.run(&["--cpu-model", model, &image, "/v3"]);
        // 128 + SIGILL
        assert_eq!(output.status.code(), Some(132), "{model}");
    }
    home.is_swept();
}

#[test]
fn the_guest_sees_the_model_in_proc_cpuinfo() {
    let home = Home::new();
    let image = home.busybox();
    let flags = |model: &str| {
        let output = home.run(&["--cpu-model", model, &image, "cat", "/proc/cpuinfo"]);
        ended(&output, 0);
        stdout(&output)
    };
    let baseline = flags("baseline");
    assert!(baseline.contains("Kombi x86-64-v2"), "{baseline}");
    assert!(baseline.contains(" sse4_2 ") && !baseline.contains(" avx"));
    if host_has_v3() {
        let v3 = flags("v3");
        for name in ["avx2", "bmi2", "fma", "f16c", "movbe", "abm", "xsave"] {
            assert!(
                v3.split_whitespace().any(|flag| flag == name),
                "{name}: {v3}"
            );
        }
    }
}

#[test]
fn an_unknown_model_is_refused_with_those_that_there_are() {
    let home = Home::new();
    let output = home
        .kombi_without_machine(&["run", "--cpu-model", "v4", "oci:x"])
        .output()
        .expect("runs");
    refused(&output, 125, &["v4", "baseline, v2, v3, host"]);
}
