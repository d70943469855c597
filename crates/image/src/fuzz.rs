//! Entry points for fuzzing: each takes any bytes and must come back, with little memory and in little time.
//!
//! Invariant: none panics, whatever the bytes. Left to others: making the bytes (`tests/mutations.rs`).

use crate::decompress::decompress;
use crate::erofs::Writer;
use crate::error::ImageError;
use crate::layer::read_layer;
use crate::limits::Limits;
use crate::lower::LowerLayers;
use crate::manifest;
use crate::pax;

/// Limits under which one input costs milliseconds.
pub fn small_limits() -> Limits {
    Limits {
        layer_file_bytes_max: 1 << 24,
        layer_tar_bytes_max: 1 << 24,
        layer_entries_max: 10_000,
        layer_metadata_bytes_max: 1 << 22,
        tar_extension_bytes_max: 1 << 16,
        sparse_extents_max: 1000,
        ..Limits::default()
    }
}

/// Takes `bytes` as a stored layer, and gives the EROFS image's bytes when it is one.
///
/// # Errors
///
/// Why it is refused.
pub fn layer(bytes: &[u8]) -> Result<Vec<u8>, ImageError> {
    let limits = small_limits();
    let path = std::path::Path::new("fuzz");
    let file = || tempfile::tempfile().map_err(ImageError::io("make", path));
    let mut writer = Writer::new(file()?, path, file()?, &limits)?;
    let stream = std::io::Read::take(decompress(bytes)?, limits.layer_tar_bytes_max);
    let tree = read_layer(stream, &mut writer, &mut LowerLayers::new(&[]), &limits)?;
    let mut image = writer.finish(&tree, [0; 16])?;
    let mut out = Vec::new();
    let read = std::io::Seek::rewind(&mut image)
        .and_then(|()| std::io::Read::read_to_end(&mut image, &mut out));
    read.map_err(ImageError::io("read", path))?;
    Ok(out)
}

/// Takes `bytes` as PAX records.
pub fn pax_records(bytes: &[u8]) {
    let _ = pax::parse(bytes);
}

/// Takes `bytes` as index, manifest and configuration.
pub fn documents(bytes: &[u8]) {
    manifest::read_any_document(bytes);
}
