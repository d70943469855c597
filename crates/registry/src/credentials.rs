//! Who we are to a registry: what `docker login` and `podman login` left.
//!
//! Order of files as in containers-auth.json(5): `$REGISTRY_AUTH_FILE` alone where it is set; else
//! `$XDG_RUNTIME_DIR/containers/auth.json`, `~/.config/containers/auth.json`, `$DOCKER_CONFIG/config.json` or
//! `~/.docker/config.json`. Within a file the longest matching key wins, then its credential helpers.
//!
//! Invariant: a secret is in no message and no log.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use docker_credential::{CredentialRetrievalError as Failure, DockerCredential};
use image::Name;
use oci_client::secrets::RegistryAuth;

use crate::error::Error;

/// Docker's key of its own registry.
pub(crate) const HUB_KEY: &str = "https://index.docker.io/v1/";

/// Where credentials may be.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    files: Vec<PathBuf>,
    /// Where what is new goes, if not into the first one.
    new: Option<PathBuf>,
}

impl Credentials {
    /// Those in `files`, the first one first. Files that are not there are passed over.
    pub fn in_files(files: Vec<PathBuf>) -> Self {
        Self { files, new: None }
    }

    /// The user's.
    pub fn of_user() -> Self {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        if let Some(file) = set("REGISTRY_AUTH_FILE") {
            return Self::in_files(vec![file.into()]);
        }
        let home = set("HOME").map(PathBuf::from);
        let config = set("XDG_CONFIG_HOME").map(PathBuf::from);
        let config = config.or_else(|| home.as_ref().map(|home| home.join(".config")));
        let docker = set("DOCKER_CONFIG").map(PathBuf::from);
        let docker = docker.or_else(|| home.as_ref().map(|home| home.join(".docker")));
        let runtime = set("XDG_RUNTIME_DIR").map(PathBuf::from);
        // The runtime directory's goes with the session, where podman wants it so.
        let new = config.map(|dir| dir.join("containers/auth.json"));
        let files = [
            runtime.map(|dir| dir.join("containers/auth.json")),
            new.clone(),
            docker.map(|dir| dir.join("config.json")),
        ];
        Self {
            new,
            ..Self::in_files(files.into_iter().flatten().collect())
        }
    }

    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    pub(crate) fn file_for_new(&self) -> Option<&Path> {
        self.new
            .as_deref()
            .or(self.files.first().map(PathBuf::as_path))
    }

    /// What to say to the registry at `host` about the image `name`.
    pub(crate) fn of(&self, host: &str, name: &Name) -> Result<RegistryAuth, Error> {
        for file in &self.files {
            for key in keys(host, name) {
                let Ok(open) = File::open(file) else {
                    continue;
                };
                match docker_credential::get_credential_from_reader(open, &key) {
                    Ok(found) => return Ok(auth(found)),
                    Err(Failure::NoCredentialConfigured | Failure::ConfigNotFound) => {}
                    // A helper that knows nothing says so by failing.
                    Err(Failure::HelperFailure { stdout, .. })
                        if stdout.contains("credentials not found") => {}
                    Err(failure) => {
                        return Err(Error::Credentials {
                            registry: host.to_owned(),
                            reason: format!("{file:?}: {}", without_output(&failure)),
                        });
                    }
                }
            }
        }
        Ok(RegistryAuth::Anonymous)
    }
}

/// From the most special to the most general.
fn keys(host: &str, name: &Name) -> Vec<String> {
    let mut keys = Vec::new();
    // A mirror is somebody else: what is known of the original's folders says nothing of its.
    if host == name.registry() {
        let mut path = format!("{host}/{}", name.repository());
        while path.len() > host.len() {
            keys.push(path.clone());
            let end = path.rfind('/').unwrap_or_default();
            path.truncate(end);
        }
    }
    keys.push(host.to_owned());
    if host == "docker.io" {
        keys.push(HUB_KEY.to_owned());
    }
    keys.push(format!("https://{host}"));
    keys
}

fn auth(found: DockerCredential) -> RegistryAuth {
    match found {
        DockerCredential::UsernamePassword(user, password) => RegistryAuth::Basic(user, password),
        DockerCredential::IdentityToken(token) => RegistryAuth::Bearer(token),
    }
}

/// What helpers print may be secret.
fn without_output(failure: &Failure) -> String {
    match failure {
        Failure::HelperFailure { helper, .. } => format!("{helper} failed"),
        other => other.to_string().to_lowercase(),
    }
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files: Vec<String> = self.files.iter().map(|file| format!("{file:?}")).collect();
        f.write_str(&files.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(user: &str) -> RegistryAuth {
        RegistryAuth::Basic(user.to_owned(), "secret".to_owned())
    }

    /// `user:secret` in base64, for three users.
    const ALL: &str = r#"{"auths": {
        "r.io": {"auth": "aG9zdDpzZWNyZXQ="},
        "r.io/team/app": {"auth": "YXBwOnNlY3JldA=="},
        "https://index.docker.io/v1/": {"auth": "aHViOnNlY3JldA=="}
    }}"#;

    #[test]
    fn the_longest_key_wins_and_the_first_file_goes_before_the_second() {
        let dir = tempfile::tempdir().expect("a folder");
        let (first, second) = (dir.path().join("auth.json"), dir.path().join("config.json"));
        std::fs::write(&first, r#"{"auths": {"x.io": {"auth": "eDpzZWNyZXQ="}}}"#)
            .expect("written");
        std::fs::write(&second, ALL).expect("written");
        let credentials = Credentials::in_files(vec![dir.path().join("none"), first, second]);
        let of = |host: &str, name: &str| {
            let name = name.parse().expect("a name");
            credentials.of(host, &name).expect("an answer")
        };
        assert_eq!(of("r.io", "r.io/team/app:1"), basic("app"));
        assert_eq!(of("r.io", "r.io/team/other"), basic("host"));
        assert_eq!(of("docker.io", "busybox"), basic("hub"));
        assert_eq!(of("x.io", "x.io/a"), basic("x"));
        assert_eq!(of("y.io", "y.io/a"), RegistryAuth::Anonymous);
        // What is for the original is not for its mirror.
        assert_eq!(of("mirror.io", "r.io/team/app"), RegistryAuth::Anonymous);
    }

    #[test]
    fn a_file_that_makes_no_sense_is_named_and_no_secret_is() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("auth.json");
        std::fs::write(&file, r#"{"auths": {"r.io": {"auth": "!!!"}}}"#).expect("written");
        let name = "r.io/a".parse().expect("a name");
        let error = Credentials::in_files(vec![file])
            .of("r.io", &name)
            .expect_err("refused");
        let text = error.to_string();
        assert!(
            text.contains("auth.json") && text.contains("r.io") && !text.contains("!!!"),
            "{text}"
        );
    }
}
