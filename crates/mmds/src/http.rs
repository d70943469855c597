//! HTTP/1 as far as this service needs it: one request's bytes in, one response's out.
//!
//! Invariant: what is read has at most [`REQUEST_BYTES_MAX`] bytes, body included.

use std::fmt::Write;

/// Bytes of a request, as in Firecracker (its receive buffer).
pub(crate) const REQUEST_BYTES_MAX: usize = 2500;
const HEADERS_MAX: usize = 32;

/// A request whose head and body are there.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    /// What stands between the method and the version.
    pub(crate) target: &'a str,
    /// Of HTTP/1.
    pub(crate) minor_version: u8,
    /// Names as written; values that are not UTF-8 are left out.
    pub(crate) headers: Vec<(&'a str, &'a str)>,
    /// Bytes of head and body.
    pub(crate) bytes: usize,
}

/// What bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    /// Not HTTP.
    Syntax,
    /// Another version than 1.0 and 1.1.
    Version,
    /// More bytes, or more headers, than may be.
    Long,
    /// A body whose length cannot be known.
    Body,
}

impl<'a> Request<'a> {
    /// The first request in `bytes`, if all of it is there.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Option<Self>, Bad> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        let head_bytes = match request.parse(bytes) {
            Ok(httparse::Status::Complete(head_bytes)) => head_bytes,
            Ok(httparse::Status::Partial) if bytes.len() < REQUEST_BYTES_MAX => return Ok(None),
            Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
                return Err(Bad::Long);
            }
            Err(httparse::Error::Version) => return Err(Bad::Version),
            Err(
                httparse::Error::HeaderName
                | httparse::Error::HeaderValue
                | httparse::Error::NewLine
                | httparse::Error::Status
                | httparse::Error::Token,
            ) => return Err(Bad::Syntax),
        };
        let (Some(method), Some(target), Some(minor_version)) =
            (request.method, request.path, request.version)
        else {
            return Err(Bad::Syntax);
        };
        let headers = request.headers.iter().filter_map(|header| {
            let value = std::str::from_utf8(header.value).ok()?;
            Some((header.name, value.trim()))
        });
        let mut request = Self {
            method,
            target,
            minor_version,
            headers: headers.collect(),
            bytes: head_bytes,
        };
        request.bytes += request.body_bytes()?;
        match request.bytes {
            total if total > REQUEST_BYTES_MAX => Err(Bad::Long),
            total if total > bytes.len() => Ok(None),
            _ => Ok(Some(request)),
        }
    }

    fn body_bytes(&self) -> Result<usize, Bad> {
        if self.header(&["transfer-encoding"]).is_some() {
            return Err(Bad::Body);
        }
        let mut told = None;
        for (name, value) in &self.headers {
            if name.eq_ignore_ascii_case("content-length") {
                let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
                // RFC 9112 §6.3: two lengths may be two requests to someone else.
                if !digits || told.is_some_and(|told| told != *value) {
                    return Err(Bad::Body);
                }
                told = Some(*value);
            }
        }
        match told {
            None => Ok(0),
            Some(length) => length
                .parse()
                .ok()
                .filter(|length| *length <= REQUEST_BYTES_MAX)
                .ok_or(Bad::Long),
        }
    }

    /// The first header of one of these names, which are in lower case: name and value.
    pub(crate) fn header(&self, names: &[&str]) -> Option<(&'a str, &'a str)> {
        let named =
            |(name, _): &&(&str, &str)| names.iter().any(|one| name.eq_ignore_ascii_case(one));
        self.headers.iter().find(named).copied()
    }

    /// The target's path: http://HOST is taken off.
    pub(crate) fn path(&self) -> &'a str {
        match self.target.strip_prefix("http://") {
            Some(rest) => rest.find('/').map_or("", |at| &rest[at..]),
            None if self.target.starts_with('/') => self.target,
            None => "",
        }
    }

    /// Whether the client wants to go on after the response (RFC 9112 §9.3).
    pub(crate) fn keeps_alive(&self) -> bool {
        let says = |word: &str| {
            self.header(&["connection"]).is_some_and(|(_, value)| {
                value
                    .split(',')
                    .any(|one| one.trim().eq_ignore_ascii_case(word))
            })
        };
        if self.minor_version == 0 {
            says("keep-alive")
        } else {
            !says("close")
        }
    }
}

