//! Which images are here, and what they are called.
//!
//! `ROOT/index.json` lists them, as image-layout.md of the OCI image specification has it: each a descriptor of a
//! manifest or an index, with its full name as `org.opencontainers.image.ref.name`. One without a name lost it to
//! another image.
//!
//! Invariant: the list changes under an exclusive flock of `ROOT/index.lock`, by a file that was synced before it takes
//! the old one's place; a reader sees one or the other. No name is there twice. Left to others: blobs (`content.rs`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};

use oci_spec::image::{
    Descriptor, DescriptorBuilder, ImageIndex, ImageIndexBuilder, MediaType, SCHEMA_VERSION,
};
use rustix::fs::FlockOperation;

use crate::blobs;
use crate::content::sync_folder;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::{REF_NAME, json};
use crate::name::Name;
use crate::store::Store;

const INDEX: &str = "index.json";
/// Shortest part of an identifier that is taken for one, as in docker.
const ID_DIGITS_MIN: usize = 3;

/// An image in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name; none when another image has it now.
    pub name: Option<Name>,
    /// Of its manifest, or of the index that it was chosen from.
    pub target: Digest,
    /// Bytes of that document.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
}

impl Entry {
    fn of(descriptor: &Descriptor) -> Result<Entry, ImageError> {
        let name = name_of(descriptor);
        Ok(Entry {
            name: name.map(str::parse).transpose()?,
            target: descriptor.digest().as_ref().parse()?,
            size: descriptor.size(),
            media_type: descriptor.media_type().to_string(),
        })
    }

    fn descriptor(&self) -> Result<Descriptor, ImageError> {
        let mut builder = DescriptorBuilder::default()
            .media_type(MediaType::from(self.media_type.as_str()))
            .digest(oci_digest(&self.target)?)
            .size(self.size);
        if let Some(name) = &self.name {
            let named = (REF_NAME.to_owned(), name.to_string());
            builder = builder.annotations(std::collections::HashMap::from([named]));
        }
        builder.build().map_err(|error| ImageError::Malformed {
            what: format!("image {}", self.target),
            reason: error.to_string(),
        })
    }
}

pub(crate) fn oci_digest(digest: &Digest) -> Result<oci_spec::image::Digest, ImageError> {
    let parsed = digest.to_string().parse();
    parsed.map_err(|_| ImageError::BadDigest {
        given: digest.to_string(),
    })
}

fn name_of(descriptor: &Descriptor) -> Option<&str> {
    let annotations = descriptor.annotations().as_ref()?;
    annotations.get(REF_NAME).map(String::as_str)
}

/// What a text given for an image may mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The image.
    pub entry: Entry,
    /// All names of the same image.
    pub names: Vec<Name>,
    /// Whether it was found by its name, not by its identifier.
    pub by_name: bool,
}

impl Store {
    /// All images, by name; those without come last. Entries that make no sense are left out with a warning for the
    /// caller: the reader's list goes on.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Json`].
    pub fn entries(&self) -> Result<Vec<Entry>, ImageError> {
        let index = self.read_index()?;
        let mut entries: Vec<Entry> = Vec::new();
        for descriptor in index.manifests() {
            if let Ok(entry) = Entry::of(descriptor) {
                entries.push(entry);
            }
        }
        let key = |entry: &Entry| {
            let name = entry.name.as_ref().map(Name::to_string);
            (name.is_none(), name, entry.target.clone())
        };
        entries.sort_by_key(key);
        Ok(entries)
    }

    /// The image of that name.
    ///
    /// # Errors
    ///
    /// As [`Store::entries`].
    pub fn entry(&self, name: &Name) -> Result<Option<Entry>, ImageError> {
        let named = |entry: &Entry| match (&entry.name, name.tag(), name.digest()) {
            (Some(other), _, None) => other == name,
            // A digest says which image, whatever its tag is now.
            (Some(other), _, Some(digest)) => {
                entry.target == *digest
                    && (other.registry(), other.repository())
                        == (name.registry(), name.repository())
            }
            (None, ..) => false,
        };
        let entries = self.entries()?;
        let exact = entries
            .iter()
            .find(|entry| entry.name.as_ref() == Some(name));
        Ok(exact
            .or_else(|| entries.iter().find(|entry| named(entry)))
            .cloned())
    }

