//! Containers in the background, from `run -d` to `rm`, and what a crash in between leaves.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{Home, ended, refused, signal, stderr, stdout, wait_for};

/// A home with an image, in which verbs that need machines are called.
struct House {
    home: Home,
    image: String,
}

impl House {
    fn new() -> Self {
        let home = Home::new();
        let image = home.busybox();
        Self { home, image }
    }

    fn call(&self, args: &[&str]) -> Output {
        self.home.kombi(args).output().expect("started")
    }

    /// Which must go well, without a word on standard error; its standard output.
    #[track_caller]
    fn done(&self, args: &[&str]) -> String {
        let output = self.call(args);
        ended(&output, 0);
        stdout(&output)
    }

    /// `kombi run -d OPTIONS IMAGE COMMAND`; the identifier.
    #[track_caller]
    fn start(&self, options: &[&str], command: &[&str]) -> String {
        let front = ["run", "-d"].into_iter().chain(options.iter().copied());
        let line: Vec<&str> = front
            .chain([self.image.as_str()])
            .chain(command.iter().copied())
            .collect();
        let id = self.done(&line);
        let id = id.strip_suffix('\n').expect("a line");
        assert!(
            id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()),
            "{id}"
        );
        id.to_owned()
    }

    #[track_caller]
    fn field(&self, container: &str, template: &str) -> String {
        let text = self.done(&["inspect", "--format", template, container]);
        text.trim_end().to_owned()
    }

    /// No container and no trace of one is left.
    #[track_caller]
    fn is_empty(&self) {
        self.home.is_swept();
        let left: Vec<_> = fs::read_dir(self.home.path("store/containers"))
            .expect("readable")
            .map(|entry| entry.expect("entry").file_name())
            .filter(|name| name != "lock")
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn a_container_lives_in_the_background_and_is_listed_read_and_stopped() {
    let house = House::new();
    let script = "echo one; echo two >&2; trap 'echo bye; exit 4' TERM
        while :; do sleep 0.1; done";
    let id = house.start(
        &[
            "--name",
            "web",
            "--label",
            "tier=front",
            "--hostname",
            "www",
        ],
        &["sh", "-c", script],
    );
    wait_for("output", || {
        let output = house.call(&["logs", "web"]);
        (stdout(&output) == "one\n" && stderr(&output) == "two\n").then_some(())
    });
    let listed = house.done(&[
        "ps",
        "--format",
        "{{.ID}} {{.Names}} {{.State}} {{.Labels}}",
    ]);
    assert_eq!(listed, format!("{} web running tier=front\n", &id[..12]));
    assert_eq!(house.done(&["ps", "-q", "--no-trunc"]), format!("{id}\n"));
    let table = house.done(&["ps"]);
    let heading = table.lines().next().expect("a heading");
    assert!(heading.starts_with("CONTAINER ID   IMAGE"), "{table}");
    assert!(table.contains("Up ") && table.contains("web"), "{table}");
    for (filter, found) in [
        ("label=tier", true),
        ("label=tier=back", false),
        ("name=we", true),
        ("status=exited", false),
        ("status=running", true),
    ] {
        let ids = house.done(&["ps", "-q", "--filter", filter]);
        assert_eq!(!ids.is_empty(), found, "{filter}");
    }
    assert_eq!(
        house.field("web", "{{.State.Status}} {{.Config.Hostname}}"),
        "running www"
    );
    // It runs: neither goes, nor is its name free.
    refused(
        &house.call(&["rm", "web"]),
        1,
        &["web", "running", "--force"],
    );
    let again = house.call(&["run", "-d", "--name", "web", &house.image, "true"]);
    refused(&again, 125, &["web", &id[..12]]);
    // Signals reach the command, which says what it has to say before it ends.
    assert_eq!(house.done(&["stop", "web"]), "web\n");
    assert_eq!(house.done(&["wait", "web"]), "4\n");
    assert_eq!(house.done(&["ps", "-q"]), "");
    let status = house.done(&["ps", "-a", "--format", "{{.Status}}"]);
    assert!(status.starts_with("Exited (4) "), "{status}");
    let output = house.call(&["logs", &id[..6]]);
    assert_eq!(
        (stdout(&output).as_str(), stderr(&output).as_str()),
        ("one\nbye\n", "two\n")
    );
    refused(&house.call(&["kill", "web"]), 1, &["web", "not running"]);
    house.home.is_swept();
    house.done(&["rename", "web", "old"]);
    assert_eq!(house.done(&["stop", "old"]), "old\n");
    assert_eq!(house.done(&["rm", "old"]), "old\n");
    refused(
        &house.call(&["logs", "old"]),
        1,
        &["old", "no such container"],
    );
    house.is_empty();
}

#[test]
fn logs_can_be_followed_cut_and_dated() {
    let house = House::new();
    let script =
        "i=0; while [ $i -lt 20 ]; do i=$((i + 1)); echo line $i; sleep 0.05; done; printf end";
    house.start(&["--name", "talker"], &["sh", "-c", script]);
    let mut follower = house
        .home
        .kombi(&["logs", "-f", "talker"])
        .spawn()
        .expect("started");
    let mut lines = BufReader::new(follower.stdout.take().expect("piped")).lines();
    assert_eq!(lines.next().expect("a line").expect("read"), "line 1");
    let rest: Vec<_> = lines.map(|line| line.expect("read")).collect();
    assert_eq!(rest.len(), 20);
    assert_eq!(rest.last().map(String::as_str), Some("end"));
    assert!(follower.wait().expect("ended").success());
    let tail = house.done(&["logs", "-n", "2", "talker"]);
    assert_eq!(tail, "line 20\nend");
    let dated = house.done(&["logs", "-t", "talker"]);
    let times: Vec<&str> = dated
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|it| it.0)
        .collect();
    assert_eq!(times.len(), 21);
    assert!(times.is_sorted());
    let since = house.done(&["logs", "--since", times[9], "--until", times[11], "talker"]);
    assert_eq!(since, "line 10\nline 11\n");
    assert_eq!(
        house.done(&["logs", "--since", "2200-01-01T00:00:00Z", "talker"]),
        ""
    );
    refused(
        &house.call(&["logs", "--since", "soon", "talker"]),
        125,
        &["soon"],
    );
    house.done(&["rm", "talker"]);
    house.is_empty();
}

