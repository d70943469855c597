//! Tar files of images: `docker save`'s `manifest.json` form, old (`ID/layer.tar`) and new (an OCI layout with
//! `manifest.json` beside it), gzipped or not.
//!
//! Invariant: members are found, never unpacked; a symbolic link among them leads to members only. Left to others:
//! checking what the members say.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::blobs::{self, Section};
use crate::decompress::decompress;
use crate::digest::{DigestAlgorithm, HashingReader};
use crate::error::ImageError;
use crate::limits::Limits;
use crate::tar_stream::{TarKind, TarStream};

const LINK_HOPS_MAX: usize = 8;

/// An archive's members.
#[derive(Debug)]
pub(crate) struct Archive {
    file: Arc<File>,
    path: PathBuf,
    members: BTreeMap<String, Member>,
}

#[derive(Debug)]
enum Member {
    Data {
        offset: u64,
        bytes: u64,
    },
    /// Another member's name.
    Link(String),
}

/// One image of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SavedImage {
    /// The configuration's member.
    pub(crate) config: String,
    /// For the reader only.
    pub(crate) repo_tags: Option<Vec<String>>,
    /// The layers' members, lowest first.
    pub(crate) layers: Option<Vec<String>>,
}

impl Archive {
    /// Opens and indexes an archive; a compressed one goes through an unnamed file in `scratch`.
    pub(crate) fn open(
        path: &Path,
        scratch: &Path,
        limits: &Limits,
    ) -> Result<Archive, ImageError> {
        // Nothing but a regular file.
        let section = blobs::open_section(path)?;
        section.ok_or_else(|| ImageError::io("open", path)(io::ErrorKind::NotFound.into()))?;
        let file = File::open(path).map_err(ImageError::io("open", path))?;
        Archive::of(file, path, scratch, limits)
    }

