//! Images from and to a real registry, as users of docker expect it; and what happens when something dies or is full.

mod support;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use support::registry::Registry;
use support::{Home, append, ended, refused, stderr, stdout};

fn skopeo(args: &[&str]) -> String {
    let output = Command::new("skopeo").args(args).output();
    let output = output.expect("skopeo is installed");
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// Bytes that do not compress.
fn noise(seed: u32, size: usize) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let step = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..size).map(step).collect()
}

/// An image of `count` layers of `bytes` each, in the registry; returns its name.
fn published(home: &Home, registry: &Registry, count: u32, bytes: usize) -> String {
    let layer = |nth: u32| {
        let mut layer = tar::Builder::new(Vec::new());
        let path = format!("data{nth}");
        append(
            &mut layer,
            &path,
            0o644,
            tar::EntryType::Regular,
            &noise(nth, bytes),
        );
        layer.into_inner().expect("finished")
    };
    let layers: Vec<Vec<u8>> = (0..count).map(layer).collect();
    let layout = home.image("published", "", &layers);
    let name = format!("{}/a/b:1", registry.host);
    let to = format!("docker://{name}");
    skopeo(&["copy", "-q", "--dest-tls-verify=false", &layout, &to]);
    name
}

#[test]
fn an_image_is_pulled_listed_run_and_pushed_under_another_name() {
    let (home, registry) = (Home::new(), Registry::start());
    let host = &registry.host;
    let name = format!("{host}/busybox");
    let to = format!("docker://{name}:latest");
    skopeo(&[
        "copy",
        "-q",
        "--dest-tls-verify=false",
        &home.busybox(),
        &to,
    ]);

    let output = home.verb(&["pull", &name]);
    ended_with(&output, &format!("{name}:latest\n"));
    let told = stderr(&output);
    assert!(told.contains("Using default tag: latest"), "{told}");
    assert!(told.contains("Status: Downloaded newer image"), "{told}");
    let again = home.verb(&["pull", &name]);
    assert!(stderr(&again).contains("up to date"), "{}", stderr(&again));
    let quiet = home.verb(&["pull", "-q", &name]);
    assert_eq!(stderr(&quiet), "");

    let id = home.done(&["images", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}"]);
    let (id, listed) = id.trim().split_once(' ').expect("two fields");
    assert_eq!(listed, format!("{name}:latest"));
    for image in [name.as_str(), id] {
        let output = home.run(&["--pull", "never", image, "cat", "/etc/group"]);
        ended(&output, 0);
        assert_eq!(stdout(&output), "root:x:0:\nuser:x:1000:\n");
    }

    let other = format!("{host}/other/name:2");
    home.done(&["tag", id, &other]);
    assert_eq!(home.done(&["push", &other]), format!("{other}\n"));
    let digest = |image: &str| {
        let at = format!("docker://{image}");
        skopeo(&[
            "inspect",
            "--tls-verify=false",
            "--format",
            "{{.Digest}}",
            &at,
        ])
    };
    assert_eq!(digest(&other), digest(&name));
    let by_digest = format!("{name}@{}", digest(&name).trim());
    home.done(&["pull", &by_digest]);

    // A machine pulls what is not here.
    let elsewhere = Home::new();
    let output = elsewhere.run(&[&other, "echo", "pulled"]);
    assert_eq!(stdout(&output), "pulled\n");
    let told = stderr(&output);
    assert!(
        told.contains(&format!("Unable to find image '{other}' locally")),
        "{told}"
    );
    elsewhere.is_swept();
    home.is_swept();
}

#[track_caller]
fn ended_with(output: &Output, text: &str) {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    assert_eq!(stdout(output), text);
}

#[test]
fn what_is_not_there_is_said_with_docker_s_exit_codes() {
    let (home, registry) = (Home::new(), Registry::start());
    let name = format!("{}/none:1", registry.host);
    refused(
        &home.verb(&["pull", &name]),
        1,
        &["has no none:1", "check the name"],
    );
    refused(&home.verb(&["pull", "Upper"]), 1, &["lower case"]);
    refused(&home.verb(&["push", &name]), 1, &["no such image"]);
    refused(&home.run(&["-q", &name, "true"]), 125, &["has no none:1"]);
    let never = home.run(&["--pull", "never", &name, "true"]);
    refused(&never, 125, &["no such image", "kombi pull"]);
    // Nobody listens there.
    let nobody = registry.host.clone();
    drop(registry);
    let pulled = home.verb(&["pull", "-q", &format!("{nobody}/a")]);
    refused(&pulled, 1, &["failed to reach", "try again"]);
    home.is_swept();
}

/// Killed at any moment, a pull leaves a store that works, and what it had is gone on with.
#[test]
fn a_pull_that_is_killed_again_and_again_is_whole_in_the_end() {
    let (home, registry) = (Home::new(), Registry::start());
    let name = published(&home, &registry, 6, 700_000);
    let mut kills = 0;
    let mut delay = Duration::from_millis(2);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "no pull was ever finished");
        let mut pull = home.kombi_without_machine(&["pull", "-q", &name]);
        let mut pull = pull.process_group(0).spawn().expect("started");
        std::thread::sleep(delay);
        let _ = pull.kill();
        // Whatever it left, the list can be read and names nothing that is not whole.
        let ended = pull.wait().expect("reaped");
        let listed = home.done(&["images", "--format", "{{.Tag}}"]);
        if ended.success() {
            break;
        }
        if !listed.is_empty() {
            // It was killed behind its last step: all of it is there.
            home.done(&["inspect", &name]);
        }
        kills += 1;
        delay += Duration::from_millis(4);
    }
    assert!(kills > 3, "only {kills} were killed");
    let layers = home.done(&["inspect", "--format", "{{len .RootFS.Layers}}", &name]);
    assert_eq!(layers, "6\n");
    // Nothing is left that no image needs.
    assert_eq!(home.done(&["prune", "-f"]), "Total reclaimed space: 0B\n");
    assert_eq!(
        fs::read_dir(home.path("store/downloads"))
            .expect("there")
            .count(),
        0
    );
    home.is_swept();
}