#[test]
fn a_log_is_kept_as_far_as_was_asked() {
    let house = House::new();
    let options = [
        "--name",
        "loud",
        "--log-opt",
        "max-size=10k",
        "--log-opt",
        "max-file=2",
    ];
    house.start(&options, &["sh", "-c", "seq 1 5000"]);
    assert_eq!(house.done(&["wait", "loud"]), "0\n");
    let kept = house.done(&["logs", "loud"]);
    assert!(
        kept.ends_with("4999\n5000\n") && !kept.starts_with("1\n"),
        "{} bytes",
        kept.len()
    );
    let path = house.field("loud", "{{.LogPath}}");
    for path in [path.clone(), format!("{path}.1")] {
        assert!(fs::metadata(&path).expect(&path).len() <= 10 << 10);
    }
    assert!(fs::metadata(format!("{path}.2")).is_err());
    house.done(&["rm", "loud"]);
}

#[test]
fn a_command_that_does_not_listen_is_ended_when_its_time_is_up() {
    let house = House::new();
    let script = "trap '' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.1; done";
    house.start(
        &["--name", "deaf", "--stop-timeout", "1"],
        &["sh", "-c", script],
    );
    wait_for("the traps", || {
        (house.done(&["logs", "deaf"]) == "ready\n").then_some(())
    });
    assert_eq!(house.done(&["kill", "-s", "USR1", "deaf"]), "deaf\n");
    wait_for("the signal", || {
        house.done(&["logs", "deaf"]).contains("usr1").then_some(())
    });
    assert_eq!(house.field("deaf", "{{.State.Running}}"), "true");
    let started = Instant::now();
    assert_eq!(house.done(&["stop", "deaf"]), "deaf\n");
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!(house.done(&["wait", "deaf"]), "137\n");
    house.home.is_swept();
    house.start(&["--name", "other"], &["sleep", "1000"]);
    assert_eq!(house.done(&["rm", "-f", "deaf", "other"]), "deaf\nother\n");
    house.is_empty();
    let gone = house.call(&["rm", "-f", "deaf"]);
    assert_eq!(gone.status.code(), Some(0));
    assert!(
        stderr(&gone).contains("no such container"),
        "{}",
        stderr(&gone)
    );
}