/// A status that this service answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    BadRequest,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    PayloadTooLarge,
    NotImplemented,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Status::Ok => "200 OK",
            Status::BadRequest => "400 Bad Request",
            Status::Unauthorized => "401 Unauthorized",
            Status::NotFound => "404 Not Found",
            Status::MethodNotAllowed => "405 Method Not Allowed",
            Status::PayloadTooLarge => "413 Payload Too Large",
            Status::NotImplemented => "501 Not Implemented",
        }
    }
}

/// A response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: Status,
    pub(crate) content_type: &'static str,
    /// Besides those that every response has.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Response {
    /// In plain text.
    pub(crate) fn text(status: Status, body: impl Into<String>) -> Self {
        Self {
            status,
            content_type: "text/plain",
            headers: Vec::new(),
            body: body.into(),
        }
    }

    pub(crate) fn bytes(&self, minor_version: u8, keep_alive: bool) -> Vec<u8> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut text = format!(
            "HTTP/1.{minor_version} {}\r\nServer: Kombi MMDS\r\nConnection: {connection}\r\n\
             Content-Type: {}\r\nContent-Length: {}\r\n",
            self.status.line(),
            self.content_type,
            self.body.len()
        );
        for (name, value) in &self.headers {
            // Writing to a string does not fail.
            let _ = write!(text, "{name}: {value}\r\n");
        }
        text.push_str("\r\n");
        text.push_str(&self.body);
        text.into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_there_when_its_last_byte_is() {
        let text = b"PUT http://h/a/b HTTP/1.1\r\nContent-Length: 3\r\nX: y\r\n\r\nabcGET";
        let whole = text.len() - 3;
        for end in 0..whole {
            assert_eq!(Request::parse(&text[..end]), Ok(None), "{end}");
        }
        let request = Request::parse(text).unwrap().unwrap();
        assert_eq!(
            (request.method, request.path(), request.bytes),
            ("PUT", "/a/b", whole)
        );
        assert_eq!(request.header(&["x"]), Some(("X", "y")));
        assert!(request.keeps_alive());
    }

    #[test]
    fn what_is_no_request_is_told_apart() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(REQUEST_BYTES_MAX));
        let headers = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "a: b\r\n".repeat(HEADERS_MAX + 1)
        );
        for (text, bad) in [
            ("\0GET / HTTP/1.1\r\n\r\n", Bad::Syntax),
            ("GET / HTTP/2.0\r\n\r\n", Bad::Version),
            (&long[..REQUEST_BYTES_MAX], Bad::Long),
            (&headers, Bad::Long),
            (
                "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
                Bad::Body,
            ),
            ("PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", Bad::Body),
            (
                "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                Bad::Body,
            ),
            ("PUT / HTTP/1.1\r\nContent-Length: 2490\r\n\r\n", Bad::Long),
            (
                "PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
                Bad::Long,
            ),
        ] {
            assert_eq!(Request::parse(text.as_bytes()), Err(bad), "{text}");
        }
    }

    #[test]
    fn old_clients_are_closed_unless_they_ask() {
        for (head, keeps) in [
            ("HTTP/1.0\r\n", false),
            ("HTTP/1.0\r\nConnection: Keep-Alive\r\n", true),
            ("HTTP/1.1\r\nConnection: te, close\r\n", false),
        ] {
            let text = format!("GET / {head}\r\n");
            let request = Request::parse(text.as_bytes()).unwrap().unwrap();
            assert_eq!(request.keeps_alive(), keeps, "{head}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_none(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(Some(request)) = Request::parse(&bytes) {
                prop_assert!(request.bytes <= bytes.len());
            }
        }

        #[test]
        fn any_text_after_a_request_line_is_read_without_harm(rest in "[a-zA-Z:,; 0-9\r\n\\-]{0,200}") {
            let text = format!("PUT /latest HTTP/1.1\r\n{rest}\r\n\r\n");
            if let Ok(Some(request)) = Request::parse(text.as_bytes()) {
                prop_assert!(request.bytes <= text.len());
                let _ = (request.path(), request.keeps_alive());
            }
        }
    }
}
