//! What a user calls an image.
//!
//! Invariant: a [`Reference`] has one of three forms and non-empty parts. Left to others: whether what it names exists.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::ImageError;

/// Where an image lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
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
        let (form, rest) = text.split_once(':').ok_or_else(unknown)?;
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
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
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
    fn the_three_forms_are_understood_and_shown_alike() {
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
        for text in [
            "",
            "busybox",
            "oci:",
            "oci:dir:",
            "oci::tag",
            "docker://busybox",
            "rootfs:",
        ] {
            let error = text.parse::<Reference>().expect_err(text);
            assert!(
                error
                    .to_string()
                    .contains("use oci:DIR[:TAG], docker-archive:FILE or rootfs:DIR"),
                "{error}"
            );
        }
    }
}
