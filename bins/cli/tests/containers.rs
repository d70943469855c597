//! Real commands in real machines on the software engine: what goes in, what comes out.

mod support;

use std::io::Write;
use std::process::Stdio;

use support::{Home, ended, refused, stderr, stdout};

#[test]
fn output_comes_back() {
    let home = Home::new();
    let output = home.run(&[&home.busybox(), "echo", "hello", "world"]);
    ended(&output, 0);
    assert_eq!(stdout(&output), "hello world\n");
    home.is_swept();
}

#[test]
fn standard_output_and_error_stay_apart() {
    let home = Home::new();
    let output = home.run(&[&home.busybox(), "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        (stdout(&output).as_str(), stderr(&output).as_str()),
        ("out\n", "err\n")
    );
}

#[test]
fn exit_codes_come_back_as_docker_has_them() {
    let home = Home::new();
    let image = home.busybox();
    ended(&home.run(&[&image, "true"]), 0);
    ended(&home.run(&[&image, "sh", "-c", "exit 3"]), 3);
    ended(&home.run(&[&image, "sh", "-c", "kill -9 $$"]), 137);
    ended(&home.run(&[&image, "sh", "-c", "kill -TERM $$"]), 143);
    refused(
        &home.run(&[&image, "no-such-program"]),
        127,
        &["no-such-program"],
    );
    refused(
        &home.run(&[&image, "/srv/not-executable"]),
        126,
        &["not-executable"],
    );
    refused(
        &home.run(&["-u", "nobody-here", &image, "true"]),
        125,
        &["nobody-here", "--user"],
    );
    home.is_swept();
}

#[test]
fn a_guest_at_rest_has_no_ticks_and_its_timers_are_finer_than_one() {
    let home = Home::new();
    let script = "ticks() { awk '/LOC:/ { print $2 }' /proc/interrupts; }
        before=$(ticks); sleep 2; after=$(ticks)
        echo $((after - before)); grep -m1 resolution /proc/timer_list";
    let output = home.run(&[&home.busybox(), "sh", "-c", script]);
    ended(&output, 0);
    let said = stdout(&output);
    let (ticks, resolution) = said.split_once('\n').expect("two lines");
    // A tick that never stops makes 500 of 250 a second.
    assert!(ticks.parse::<u32>().expect("a number") < 200, "{said}");
    assert!(resolution.trim().ends_with(" 1 nsecs"), "{said}");
}

#[test]
fn processors_that_were_asked_for_are_there_and_work() {
    let home = Home::new();
    // Forks, pipes and waits on all of them; and no clock that goes back from one to the next.
    let script = "nproc; grep -c ^processor /proc/cpuinfo
        for i in 0 1 2 3; do
            taskset -p $((1 << i)) $$ >/dev/null
            now=$(cut -d' ' -f1 /proc/uptime | tr -d .)
            [ \"$now\" -ge \"${before:-0}\" ] || echo back from $before to $now
            before=$now
        done
        taskset -p f $$ >/dev/null
        for i in 1 2 3 4 5 6 7 8; do
            (n=0; while [ $n -lt 20 ]; do echo $n; n=$((n+1)); done | sort -rn | head -1) &
        done; wait";
    let output = home.run(&["--cpus", "4", &home.busybox(), "sh", "-c", script]);
    ended(&output, 0);
    assert_eq!(stdout(&output), format!("4\n4\n{}", "19\n".repeat(8)));
    home.is_swept();
}

#[test]
fn the_images_configuration_and_the_options_are_honoured() {
    let home = Home::new();
    let image = home.busybox();
    let report = "pwd; id -u; id -g; hostname; echo $FROM_IMAGE $GIVEN";
    let output = home.run(&["--name", "box", &image, "sh", "-c", report]);
    ended(&output, 0);
    assert_eq!(stdout(&output), "/root\n0\n0\nbox\nyes\n");
    let output = home.run(&[
        "-w",
        "/srv/new",
        "-u",
        "user",
        "--hostname",
        "host",
        "-e",
        "GIVEN=a b",
        "-e",
        "FROM_IMAGE",
        &image,
        "sh",
        "-c",
        report,
    ]);
    ended(&output, 0);
    assert_eq!(stdout(&output), "/srv/new\n1000\n1000\nhost\na b\n");
    let output = home.run(&["--entrypoint", "echo", &image, "instead"]);
    ended(&output, 0);
    assert_eq!(stdout(&output), "instead\n");
    home.is_swept();
}

#[test]
fn standard_input_reaches_the_command_and_ends() {
    let home = Home::new();
    let image = home.busybox();
    let mut child = home.start(&["-i", &image, "sh", "-c", "wc -c; echo done"]);
    let mut stdin = child.stdin.take().expect("piped");
    // More than all buffers on the way hold.
    let writer =
        std::thread::spawn(move || stdin.write_all(&vec![b'x'; 3_000_000]).expect("written"));
    let output = child.wait_with_output().expect("ended");
    writer.join().expect("written");
    ended(&output, 0);
    assert_eq!(stdout(&output), "3000000\ndone\n");
    home.is_swept();
}

#[test]
fn without_interactive_the_command_has_no_input() {
    let home = Home::new();
    let image = home.busybox();
    let mut command = home.kombi(&["run", &image, "wc", "-c"]);
    let mut child = command.stdin(Stdio::piped()).spawn().expect("started");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(b"never read").expect("written");
    let output = child.wait_with_output().expect("ended");
    ended(&output, 0);
    assert_eq!(stdout(&output).trim(), "0");
}

#[test]
fn megabytes_of_output_arrive_whole() {
    let home = Home::new();
    let output = home.run(&[&home.busybox(), "seq", "1", "500000"]);
    ended(&output, 0);
    let expected: String = (1..=500_000).map(|n| format!("{n}\n")).collect();
    assert!(
        stdout(&output) == expected,
        "{} bytes of {}",
        output.stdout.len(),
        expected.len()
    );
}

#[test]
fn a_directory_can_be_the_root() {
    let home = Home::new();
    let root = home.path("root");
    std::fs::create_dir_all(root.join("bin")).expect("made");
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("copied");
    let image = format!("rootfs:{}", root.display());
    let output = home.run(&[&image, "/bin/busybox", "echo", "hello"]);
    ended(&output, 0);
    assert_eq!(stdout(&output), "hello\n");
    home.is_swept();
}

#[test]
fn higher_layers_cover_lower_ones() {
    let home = Home::new();
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let mut lower = tar::Builder::new(Vec::new());
    support::append(
        &mut lower,
        "bin/sh",
        0o755,
        tar::EntryType::Regular,
        &busybox,
    );
    support::append(&mut lower, "a", 0o644, tar::EntryType::Regular, b"lower\n");
    support::append(&mut lower, "b", 0o644, tar::EntryType::Regular, b"lower\n");
    let mut upper = tar::Builder::new(Vec::new());
    support::append(&mut upper, "a", 0o644, tar::EntryType::Regular, b"upper\n");
    support::append(&mut upper, ".wh.b", 0o644, tar::EntryType::Regular, b"");
    let layers = [
        lower.into_inner().expect("finished"),
        upper.into_inner().expect("finished"),
    ];
    let image = home.image("layers", "\"Env\":[\"PATH=/bin\"]", &layers);
    let script = "read x < /a; echo $x; test -e /b || echo gone; echo w > /c; read x < /c; echo $x";
    let output = home.run(&[&image, "sh", "-c", script]);
    ended(&output, 0);
    assert_eq!(stdout(&output), "upper\ngone\nw\n");
}

#[test]
fn machines_run_side_by_side_and_names_are_unique() {
    let home = Home::new();
    let image = home.busybox();
    let mut first = home.start(&[
        "-i",
        "--name",
        "one",
        &image,
        "sh",
        "-c",
        "echo up; read x; echo $x",
    ]);
    let mut reader = std::io::BufReader::new(first.stdout.take().expect("piped"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut reader, &mut line).expect("read");
    assert_eq!(line, "up\n");
    refused(
        &home.run(&["--name", "one", &image, "true"]),
        125,
        &["\"one\"", "choose another --name"],
    );
    let output = home.run(&["--name", "two", &image, "echo", "beside"]);
    ended(&output, 0);
    first
        .stdin
        .take()
        .expect("piped")
        .write_all(b"bye\n")
        .expect("written");
    line.clear();
    std::io::BufRead::read_line(&mut reader, &mut line).expect("read");
    assert_eq!(line, "bye\n");
    assert_eq!(first.wait().expect("ended").code(), Some(0));
    home.is_swept();
}

#[test]
fn doctor_finds_that_machines_can_run_here() {
    let home = Home::new();
    let output = home.kombi(&["doctor", "--json"]).output().expect("started");
    ended(&output, 0);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&report["ok"], &report["engine"]["use"]),
        (&true.into(), &"soft".into())
    );
}

#[test]
fn metrics_of_a_command_end_with_those_of_the_whole_machine() {
    let home = Home::new();
    let metrics = home.path("metrics.jsonl");
    let option = ["--metrics-path", metrics.to_str().expect("utf-8")];
    let trace = home.path("trace.jsonl");
    let traced = ["--engine-trace", trace.to_str().expect("utf-8")];
    let image = home.busybox();
    let lines = |path: &std::path::Path| -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).expect("written");
        assert!(text.ends_with('\n'), "{text}");
        let parse = |line| serde_json::from_str(line).expect("JSON");
        text.lines().map(parse).collect()
    };
    // The second machine appends.
    for machine in 1..=2 {
        let output = home.run(&[&option[..], &traced[..], &[&image, "true"]].concat());
        ended(&output, 0);
        let lines = lines(&metrics);
        assert_eq!(lines.len(), 2 * machine, "{lines:?}");
        let number = |line: &serde_json::Value, pointer: &str| {
            let value = line.pointer(pointer).and_then(serde_json::Value::as_u64);
            value.unwrap_or_else(|| panic!("no {pointer} in {line}"))
        };
        let (first, last) = (&lines[2 * machine - 2], &lines[2 * machine - 1]);
        assert_eq!(number(first, "/engine/exits/link"), 0);
        assert!(number(last, "/utc_timestamp_ms") > number(first, "/utc_timestamp_ms"));
        // The trace ends with the vCPU: not one exit came after the metrics' last line.
        let traced = std::fs::read_to_string(&trace).expect("written");
        let counted = |pointer: &str| -> u64 {
            let events = traced
                .lines()
                .map(|line| serde_json::from_str(line).expect("JSON"));
            let counts = events.filter(|line: &serde_json::Value| line["event"] == "counts");
            counts.map(|line| number(&line, pointer)).sum()
        };
        for (metric, event) in [
            ("/engine/exits/interpret", "/exits/interpret"),
            ("/engine/exits/access", "/exits/access"),
            ("/engine/page_faults", "/page_faults"),
        ] {
            assert!(number(last, metric) > 0, "{last}");
            assert_eq!(number(last, metric), counted(event), "{metric}");
        }
    }
    home.is_swept();

    refused(
        &home.run(&["--metrics-path", "/none/metrics", &image, "true"]),
        125,
        &["/none/metrics", "path that can be written"],
    );
}

#[test]
fn the_engine_says_what_it_did_when_it_is_asked_to() {
    let home = Home::new();
    let trace = home.path("trace.jsonl");
    let option = ["--engine-trace", trace.to_str().expect("utf-8")];
    let image = home.busybox();
    let output = home.run(&[&option[..], &[&image, "true"]].concat());
    ended(&output, 0);
    let text = std::fs::read_to_string(&trace).expect("written");
    for part in [
        r#""event":"block","rip":"0xffffffff8"#,
        r#""mode":"user""#,
        r#""event":"counts","instructions":{"kernel":"#,
        r#""event":"hot","exit":"#,
        r#""event":"samples","translated":"#,
        r#""event":"busy","rip":"0xffffffff8"#,
    ] {
        assert!(text.contains(part), "no {part}");
    }
    home.is_swept();

    refused(
        &home.run(&["--engine-trace", "/none/trace", &image, "true"]),
        125,
        &["/none/trace", "path that can be written"],
    );
}
