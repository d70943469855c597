//! The entry point for fuzzing: any bytes as one client's connection.
//!
//! Invariant: no panic, whatever the bytes. Left to others: making the bytes (`fuzz/`).

use std::io;

use crate::http::{Answer, Limits, Requests};
use crate::{Call, Method, parse};

/// A request as the server read it.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// As the client wrote it.
    pub method: String,
    /// As the client wrote it.
    pub path: String,
    /// What came behind the head.
    pub body: Option<Vec<u8>>,
    /// The client will send another one on this connection.
    pub keep_alive: bool,
    /// What it asks for, or why it is not understood.
    pub call: Result<Call, String>,
}

/// A client whose bytes come in pieces and who takes no interest in answers.
struct Client<'a> {
    bytes: &'a [u8],
    piece: usize,
}

impl io::Read for Client<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let room = out.len().min(self.piece);
        self.bytes.read(out.get_mut(..room).unwrap_or_default())
    }
}

impl io::Write for Client<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads requests from `bytes`, which arrive `piece` at a time, until one cannot be read.
#[must_use]
pub fn connection(bytes: &[u8], piece: usize) -> Vec<Seen> {
    let client = Client { bytes, piece };
    let mut requests = Requests::new(client, Limits::default().body_bytes);
    let mut seen = Vec::new();
    while let Ok(Some(request)) = requests.next() {
        let call = match Method::parse(&request.method) {
            Some(method) => parse(method, &request.path, request.body.as_deref()).1,
            None => break,
        };
        seen.push(Seen {
            method: request.method,
            path: request.path,
            body: request.body,
            keep_alive: request.keep_alive,
            call: call.map_err(|error| error.to_string()),
        });
    }
    seen
}

/// The answer that a client gets whose request is refused with this line.
#[must_use]
pub fn refusal(line: &str) -> Vec<u8> {
    Answer::fault(400, line).bytes(false)
}
