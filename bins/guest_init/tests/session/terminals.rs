//! Processes on a terminal.

use std::{thread::sleep, time::Duration};

use guest_wire::{HostMessage, TerminalSize};

use crate::host::{Host, exited, on_terminal, process, record_of, shell, signalled};

#[test]
fn terminal_has_the_size_asked_for_and_a_name() {
    let record = record_of(on_terminal(shell(
        "stty size; echo $TERM; tty > /dev/null && echo on; echo err >&2",
    )));
    assert_eq!(
        (record.text().as_str(), record.last),
        ("24 80\r\nxterm\r\non\r\nerr\r\n", exited(0))
    );
    assert_eq!(record.stderr, b"");
}

#[test]
fn resize_is_seen_by_the_process() {
    let script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut host = Host::running(on_terminal(shell(script)));
    host.hear_text("ready\r\n");
    host.send(&HostMessage::Resize(TerminalSize {
        rows: 50,
        cols: 132,
    }));
    let record = host.into_record();
    assert_eq!(
        (record.text().as_str(), record.last),
        ("50 132\r\n", exited(0))
    );
}

#[test]
fn resize_without_a_terminal_is_ignored() {
    let mut host = Host::running(shell("read line; exit 6"));
    host.send(&HostMessage::Resize(TerminalSize { rows: 1, cols: 1 }));
    assert_eq!(host.into_record().last, exited(6));
}

#[test]
fn control_c_interrupts_what_runs_in_the_foreground() {
    let mut host = Host::running(on_terminal(shell("echo ready; exec sleep 100")));
    host.hear_text("ready\r\n");
    // Between the shell and its successor the terminal is the same; so is the process.
    host.send(&HostMessage::Stdin { bytes: vec![3] });
    assert_eq!(host.into_record().last, signalled(2));
}

#[test]
fn typed_lines_and_the_end_of_input_arrive() {
    let mut host = Host::running(on_terminal(process(&["cat"])));
    host.send(&HostMessage::Stdin {
        bytes: b"hello\n".to_vec(),
    });
    host.hear_text("hello\r\nhello\r\n");
    host.send(&HostMessage::StdinEof);
    assert_eq!(host.into_record().last, exited(0));
}

#[test]
fn long_output_of_a_terminal_is_whole() {
    let expected: String = (1..=30000).map(|number| format!("{number}\r\n")).collect();
    let record = record_of(on_terminal(process(&["seq", "1", "30000"])));
    assert!(
        record.text() == expected,
        "{} of {} bytes",
        record.stdout.len(),
        expected.len()
    );
    assert_eq!(record.last, exited(0));
}

#[test]
fn relative_that_holds_the_terminal_does_not_keep_the_session() {
    let begin = std::time::Instant::now();
    let record = record_of(on_terminal(shell("trap '' HUP; sleep 100 & echo done")));
    assert_eq!(
        (record.text().as_str(), record.last),
        ("done\r\n", exited(0))
    );
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn terminal_without_input_waits_for_nobody() {
    let mut spec = on_terminal(shell("read line && echo typed; echo over"));
    spec.stdin = false;
    let mut host = Host::running(spec);
    sleep(Duration::from_millis(100));
    host.send(&HostMessage::Stdin {
        bytes: b"nobody\n".to_vec(),
    });
    host.send(&HostMessage::Signal { number: 9 });
    let record = host.into_record();
    assert_eq!((record.text().as_str(), record.last), ("", signalled(9)));
}
