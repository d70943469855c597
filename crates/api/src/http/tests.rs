//! The server, by honest, broken and hostile clients.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::message::{Request, Requests};
use super::{Limits, Server};
use crate::{Action, Answer, Refusal, Serve};

/// Takes everything; `GET /machine-config` takes its time.
struct Fake {
    seen: Mutex<Vec<Action>>,
}

impl Serve for Fake {
    fn act(&self, action: Action) -> Result<Answer, Refusal> {
        match &action {
            Action::GetMachineConfig => std::thread::sleep(Duration::from_millis(500)),
            Action::GetVersion => return Ok(Answer::Body(serde_json::json!({"v": 1}))),
            Action::PutMmds(_) => return Err(Refusal::TooLarge("large".to_owned())),
            _ => {}
        }
        self.seen.lock().unwrap().push(action);
        Ok(Answer::Done)
    }
}

struct Rig {
    dir: tempfile::TempDir,
    counters: Arc<crate::Counters>,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        connections: 3,
        body_bytes: 100,
    };
    let server = Server::bind(&dir.path().join("s"), limits).unwrap();
    let counters = server.counters();
    let serve: Arc<dyn Serve> = Arc::new(Fake {
        seen: Mutex::default(),
    });
    std::thread::spawn(move || server.run(&serve));
    Rig { dir, counters }
}

impl Rig {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// Everything that comes back for `bytes` on a connection of their own.
    fn say(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // A client that is turned away may find the connection closed already.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut text = Vec::new();
        match stream.read_to_end(&mut text) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
        String::from_utf8(text).unwrap()
    }
}

