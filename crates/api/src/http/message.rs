//! One request out of a stream of bytes, one answer into it (RFC 9112).

use std::io::{self, Read, Write};

/// Bytes of a request before its body.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Header fields of a request.
const FIELDS_MAX: usize = 64;

/// One request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    /// `None` without a length, and with a length of 0.
    pub(crate) body: Option<Vec<u8>>,
    /// The client will send another one on this connection.
    pub(crate) keep_alive: bool,
}

/// Why there is no request. After each the connection ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The client went, or the host failed.
    #[error("the connection broke")]
    Io(#[from] io::Error),
    /// Not HTTP/1.
    #[error("the request is not HTTP/1.1: {0}")]
    Malformed(httparse::Error),
    /// Too much in front of the body.
    #[error("the request's head has more than {HEAD_BYTES_MAX} bytes")]
    LongHead,
    /// Not a number, or two that differ.
    #[error("the request's Content-Length is not one number")]
    Length,
    /// A body in pieces.
    #[error("the request has a Transfer-Encoding: send it with a Content-Length")]
    TransferEncoding,
    /// A body beyond the limit.
    #[error(
        "the request's body has {len} bytes, at most {most} are taken: see --http-api-max-payload-size"
    )]
    LongBody { len: u64, most: usize },
}

/// The requests of one connection.
pub(crate) struct Requests<S> {
    stream: S,
    /// What was read and not yet used.
    buffer: Vec<u8>,
    body_bytes_max: usize,
}

struct Head {
    request: Request,
    /// Bytes of it in the buffer.
    len: usize,
    body_len: usize,
    expects_continue: bool,
}

impl<S: Read + Write> Requests<S> {
    pub(crate) fn new(stream: S, body_bytes_max: usize) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            body_bytes_max,
        }
    }

    /// The next one; `None` when the client is done.
    pub(crate) fn next(&mut self) -> Result<Option<Request>, ReadError> {
        let head = loop {
            match parse_head(&self.buffer, self.body_bytes_max)? {
                Some(head) => break head,
                None if self.buffer.len() >= HEAD_BYTES_MAX => return Err(ReadError::LongHead),
                None => {}
            }
            if self.fill()? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                };
            }
        };
        let end = head.len + head.body_len;
        if head.expects_continue && self.buffer.len() < end {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        while self.buffer.len() < end {
            if self.fill()? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
        let rest = self.buffer.split_off(end);
        let body = std::mem::replace(&mut self.buffer, rest).split_off(head.len);
        let mut request = head.request;
        request.body = Some(body).filter(|body| !body.is_empty());
        Ok(Some(request))
    }

    pub(super) fn answer(&mut self, answer: &Answer, keep_alive: bool) -> io::Result<()> {
        self.stream.write_all(&answer.bytes(keep_alive))
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut piece = [0; 4096];
        loop {
            match self.stream.read(&mut piece) {
                Ok(n) => {
                    self.buffer
                        .extend_from_slice(piece.get(..n).unwrap_or_default());
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The head at the start of `bytes`, when it is there whole.
fn parse_head(bytes: &[u8], body_bytes_max: usize) -> Result<Option<Head>, ReadError> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut fields);
    let len = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(ReadError::Malformed(error)),
    };
    // As in Firecracker for HTTP/1.0 too: clients count on it.
    let mut keep_alive = true;
    let mut body_len = None;
    let mut expects_continue = false;
    for field in parsed.headers.iter() {
        let value = field.value.trim_ascii();
        if field.name.eq_ignore_ascii_case("content-length") {
            // RFC 9110 §8.6: digits only, no sign.
            let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
            let number = std::str::from_utf8(value)
                .ok()
                .filter(|_| digits)
                .and_then(|text| text.parse::<u64>().ok())
                .ok_or(ReadError::Length)?;
            if body_len.is_some_and(|before| before != number) {
                return Err(ReadError::Length);
            }
            body_len = Some(number);
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(ReadError::TransferEncoding);
        } else if field.name.eq_ignore_ascii_case("connection") {
            for option in value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                if option.eq_ignore_ascii_case(b"close") {
                    keep_alive = false;
                } else if option.eq_ignore_ascii_case(b"keep-alive") {
                    keep_alive = true;
                }
            }
        } else if field.name.eq_ignore_ascii_case("expect") {
            expects_continue = value.eq_ignore_ascii_case(b"100-continue");
        }
    }
    let asked = body_len.unwrap_or(0);
    let body_len = usize::try_from(asked)
        .ok()
        .filter(|&len| len <= body_bytes_max)
        .ok_or(ReadError::LongBody {
            len: asked,
            most: body_bytes_max,
        })?;
    Ok(Some(Head {
        request: Request {
            method: parsed.method.unwrap_or_default().to_owned(),
            path: parsed.path.unwrap_or_default().to_owned(),
            body: None,
            keep_alive,
        },
        len,
        body_len,
        expects_continue,
    }))
}

pub(super) const JSON: &str = "application/json";

/// One answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(super) status: u16,
    pub(super) body: Option<String>,
    /// Of the body.
    pub(super) media_type: &'static str,
    pub(super) deprecated: bool,
}

impl Answer {
    pub(crate) fn fault(status: u16, message: &str) -> Self {
        Self {
            status,
            body: Some(serde_json::json!({ "fault_message": message }).to_string()),
            media_type: JSON,
            deprecated: false,
        }
    }

    pub(crate) fn bytes(&self, keep_alive: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            204 => "No Content",
            400 => "Bad Request",
            413 => "Payload Too Large",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head = format!(
            "HTTP/1.1 {} {reason}\r\nServer: Kombi\r\nConnection: {connection}\r\n",
            self.status
        );
        if self.deprecated {
            head.push_str("Deprecation: true\r\n");
        }
        // RFC 9110 §8.6: 204 has no Content-Length.
        if let Some(body) = &self.body {
            head.push_str(&format!("Content-Type: {}\r\n", self.media_type));
            head.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        } else {
            head.push_str("\r\n");
        }
        head.into_bytes()
    }
}
