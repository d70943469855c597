//! Writing down who we are to a registry: in the files that docker and podman read, or with the credential helpers that
//! these name.
//!
//! Invariant: whatever else such a file holds stays; it is replaced whole or not at all, and nobody else may read it. A
//! secret is in no message.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::Credentials;
use crate::credentials::HUB_KEY;
use crate::error::Error;

/// Bytes of such a file.
const FILE_BYTES_MAX: u64 = 1 << 20;

impl Credentials {
    /// Writes down what to say to `host`: where something is already, else in the file for new ones.
    pub(crate) fn remember(&self, host: &str, user: &str, password: &str) -> Result<(), Error> {
        let mut known = None;
        for file in self.files() {
            if read(file)?.is_some_and(|all| keys(host).any(|key| all.has(&key))) {
                known = Some(file.as_path());
                break;
            }
        }
        let file = known.or(self.file_for_new());
        let file = file.ok_or_else(|| failed(host, "there is no home: set REGISTRY_AUTH_FILE"))?;
        let mut all = read(file)?.unwrap_or_default();
        let docker = file.file_name().is_some_and(|name| name == "config.json");
        let key = match host {
            "docker.io" if docker => HUB_KEY,
            host => host,
        };
        let entry = match all.helper(key) {
            Some(helper) => {
                let secret = json!({"ServerURL": key, "Username": user, "Secret": password});
                ask(&helper, "store", &secret.to_string(), host)?;
                json!({})
            }
            None => json!({"auth": STANDARD.encode(format!("{user}:{password}"))}),
        };
        all.auths(|auths| auths.insert(key.to_owned(), entry));
        write(file, &all)
    }

    /// Removes what there is for `host`; whether there was something.
    pub(crate) fn forget(&self, host: &str) -> Result<bool, Error> {
        let mut found = false;
        for file in self.files() {
            let Some(mut all) = read(file)? else {
                continue;
            };
            let mut changed = false;
            for key in keys(host).filter(|key| all.has(key)).collect::<Vec<_>>() {
                if let Some(helper) = all.helper(&key) {
                    ask(&helper, "erase", &key, host)?;
                }
                changed |= all.auths(|auths| auths.remove(&key)).is_some();
                found = true;
            }
            if changed {
                write(file, &all)?;
            }
        }
        Ok(found)
    }
}

/// By which `host` may be known.
fn keys(host: &str) -> impl Iterator<Item = String> {
    let hub = (host == "docker.io").then(|| HUB_KEY.to_owned());
    [host.to_owned(), format!("https://{host}")]
        .into_iter()
        .chain(hub)
}

/// What a file holds.
#[derive(Default)]
struct All(Map<String, Value>);

impl All {
    fn has(&self, key: &str) -> bool {
        let holds = |group| self.0.get(group).is_some_and(|all| all.get(key).is_some());
        holds("auths") || holds("credHelpers")
    }

    /// The program that keeps the secret of `key`.
    fn helper(&self, key: &str) -> Option<String> {
        let of_key = self.0.get("credHelpers").and_then(|all| all.get(key));
        let name = of_key.or(self.0.get("credsStore"))?.as_str()?;
        (!name.is_empty()).then(|| format!("docker-credential-{name}"))
    }

    /// Has `change` change the entries.
    fn auths<T>(&mut self, change: impl FnOnce(&mut Map<String, Value>) -> T) -> T {
        let mut auths = match self.0.remove("auths") {
            Some(Value::Object(auths)) => auths,
            Some(_) | None => Map::new(),
        };
        let changed = change(&mut auths);
        self.0.insert("auths".to_owned(), Value::Object(auths));
        changed
    }
}

/// None where there is no file.
fn read(file: &Path) -> Result<Option<All>, Error> {
    let makes_no_sense = |reason: String| Error::Configuration {
        path: file.to_owned(),
        reason,
    };
    match fs::metadata(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(meta) if meta.len() > FILE_BYTES_MAX => {
            return Err(makes_no_sense("it has more than 1 MiB".to_owned()));
        }
        _ => {}
    }
    let text = fs::read(file).map_err(|error| makes_no_sense(error.to_string()))?;
    if text.iter().all(u8::is_ascii_whitespace) {
        return Ok(Some(All::default()));
    }
    let all = serde_json::from_slice(&text);
    // What the parser says may quote a secret.
    all.map(|all| Some(All(all)))
        .map_err(|error| makes_no_sense(format!("no JSON object, at line {}", error.line())))
}