fn put(path: &str, body: &str) -> String {
    format!(
        "PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn an_answer_with_a_body_is_200_and_one_without_is_204() {
    let rig = rig();
    let text = rig.say(b"GET /version HTTP/1.1\r\n\r\n");
    assert_eq!(
        text,
        "HTTP/1.1 200 OK\r\nServer: Kombi\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{\"v\":1}"
    );
    let text = rig.say(put("/entropy", "{}").as_bytes());
    assert_eq!(
        text,
        "HTTP/1.1 204 No Content\r\nServer: Kombi\r\nConnection: keep-alive\r\n\r\n"
    );
}

#[test]
fn requests_follow_each_other_on_one_connection() {
    let rig = rig();
    let three = format!(
        "{}{}{}",
        put("/entropy", "{}"),
        "GET /version HTTP/1.1\r\n\r\n",
        put("/entropy", "{}")
    );
    let text = rig.say(three.as_bytes());
    assert_eq!(text.matches("HTTP/1.1 204").count(), 2);
    assert_eq!(text.matches("HTTP/1.1 200").count(), 1);
}

#[test]
fn a_client_that_speaks_http_1_0_keeps_its_connection_until_it_says_close() {
    let rig = rig();
    let one = "GET /version HTTP/1.0\r\n";
    let text = rig.say(format!("{one}\r\n{one}\r\n").as_bytes());
    assert_eq!(text.matches("HTTP/1.1 200").count(), 2, "{text}");
    let text = rig.say(format!("{one}Connection: close\r\n\r\n{one}\r\n").as_bytes());
    assert_eq!(text.matches("HTTP/1.1 200").count(), 1, "{text}");
}

#[test]
fn what_is_not_understood_is_400_with_a_message_and_the_connection_lives() {
    let rig = rig();
    let bad = format!("{}GET /version HTTP/1.1\r\n\r\n", put("/entropy", "{"));
    let text = rig.say(bad.as_bytes());
    assert!(text.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{text}");
    assert!(
        text.contains(r#"{"fault_message":"the body of PUT /entropy is not understood"#),
        "{text}"
    );
    assert!(text.contains("HTTP/1.1 200 OK"), "{text}");
    let text = rig.say(b"POST /version HTTP/1.1\r\n\r\n");
    assert!(text.contains("there is no method POST"), "{text}");
}

#[test]
fn what_is_not_http_is_400_and_the_connection_ends() {
    let rig = rig();
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(9000));
    for (bytes, wanted) in [
        (&b"\x00\x01\x02\r\n\r\n"[..], "not HTTP/1.1"),
        (b"GET / HTTP/3.0\r\n\r\n", "not HTTP/1.1"),
        (
            b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            "not one number",
        ),
        (
            b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "not one number",
        ),
        (
            b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "Transfer-Encoding",
        ),
        (
            b"PUT / HTTP/1.1\r\nContent-Length: 101\r\n\r\n",
            "has 101 bytes, at most 100",
        ),
        (
            b"PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "not one number",
        ),
        (long.as_bytes(), "more than 8192 bytes"),
    ] {
        let text = rig.say(&[bytes, b"GET /version HTTP/1.1\r\n\r\n"].concat());
        assert!(text.starts_with("HTTP/1.1 400 "), "{text}");
        assert!(
            text.contains("Connection: close") && text.contains(wanted),
            "{text}"
        );
        assert!(!text.contains("200 OK"), "{text}");
    }
}

#[test]
fn the_store_of_metadata_alone_answers_413() {
    let text = rig().say(put("/mmds", "{}").as_bytes());
    assert!(
        text.starts_with("HTTP/1.1 413 Payload Too Large\r\n"),
        "{text}"
    );
}

#[test]
fn deprecated_fields_are_marked() {
    let rig = rig();
    let body = r#"{"guest_cid": 3, "uds_path": "/s", "vsock_id": "a"}"#;
    let text = rig.say(put("/vsock", body).as_bytes());
    assert!(text.contains("Deprecation: true\r\n"), "{text}");
    let counts = rig.counters.totals();
    assert_eq!(counts["deprecated_api"]["deprecated_http_api_calls"], 1);
    assert_eq!(counts["put_api_requests"]["vsock_count"], 1);
}

#[test]
fn one_connection_too_many_is_told_so_and_a_place_comes_free() {
    let rig = rig();
    let mut open: Vec<_> = (0..3).map(|_| rig.connect()).collect();
    for stream in &mut open {
        stream.write_all(b"GET /version HTTP/1.1\r\n\r\n").unwrap();
        assert!(stream.read(&mut [0; 500]).unwrap() > 0);
    }
    let text = rig.say(b"");
    assert!(
        text.starts_with("HTTP/1.1 503 Service Unavailable\r\n"),
        "{text}"
    );
    open.pop();
    let end = Instant::now() + Duration::from_secs(20);
    while !rig.say(b"GET /version HTTP/1.1\r\n\r\n").contains("200 OK") {
        assert!(Instant::now() < end, "the place never came free");
    }
}

#[test]
fn a_slow_request_and_a_silent_client_make_nobody_wait() {
    let rig = rig();
    let mut slow = rig.connect();
    slow.write_all(b"GET /machine-config HTTP/1.1\r\n\r\n")
        .unwrap();
    let mut silent = rig.connect();
    silent
        .write_all(b"PUT /entropy HTTP/1.1\r\nContent-Length: 2\r\n\r\n{")
        .unwrap();
    // It can only be there before the slow one if it did not wait for it.
    assert!(rig.say(b"GET /version HTTP/1.1\r\n\r\n").contains("200 OK"));
    slow.set_nonblocking(true).unwrap();
    assert!(slow.read(&mut [0; 1]).is_err());
}

#[test]
fn a_client_that_waits_for_it_is_told_to_go_on() {
    let rig = rig();
    let mut stream = rig.connect();
    stream
        .write_all(b"PUT /entropy HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        .unwrap();
    let mut bytes = [0; 25];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"{}").unwrap();
    let mut bytes = [0; 12];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"HTTP/1.1 204");
}

#[test]
fn a_socket_path_that_is_taken_is_refused_and_ours_goes_with_us() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = Server::bind(&path, Limits::default()).unwrap();
    let error = Server::bind(&path, Limits::default()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    drop(server);
    assert!(!path.exists());
}

/// A stream that gives its bytes in pieces and forgets what is written.
struct Pieces<'a> {
    bytes: &'a [u8],
    piece: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let n = self.piece.min(self.bytes.len()).min(to.len());
        let (now, later) = self.bytes.split_at(n);
        to[..n].copy_from_slice(now);
        self.bytes = later;
        Ok(n)
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// All requests of a stream, until it ends or breaks.
fn all(bytes: &[u8], piece: usize) -> (Vec<Request>, bool) {
    let mut requests = Requests::new(Pieces { bytes, piece }, 100);
    let mut list = Vec::new();
    loop {
        match requests.next() {
            Ok(Some(request)) => list.push(request),
            Ok(None) => return (list, true),
            Err(_) => return (list, false),
        }
    }
}

proptest! {
    #[test]
    fn requests_are_the_same_however_the_bytes_arrive(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 1..5),
        piece in 1_usize..40,
    ) {
        let mut bytes = Vec::new();
        for body in &bodies {
            bytes.extend(format!("PUT /mmds HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).bytes());
            bytes.extend(body);
        }
        let (list, whole) = all(&bytes, piece);
        prop_assert!(whole);
        let got: Vec<Vec<u8>> = list.into_iter().map(|one| one.body.unwrap_or_default()).collect();
        prop_assert_eq!(got, bodies);
    }

    #[test]
    fn no_bytes_make_it_panic(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b' ')], 0..400),
        start in prop::sample::select(vec![&b""[..], b"GET / HTTP/1.1\r\n", b"PUT /mmds HTTP/1.1\r\nContent-Length: 9\r\n"]),
        piece in 1_usize..40,
    ) {
        let bytes = [start, &bytes].concat();
        prop_assert_eq!(all(&bytes, piece), all(&bytes, 4096));
    }
}