    /// As [`Archive::open`], of an open file.
    pub(crate) fn of(
        file: File,
        path: &Path,
        scratch: &Path,
        limits: &Limits,
    ) -> Result<Archive, ImageError> {
        let bytes = file.metadata().map_err(ImageError::io("open", path))?.len();
        let file = Arc::new(file);
        let section = Section::new(file.clone(), 0, bytes);
        let mut magic = [0; 4];
        let count =
            read_start(section.clone(), &mut magic).map_err(ImageError::io("read", path))?;
        let compressed = matches!(
            magic.get(..count),
            Some([0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd])
        );
        let file = if compressed {
            let mut plain =
                tempfile::tempfile_in(scratch).map_err(ImageError::io("write to", scratch))?;
            let bytes_max = limits.archive_bytes_max;
            let mut stream =
                HashingReader::new(decompress(section)?, DigestAlgorithm::Sha256, bytes_max);
            let copied = io::copy(&mut stream, &mut plain);
            if stream.is_over() {
                let what = format!("{path:?}");
                return Err(ImageError::Limit {
                    what,
                    limit: "archive_bytes_max",
                    max: bytes_max,
                });
            }
            copied.map_err(ImageError::io("decompress", path))?;
            Arc::new(plain)
        } else {
            file
        };
        let members = index(&file, limits).map_err(|source| ImageError::Malformed {
            what: format!("docker archive {path:?}"),
            reason: with_causes(&source),
        })?;
        Ok(Archive {
            file,
            path: path.to_path_buf(),
            members,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A member's bytes, links followed.
    pub(crate) fn member(&self, name: &str) -> Option<Section> {
        let mut name = normal(name)?;
        for _ in 0..LINK_HOPS_MAX {
            match self.members.get(&name)? {
                Member::Data { offset, bytes } => {
                    return Some(Section::new(self.file.clone(), *offset, *bytes));
                }
                Member::Link(target) => name.clone_from(target),
            }
        }
        None
    }

    /// All images of `manifest.json`; none when the archive has no such member.
    pub(crate) fn saved_images(
        &self,
        limits: &Limits,
    ) -> Result<Option<Vec<SavedImage>>, ImageError> {
        let Some(section) = self.member("manifest.json") else {
            return Ok(None);
        };
        let what = format!("manifest.json of {:?}", self.path);
        let bytes = blobs::read_document(section, &what, &self.path, limits)?;
        let images = serde_json::from_slice(&bytes);
        images.map_err(|source| ImageError::Json { what, source })
    }

    /// The one image of `manifest.json`; none when the archive has no such member.
    pub(crate) fn saved_image(&self, limits: &Limits) -> Result<Option<SavedImage>, ImageError> {
        let Some(images) = self.saved_images(limits)? else {
            return Ok(None);
        };
        let count = images.len();
        let names: Vec<String> = images
            .iter()
            .flat_map(|i| i.repo_tags.clone().unwrap_or_default())
            .collect();
        let mut images = images.into_iter();
        match (images.next(), images.next()) {
            (Some(image), None) => Ok(Some(image)),
            (None, _) => Err(ImageError::NotALayout {
                path: self.path.clone(),
                missing: "image in manifest.json",
            }),
            (Some(_), Some(_)) => Err(ImageError::Ambiguous {
                path: self.path.clone(),
                count,
                known: format!("{} and save it alone", names.join(", ")),
            }),
        }
    }
}

fn with_causes(error: &ImageError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn read_start(mut section: Section, magic: &mut [u8]) -> io::Result<usize> {
    io::Read::read(&mut section, magic)
}

fn index(file: &File, limits: &Limits) -> Result<BTreeMap<String, Member>, ImageError> {
    let seek_error = |source| ImageError::Stream {
        what: "its tar stream",
        source,
    };
    let end = file.metadata().map_err(seek_error)?.len();
    let mut position: &File = file;
    position.seek(SeekFrom::Start(0)).map_err(seek_error)?;
    let mut stream = TarStream::new(file, *limits);
    let mut members = BTreeMap::new();
    while let Some(entry) = stream.next_entry()? {
        if members.len() >= limits.archive_members_max {
            let max = limits.archive_members_max as u64;
            return Err(ImageError::Limit {
                what: "its index".to_owned(),
                limit: "archive_members_max",
                max,
            });
        }
        // Data is passed over by seeking: an archive is large, its index is small.
        let offset = position.stream_position().map_err(seek_error)?;
        let skipped = stream.forget_data();
        let next = offset.checked_add(skipped).filter(|next| *next <= end);
        let next = next.ok_or_else(|| seek_error(io::ErrorKind::UnexpectedEof.into()))?;
        position.seek(SeekFrom::Start(next)).map_err(seek_error)?;
        let Some(name) = std::str::from_utf8(&entry.path).ok().and_then(normal) else {
            continue;
        };
        let member = match entry.kind {
            TarKind::File {
                size,
                extents: None,
            } => Member::Data {
                offset,
                bytes: size,
            },
            TarKind::HardLink(target) => match std::str::from_utf8(&target).ok().and_then(normal) {
                Some(target) => Member::Link(target),
                None => continue,
            },
            TarKind::Symlink(target) => {
                let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
                let joined = std::str::from_utf8(&target)
                    .ok()
                    .and_then(|t| normal(&format!("{parent}/{t}")));
                match joined {
                    Some(target) => Member::Link(target),
                    None => continue,
                }
            }
            TarKind::File {
                extents: Some(_), ..
            }
            | TarKind::Directory
            | TarKind::CharDevice { .. }
            | TarKind::BlockDevice { .. }
            | TarKind::Fifo => continue,
        };
        members.insert(name, member);
    }
    Ok(members)
}

/// Without `.`, `..` and empty components; none when it would leave the archive.
fn normal(name: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_names_stay_in_the_archive() {
        assert_eq!(normal("./a//b/../c").as_deref(), Some("a/c"));
        assert_eq!(normal("a/../../etc/passwd"), None);
    }
}
