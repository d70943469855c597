//! Images of the store: names, archives of all tools, what is shown of them. No registry.

mod support;

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use support::{Home, ended, refused, stderr, stdout};

/// Busybox as an archive of skopeo's, called `busybox:1`.
fn archive(home: &Home, form: &str) -> String {
    let file = home.path(&format!("{form}.tar"));
    let to = format!("{form}:{}:busybox:1", file.display());
    // skopeo writes none anew.
    let _ = fs::remove_file(&file);
    let copied = Command::new("skopeo")
        .args(["copy", "-q", &home.busybox(), &to])
        .status();
    assert!(copied.expect("skopeo is installed").success());
    file.display().to_string()
}

fn with_busybox() -> Home {
    let home = Home::new();
    let file = archive(&home, "docker-archive");
    assert_eq!(
        home.done(&["load", "-qi", &file]),
        "Loaded image: busybox:1\n"
    );
    home
}

#[test]
fn archives_of_other_tools_are_loaded_and_ours_are_read_by_them() {
    let home = Home::new();
    for form in ["oci-archive", "docker-archive"] {
        let file = archive(&home, form);
        assert_eq!(
            home.done(&["load", "-i", &file]),
            "Loaded image: busybox:1\n",
            "{form}"
        );
        // By a pipe, compressed.
        let mut load = home.kombi_without_machine(&["load"]);
        let mut load = load.stdin(Stdio::piped()).spawn().expect("started");
        let packed = Command::new("gzip")
            .args(["-1c", &file])
            .output()
            .expect("gzip");
        let mut stdin = load.stdin.take().expect("a pipe");
        stdin.write_all(&packed.stdout).expect("written");
        drop(stdin);
        let output = load.wait_with_output().expect("ended");
        assert_eq!(
            stdout(&output),
            "Loaded image: busybox:1\n",
            "{}",
            stderr(&output)
        );
        let output = home.run(&["busybox:1", "id", "-u"]);
        ended(&output, 0);
        assert_eq!(stdout(&output), "0\n");
        home.done(&["prune", "-af"]);
        assert_eq!(home.done(&["images", "-q"]), "");
    }
    let file = archive(&home, "docker-archive");
    home.done(&["load", "-qi", &file]);
    home.done(&["tag", "busybox:1", "localhost:5000/other:2"]);
    let saved = home.path("saved.tar").display().to_string();
    home.done(&["save", "-o", &saved, "busybox:1", "localhost:5000/other:2"]);
    let digest = home.done(&["inspect", "-f", "{{.Descriptor.digest}}", "busybox:1"]);
    let tags = Command::new("skopeo")
        .args([
            "inspect",
            "--config",
            &format!("docker-archive:{saved}:busybox:1"),
        ])
        .output()
        .expect("skopeo");
    assert!(
        stdout(&tags).contains("FROM_IMAGE=yes"),
        "{}",
        stderr(&tags)
    );
    let elsewhere = Home::new();
    assert_eq!(
        elsewhere.done(&["load", "-qi", &saved]),
        "Loaded image: busybox:1\nLoaded image: localhost:5000/other:2\n"
    );
    assert_eq!(
        elsewhere.done(&["inspect", "-f", "{{.Descriptor.digest}}", "busybox:1"]),
        digest
    );
    // The same images give the same bytes, in a file and in a pipe.
    let piped = elsewhere.verb(&["save", "busybox:1", "localhost:5000/other:2"]);
    assert!(
        piped.stdout == fs::read(&saved).expect("readable"),
        "other bytes"
    );
    home.is_swept();
}

