//! Logging in to a registry that wants it, as users of docker expect it.

mod support;

use std::fs;
use std::io::Write;
use std::process::{Output, Stdio};

use support::registry::Registry;
use support::{Home, stderr, stdout};

/// `kombi ARGS` of a user with these files and with `input`.
fn kombi(home: &Home, args: &[&str], input: &str) -> Output {
    let mut command = home.kombi_without_machine(args);
    command
        .env("HOME", home.path("me"))
        .env_remove("REGISTRY_AUTH_FILE")
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("DOCKER_CONFIG")
        .stdin(Stdio::piped());
    let mut child = command.spawn().expect("started");
    let mut stdin = child.stdin.take().expect("piped");
    // It may not want any.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("ended")
}

#[track_caller]
fn done(output: &Output, said: &str) {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    assert_eq!(stdout(output), said);
}

#[track_caller]
fn failed(output: &Output, wanted: &str) {
    assert_eq!(output.status.code(), Some(1), "{}", stderr(output));
    let told = stderr(output);
    assert!(told.contains(wanted), "{told}");
    assert!(
        !told.contains("secret") && told.trim().lines().count() == 1,
        "{told}"
    );
}

#[test]
fn who_is_logged_in_pushes_and_pulls_and_nobody_else() {
    let (home, registry) = (Home::new(), Registry::private());
    let host = registry.host.as_str();
    let name = format!("{host}/a/busybox:1");
    home.done(&["load", "-q", "-i", &archive(&home)]);
    home.done(&["tag", "busybox", &name]);
    let push = ["push", "-q", &name];
    failed(&kombi(&home, &push, ""), "refuses access");

    let login = ["login", "-u", "me", "--password-stdin", host];
    failed(&kombi(&home, &login, "wrong\n"), "check user and password");
    let file = home.path("me/.config/containers/auth.json");
    assert!(!file.exists(), "nothing is written that was refused");
    done(&kombi(&home, &login, "secret\n"), "Login Succeeded\n");
    let text = fs::read_to_string(&file).expect("written");
    assert!(text.contains(host) && !text.contains("secret"), "{text}");
    done(&kombi(&home, &push, ""), &format!("{name}\n"));
    let pull = ["pull", "-q", &name];
    done(&kombi(&home, &pull, ""), &format!("{name}\n"));

    let logout = ["logout", host];
    let said = format!("Removing login credentials for {host}\n");
    done(&kombi(&home, &logout, ""), &said);
    done(
        &kombi(&home, &logout, ""),
        &format!("Not logged in to {host}\n"),
    );
    failed(&kombi(&home, &push, ""), "refuses access");
}

/// An archive with the image `busybox`.
fn archive(home: &Home) -> String {
    let file = home.path("busybox.tar");
    let to = format!("docker-archive:{}:busybox:latest", file.display());
    let copied = std::process::Command::new("skopeo")
        .args(["copy", "-q", &home.busybox(), &to])
        .status();
    assert!(copied.expect("skopeo is installed").success());
    file.to_str().expect("utf-8").to_owned()
}

#[test]
fn a_credential_helper_keeps_the_secret() {
    let (home, registry) = (Home::new(), Registry::private());
    let host = registry.host.as_str();
    let bin = home.path("bin");
    fs::create_dir_all(&bin).expect("made");
    let helper = bin.join("docker-credential-shelf");
    let shelf = home.path("shelf");
    let script = format!(
        "#!/bin/sh\necho $1 >> {shelf}.calls\ncat > {shelf}\n",
        shelf = shelf.display()
    );
    fs::write(&helper, script).expect("written");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&helper, executable).expect("set");
    let docker = home.path("me/.docker");
    fs::create_dir_all(&docker).expect("made");
    let config = format!("{{\"credHelpers\": {{\"{host}\": \"shelf\"}}}}");
    fs::write(docker.join("config.json"), config).expect("written");

    let path = format!("{}:{}", bin.display(), std::env::var("PATH").expect("set"));
    let ask = |args: &[&str]| {
        let mut command = home.kombi_without_machine(args);
        command
            .env("HOME", home.path("me"))
            .env("PATH", &path)
            .env_remove("DOCKER_CONFIG")
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("REGISTRY_AUTH_FILE");
        command.output().expect("started")
    };
    done(
        &ask(&["login", "-u", "me", "-p", "secret", host]),
        "Login Succeeded\n",
    );
    let kept = fs::read_to_string(&shelf).expect("asked");
    let wanted = format!("{{\"Secret\":\"secret\",\"ServerURL\":\"{host}\",\"Username\":\"me\"}}");
    assert_eq!(kept, wanted);
    let text = fs::read_to_string(docker.join("config.json")).expect("there");
    assert!(!text.contains("secret") && !text.contains("bWU6"), "{text}");
    let said = format!("Removing login credentials for {host}\n");
    done(&ask(&["logout", host]), &said);
    let calls = home.path("shelf.calls");
    assert_eq!(fs::read_to_string(calls).expect("asked"), "store\nerase\n");
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    let home = Home::new();
    let ask = |args: &[&str]| kombi(&home, args, "");
    failed(
        &ask(&["login", "localhost:5000"]),
        "standard input is not a terminal",
    );
    failed(
        &ask(&["login", "-u", "me", "--password-stdin", "no registry"]),
        "user and password are not empty",
    );
    let login = ["login", "-u", "me", "--password-stdin"];
    let nowhere = kombi(&home, &[&login[..], &["127.0.0.1:1"]].concat(), "x");
    failed(&nowhere, "failed to reach 127.0.0.1:1");
    let nonsense = kombi(&home, &[&login[..], &["a b"]].concat(), "x");
    failed(&nonsense, "is not a registry");
    failed(&ask(&["logout", "a b"]), "is not a registry");
    let usage = ask(&["login", "--password-stdin"]);
    assert_eq!(usage.status.code(), Some(125));
}
