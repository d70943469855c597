//! Which places to ask for an image: containers-registries.conf(5), version 2.
//!
//! Read are `$CONTAINERS_REGISTRIES_CONF` alone where it is set, else `~/.config/containers/registries.conf` or, without
//! one, `/etc/containers/registries.conf`; and the files of the folders `registries.conf.d` beside both. Short names are
//! docker's: `unqualified-search-registries` and aliases are not looked at.
//!
//! Invariant: the list of places is never empty, and the registry itself comes last.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use image::Name;
use serde::Deserialize;

use crate::error::Error;

/// What registries.conf says.
#[derive(Clone, Debug, Default)]
pub struct Configuration {
    registries: Vec<(PathBuf, Registry)>,
}

/// A place that may have an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Host and port.
    pub host: String,
    /// The repository there.
    pub repository: String,
    /// Without TLS, or with certificates that nobody vouches for.
    pub insecure: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct File {
    #[serde(default)]
    registry: Vec<Registry>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Registry {
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror: Vec<Mirror>,
    #[serde(default)]
    mirror_by_digest_only: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Mirror {
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    pull_from_mirror: Option<PullFromMirror>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PullFromMirror {
    All,
    DigestOnly,
    TagOnly,
}

impl Configuration {
    /// The user's, else the host's.
    ///
    /// # Errors
    ///
    /// [`Error::Configuration`] names the file.
    pub fn of_user() -> Result<Self, Error> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        if let Some(file) = set("CONTAINERS_REGISTRIES_CONF") {
            return Self::in_files(&[file]);
        }
        let home = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")));
        let user = home.map(|home| home.join("containers"));
        let host = PathBuf::from("/etc/containers");
        let mut files = Vec::new();
        for folder in user.iter().chain([&host]) {
            let file = folder.join("registries.conf");
            if files.is_empty() && file.exists() {
                files.push(file);
            }
        }
        for folder in [Some(&host), user.as_ref()].into_iter().flatten() {
            files.extend(drop_ins(&folder.join("registries.conf.d")));
        }
        Self::in_files(&files)
    }

    /// What `files` say; of two entries for one prefix the later one counts.
    ///
    /// # Errors
    ///
    /// [`Error::Configuration`] names the file.
    pub fn in_files(files: &[PathBuf]) -> Result<Self, Error> {
        let mut registries: Vec<(PathBuf, Registry)> = Vec::new();
        for path in files {
            for mut one in read(path)?.registry {
                if one.prefix.is_empty() {
                    one.prefix.clone_from(&one.location);
                }
                registries.retain(|(_, other)| other.prefix != one.prefix);
                registries.push((path.clone(), one));
            }
        }
        Ok(Self { registries })
    }

    /// Where to look for the image, in this order.
    ///
    /// # Errors
    ///
    /// [`Error::Blocked`].
    pub fn places(&self, name: &Name) -> Result<Vec<Place>, Error> {
        let whole = format!("{}/{}", name.registry(), name.repository());
        let matching = |(_, one): &&(PathBuf, Registry)| matched(&one.prefix, &whole).is_some();
        let found = self.registries.iter().filter(matching);
        let Some((path, registry)) = found.max_by_key(|(_, one)| one.prefix.len()) else {
            return Ok(vec![place(&whole, false)]);
        };
        if registry.blocked {
            return Err(Error::Blocked {
                registry: registry.prefix.clone(),
                path: path.clone(),
            });
        }
        let by_digest = name.digest().is_some();
        let rewritten = |location: &str| match matched(&registry.prefix, &whole) {
            Some(rest) if !location.is_empty() => format!("{location}{rest}"),
            _ => whole.clone(),
        };
        let mut places = Vec::new();
        for mirror in &registry.mirror {
            let when = mirror
                .pull_from_mirror
                .unwrap_or(match registry.mirror_by_digest_only {
                    true => PullFromMirror::DigestOnly,
                    false => PullFromMirror::All,
                });
            let asked = match when {
                PullFromMirror::All => true,
                PullFromMirror::DigestOnly => by_digest,
                PullFromMirror::TagOnly => !by_digest,
            };
            if asked {
                places.push(place(&rewritten(&mirror.location), mirror.insecure));
            }
        }
        places.push(place(&rewritten(&registry.location), registry.insecure));
        Ok(places)
    }

    /// Where to push: the registry itself.
    ///
    /// # Errors
    ///
    /// [`Error::Blocked`].
    pub fn place_to_push(&self, name: &Name) -> Result<Place, Error> {
        let whole = format!("{}/{}", name.registry(), name.repository());
        let last = self.places(name)?.pop();
        Ok(last.unwrap_or_else(|| place(&whole, false)))
    }
}

fn drop_ins(folder: &Path) -> Vec<PathBuf> {
    let list = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = list.map(|entry| entry.path()).collect();
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "conf")
    });
    files.sort();
    files
}