#[test]
fn names_come_and_go_and_the_image_goes_with_its_last_one() {
    let home = with_busybox();
    home.done(&["tag", "busybox:1", "a:x"]);
    home.done(&["tag", "a:x", "b"]);
    let id = home.done(&["images", "-q", "b"]);
    let id = id.trim();
    let rows = home.done(&["images", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"]);
    assert_eq!(rows, format!("a:x {id}\nb:latest {id}\nbusybox:1 {id}\n"));
    refused(&home.verb(&["rmi", id]), 1, &["has 3 names", "--force"]);
    assert_eq!(home.done(&["rmi", "a:x"]), "Untagged: a:x\n");
    assert_eq!(home.done(&["rmi", "busybox:1"]), "Untagged: busybox:1\n");
    let whole = home.done(&["inspect", "-f", "{{.Id}}", "b"]);
    let gone = home.done(&["rmi", "b"]);
    assert_eq!(gone, format!("Untagged: b:latest\nDeleted: {whole}"));
    for folder in ["store/blobs/sha256", "store/layers"] {
        let left = fs::read_dir(home.path(folder)).expect("there").count();
        assert_eq!(left, 0, "{folder}");
    }
    refused(&home.verb(&["rmi", "b"]), 1, &["no such image: b"]);
    assert_eq!(home.verb(&["rmi", "-f", "b"]).status.code(), Some(0));
}

#[test]
fn an_import_is_run_as_its_changes_say() {
    let home = Home::new();
    let file = home.path("root.tar");
    let mut root = tar::Builder::new(Vec::new());
    let busybox = fs::read("/bin/busybox").expect("busybox-static is installed");
    for name in ["bin/", "tmp/"] {
        support::append(&mut root, name, 0o755, tar::EntryType::Directory, b"");
    }
    for name in ["bin/busybox", "bin/sh"] {
        support::append(&mut root, name, 0o755, tar::EntryType::Regular, &busybox);
    }
    fs::write(&file, root.into_inner().expect("finished")).expect("written");
    let file = file.to_str().expect("utf-8");
    let changes = [
        "CMD echo $GREETING from $(pwd)",
        "ENV GREETING='good day'",
        "WORKDIR /tmp",
    ];
    let changes = changes.iter().flat_map(|change| ["-c", change]);
    let args: Vec<&str> = ["import", "-q"]
        .into_iter()
        .chain(changes)
        .chain([file, "mine"])
        .collect();
    home.done(&args);
    let output = home.run(&["mine"]);
    assert_eq!(
        stdout(&output),
        "good day from /tmp\n",
        "{}",
        stderr(&output)
    );
    let bad = home.verb(&["import", "-c", "RUN make", file, "other"]);
    refused(
        &bad,
        1,
        &[
            "\"RUN make\" changes no image",
            "write it as in a Dockerfile",
        ],
    );
}

#[test]
fn a_name_that_another_image_takes_leaves_the_first_one_without() {
    let home = with_busybox();
    let mut import = home.kombi_without_machine(&["import", "-m", "by hand", "-", "busybox:1"]);
    let mut import = import.stdin(Stdio::piped()).spawn().expect("started");
    let mut layer = tar::Builder::new(Vec::new());
    support::append(
        &mut layer,
        "hello",
        0o644,
        tar::EntryType::Regular,
        b"there",
    );
    let mut stdin = import.stdin.take().expect("a pipe");
    stdin
        .write_all(&layer.into_inner().expect("finished"))
        .expect("written");
    drop(stdin);
    let id = stdout(&import.wait_with_output().expect("ended"));
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(home.done(&["images", "--no-trunc", "-q", "busybox"]), id);
    let nameless = home.done(&[
        "images",
        "-f",
        "dangling=true",
        "--format",
        "{{.Repository}}",
    ]);
    assert_eq!(nameless, "<none>\n");
    let steps = home.done(&[
        "history",
        "--format",
        "{{.Comment}} {{.CreatedSince}}",
        "busybox:1",
    ]);
    assert!(
        steps.starts_with("by hand ") && steps.ends_with(" ago\n"),
        "{steps}"
    );

    // Asked, and not answered: nothing goes.
    refused(&home.verb(&["prune"]), 1, &["nothing was removed"]);
    assert_eq!(home.done(&["images", "-q"]).lines().count(), 2);
    let pruned = home.done(&["prune", "--force"]);
    assert!(
        pruned.starts_with("Deleted Images:\ndeleted: sha256:"),
        "{pruned}"
    );
    assert_eq!(home.done(&["images", "-q"]).lines().count(), 1);
}

#[test]
fn lists_are_tables_templates_and_json() {
    let home = with_busybox();
    let table = home.done(&["images"]);
    let lines: Vec<&str> = table.lines().collect();
    let (heading, row) = (
        lines.first().expect("a heading"),
        lines.get(1).expect("a row"),
    );
    let words = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        words(heading),
        ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]
    );
    assert_eq!(words(row).get(..2).expect("two"), ["busybox", "1"]);
    // Columns stand below their headings.
    assert_eq!(heading.find("TAG"), row.find("1 "));
    let json = home.done(&["images", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("one object");
    assert_eq!(json["Repository"], "busybox");
    assert_eq!(home.done(&["images", "-q", "-f", "reference=no*"]), "");
    assert_eq!(
        home.done(&["images", "-q", "-f", "reference=bus*:1"])
            .lines()
            .count(),
        1
    );
    refused(
        &home.verb(&["images", "-f", "size=3"]),
        1,
        &["filter \"size=3\"", "dangling"],
    );
    refused(
        &home.verb(&["images", "--format", "{{.ID"]),
        1,
        &["unclosed {{"],
    );

    let env = [
        "inspect",
        "--format",
        "{{range .Config.Env}}{{println .}}{{end}}",
        "busybox:1",
    ];
    assert_eq!(home.done(&env), "PATH=/bin\nFROM_IMAGE=yes\n\n");
    let output = home.verb(&["inspect", "nope"]);
    assert_eq!(
        (output.status.code(), stdout(&output).as_str()),
        (Some(1), "[]\n")
    );
    let whole: serde_json::Value =
        serde_json::from_str(&home.done(&["image", "inspect", "busybox:1"])).expect("a list");
    assert_eq!(whole[0]["RepoTags"][0], "busybox:1");
    assert_eq!(whole[0]["Architecture"], "amd64");
}

#[test]
fn what_is_no_image_is_refused_and_leaves_nothing() {
    let home = Home::new();
    let file = home.path("junk.tar");
    fs::write(&file, vec![7; 5000]).expect("written");
    let junk = file.display().to_string();
    refused(&home.verb(&["load", "-i", &junk]), 1, &["junk.tar"]);
    refused(
        &home.verb(&["load", "-i", "/nowhere"]),
        1,
        &["/nowhere", "check the path"],
    );
    refused(&home.verb(&["import", &junk, "x"]), 1, &["get it again"]);
    refused(
        &home.verb(&["save", "-o", "/nowhere/x", "y"]),
        1,
        &["no such image: y"],
    );
    refused(&home.verb(&["tag", "y", "z@sha256:00"]), 1, &["sha256:00"]);
    assert_eq!(home.done(&["images", "-q"]), "");
    home.done(&["prune", "-f"]);
    assert_eq!(
        fs::read_dir(home.path("store/blobs/sha256"))
            .expect("there")
            .count(),
        0
    );
    home.is_swept();
}