#[test]
fn two_pulls_of_one_image_at_once_both_have_it() {
    let (home, registry) = (Home::new(), Registry::start());
    let name = published(&home, &registry, 4, 2_000_000);
    let start = || {
        let mut pull = home.kombi_without_machine(&["pull", "-q", &name]);
        pull.spawn().expect("started")
    };
    let pulls = [start(), start(), start()];
    for pull in pulls {
        ended_with(
            &pull.wait_with_output().expect("ended"),
            &format!("{name}\n"),
        );
    }
    assert_eq!(home.done(&["images", "-q"]).lines().count(), 1);
    home.is_swept();
}

/// On a disk that is too small for it: said in one line, and the same command works once there is room.
#[test]
fn a_full_disk_is_said_and_costs_nothing_but_time() {
    let (home, registry) = (Home::new(), Registry::start());
    let name = published(&home, &registry, 3, 1_000_000);
    let kombi = env!("CARGO_BIN_EXE_kombi");
    let store = home.path("store");
    fs::create_dir_all(&store).expect("made");
    for size in ["200k", "1500k", "3500k", "5000k"] {
        // In mounts of its own: they go with it.
        let script = format!(
            "set -e; mount -t tmpfs -o size={size} t {store:?}; {kombi:?} pull -q {name} && exit 3; \
             {kombi:?} images -q; {kombi:?} prune -af >/dev/null; \
             mount -o remount,size=40m {store:?}; {kombi:?} pull -q {name}"
        );
        let root = match rustix::process::geteuid().is_root() {
            true => "-m",
            false => "-rm",
        };
        let mut command = home.kombi_without_machine(&[]);
        let envs: Vec<_> = command
            .get_envs()
            .map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned)))
            .collect();
        command = Command::new("unshare");
        command.args([root, "sh", "-c", &script]);
        for (key, value) in envs {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        let output = command.output().expect("started");
        let told = stderr(&output);
        assert_eq!(stdout(&output), format!("{name}\n"), "{size}: {told}");
        assert_eq!(output.status.code(), Some(0), "{size}: {told}");
        assert_eq!(told.lines().count(), 1, "{size}: {told}");
        assert!(told.contains("No space left on device"), "{size}: {told}");
        assert!(told.contains("KOMBI_HOME"), "{size}: {told}");
    }
    home.is_swept();
}
