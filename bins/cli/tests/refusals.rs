//! What is refused before a machine is made: one line, the object, the cause, the way out, and nothing left behind.

mod support;

use std::fs;

use support::{Home, append, refused, stdout};

fn run(home: &Home, args: &[&str]) -> std::process::Output {
    let args: Vec<&str> = ["run"].iter().chain(args).copied().collect();
    home.kombi_without_machine(&args).output().expect("started")
}

#[test]
fn mistakes_on_the_command_line_are_told_in_one_line() {
    let home = Home::new();
    for (args, words) in [
        (&[][..], &["IMAGE", "see kombi"][..]),
        (
            &["--no-such-option", "oci:x"],
            &["--no-such-option", "see kombi"],
        ),
        (&["--memory", "lots", "oci:x"], &["\"lots\"", "256M"]),
        (&["--cpus", "0", "oci:x"], &["\"0\"", "1 to 32"]),
        (&["--boot-timeout", "soon", "oci:x"], &["\"soon\"", "30s"]),
        (
            &["--engine", "magic", "oci:x"],
            &["magic", "auto, soft, kvm"],
        ),
        (&["-q", "-v", "oci:x"], &["--quiet", "--verbose"]),
        (&["-e", "=x", "oci:x"], &["has no name", "NAME=value"]),
        (
            &["--env-file", "/nowhere", "oci:x"],
            &["/nowhere", "No such file", "--env-file"],
        ),
        (&["-i", "-t", "oci:x"], &["not a terminal", "-t"]),
    ] {
        refused(&run(&home, args), 125, words);
    }
    let output = home
        .kombi_without_machine(&["dance"])
        .output()
        .expect("started");
    refused(&output, 125, &["dance", "see kombi --help"]);
    home.is_swept();
}

#[test]
fn engines_that_cannot_do_it_are_refused_with_the_way_out() {
    let home = Home::new();
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if kvm.is_err() {
        refused(
            &run(&home, &["--engine", "kvm", "oci:x"]),
            125,
            &["engine kvm", "--engine soft"],
        );
    }
    refused(
        &run(&home, &["--cpus", "9", "oci:x"]),
        125,
        &["engine soft", "9 processors", "--cpus 8"],
    );
    home.is_swept();
}

#[test]
fn a_missing_image_is_refused() {
    let home = Home::new();
    refused(
        &run(&home, &["--pull", "never", "busybox"]),
        125,
        &["no such image: busybox", "kombi pull"],
    );
    for image in ["oci:/nowhere", "docker-archive:/nowhere", "rootfs:/nowhere"] {
        refused(&run(&home, &[image]), 125, &[image, "; "]);
    }
    let empty = format!("oci:{}", home.path("tmp").display());
    refused(&run(&home, &[&empty]), 125, &[&empty, "; "]);
    home.is_swept();
}

#[test]
fn a_corrupt_layer_is_refused_with_its_digest() {
    let home = Home::new();
    let mut layer = tar::Builder::new(Vec::new());
    append(
        &mut layer,
        "file",
        0o644,
        tar::EntryType::Regular,
        b"content",
    );
    let image = home.image(
        "corrupt",
        "\"Cmd\":[\"sh\"]",
        &[layer.into_inner().expect("finished")],
    );
    let blobs = home.path("corrupt/blobs/sha256");
    let path = fs::read_dir(blobs)
        .expect("readable")
        .map(|entry| entry.expect("entry").path())
        .find(|path| fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"file\0")))
        .expect("the layer");
    let mut bytes = fs::read(&path).expect("readable");
    bytes[512] ^= 1;
    fs::write(&path, bytes).expect("written");
    let digest = path
        .file_name()
        .and_then(|name| name.to_str())
        .expect("a digest");
    refused(
        &run(&home, &[&image]),
        125,
        &["corrupt", digest, "get the image again"],
    );
    home.is_swept();
}

#[test]
fn a_layer_that_would_leave_the_root_is_refused() {
    let home = Home::new();
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..9].copy_from_slice(b"../escape");
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_size(0);
    header.set_cksum();
    let mut layer = tar::Builder::new(Vec::new());
    layer.append(&header, &b""[..]).expect("appended");
    let image = home.image(
        "escape",
        "\"Cmd\":[\"sh\"]",
        &[layer.into_inner().expect("finished")],
    );
    refused(&run(&home, &[&image]), 125, &["../escape", "; "]);
    assert!(!home.path("escape/escape").exists());
    home.is_swept();
}

