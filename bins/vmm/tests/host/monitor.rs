//! A monitor that is driven over its socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Host, VMM, elf, finish};

/// A monitor that waits for requests.
pub(crate) struct Monitor {
    pub(crate) child: Option<Child>,
    pub(crate) socket: PathBuf,
    /// Goes last: the monitor's files are in it.
    pub(crate) host: Host,
}

impl Monitor {
    pub(crate) fn start(args: &[&str]) -> Self {
        let host = Host::new();
        let socket = host.path("api.sock");
        let child = Command::new(VMM)
            .args(["--die-with-parent", "--level", "off", "--api-sock"])
            .arg(&socket)
            .args(args)
            .env("KOMBI_TRANSLATION_CACHE", host.path("translations"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let monitor = Self {
            child: Some(child),
            socket,
            host,
        };
        let until = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&monitor.socket).is_err() {
            assert!(Instant::now() < until, "the socket never came");
            std::thread::sleep(Duration::from_millis(1));
        }
        monitor
    }

    /// Status and body of one request.
    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        ask(&self.socket, method, path, body)
    }

    pub(crate) fn put(&self, path: &str, body: Value) {
        let got = self.ask("PUT", path, Some(body));
        assert_eq!(got, (204, Value::Null), "PUT {path}");
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, None);
        assert_eq!(status, 200, "GET {path}: {body}");
        body
    }

    /// Head and body of what Prometheus reads.
    #[allow(dead_code)] // not every test asks
    pub(crate) fn metrics(&self) -> (String, String) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    /// One number of it.
    #[allow(dead_code)] // not every test asks
    pub(crate) fn counted(&self, name: &str) -> u64 {
        let (_, body) = self.metrics();
        let number = body
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let number = number.unwrap_or_else(|| panic!("no {name}: {body}"));
        number.parse().unwrap()
    }

    /// The message of a request that is refused.
    pub(crate) fn refusal(&self, method: &str, path: &str, body: Option<Value>) -> String {
        let (status, body) = self.ask(method, path, body);
        assert_eq!(status, 400, "{method} {path}: {body}");
        body["fault_message"].as_str().unwrap().to_owned()
    }

    /// A machine that boots `code`, not started.
    pub(crate) fn prepare(&self, code: &[u8]) {
        std::fs::write(self.host.path("kernel"), elf(code)).unwrap();
        let kernel = self.host.path("kernel");
        self.put(
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 32, "engine": "soft"}),
        );
        self.put(
            "/boot-source",
            json!({"kernel_image_path": kernel, "boot_args": ""}),
        );
    }

    pub(crate) fn action(&self, name: &str) -> (u16, Value) {
        self.ask("PUT", "/actions", Some(json!({"action_type": name})))
    }

    pub(crate) fn state(&self) -> String {
        self.get("/")["state"].as_str().unwrap().to_owned()
    }

    /// The process's exit code and output, once it ended.
    pub(crate) fn end(mut self) -> (Option<i32>, Vec<u8>, Host, PathBuf) {
        let output = finish(self.child.take().unwrap());
        let host = std::mem::replace(&mut self.host, Host::new());
        (
            output.status.code(),
            output.stdout,
            host,
            self.socket.clone(),
        )
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Status and body of one request on a connection of its own.
pub(crate) fn ask(socket: &Path, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = match body {
        "" => Value::Null,
        body => serde_json::from_str(body).unwrap(),
    };
    (status, body)
}
