//! Standard streams through pipes: whole, in order, and never in each other's way.

use std::{
    fs,
    io::{Read, Write},
    thread::sleep,
    time::Duration,
};

use guest_wire::{
    GuestMessage, HostMessage, STDIN_CREDIT_BYTES_INITIAL, STDIO_CHUNK_BYTES_MAX, write_message,
};

use crate::host::{Host, exited, process, record_of, shell, signalled, start, with_stdin};

#[test]
fn output_and_errors_come_apart() {
    let record = record_of(shell("echo out; echo err >&2; exit 3"));
    assert_eq!(
        (record.stdout.as_slice(), record.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(record.last, exited(3));
}

#[test]
fn process_without_standard_input_reads_its_end() {
    let record = record_of(process(&["cat"]));
    assert_eq!((record.stdout.len(), record.last), (0, exited(0)));
}

#[test]
fn standard_input_and_its_end_arrive() {
    let mut host = Host::running(with_stdin(process(&["cat"])));
    host.send(&HostMessage::Stdin {
        bytes: b"one\ntwo".to_vec(),
    });
    host.send(&HostMessage::StdinEof);
    let record = host.into_record();
    assert_eq!(
        (record.text().as_str(), record.last),
        ("one\ntwo", exited(0))
    );
}

#[test]
fn input_that_comes_with_start_in_one_piece_arrives_and_ends() {
    let mut host = Host::greeted();
    let start = HostMessage::Start(Box::new(start(with_stdin(process(&["cat"])))));
    let input = HostMessage::Stdin {
        bytes: b"at once".to_vec(),
    };
    let mut piece = Vec::new();
    for message in [start, input, HostMessage::StdinEof] {
        write_message(&mut piece, &message).unwrap();
    }
    host.stream.write_all(&piece).unwrap();
    assert!(matches!(host.hear(), Some(GuestMessage::Started { .. })));
    let record = host.into_record();
    assert_eq!(
        (record.text().as_str(), record.last),
        ("at once", exited(0))
    );
}

#[test]
fn fifty_megabytes_of_output_arrive_whole() {
    let record = record_of(process(&["head", "-c", "50000000", "/dev/zero"]));
    assert_eq!((record.stdout.len(), record.last), (50_000_000, exited(0)));
}

#[test]
fn last_output_is_whole_when_the_host_is_slow() {
    let host = Host::running(shell("seq 1 60000; seq 1 60000 >&2; exit 4"));
    sleep(Duration::from_millis(800));
    let record = host.into_record();
    let expected: String = (1..=60000).map(|number| format!("{number}\n")).collect();
    assert!(
        record.text() == expected,
        "{} of {} bytes",
        record.stdout.len(),
        expected.len()
    );
    assert!(
        record.stderr == expected.as_bytes(),
        "{} of {} bytes",
        record.stderr.len(),
        expected.len()
    );
    assert_eq!(record.last, exited(4));
}

#[test]
fn flood_that_nobody_reads_stays_in_its_pipe_and_signals_still_pass() {
    let mut host = Host::running(process(&["cat", "/dev/zero"]));
    sleep(Duration::from_millis(500));
    let status = fs::read_to_string(format!("/proc/{}/status", host.init.id())).unwrap();
    let anonymous = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    let kib: u64 = anonymous.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 4096, "init holds {kib} KiB");
    host.send(&HostMessage::Signal { number: 15 });
    assert_eq!(host.into_record().last, signalled(15));
}

/// Sends `total` bytes within the credit, while listening; gives what came back.
fn echo_within_credit(host: &mut Host, total: usize) -> Vec<u8> {
    let input: Vec<u8> = (0..total).map(|index| (index % 251) as u8).collect();
    let (mut sent, mut credit) = (0, usize::try_from(STDIN_CREDIT_BYTES_INITIAL).unwrap());
    let mut heard = Vec::new();
    while heard.len() < total {
        while sent < total && credit > 0 {
            let length = STDIO_CHUNK_BYTES_MAX.min(credit).min(total - sent);
            write_message(
                &mut host.stream,
                &HostMessage::Stdin {
                    bytes: input[sent..sent + length].to_vec(),
                },
            )
            .unwrap();
            sent += length;
            credit -= length;
        }
        match host.hear() {
            Some(GuestMessage::Stdout { bytes }) => heard.extend(bytes),
            Some(GuestMessage::StdinCredit { bytes }) => credit += usize::try_from(bytes).unwrap(),
            other => panic!("{other:?} after {sent} sent and {} heard", heard.len()),
        }
    }
    assert!(heard == input, "what came back is not what was sent");
    heard
}

#[test]
fn input_flows_by_credit() {
    let mut host = Host::running(with_stdin(process(&["cat"])));
    echo_within_credit(&mut host, 3_000_000);
    host.send(&HostMessage::StdinEof);
    assert_eq!(host.into_record().last, exited(0));
}

#[test]
fn full_input_does_not_hold_up_signals() {
    let mut host = Host::running(with_stdin(process(&["sleep", "100"])));
    for _ in 0..4 {
        host.send(&HostMessage::Stdin {
            bytes: vec![b'x'; STDIO_CHUNK_BYTES_MAX],
        });
    }
    host.send(&HostMessage::Signal { number: 15 });
    assert_eq!(host.into_record().last, signalled(15));
}

#[test]
fn input_that_nobody_will_read_is_credited_all_the_same() {
    let mut host = Host::running(with_stdin(shell("exec <&-; echo closed; sleep 100")));
    host.hear_text("closed");
    for _ in 0..4 {
        host.send(&HostMessage::Stdin {
            bytes: vec![b'x'; STDIO_CHUNK_BYTES_MAX],
        });
    }
    let mut credited = 0;
    while credited < STDIN_CREDIT_BYTES_INITIAL {
        match host.hear() {
            Some(GuestMessage::StdinCredit { bytes }) => credited += bytes,
            other => panic!("{other:?}"),
        }
    }
    host.send(&HostMessage::Stdin {
        bytes: vec![b'x'; STDIO_CHUNK_BYTES_MAX],
    });
    host.send(&HostMessage::Signal { number: 15 });
    assert_eq!(host.into_record().last, signalled(15));
}

#[test]
fn input_beyond_the_credit_ends_the_machine() {
    let mut host = Host::running(with_stdin(process(&["sleep", "100"])));
    // What the process's pipe takes is credited anew: the sixth is too many in any case.
    for _ in 0..6 {
        host.send(&HostMessage::Stdin {
            bytes: vec![b'x'; STDIO_CHUNK_BYTES_MAX],
        });
    }
    let (record, code, console) = host.into_record_and_console();
    let message =
        format!("host sent {STDIO_CHUNK_BYTES_MAX} bytes of standard input beyond its credit");
    assert_eq!(console, format!("kombi-init: {message}\n"));
    assert_eq!(
        (record.last, code),
        (Some(GuestMessage::InitFailed { message }), 1)
    );
}

#[test]
fn waiting_session_uses_no_processor() {
    let mut host = Host::running(with_stdin(process(&["sleep", "100"])));
    host.send(&HostMessage::StdinEof);
    sleep(Duration::from_millis(500));
    let mut stat = String::new();
    let path = format!("/proc/{}/stat", host.init.id());
    fs::File::open(path)
        .unwrap()
        .read_to_string(&mut stat)
        .unwrap();
    let ticks: u64 = stat
        .split_ascii_whitespace()
        .skip(13)
        .take(2)
        .map(|ticks| ticks.parse::<u64>().unwrap())
        .sum();
    assert!(ticks < 10, "{ticks} hundredths of a second");
    host.send(&HostMessage::Shutdown);
    assert_eq!(host.bury().0, 0);
}