#[test]
fn an_image_without_a_command_is_refused() {
    let home = Home::new();
    let mut layer = tar::Builder::new(Vec::new());
    append(
        &mut layer,
        "file",
        0o644,
        tar::EntryType::Regular,
        b"content",
    );
    let image = home.image("plain", "", &[layer.into_inner().expect("finished")]);
    refused(
        &run(&home, &[&image]),
        125,
        &[
            "neither an entrypoint nor a command",
            "give one after the image",
        ],
    );
    refused(
        &run(&home, &["-w", "here", &image, "x"]),
        125,
        &["\"here\"", "starts with /"],
    );
    refused(
        &run(&home, &["--memory", "8M", &image, "x"]),
        125,
        &["8 MiB is too little", "raise --memory"],
    );
    refused(
        &run(&home, &["--name", "../x", &image, "x"]),
        125,
        &["\"../x\"", "characters"],
    );
    home.is_swept();
}

#[test]
fn a_monitor_that_fails_at_once_is_told_and_leaves_nothing() {
    let home = Home::new();
    let mut layer = tar::Builder::new(Vec::new());
    append(
        &mut layer,
        "file",
        0o644,
        tar::EntryType::Regular,
        b"content",
    );
    let image = home.image(
        "plain",
        "\"Cmd\":[\"x\"]",
        &[layer.into_inner().expect("finished")],
    );
    refused(
        &run(&home, &[&image]),
        125,
        &["machine failed to start", "kombi-vmm ended", "kombi doctor"],
    );
    home.is_swept();
}

#[test]
fn missing_assets_are_named_with_the_way_out() {
    let home = Home::new();
    let mut command = home.kombi_without_machine(&["run", "oci:x"]);
    let output = command
        .env("KOMBI_ASSETS", "/nowhere")
        .output()
        .expect("started");
    refused(&output, 125, &["/nowhere/vmlinux", "make build"]);
    let mut command = home.kombi_without_machine(&["run", "--kernel", "/nowhere/k", "oci:x"]);
    refused(
        &command.output().expect("started"),
        125,
        &["/nowhere/k", "--kernel"],
    );
    let mut command = home.kombi_without_machine(&["run", "oci:x"]);
    let output = command
        .env("KOMBI_VMM", "/nowhere/vmm")
        .output()
        .expect("started");
    refused(&output, 125, &["/nowhere/vmm", "KOMBI_VMM"]);
    home.is_swept();
}

#[test]
fn help_and_version_go_to_standard_output() {
    let home = Home::new();
    for (args, words) in [
        (&["--help"][..], "kombi run busybox"),
        (&["run", "--help"], "Exit code"),
        (&["doctor", "--help"], "--json"),
        (&["version"], env!("CARGO_PKG_VERSION")),
        (&["--version"], env!("CARGO_PKG_VERSION")),
    ] {
        let output = home.kombi_without_machine(args).output().expect("started");
        support::ended(&output, 0);
        assert!(stdout(&output).contains(words), "{}", stdout(&output));
    }
}

#[test]
fn shells_and_man_know_every_verb() {
    let home = Home::new();
    let done = |args: &[&str]| {
        let output = home.kombi_without_machine(args).output().expect("started");
        assert_eq!(
            output.status.code(),
            Some(0),
            "{}",
            support::stderr(&output)
        );
        stdout(&output)
    };
    let script = home.path("completion.bash");
    fs::write(&script, done(&["completion", "bash"])).expect("written");
    // By the shell itself: what it offers behind `kombi i`.
    let ask = format!(
        "source {script:?}; COMP_WORDS=(kombi i); COMP_CWORD=1; _kombi kombi i kombi; echo ${{COMPREPLY[@]}}"
    );
    let offered = std::process::Command::new("bash")
        .args(["-c", &ask])
        .output()
        .expect("bash");
    let offered = stdout(&offered);
    for verb in ["images", "import", "inspect", "image"] {
        assert!(
            offered.split_whitespace().any(|word| word == verb),
            "{verb}: {offered}"
        );
    }
    let pages = home.path("man");
    fs::create_dir(&pages).expect("made");
    done(&["man", pages.to_str().expect("utf-8")]);
    let page = fs::read_to_string(pages.join("kombi-pull.1")).expect("a page");
    assert!(page.contains("Get an image from a registry"), "{page}");
    refused(
        &home
            .kombi_without_machine(&["man", "/nowhere"])
            .output()
            .expect("started"),
        1,
        &["/nowhere", "a folder that is there"],
    );
}

#[test]
fn doctor_says_what_is_missing_and_exits_with_one() {
    let home = Home::new();
    let mut command = home.kombi_without_machine(&["doctor", "--json"]);
    let output = command
        .env("KOMBI_VMM", "/nowhere/vmm")
        .output()
        .expect("started");
    support::ended(&output, 1);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["ok"], false);
    assert_eq!(report["engine"]["use"], "soft");
    let problems = report["problems"].to_string();
    assert!(problems.contains("/nowhere/vmm"), "{problems}");

    let output = home
        .kombi_without_machine(&["doctor"])
        .output()
        .expect("started");
    support::ended(&output, 0);
    assert!(
        stdout(&output).contains("Machines can run here."),
        "{}",
        stdout(&output)
    );
}
