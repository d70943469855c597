//! How much of everything an image may ask for, with names and units.
//!
//! Invariant: whatever grows with the input grows only up to a field of [`Limits`]. The defaults are well above what
//! the largest images in use need and well below what would take down a host. Left to others: what to do when a limit
//! is hit (the caller gets [`crate::ImageError::Limit`], which names the field).

/// Bounds on what one image may make this crate do; see the fields' units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one JSON document (index, manifest, configuration, `manifest.json`).
    pub json_bytes_max: u64,
    /// Layers in one image. Linux overlayfs takes at most 500 lower layers; docker stops at 127.
    pub layers_max: usize,
    /// Bytes of one layer as stored (compressed).
    pub layer_blob_bytes_max: u64,
    /// Bytes of one layer's tar stream, decompressed. Stops decompression bombs.
    pub layer_tar_bytes_max: u64,
    /// Bytes of file contents one layer describes, holes of sparse files included.
    pub layer_file_bytes_max: u64,
    /// Files, directories (implied ones too) and links in one layer.
    pub layer_entries_max: usize,
    /// Bytes of names, symbolic link targets and extended attributes in one layer; all of it is held in memory.
    pub layer_metadata_bytes_max: u64,
    /// Bytes of one tar extension record (GNU long name, PAX header).
    pub tar_extension_bytes_max: u64,
    /// Extents of one sparse file.
    pub sparse_extents_max: usize,
    /// Bytes of extended attributes of one file, names included.
    pub xattr_bytes_max: usize,
    /// Bytes of one path, and of one symbolic link's target (Linux `PATH_MAX` less its terminator).
    pub path_bytes_max: usize,
    /// Bytes of a decompressed `docker-archive` file.
    pub archive_bytes_max: u64,
    /// Members of a `docker-archive` file.
    pub archive_members_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        Limits {
            json_bytes_max: 8 * MIB,
            layers_max: 127,
            layer_blob_bytes_max: 32 * GIB,
            layer_tar_bytes_max: 64 * GIB,
            layer_file_bytes_max: 256 * GIB,
            layer_entries_max: 1_000_000,
            layer_metadata_bytes_max: 256 * MIB,
            tar_extension_bytes_max: MIB,
            sparse_extents_max: 65_536,
            xattr_bytes_max: 65_536,
            path_bytes_max: 4095,
            archive_bytes_max: 128 * GIB,
            archive_members_max: 100_000,
        }
    }
}