#[test]
fn one_that_goes_with_its_end_tells_who_waits() {
    let house = House::new();
    let file = house.home.path("cid");
    let cid = file.to_str().expect("utf-8");
    let id = house.start(
        &["--rm", "--cidfile", cid],
        &["sh", "-c", "sleep 2; exit 9"],
    );
    assert_eq!(fs::read_to_string(&file).expect("written"), id);
    let again = house.call(&["run", "-d", "--cidfile", cid, &house.image, "true"]);
    refused(&again, 125, &["cid", "there already"]);
    assert_eq!(house.done(&["wait", &id]), "9\n");
    wait_for("its end", || {
        house.done(&["ps", "-aq"]).is_empty().then_some(())
    });
    house.is_empty();
}

#[test]
fn a_command_that_cannot_start_is_told_at_once_and_kept_on_record() {
    let house = House::new();
    for (command, code) in [("no-such-program", 127), ("/srv/not-executable", 126)] {
        let output = house.call(&["run", "-d", "--name", "bad", &house.image, command]);
        refused(&output, code, &[command]);
        let state = house.field(
            "bad",
            "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}",
        );
        assert!(
            state.starts_with(&format!("exited {code} kombi: ")),
            "{state}"
        );
        house.done(&["rm", "bad"]);
        let output = house.call(&["run", "-d", "--rm", &house.image, command]);
        refused(&output, code, &[command]);
        house.is_empty();
    }
    for (options, word) in [
        (["--stop-signal", "NONSENSE"], "NONSENSE"),
        (["--log-opt", "max-file=3"], "max-size"),
        (["--label", "=x"], "label"),
        (["--name", "a/b"], "a/b"),
    ] {
        let line = ["run", "-d", options[0], options[1], &house.image, "true"];
        refused(&house.call(&line), 125, &[word]);
    }
    house.is_empty();
}

#[test]
fn neither_a_killed_supervisor_nor_a_killed_monitor_leaves_anything_that_looks_alive() {
    let house = House::new();
    house.start(&["--name", "one"], &["sleep", "1000"]);
    let pid: i32 = house
        .field("one", "{{.State.Pid}}")
        .parse()
        .expect("a process");
    signal(pid, Signal::KILL);
    wait_for("its end", || {
        house.done(&["ps", "-q"]).is_empty().then_some(())
    });
    wait_for("the monitor's end", || {
        house.home.processes().is_empty().then_some(())
    });
    assert_eq!(house.done(&["wait", "one"]), "255\n");
    assert!(house.field("one", "{{.State.Error}}").contains("killed"));
    house.done(&["rm", "one"]);
    house.start(&["--name", "two"], &["sleep", "1000"]);
    signal(house.home.monitor(), Signal::KILL);
    assert_eq!(house.done(&["wait", "two"]), "125\n");
    assert!(house.field("two", "{{.State.Error}}").contains("SIGKILL"));
    // What the first left in the runtime directory went with the second's start.
    house.home.is_swept();
    house.start(
        &["--name", "three"],
        &[
            "sh",
            "-c",
            "trap 'exit 5' TERM; while :; do sleep 0.1; done",
        ],
    );
    let pid: i32 = house
        .field("three", "{{.State.Pid}}")
        .parse()
        .expect("a process");
    // As a host that shuts down asks: the command has its chance.
    signal(pid, Signal::TERM);
    let code = house.done(&["wait", "three"]);
    // The trap may not be there yet.
    assert!(code == "5\n" || code == "143\n", "{code}");
    assert_eq!(house.done(&["container", "prune", "-f"]).lines().count(), 3);
    house.is_empty();
}