    /// The image that `text` names: a name, or the first digits of an identifier ([`Store::id`]) or of a digest.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotHere`], [`ImageError::AmbiguousId`], or as [`Store::entries`].
    pub fn find(&self, text: &str) -> Result<Found, ImageError> {
        let entries = self.entries()?;
        let names = |target: &Digest| {
            let same = entries.iter().filter(|entry| entry.target == *target);
            same.filter_map(|entry| entry.name.clone()).collect()
        };
        if let Ok(name) = text.parse::<Name>()
            && let Some(entry) = self.entry(&name)?
        {
            let names = names(&entry.target);
            return Ok(Found {
                entry,
                names,
                by_name: true,
            });
        }
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let mut found: Option<(Digest, &Entry)> = None;
        if digits.len() >= ID_DIGITS_MIN && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            for entry in &entries {
                let id = self.id(&entry.target)?;
                if !id.hex().starts_with(digits) && !entry.target.hex().starts_with(digits) {
                    continue;
                }
                if found.as_ref().is_some_and(|(other, _)| *other != id) {
                    return Err(ImageError::AmbiguousId {
                        given: text.to_owned(),
                    });
                }
                found = Some((id, entry));
            }
        }
        match found {
            Some((_, entry)) => Ok(Found {
                entry: entry.clone(),
                names: names(&entry.target),
                by_name: false,
            }),
            None => Err(ImageError::NotHere {
                given: text.to_owned(),
            }),
        }
    }

    /// Lists the image under its name; one that had the name keeps its place without.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Json`].
    pub fn add_entry(&self, entry: &Entry) -> Result<(), ImageError> {
        self.change(|entries| {
            let mut others = std::mem::take(entries);
            for other in &mut others {
                if other.name == entry.name {
                    other.name = None;
                }
            }
            // One entry without a name is enough, and none is needed where there are names.
            let known = |target: &Digest, among: &[Entry]| {
                among
                    .iter()
                    .any(|other| other.target == *target && other.name.is_some())
            };
            others.push(entry.clone());
            for other in &others {
                let again = entries.iter().any(|kept| kept == other);
                let needed = other.name.is_some() || !known(&other.target, &others);
                if needed && !again {
                    entries.push(other.clone());
                }
            }
        })
    }

    /// Takes a name from the list. Returns whether it was there.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Json`].
    pub fn remove_name(&self, name: &Name) -> Result<bool, ImageError> {
        let mut removed = false;
        self.change(|entries| {
            let before = entries.len();
            entries.retain(|entry| entry.name.as_ref() != Some(name));
            removed = entries.len() < before;
        })?;
        Ok(removed)
    }

    /// Takes all entries of an image from the list.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Json`].
    pub fn remove_image(&self, target: &Digest) -> Result<(), ImageError> {
        self.change(|entries| entries.retain(|entry| entry.target != *target))
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Entry>)) -> Result<(), ImageError> {
        let lock = self.root().join("index.lock");
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).open(&lock);
        let file = file.map_err(ImageError::io("open", &lock))?;
        let locked = rustix::fs::flock(&file, FlockOperation::LockExclusive);
        locked.map_err(|errno| ImageError::io("lock", &lock)(errno.into()))?;
        let mut entries = self.entries()?;
        let before = entries.clone();
        change(&mut entries);
        if entries == before {
            return Ok(());
        }
        let manifests = entries
            .iter()
            .map(Entry::descriptor)
            .collect::<Result<Vec<_>, _>>()?;
        let index = ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageIndex)
            .manifests(manifests)
            .build();
        let text = index
            .map_err(|error| error.to_string())
            .and_then(|index| serde_json::to_vec_pretty(&index).map_err(|error| error.to_string()));
        let text = text.map_err(|reason| ImageError::Malformed {
            what: INDEX.to_owned(),
            reason,
        })?;
        // Only who has the lock writes it.
        self.replace("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        self.replace(INDEX, &text)
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        let place = self.root().join(name);
        if fs::read(&place).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        let fresh = self.root().join(format!("{name}.new"));
        let written = File::create(&fresh).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        written.map_err(ImageError::io("write", &fresh))?;
        fs::rename(&fresh, &place).map_err(ImageError::io("create", &place))?;
        sync_folder(self.root())
    }

    fn read_index(&self) -> Result<ImageIndex, ImageError> {
        let path = self.root().join(INDEX);
        let Some(section) = blobs::open_section(&path)? else {
            return Ok(ImageIndex::default());
        };
        let what = format!("{path:?}");
        let bytes = blobs::read_document(section, &what, &path, self.limits())?;
        json(&bytes, || what)
    }
}

/// Holds an image's files where they are: nothing is collected meanwhile.
#[derive(Debug)]
pub struct Hold(#[expect(dead_code, reason = "its lock goes with it")] File);

impl Store {
    /// Keeps every blob and layer from being collected until the hold is dropped.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`].
    pub fn hold(&self) -> Result<Hold, ImageError> {
        let (file, path) = self.in_use()?;
        let locked = rustix::fs::flock(&file, FlockOperation::LockShared);
        locked.map_err(|errno| ImageError::io("lock", path)(errno.into()))?;
        Ok(Hold(file))
    }

    /// The opposite: `None` while somebody holds.
    pub(crate) fn hold_alone(&self) -> Result<Option<Hold>, ImageError> {
        let (file, path) = self.in_use()?;
        let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        match locked.map_err(io::Error::from) {
            Ok(()) => Ok(Some(Hold(file))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(ImageError::io("lock", path)(error)),
        }
    }

    fn in_use(&self) -> Result<(File, std::path::PathBuf), ImageError> {
        let path = self.root().join("in-use.lock");
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).open(&path);
        Ok((file.map_err(ImageError::io("open", &path))?, path))
    }
}
