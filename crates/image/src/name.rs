//! An image's name as docker writes it: `[REGISTRY/]REPOSITORY[:TAG][@DIGEST]`.
//!
//! Invariant: a [`Name`] has a registry, a repository, and a tag or a digest; what was left out is docker's:
//! `docker.io`, `library/`, `latest`. Grammar and defaults are those of the distribution project's package `reference`
//! (docs.docker.com, "image reference"). Left to others: whether there is such an image.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::ImageError;

const HUB: &str = "docker.io";
const HUB_LEGACY: &str = "index.docker.io";
const OFFICIAL: &str = "library/";
const TAG: &str = "latest";
/// Bytes of a repository.
const REPOSITORY_MAX: usize = 255;
/// Bytes of a tag.
const TAG_MAX: usize = 128;

/// A complete name. Its text is canonical: `docker.io/library/busybox:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Name {
    /// `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// `latest`; none where a digest was given alone.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest that the image must have.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Registry and repository as people write them: `busybox`, `localhost:5000/app`.
    pub fn familiar_repository(&self) -> String {
        if self.registry != HUB {
            return format!("{}/{}", self.registry, self.repository);
        }
        let official = self.repository.strip_prefix(OFFICIAL);
        official.unwrap_or(&self.repository).to_owned()
    }

    /// The same repository's image `digest`.
    pub fn with_digest(&self, digest: Digest) -> Name {
        Name {
            tag: None,
            digest: Some(digest),
            ..self.clone()
        }
    }

    /// The image as people write it: `busybox:latest`.
    pub fn familiar(&self) -> String {
        let mut text = self.familiar_repository();
        self.push_version(&mut text);
        text
    }

    fn push_version(&self, text: &mut String) {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{}/{}", self.registry, self.repository);
        self.push_version(&mut text);
        f.write_str(&text)
    }
}

impl FromStr for Name {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Name, ImageError> {
        let bad = |reason| ImageError::BadName {
            given: text.chars().take(300).collect(),
            reason,
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        // A colon before a slash belongs to a port.
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            Some(_) | None => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(bad(
                "its tag has other characters than letters, digits, _, . and -",
            ));
        }
        let (registry, repository) = match path.split_once('/') {
            Some((first, rest)) if is_registry(first) => (first, rest),
            Some(_) | None => (HUB, path),
        };
        let registry = if registry == HUB_LEGACY {
            HUB
        } else {
            registry
        };
        if !is_host(registry) {
            return Err(bad(
                "its registry is not a host name with or without a port",
            ));
        }
        if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(bad("repositories are lower case"));
        }
        if !repository.split('/').all(is_component) {
            return Err(bad(
                "a repository has lower-case letters and digits, with . _ __ - between them",
            ));
        }
        let repository = match registry == HUB && !repository.contains('/') {
            true => format!("{OFFICIAL}{repository}"),
            false => repository.to_owned(),
        };
        if repository.len() > REPOSITORY_MAX {
            return Err(bad("its repository has more than 255 characters"));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some(TAG),
            (tag, _) => tag,
        };
        Ok(Name {
            registry: registry.to_owned(),
            repository,
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

/// Whether what stands before the first slash is a registry and not a part of a repository.
fn is_registry(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost"
}

fn is_host(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let label = |label: &str| {
        let inner = label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-');
        inner && !label.is_empty() && !label.starts_with('-') && !label.ends_with('-')
    };
    let is_port = |port: &str| port.parse::<u16>().is_ok() && !port.starts_with('+');
    host.split('.').all(label) && port.is_none_or(is_port)
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    tag.len() <= TAG_MAX
        && bytes.next().is_some_and(word)
        && bytes.all(|b| word(b) || matches!(b, b'.' | b'-'))
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut runs = Vec::new();
    let mut rest = text.as_bytes();
    while let Some(first) = rest.first() {
        let is_word = word(*first);
        let len = rest.iter().take_while(|b| word(**b) == is_word).count();
        let (run, left) = rest.split_at(len);
        runs.push((is_word, run));
        rest = left;
    }
    let separates =
        |run: &[u8]| matches!(run, b"." | b"_" | b"__") || run.iter().all(|b| *b == b'-');
    let whole = |end: Option<&(bool, &[u8])>| end.is_some_and(|(is_word, _)| *is_word);
    whole(runs.first())
        && whole(runs.last())
        && runs.iter().all(|(is_word, run)| *is_word || separates(run))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

    #[test]
    fn what_is_left_out_is_docker_s() {
        for (given, whole, familiar) in [
            (
                "busybox",
                "docker.io/library/busybox:latest",
                "busybox:latest",
            ),
            (
                "test.com:tag",
                "docker.io/library/test.com:tag",
                "test.com:tag",
            ),
            (
                "test.com/repo:tag",
                "test.com/repo:tag",
                "test.com/repo:tag",
            ),
            (
                "test:5000/repo",
                "test:5000/repo:latest",
                "test:5000/repo:latest",
            ),
            (
                "localhost/a/b__c",
                "localhost/a/b__c:latest",
                "localhost/a/b__c:latest",
            ),
            (
                "opensuse/leap:15.3",
                "docker.io/opensuse/leap:15.3",
                "opensuse/leap:15.3",
            ),
            (
                "lowercase:Uppercase",
                "docker.io/library/lowercase:Uppercase",
                "lowercase:Uppercase",
            ),
            (
                "index.docker.io/x",
                "docker.io/library/x:latest",
                "x:latest",
            ),
        ] {
            let name: Name = given.parse().expect(given);
            assert_eq!(name.to_string(), whole);
            assert_eq!(name.familiar(), familiar);
            assert_eq!(whole.parse::<Name>().expect("a whole name"), name);
        }
        let digest = format!("r.io/a@sha256:{HEX}");
        let name: Name = digest.parse().expect("a digest");
        assert_eq!((name.tag(), name.to_string()), (None, digest));
        let both: Name = format!("a:b@sha256:{HEX}").parse().expect("both");
        assert_eq!((both.tag(), both.digest().is_some()), (Some("b"), true));
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_reason() {
        let long = format!("a/{}", "b".repeat(255));
        for given in [
            "",
            ":tag",
            "a//b",
            "a:",
            "a:-b",
            "A/b",
            "a/B",
            "a b",
            "a/../b",
            "-a",
            "a_",
            "a___b",
            "a..b",
            "a/b:c/d",
            "x@sha256:12",
            "x.com:99999/a",
            "-.com/a",
            "a\n",
            &long,
        ] {
            let error = given.parse::<Name>().expect_err(given);
            let refused = matches!(
                error,
                ImageError::BadName { .. } | ImageError::BadDigest { .. }
            );
            assert!(refused, "{given}: {error}");
        }
    }
}
