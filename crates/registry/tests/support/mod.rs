//! A small image, and a registry of the test's own that behaves as badly as it is told to.
#![allow(dead_code)] // each test program uses its part

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use image::{Digest, Store};
use registry::{Configuration, Credentials, Registries};
use serde_json::{Value, json};

/// An image: documents and layers by digest.
#[derive(Clone)]
pub(crate) struct Sample {
    pub(crate) blobs: HashMap<String, Vec<u8>>,
    pub(crate) manifest: Digest,
    pub(crate) config: Digest,
    /// Lowest first.
    pub(crate) layers: Vec<Digest>,
    /// An index that has it, and one for another platform.
    pub(crate) index: Digest,
}

fn tar(name: &str, data: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    builder
        .append_data(&mut header, name, data)
        .expect("written");
    builder.into_inner().expect("finished")
}

impl Sample {
    /// `count` layers of some 100 KB, which do not compress.
    pub(crate) fn new(count: u8) -> Self {
        let mut blobs = HashMap::new();
        let mut keep = |bytes: Vec<u8>| {
            let digest = Digest::sha256_of(&bytes);
            let size = bytes.len();
            blobs.insert(digest.to_string(), bytes);
            (digest, size)
        };
        let described = |kind: &str, (digest, size): &(Digest, usize)| -> Value {
            let media_type = format!("application/vnd.oci.image.{kind}");
            json!({"mediaType": media_type, "digest": digest.to_string(), "size": size})
        };
        let (mut diff_ids, mut layers) = (Vec::new(), Vec::new());
        let mut state = 1_u32;
        for nth in 0..count {
            let data: Vec<u8> = (0..100_000)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as u8
                })
                .collect();
            let layer = tar(&format!("file{nth}"), &data);
            diff_ids.push(Digest::sha256_of(&layer).to_string());
            layers.push(keep(layer));
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = keep(config.to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": described("config.v1+json", &config),
            "layers": layers.iter().map(|layer| described("layer.v1.tar", layer)).collect::<Vec<_>>(),
        });
        let manifest = keep(manifest.to_string().into_bytes());
        let mut ours = described("manifest.v1+json", &manifest);
        ours["platform"] = json!({"os": "linux", "architecture": "amd64"});
        let other = Digest::sha256_of(b"elsewhere");
        let mut others = described("manifest.v1+json", &(other, 9));
        others["platform"] = json!({"os": "linux", "architecture": "arm64"});
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [others, ours],
        });
        let (index, _) = keep(index.to_string().into_bytes());
        Self {
            manifest: manifest.0,
            config: config.0,
            layers: layers.into_iter().map(|(digest, _)| digest).collect(),
            index,
            blobs,
        }
    }
}

/// A request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
    /// Where its range begins.
    pub(crate) from: Option<usize>,
}

/// What the registry does with it.
pub(crate) enum Answer {
    /// What an honest one does.
    Honest,
    /// A status, headers, and a body.
    Status(u16, String, Vec<u8>),
    /// So many bytes of the body, and no more for ever.
    Stall(usize),
    /// So many bytes of the body, then the end.
    Cut(usize),
    /// A body in place of the right one.
    Body(Vec<u8>),
    /// A body without an end.
    Endless,
}

type Hook = dyn Fn(&Request) -> Answer + Send + Sync;

/// A registry.
pub(crate) struct Fake {
    pub(crate) host: String,
    pub(crate) seen: Arc<Mutex<Vec<Request>>>,
}

impl Fake {
    /// Has `sample` as `app:1` and as `app:many`, an index.
    pub(crate) fn start(
        sample: &Sample,
        hook: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let host = listener.local_addr().expect("an address").to_string();
        let seen: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (hook, sample, log): (Arc<Hook>, _, _) = (Arc::new(hook), sample.clone(), seen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (hook, sample, log) = (hook.clone(), sample.clone(), log.clone());
                std::thread::spawn(move || serve(stream, &sample, hook.as_ref(), &log));
            }
        });
        Self { host, seen }
    }

    pub(crate) fn count(&self, part: &str) -> usize {
        let seen = self.seen.lock().expect("not poisoned");
        seen.iter()
            .filter(|request| request.path.contains(part))
            .count()
    }
}

fn serve(stream: TcpStream, sample: &Sample, hook: &Hook, log: &Mutex<Vec<Request>>) -> Option<()> {
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .ok()?;
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let mut request = Request {
        method: words.next()?,
        path: words.next()?,
        ..Request::default()
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.authorization = Some(value.to_owned()),
            "range" => {
                request.from = value
                    .strip_prefix("bytes=")?
                    .split('-')
                    .next()?
                    .parse()
                    .ok()
            }
            _ => {}
        }
    }
    log.lock().expect("not poisoned").push(request.clone());
    let version = request.path.rsplit('/').next().unwrap_or_default();
    let named = match version {
        "1" => sample.manifest.to_string(),
        "many" => sample.index.to_string(),
        digest => digest.to_owned(),
    };
    let body = sample.blobs.get(&named).cloned();
    let mut out = stream;
    match (hook(&request), body) {
        (Answer::Status(code, headers, body), _) => {
            let len = body.len();
            write!(
                out,
                "HTTP/1.1 {code} X\r\n{headers}Content-Length: {len}\r\nConnection: close\r\n\r\n"
            )
            .ok()?;
            out.write_all(&body).ok()?;
        }
        (Answer::Endless, _) => {
            write!(out, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").ok()?;
            loop {
                out.write_all(&[b' '; 65536]).ok()?;
            }
        }
        (_, None) if request.path == "/v2/" => {
            write!(
                out,
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
            )
            .ok()?;
        }
        (_, None) => {
            write!(
                out,
                "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            .ok()?;
        }
        (answer, Some(body)) => {
            let body = match &answer {
                Answer::Body(other) => other.clone(),
                _ => body,
            };
            let from = request.from.unwrap_or(0).min(body.len());
            let status = if from > 0 {
                "206 Partial Content"
            } else {
                "200 OK"
            };
            let rest = &body[from..];
            let len = rest.len();
            write!(
                out,
                "HTTP/1.1 {status}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n"
            )
            .ok()?;
            let most = match answer {
                Answer::Stall(most) | Answer::Cut(most) => most.min(len),
                _ => len,
            };
            out.write_all(&rest[..most]).ok()?;
            if matches!(answer, Answer::Stall(_)) {
                let _ = reader.read(&mut [0]);
            }
        }
    }
    Some(())
}

/// A store of the test's own.
pub(crate) fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().expect("a folder");
    let store = Store::open(dir.path()).expect("a store");
    (dir, store)
}

/// Registries without a configuration, that soon lose patience.
pub(crate) fn registries() -> Registries {
    let registries = Registries::new(Configuration::default(), Credentials::default());
    registries
        .expect("registries")
        .with_patience(Duration::from_millis(700))
}

/// The whole text of an error.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