#[test]
fn of_two_that_want_one_name_one_gets_it() {
    let house = House::new();
    let line = ["run", "-d", "--name", "same", &house.image, "sleep", "1000"];
    let mut both: Vec<_> = (0..2)
        .map(|_| {
            house
                .home
                .kombi(&line)
                .stderr(Stdio::piped())
                .spawn()
                .expect("started")
        })
        .collect();
    let mut codes: Vec<_> = both
        .iter_mut()
        .map(|child| {
            let mut told = String::new();
            let code = child.wait().expect("ended").code();
            child
                .stderr
                .take()
                .expect("piped")
                .read_to_string(&mut told)
                .expect("read");
            assert_eq!(code == Some(125), told.contains("same"), "{told}");
            code
        })
        .collect();
    codes.sort();
    assert_eq!(codes, [Some(0), Some(125)]);
    assert_eq!(house.done(&["ps", "--format", "{{.Names}}"]), "same\n");
    house.done(&["rm", "-f", "same"]);
    house.is_empty();
}

#[test]
fn what_a_container_wrote_is_there_when_it_is_started_again() {
    let house = House::new();
    let script = "[ -e /srv/kept ] && { cat /srv/kept; stat -c %a /; }
        echo run >> /srv/kept; rm -f /etc/passwd; sync; echo ready; exec sleep 1000";
    let line = [
        "create",
        "--name",
        "box",
        "--disk",
        "64M",
        &house.image,
        "sh",
        "-c",
        script,
    ];
    let id = house.done(&line);
    assert_eq!(
        house.field("box", "{{.State.Status}} {{.Id}}"),
        format!("created {}", id.trim())
    );
    assert_eq!(house.done(&["ps", "-q"]), "");
    assert_eq!(house.done(&["start", "box"]), "box\n");
    // It runs: so be it.
    assert_eq!(house.done(&["start", "box"]), "box\n");
    wait_for("its word", || {
        house
            .done(&["logs", "box"])
            .ends_with("ready\n")
            .then_some(())
    });
    // A machine that is killed: what was synced is there.
    signal(house.home.monitor(), Signal::KILL);
    assert_eq!(house.done(&["wait", "box"]), "125\n");
    assert_eq!(house.done(&["restart", "-t", "1", "box"]), "box\n");
    wait_for("its word", || {
        house
            .done(&["logs", "box"])
            .ends_with("755\nready\n")
            .then_some(())
    });
    assert_eq!(house.done(&["logs", "box"]), "ready\nrun\n755\nready\n");
    assert_eq!(house.done(&["restart", "-t", "1", "box"]), "box\n");
    wait_for("its word", || {
        house
            .done(&["logs", "box"])
            .ends_with("run\nrun\n755\nready\n")
            .then_some(())
    });
    house.done(&["rm", "-f", "box"]);
    house.is_empty();
}