fn write(file: &Path, all: &All) -> Result<(), Error> {
    let failed = |error: io::Error| Error::Configuration {
        path: file.to_owned(),
        reason: format!("it cannot be written: {error}"),
    };
    // A link stays one.
    let file: PathBuf = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let folder = file.parent().unwrap_or(Path::new("."));
    let mut make = DirBuilder::new();
    make.recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(failed)?;
    let new = folder.join(format!(".kombi-login.{}", std::process::id()));
    let written = (|| {
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut open = options.open(&new)?;
        let mut text = serde_json::to_vec_pretty(&all.0)?;
        text.push(b'\n');
        open.write_all(&text)?;
        open.sync_all()?;
        fs::rename(&new, &file)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written.map_err(failed)
}

fn failed(host: &str, reason: impl Into<String>) -> Error {
    Error::Credentials {
        registry: host.to_owned(),
        reason: reason.into(),
    }
}

/// Has `helper` do `what` with `input` (docker's protocol of credential helpers). What it prints may be secret.
fn ask(helper: &str, what: &str, input: &str, host: &str) -> Result<(), Error> {
    let started = Command::new(helper)
        .arg(what)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut child = started.map_err(|error| failed(host, format!("{helper}: {error}")))?;
    // One that does not read says so by its exit code.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    match child.wait() {
        Ok(status) if status.success() => Ok(()),
        _ => Err(failed(host, format!("{helper} {what} failed"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn text(file: &Path) -> Value {
        serde_json::from_slice(&fs::read(file).expect("there")).expect("JSON")
    }

    #[test]
    fn an_entry_is_added_replaced_and_removed_and_the_rest_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        let (first, second) = (
            dir.path().join("new/auth.json"),
            dir.path().join("config.json"),
        );
        let before = json!({"auths": {"r.io": {"auth": "b2xkOm9sZA=="}}, "psFormat": "table"});
        fs::write(&second, before.to_string()).expect("written");
        let credentials = Credentials::in_files(vec![first.clone(), second.clone()]);

        credentials.remember("r.io", "me", "secret").expect("kept");
        assert!(!first.exists(), "it is in the other one");
        let there = text(&second);
        assert_eq!(there["auths"]["r.io"]["auth"], "bWU6c2VjcmV0");
        assert_eq!(there["psFormat"], "table");

        credentials
            .remember("docker.io", "me", "x:y")
            .expect("kept");
        assert_eq!(text(&first)["auths"]["docker.io"]["auth"], "bWU6eDp5");
        let mode = fs::metadata(&first).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        assert!(credentials.forget("r.io").expect("asked"));
        assert!(!credentials.forget("r.io").expect("asked"));
        assert_eq!(text(&second), json!({"auths": {}, "psFormat": "table"}));
        let left = fs::read_dir(dir.path()).expect("listed").count();
        assert_eq!(left, 2, "nothing else is left");
    }

    #[test]
    fn a_file_that_makes_no_sense_stays_as_it_is() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("auth.json");
        fs::write(&file, "{\"auths\": {\"r.io\": \"c2VjcmV0\"").expect("written");
        let credentials = Credentials::in_files(vec![file.clone()]);
        let errors = [
            credentials
                .remember("r.io", "me", "secret")
                .expect_err("refused"),
            credentials.forget("r.io").expect_err("refused"),
        ];
        for error in errors {
            let said = error.to_string();
            assert!(
                said.contains("auth.json") && !said.contains("c2VjcmV0"),
                "{said}"
            );
        }
        assert!(
            fs::read_to_string(&file)
                .expect("there")
                .ends_with("c2VjcmV0\"")
        );
    }

    #[test]
    fn a_helper_keeps_the_secret_where_the_file_names_one() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("config.json");
        fs::write(&file, r#"{"credsStore": "kombi-test-none"}"#).expect("written");
        let credentials = Credentials::in_files(vec![file.clone()]);
        let error = credentials.remember("r.io", "me", "secret");
        let said = error.expect_err("no such program").to_string();
        assert!(said.contains("docker-credential-kombi-test-none"), "{said}");
        assert!(!said.contains("secret"), "{said}");
        assert_eq!(text(&file), json!({"credsStore": "kombi-test-none"}));
    }
}
