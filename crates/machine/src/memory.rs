//! The guest's memory as a blueprint asks for it: what the machine starts with, then
//! mapped files, then what can be plugged.

use std::fs::{File, OpenOptions};

use blueprint::{Blueprint, HugePages};
use ram::{ByteSize, Further, GuestRam, Kind, Pages, Region};

use crate::Error;

/// A machine's memory and what of it belongs to devices.
pub(crate) struct Memory {
    pub(crate) ram: GuestRam,
    /// In the blueprint's order.
    pub(crate) files: Vec<MappedFile>,
    /// What can be plugged.
    pub(crate) pluggable: Option<Region>,
}

/// A file in guest memory.
pub(crate) struct MappedFile {
    pub(crate) id: String,
    pub(crate) file: File,
    pub(crate) region: Region,
}

impl Memory {
    /// Memory of the machine of `blueprint`.
    pub(crate) fn make(blueprint: &Blueprint) -> Result<Self, Error> {
        Self::with(blueprint, None)
    }

    /// The same with the content of a snapshot's memory file.
    pub(crate) fn restore(blueprint: &Blueprint, image: File) -> Result<Self, Error> {
        Self::with(blueprint, Some(image))
    }

    fn with(blueprint: &Blueprint, image: Option<File>) -> Result<Self, Error> {
        let mut further = Vec::new();
        let mut opened = Vec::new();
        for pmem in blueprint.pmem() {
            let failed = |source| Error::Pmem {
                id: pmem.id.clone(),
                source,
            };
            let file = OpenOptions::new()
                .read(true)
                .write(!pmem.read_only)
                .open(&pmem.path)
                .map_err(failed)?;
            let meta = file.metadata().map_err(failed)?;
            if !meta.is_file() || meta.len() == 0 {
                let why = "it is not a regular file with at least one byte";
                return Err(failed(std::io::Error::other(why)));
            }
            further.push(Further::File {
                file: file.try_clone().map_err(failed)?,
                read_only: pmem.read_only,
            });
            opened.push((pmem.id.clone(), file));
        }
        if let Some(hotplug) = blueprint.memory_hotplug() {
            further.push(Further::Pluggable {
                len: u64::from(hotplug.total_mib) << 20,
                block: u64::from(hotplug.block_mib) << 20,
            });
        }
        let pages = match blueprint.huge_pages() {
            HugePages::None => Pages::Ordinary,
            HugePages::Transparent => Pages::Transparent,
            HugePages::Hugetlbfs2M => Pages::Huge,
        };
        let size = ByteSize::mib(blueprint.memory_mib().into());
        let ram = match image {
            None => GuestRam::of_pages(pages, size, further),
            Some(image) => {
                if pages == Pages::Huge {
                    tracing::warn!(
                        "memory of a snapshot is mapped from its file, not in huge pages"
                    );
                }
                GuestRam::from_image(size, further, image)
            }
        };
        let ram = ram.map_err(|source| Error::Memory { source })?;
        let of_files = ram
            .regions()
            .filter(|region| matches!(region.kind, Kind::File { .. }));
        let files = of_files
            .zip(opened)
            .map(|(region, (id, file))| MappedFile { id, file, region })
            .collect();
        let pluggable = ram
            .regions()
            .find(|region| matches!(region.kind, Kind::Pluggable { .. }));
        Ok(Self {
            ram,
            files,
            pluggable,
        })
    }
}
