//! What the process is given, how it ends, and what becomes of its relatives.

use std::{fs, thread::sleep, time::Duration};

use guest_wire::{GuestMessage, HostMessage};

use crate::host::{Host, exited, process, record_of, shell, signalled};

#[test]
fn exit_codes_come_back() {
    for code in [0, 7, 255] {
        assert_eq!(record_of(shell(&format!("exit {code}"))).last, exited(code));
    }
}

#[test]
fn signals_reach_the_process_and_its_death_by_them_is_told() {
    for number in [2, 9, 15, 40] {
        let mut host = Host::running(process(&["sleep", "100"]));
        host.send(&HostMessage::Signal { number });
        assert_eq!(host.into_record().last, signalled(number));
    }
}

#[test]
fn handled_and_impossible_signals_do_not_kill() {
    let mut host = Host::running(shell(
        "trap 'echo usr1; exit 5' USR1; echo ready; while :; do sleep 0.05; done",
    ));
    host.hear_text("ready");
    host.send(&HostMessage::Signal { number: 0 });
    host.send(&HostMessage::Signal { number: 200 });
    host.send(&HostMessage::Signal { number: 10 });
    let record = host.into_record();
    assert_eq!((record.text().as_str(), record.last), ("usr1\n", exited(5)));
}

#[test]
fn missing_variables_get_dockers_defaults() {
    let mut spec = process(&["env"]);
    spec.env = vec![String::from("A=1"), String::from("HOME=/here")];
    let text = record_of(spec).text();
    assert_eq!(
        text,
        "A=1\nHOME=/here\nPATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nHOSTNAME=box\n"
    );
}

#[test]
fn program_is_looked_up_in_the_path_of_the_process() {
    let place = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/bin/sh", place.path().join("odd-name")).unwrap();
    let mut spec = process(&["odd-name", "-c", "echo $0"]);
    spec.env = vec![format!("PATH=/nonexistent::{}", place.path().display())];
    let record = record_of(spec);
    assert_eq!(
        (record.text().as_str(), record.last),
        ("odd-name\n", exited(0))
    );
}

#[test]
fn missing_working_directory_is_created() {
    let place = tempfile::tempdir().unwrap();
    let wanted = place.path().join("a/b");
    let mut spec = process(&["pwd"]);
    spec.cwd = wanted.display().to_string();
    assert_eq!(record_of(spec).text(), format!("{}\n", wanted.display()));
    assert!(wanted.is_dir());
}

#[test]
fn process_has_its_own_session_clean_signals_and_three_files() {
    let script = "grep -E '^Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd; \
        set -- $(cat /proc/$$/stat); [ $6 = $$ ] && echo leader";
    let text = record_of(shell(script)).text();
    let zero = "0000000000000000";
    // The fourth file is the listing's own.
    assert_eq!(
        text,
        format!("SigBlk:\t{zero}\nSigIgn:\t{zero}\n0\n1\n2\n3\nleader\n")
    );
}

#[test]
fn other_users_are_for_root_only() {
    let mut spec = shell("id -u; id -g; id -G; echo here > /proc/self/fd/1");
    spec.user = String::from("4242:4343");
    let record = Host::starting(spec).into_record();
    if rustix::process::geteuid().is_root() {
        assert_eq!(record.text(), "4242\n4343\n4343\nhere\n", "{record:?}");
    } else {
        assert!(
            matches!(record.last, Some(GuestMessage::StartFailed { .. })),
            "{record:?}"
        );
    }
}

/// The children of kombi-init, by number.
fn children(host: &Host) -> Vec<String> {
    let pid = host.init.id();
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    list.split_ascii_whitespace().map(String::from).collect()
}

#[test]
fn orphans_are_reaped() {
    let mut host = Host::running(shell(
        "for i in 1 2 3 4 5; do (sleep 0.1 &); done; echo made; sleep 100",
    ));
    host.hear_text("made");
    let mut patience = 100;
    while children(&host).len() > 1 {
        patience -= 1;
        assert!(patience > 0, "children left: {:?}", children(&host));
        sleep(Duration::from_millis(50));
    }
    host.send(&HostMessage::Signal { number: 9 });
    assert_eq!(host.into_record().last, signalled(9));
}

#[test]
fn relative_that_holds_the_streams_delays_nothing_and_dies_with_the_machine() {
    let begin = std::time::Instant::now();
    let record = record_of(shell("sleep 100 & echo $!"));
    assert_eq!(record.last, exited(0));
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
    let pid: u32 = record.text().trim().parse().unwrap();
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
}

#[test]
fn shutdown_ends_the_machine_at_once() {
    let mut host = Host::running(process(&["sleep", "100"]));
    host.send(&HostMessage::Shutdown);
    let mut host = host;
    assert_eq!(host.hear(), None);
    assert_eq!(host.bury(), (0, String::new()));
}

#[test]
fn vanished_host_ends_the_machine() {
    let mut host = Host::running(shell("echo $$; sleep 100"));
    let pid: u32 = host.hear_text("\n").trim().parse().unwrap();
    let (code, console) = host.bury();
    assert_eq!(
        (code, console.as_str()),
        (1, "kombi-init: host closed the control stream\n")
    );
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
}