fn read(path: &Path) -> Result<File, Error> {
    let bad = |reason: String| Error::Configuration {
        path: path.to_path_buf(),
        reason,
    };
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(File::default()),
        Err(error) => return Err(bad(error.to_string())),
    };
    toml::from_str(&text).map_err(|error| bad(error.message().to_owned()))
}

/// What follows the prefix, if it is one: it ends where a part of the name does, and `*.` stands for subdomains.
fn matched<'a>(prefix: &str, whole: &'a str) -> Option<&'a str> {
    if let Some(domain) = prefix.strip_prefix('*') {
        let host = whole.split('/').next().unwrap_or(whole);
        let is_sub =
            domain.starts_with('.') && host.split(':').next().unwrap_or(host).ends_with(domain);
        return is_sub.then(|| whole.get(host.len()..).unwrap_or_default());
    }
    let rest = whole.strip_prefix(prefix)?;
    (!prefix.is_empty() && (rest.is_empty() || rest.starts_with('/'))).then_some(rest)
}

fn place(whole: &str, insecure: bool) -> Place {
    let (host, repository) = whole.split_once('/').unwrap_or((whole, ""));
    Place {
        host: host.to_owned(),
        repository: repository.to_owned(),
        insecure: insecure || is_loopback(host),
    }
}

/// As docker does it: what does not leave this host needs no TLS.
fn is_loopback(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    name == "localhost"
        || name
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(text: &str) -> Configuration {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("registries.conf");
        fs::write(&file, text).expect("written");
        Configuration::in_files(&[file]).expect("a configuration")
    }

    fn places(configuration: &Configuration, name: &str) -> Vec<String> {
        let places = configuration
            .places(&name.parse().expect("a name"))
            .expect("places");
        let shown = |place: Place| {
            let mark = if place.insecure { "!" } else { "" };
            format!("{mark}{}/{}", place.host, place.repository)
        };
        places.into_iter().map(shown).collect()
    }

    #[test]
    fn without_a_configuration_the_registry_is_the_only_place() {
        let none = Configuration::default();
        assert_eq!(places(&none, "busybox"), ["docker.io/library/busybox"]);
        assert_eq!(places(&none, "localhost:5000/a"), ["!localhost:5000/a"]);
        assert_eq!(places(&none, "127.0.0.1:5000/a"), ["!127.0.0.1:5000/a"]);
    }

    #[test]
    fn mirrors_come_first_and_the_longest_prefix_wins() {
        let configuration = configuration(
            r#"
            unqualified-search-registries = ["docker.io"]
            [[registry]]
            prefix = "docker.io"
            location = "hub.corp:5000/proxy"
            [[registry.mirror]]
            location = "mirror.corp"
            insecure = true
            [[registry.mirror]]
            location = "digests.corp"
            pull-from-mirror = "digest-only"
            [[registry]]
            location = "docker.io/library/secret"
            blocked = true
            [[registry]]
            prefix = "*.example.com"
            insecure = true
            "#,
        );
        assert_eq!(
            places(&configuration, "busybox"),
            [
                "!mirror.corp/library/busybox",
                "hub.corp:5000/proxy/library/busybox"
            ]
        );
        let by_digest = format!("busybox@sha256:{}", "a".repeat(64));
        assert_eq!(places(&configuration, &by_digest).len(), 3);
        assert_eq!(
            places(&configuration, "a.example.com:1/x"),
            ["!a.example.com:1/x"]
        );
        assert_eq!(places(&configuration, "example.com/x"), ["example.com/x"]);
        let secret = "secret".parse().expect("a name");
        assert!(matches!(
            configuration.places(&secret),
            Err(Error::Blocked { .. })
        ));
        // Not a part of it, another name.
        assert_eq!(places(&configuration, "secrets").len(), 2);
        let pushed = configuration
            .place_to_push(&"a/b".parse().expect("a name"))
            .expect("a place");
        assert_eq!(pushed.host, "hub.corp:5000");
    }

    #[test]
    fn a_file_that_makes_no_sense_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("registries.conf");
        fs::write(&file, "[[registry]]\nblocked = 3\n").expect("written");
        let error = Configuration::in_files(&[file])
            .expect_err("refused")
            .to_string();
        assert!(error.contains("registries.conf"), "{error}");
        assert!(Configuration::in_files(&[dir.path().join("none")]).is_ok());
    }
}
