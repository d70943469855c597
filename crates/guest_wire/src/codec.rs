//! Frames: bytes to messages and back, over blocking streams or fed piece by piece.

use std::io::{self, Read, Write};

use crate::{FRAME_BYTES_MAX, Hello, Message, WireError};

const LENGTH_BYTES: usize = 4;

/// Appends `message` to `out` as one frame. On error `out` is as before.
///
/// # Errors
/// [`WireError::FrameTooLong`] when it would not fit a frame, [`WireError::Encode`] when it cannot be encoded.
pub fn encode<M: Message>(message: &M, out: &mut Vec<u8>) -> Result<(), WireError> {
    let start = out.len();
    let result = encode_at(message, out, start);
    if result.is_err() {
        out.truncate(start);
    }
    result
}

fn encode_at<M: Message>(message: &M, out: &mut Vec<u8>, start: usize) -> Result<(), WireError> {
    out.extend_from_slice(&[0; LENGTH_BYTES]);
    postcard::to_io(message, &mut *out).map_err(WireError::Encode)?;
    let length = out.len().saturating_sub(start).saturating_sub(LENGTH_BYTES);
    let header = frame_header(length)?;
    if let Some(slot) = out
        .get_mut(start..)
        .and_then(|frame| frame.first_chunk_mut())
    {
        *slot = header;
    }
    Ok(())
}

fn frame_header(length: usize) -> Result<[u8; LENGTH_BYTES], WireError> {
    match u32::try_from(length) {
        Ok(short) if length <= FRAME_BYTES_MAX => Ok(short.to_le_bytes()),
        Ok(_) | Err(_) => Err(WireError::FrameTooLong {
            length,
            limit: FRAME_BYTES_MAX,
        }),
    }
}

fn body_length(header: [u8; LENGTH_BYTES]) -> Result<usize, WireError> {
    let length = usize::try_from(u32::from_le_bytes(header)).unwrap_or(usize::MAX);
    if length <= FRAME_BYTES_MAX {
        Ok(length)
    } else {
        Err(WireError::FrameTooLong {
            length,
            limit: FRAME_BYTES_MAX,
        })
    }
}

fn decode_body<M: Message>(body: &[u8]) -> Result<M, WireError> {
    let (message, surplus) =
        postcard::take_from_bytes(body).map_err(|source| WireError::Malformed {
            length: body.len(),
            source,
        })?;
    if surplus.is_empty() {
        Ok(message)
    } else {
        Err(WireError::Surplus {
            surplus: surplus.len(),
        })
    }
}

/// Writes `hello` as one frame and flushes.
///
/// # Errors
/// [`WireError::Stream`].
pub fn write_hello(stream: &mut impl Write, hello: Hello) -> Result<(), WireError> {
    let body = hello.to_body();
    let mut frame = Vec::with_capacity(LENGTH_BYTES.saturating_add(body.len()));
    frame.extend_from_slice(&frame_header(body.len())?);
    frame.extend_from_slice(&body);
    stream
        .write_all(&frame)
        .and_then(|()| stream.flush())
        .map_err(WireError::Stream)
}

/// Reads the peer's greeting; the caller checks it with [`Hello::agree`]. Reads no byte beyond it.
///
/// # Errors
/// [`WireError::NoHello`] when the stream ends first, [`WireError::NotHello`] when something else comes,
/// [`WireError::Stream`].
pub fn read_hello(stream: &mut impl Read) -> Result<Hello, WireError> {
    match read_frame(stream) {
        Ok(Some(body)) => Hello::from_body(&body),
        Ok(None) | Err(WireError::Truncated) => Err(WireError::NoHello),
        // What does not speak our protocol has, most likely, no plausible length either.
        Err(WireError::FrameTooLong { .. }) => Err(WireError::NotHello),
        Err(error) => Err(error),
    }
}

/// Writes `message` as one frame and flushes.
///
/// # Errors
/// Those of [`encode`], and [`WireError::Stream`].
pub fn write_message<M: Message>(stream: &mut impl Write, message: &M) -> Result<(), WireError> {
    let mut frame = Vec::new();
    encode(message, &mut frame)?;
    stream
        .write_all(&frame)
        .and_then(|()| stream.flush())
        .map_err(WireError::Stream)
}

/// Reads one message, waiting for it; `None` when the stream ended between two frames.
///
/// # Errors
/// Any [`WireError`] of reading; the stream is of no use afterwards.
pub fn read_message<M: Message>(stream: &mut impl Read) -> Result<Option<M>, WireError> {
    read_frame(stream)?
        .map(|body| decode_body(&body))
        .transpose()
}

fn read_frame(stream: &mut impl Read) -> Result<Option<Vec<u8>>, WireError> {
    let mut header = [0; LENGTH_BYTES];
    let mut have = 0;
    while let Some(missing) = header.get_mut(have..).filter(|missing| !missing.is_empty()) {
        match stream.read(missing) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(WireError::Truncated),
            Ok(count) => have = have.saturating_add(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(WireError::Stream(error)),
        }
    }
    let mut body = vec![0; body_length(header)?];
    stream
        .read_exact(&mut body)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => WireError::Truncated,
            _ => WireError::Stream(error),
        })?;
    Ok(Some(body))
}

/// Takes bytes as they come from a non-blocking stream and gives messages when they are whole.
///
/// Feed it, then take until it gives `None`: it holds at most one frame beyond what was fed and not yet taken. After an
/// error it must be dropped together with its stream.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    bytes: Vec<u8>,
    /// Where the first frame not yet taken starts; never beyond `bytes`.
    start: usize,
}

impl FrameDecoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends what was read from the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.start == self.bytes.len() {
            self.bytes.clear();
        } else {
            self.bytes.drain(..self.start);
        }
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// Bytes fed and not yet taken.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.bytes.len().saturating_sub(self.start)
    }

    /// Takes the peer's greeting, the first frame of the stream; `None` until it is whole.
    ///
    /// # Errors
    /// [`WireError::NotHello`].
    pub fn take_hello(&mut self) -> Result<Option<Hello>, WireError> {
        match self.take_frame() {
            Ok(body) => body.map(Hello::from_body).transpose(),
            Err(_too_long) => Err(WireError::NotHello),
        }
    }

    /// Takes the next message; `None` until it is whole.
    ///
    /// # Errors
    /// [`WireError::FrameTooLong`], [`WireError::Malformed`], [`WireError::Surplus`].
    pub fn take_message<M: Message>(&mut self) -> Result<Option<M>, WireError> {
        self.take_frame()?.map(decode_body).transpose()
    }

    /// Tells whether the stream may end here.
    ///
    /// # Errors
    /// [`WireError::Truncated`] when it would end inside a frame.
    pub fn finish(&self) -> Result<(), WireError> {
        if self.pending() == 0 {
            Ok(())
        } else {
            Err(WireError::Truncated)
        }
    }

    fn take_frame(&mut self) -> Result<Option<&[u8]>, WireError> {
        let pending = self.bytes.get(self.start..).unwrap_or_default();
        let Some((header, rest)) = pending.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = body_length(*header)?;
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        self.start = self
            .start
            .saturating_add(LENGTH_BYTES)
            .saturating_add(length);
        Ok(Some(body))
    }
}
