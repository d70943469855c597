//! Making, finding, holding, losing and removing containers, by several at once and after crashes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use containers::{Containers, Error, LogOptions, Phase, Wanted};

fn wanted(name: Option<&str>) -> Wanted {
    Wanted {
        name: name.map(str::to_owned),
        image: "busybox".into(),
        image_digest: "sha256:0".into(),
        command: vec!["sleep".into(), "1".into()],
        labels: BTreeMap::new(),
        remove_at_end: false,
        stop_signal: 15,
        stop_timeout_seconds: 10,
        log: LogOptions::default(),
        task: serde_json::json!({"secret": "in a private directory"}),
    }
}

fn names(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).expect("readable");
    let names = entries.map(|entry| entry.expect("entry").file_name());
    names
        .map(|name| name.into_string().expect("utf-8"))
        .filter(|name| name != "lock")
        .collect()
}

#[test]
fn one_is_found_by_its_name_and_by_the_beginning_of_its_identifier() {
    let temp = tempfile::tempdir().expect("made");
    let all = Containers::open(temp.path().join("c")).expect("opened");
    let web = all.create(wanted(Some("web"))).expect("made");
    let other = all.create(wanted(None)).expect("made");
    let id = web.record().id.as_str();
    for given in ["web", id, web.record().id.short(), &id[..5]] {
        assert_eq!(all.find(given).expect(given).record(), web.record());
    }
    assert_eq!(
        all.find(&other.record().name).expect("found").record(),
        other.record()
    );
    for given in ["", "we", "nobody", &"0".repeat(64), "../c"] {
        let error = all.find(given).expect_err(given);
        assert!(matches!(error, Error::NotHere { .. }), "{given}: {error}");
    }
    let order: Vec<_> = all
        .all()
        .expect("listed")
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert_eq!(order[0].record(), other.record());
    assert_eq!(order[1].record(), web.record());
    let mode = fs::metadata(web.dir()).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn a_name_belongs_to_one_even_when_many_want_it() {
    let temp = tempfile::tempdir().expect("made");
    let all = Containers::open(temp.path()).expect("opened");
    let made = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| all.create(wanted(Some("web")))))
            .collect();
        let outcomes = tries.into_iter().map(|it| it.join().expect("no panic"));
        outcomes
            .filter(|outcome| match outcome {
                Ok(_) => true,
                Err(Error::NameInUse { name, .. }) if name == "web" => false,
                Err(error) => panic!("{error}"),
            })
            .count()
    });
    assert_eq!(made, 1);
    let other = all.create(wanted(None)).expect("made");
    let error = all.rename(&other, "web").expect_err("taken");
    assert!(matches!(error, Error::NameInUse { .. }), "{error}");
    all.rename(&other, "db").expect("renamed");
    assert_eq!(
        all.find("db").expect("found").record().id,
        other.record().id
    );
    let error = all.rename(&other, "../x").expect_err("no name");
    assert!(matches!(error, Error::BadName { .. }), "{error}");
}

#[test]
fn its_life_is_on_disk() {
    let temp = tempfile::tempdir().expect("made");
    let all = Containers::open(temp.path()).expect("opened");
    let made = all.create(wanted(Some("web"))).expect("made");
    assert_eq!(made.state().phase, Phase::Created);
    let mut held = made.clone().supervise().expect("held");
    held.started().expect("written");
    let seen = all.find("web").expect("found");
    assert!(seen.is_running() && seen.is_held().expect("looked"));
    assert_eq!(seen.state().pid, Some(std::process::id()));
    assert_eq!(seen.wait(Some(Duration::ZERO)).expect("waited"), None);
    for outcome in [all.remove(&seen), seen.clone().supervise().map(drop)] {
        assert!(matches!(outcome, Err(Error::Running { .. })), "{outcome:?}");
    }
    let waits = std::thread::spawn(move || seen.wait(None).expect("waited"));
    held.ended(3, None).expect("written");
    assert_eq!(waits.join().expect("no panic"), Some(3));
    let over = all.find("web").expect("found");
    assert_eq!(
        (over.state().phase, over.state().exit_code),
        (Phase::Exited, Some(3))
    );
    assert!(over.state().started.is_some() && over.state().finished.is_some());
    all.remove(&over).expect("removed");
    assert!(names(temp.path()).is_empty());
    assert_eq!(over.wait(None).expect("waited"), Some(3));
}

