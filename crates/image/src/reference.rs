//! What a user calls an image.
//!
//! Invariant: a [`Reference`] has one of four forms and non-empty parts. Left to others: whether what it names exists.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::ImageError;
use crate::name::Name;

/// Where an image lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// `NAME`, or `docker://NAME`: an image of the store.
    Named(Name),
    /// `oci:DIR[:TAG]`: an OCI image layout; the tag is `org.opencontainers.image.ref.name`.
    Oci {
        /// The layout's directory.
        dir: PathBuf,
        /// Which image, when not the only one.
        tag: Option<String>,
    },
    /// `docker-archive:FILE`: what `docker save` writes.
    DockerArchive {
        /// The tar file.
        file: PathBuf,
    },
    /// `rootfs:DIR`: a directory that is the root.
    Rootfs {
        /// The directory.
        dir: PathBuf,
    },
}

impl FromStr for Reference {
    type Err = ImageError;

    /// The tag is what follows the last colon, unless that holds a slash: `oci:./a:b/c` is a directory `./a:b/c`.
    fn from_str(text: &str) -> Result<Reference, ImageError> {
        let unknown = || ImageError::UnknownReference {
            given: text.to_owned(),
        };
        let named = |name: &str| name.parse().map(Reference::Named);
        if let Some(name) = text.strip_prefix("docker://") {
            return named(name);
        }
        let Some((form, rest)) = text.split_once(':') else {
            return named(text);
        };
        if rest.is_empty() {
            return Err(unknown());
        }
        match form {
            "oci" => match rest.rsplit_once(':') {
                Some((dir, tag)) if !tag.contains('/') => {
                    if dir.is_empty() || tag.is_empty() {
                        return Err(unknown());
                    }
                    Ok(Reference::Oci {
                        dir: dir.into(),
                        tag: Some(tag.to_owned()),
                    })
                }
                Some(_) | None => Ok(Reference::Oci {
                    dir: rest.into(),
                    tag: None,
                }),
            },
            "docker-archive" => Ok(Reference::DockerArchive { file: rest.into() }),
            "rootfs" => Ok(Reference::Rootfs { dir: rest.into() }),
            _ => named(text),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reference::Named(name) => f.write_str(&name.familiar()),
            Reference::Oci { dir, tag: None } => write!(f, "oci:{}", dir.display()),
            Reference::Oci {
                dir,
                tag: Some(tag),
            } => write!(f, "oci:{}:{tag}", dir.display()),
            Reference::DockerArchive { file } => write!(f, "docker-archive:{}", file.display()),
            Reference::Rootfs { dir } => write!(f, "rootfs:{}", dir.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_understood_and_shown_alike() {
        for text in [
            "oci:/a/b",
            "oci:a:latest",
            "oci:./a:b/c",
            "docker-archive:/x.tar",
            "rootfs:/srv/root",
        ] {
            let reference: Reference = text.parse().expect(text);
            assert_eq!(reference.to_string(), text);
        }
        let tagged: Reference = "oci:/a:b:1.2".parse().expect("tag after the last colon");
        assert_eq!(
            tagged,
            Reference::Oci {
                dir: "/a:b".into(),
                tag: Some("1.2".into())
            }
        );
    }

    #[test]
    fn any_other_form_is_refused_with_the_way_out() {
        for text in ["oci:", "oci:dir:", "oci::tag", "rootfs:"] {
            let error = text.parse::<Reference>().expect_err(text);
            let way_out = "use a name, oci:DIR[:TAG], docker-archive:FILE or rootfs:DIR";
            assert!(error.to_string().contains(way_out), "{error}");
        }
        for text in ["", "Busybox", "docker://", "dir:/srv/x"] {
            let error = text.parse::<Reference>().expect_err(text);
            assert!(matches!(error, ImageError::BadName { .. }), "{error}");
        }
    }

    #[test]
    fn anything_else_is_an_image_s_name() {
        for (text, shown) in [
            ("busybox", "busybox:latest"),
            ("docker://busybox", "busybox:latest"),
            ("localhost:5000/a:1", "localhost:5000/a:1"),
        ] {
            let reference: Reference = text.parse().expect(text);
            assert!(matches!(reference, Reference::Named(_)));
            assert_eq!(reference.to_string(), shown);
        }
    }
}
