//! Layers as stored: plain tar, gzip (several members too) or zstd (several frames too), told apart by their first
//! bytes, as media types of real images are not always right.
//!
//! Invariant: memory of a decoder is bounded (zstd windows to 128 MiB). Left to others: how much may come out.

use std::io::{self, BufRead, BufReader, Read};

use oci_spec::image::MediaType;

use crate::error::ImageError;

/// zstd's own default for decoders.
const ZSTD_WINDOW_BITS_MAX: u32 = 27;
const INPUT_BYTES: usize = 128 * 1024;

/// How a layer is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// By the first bytes of `stored`, which are read.
    pub(crate) fn of(stored: &mut impl Read) -> io::Result<Compression> {
        let mut start = Vec::new();
        stored.take(4).read_to_end(&mut start)?;
        Ok(match start.as_slice() {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Compression::Zstd,
            _ => Compression::None,
        })
    }

    /// Of a layer that is stored so.
    pub(crate) fn media_type(self) -> MediaType {
        match self {
            Compression::None => MediaType::ImageLayer,
            Compression::Gzip => MediaType::ImageLayerGzip,
            Compression::Zstd => MediaType::ImageLayerZstd,
        }
    }
}

/// Gives the decompressed stream.
pub(crate) fn decompress<'a>(stored: impl Read + 'a) -> Result<Box<dyn Read + 'a>, ImageError> {
    let error = |source| ImageError::Stream {
        what: "its compressed stream",
        source,
    };
    let mut stored = BufReader::with_capacity(INPUT_BYTES, stored);
    // A tar stream is never shorter than a magic number; a shorter first read is no reason to mistake it.
    let start = loop {
        match stored.fill_buf() {
            Ok(start) => break start,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(error(e)),
        }
    };
    match start {
        [0x1f, 0x8b, ..] => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(stored))),
        // A frame, or one of sixteen kinds of skippable frames (RFC 8878 §3.1).
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(stored).map_err(error)?;
            decoder
                .window_log_max(ZSTD_WINDOW_BITS_MAX)
                .map_err(error)?;
            Ok(Box::new(decoder))
        }
        [b'B', b'Z', b'h', ..] | [0xfd, b'7', b'z', b'X', b'Z', ..] => Err(ImageError::Malformed {
            what: "its compressed stream".to_owned(),
            reason: "it is neither gzip, zstd nor plain tar".to_owned(),
        }),
        _ => Ok(Box::new(stored)),
    }
}