#[test]
fn who_waits_learns_how_one_ended_that_went_with_its_end() {
    let temp = tempfile::tempdir().expect("made");
    let all = Containers::open(temp.path()).expect("opened");
    let made = all
        .create(Wanted {
            remove_at_end: true,
            ..wanted(Some("web"))
        })
        .expect("made");
    let mut held = made.clone().supervise().expect("held");
    held.started().expect("written");
    let waits = std::thread::spawn(move || made.wait(None).expect("waited"));
    // Until it has the file open.
    std::thread::sleep(Duration::from_millis(200));
    held.ended(7, None).expect("written");
    assert_eq!(waits.join().expect("no panic"), Some(7));
    assert!(names(temp.path()).is_empty());
}

#[test]
fn one_whose_holder_went_without_a_word_does_not_look_alive() {
    let temp = tempfile::tempdir().expect("made");
    let all = Containers::open(temp.path()).expect("opened");
    let made = all.create(wanted(Some("web"))).expect("made");
    let mut held = made.supervise().expect("held");
    held.started().expect("written");
    // As the kernel does with the lock of a process that was killed.
    drop(held);
    let seen = all.find("web").expect("found");
    assert_eq!(
        (seen.state().phase, seen.state().exit_code),
        (Phase::Exited, Some(255))
    );
    assert!(
        seen.state()
            .error
            .as_deref()
            .expect("said")
            .contains("killed")
    );
    assert_eq!(seen.wait(None).expect("waited"), Some(255));
    all.remove(&seen).expect("removed");
    assert!(names(temp.path()).is_empty());
}

#[test]
fn who_waits_for_one_that_is_yet_to_start_waits() {
    let temp = tempfile::tempdir().expect("made");
    let all = Containers::open(temp.path()).expect("opened");
    let made = all.create(wanted(Some("web"))).expect("made");
    assert_eq!(
        made.wait(Some(Duration::from_millis(50))).expect("waited"),
        None
    );
    let waiting = made.clone();
    let waits = std::thread::spawn(move || waiting.wait(None).expect("waited"));
    std::thread::sleep(Duration::from_millis(50));
    let mut held = made.supervise().expect("held");
    held.started().expect("written");
    held.ended(6, None).expect("written");
    assert_eq!(waits.join().expect("no panic"), Some(6));
}

#[test]
fn what_crashes_left_goes_and_what_is_damaged_is_named() {
    let temp = tempfile::tempdir().expect("made");
    let all = Containers::open(temp.path()).expect("opened");
    let id = "a".repeat(64);
    for left in ["new", "gone"] {
        fs::create_dir(temp.path().join(format!("{id}.{left}"))).expect("made");
    }
    // Not ours to touch.
    fs::create_dir(temp.path().join("else.new")).expect("made");
    let web = all.create(wanted(Some("web"))).expect("made");
    let mut here = names(temp.path());
    here.sort();
    let mut expected = vec![web.record().id.to_string(), "else.new".to_owned()];
    expected.sort();
    assert_eq!(here, expected);
    for (damage, file) in [
        ("", "record.json"),
        ("{}", "state.json"),
        ("[1", "record.json"),
    ] {
        let whole = fs::read(web.dir().join(file)).expect("read");
        fs::write(web.dir().join(file), damage).expect("written");
        let listed = all.all().expect("listed");
        let error = listed
            .into_iter()
            .next()
            .expect("one")
            .expect_err("damaged");
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(file), "{error}");
        fs::write(web.dir().join(file), whole).expect("written");
    }
    // Others are made and found all the same.
    fs::write(web.dir().join("record.json"), "{").expect("written");
    let db = all.create(wanted(Some("db"))).expect("made");
    assert_eq!(all.find("db").expect("found").record(), db.record());
}