#[test]
fn a_container_s_disk_is_as_large_as_was_asked_and_sparse() {
    let house = House::new();
    let fill = "dd if=/dev/zero of=/big bs=1M count=100; echo $?";
    house.start(&["--name", "small", "--disk", "64M"], &["sh", "-c", fill]);
    assert_eq!(house.done(&["wait", "small"]), "0\n");
    let output = house.call(&["logs", "small"]);
    assert!(stdout(&output).starts_with("1\n"), "{}", stdout(&output));
    assert!(
        stderr(&output).contains("No space left"),
        "{}",
        stderr(&output)
    );
    house.start(&["--name", "usual"], &["true"]);
    assert_eq!(house.done(&["wait", "usual"]), "0\n");
    let log = house.field("usual", "{{.LogPath}}");
    let disk = std::path::Path::new(&log).with_file_name("upper.ext4");
    let meta = fs::metadata(disk).expect("there");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(meta.len(), 10 << 30);
    assert!(
        meta.blocks() * 512 < 16 << 20,
        "{} bytes",
        meta.blocks() * 512
    );
    let image = house.image.as_str();
    let mut command = house
        .home
        .kombi(&["run", "-d", "--disk", "1M", image, "true"]);
    refused(&command.output().expect("started"), 125, &["1M", "16M"]);
    command = house.home.kombi(&["run", "--disk", "1G", image, "true"]);
    refused(&command.output().expect("started"), 125, &["--disk", "-d"]);
    house.done(&["rm", "small", "usual"]);
    house.is_empty();
}

#[test]
fn the_background_holds_nothing_that_its_starter_was_given() {
    let house = House::new();
    // A shell waits for the end of what is written to descriptor 7.
    let kombi = support::bin_dir().join("kombi");
    let script = format!(
        "({} run -d --name quiet {} sleep 1000 7>&1 >/dev/null) | cat",
        kombi.display(),
        house.image
    );
    let mut command = house.home.kombi(&[]);
    let environment: Vec<_> = command
        .get_envs()
        .map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned)))
        .collect();
    command = std::process::Command::new("timeout");
    command.args(["60", "sh", "-c", &script]);
    for (name, value) in environment {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let output = command.stdin(Stdio::null()).output().expect("started");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(house.done(&["ps", "--format", "{{.Names}}"]), "quiet\n");
    house.done(&["rm", "-f", "quiet"]);
    house.is_empty();
}

#[test]
fn the_background_takes_a_terminal_and_keeps_input_open() {
    let house = House::new();
    house.start(
        &["-it", "--name", "shell"],
        &["sh", "-c", "[ -t 1 ] && echo terminal; cat"],
    );
    wait_for("output", || {
        (house.done(&["logs", "shell"]) == "terminal\r\n").then_some(())
    });
    assert_eq!(
        house.field("shell", "{{.State.Running}} {{.Config.Tty}}"),
        "true true"
    );
    house.done(&["kill", "shell"]);
    assert_eq!(house.done(&["wait", "shell"]), "137\n");
    house.done(&["rm", "shell"]);
    house.is_empty();
}

#[test]
fn an_image_stays_while_a_container_is_made_of_it() {
    let house = House::new();
    // As people get one with a name of its own.
    let folder = house.image.strip_prefix("oci:").expect("a folder");
    let archive = house.home.path("image.tar");
    let archive = archive.to_str().expect("utf-8");
    let packed = std::process::Command::new("skopeo")
        .args([
            "copy",
            "-q",
            &format!("oci:{folder}"),
            &format!("oci-archive:{archive}:localhost/box:1"),
        ])
        .output()
        .expect("skopeo is installed");
    assert!(packed.status.success(), "{}", stderr(&packed));
    house.done(&["load", "-q", "-i", archive]);
    house.done(&[
        "create",
        "--name",
        "user",
        "localhost/box:1",
        "echo",
        "still here",
    ]);
    refused(
        &house.call(&["rmi", "localhost/box:1"]),
        1,
        &["localhost/box:1", "user", "--force"],
    );
    house.done(&["prune", "-a", "-f"]);
    house.done(&["start", "user"]);
    assert_eq!(house.done(&["wait", "user"]), "0\n");
    assert_eq!(house.done(&["logs", "user"]), "still here\n");
    house.done(&["rmi", "-f", "localhost/box:1"]);
    let output = house.call(&["start", "user"]);
    refused(
        &output,
        1,
        &["localhost/box:1", "is gone", "get the image again"],
    );
    house.done(&["rm", "user"]);
    house.is_empty();
}
