//! The socket, its connections, and what is said to each request.
//!
//! Invariant: at most [`Limits::connections`] threads; the socket's file goes with the
//! server.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::Serve;
use crate::action::{Answer as Outcome, Refusal};
use crate::counters::Counters;
use crate::http::message::{Answer, JSON, ReadError, Request, Requests};
use crate::routes::{self, Method};

/// A client that takes no byte of an answer for this long is let go.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes that a client may have sent behind what was refused.
const DRAIN_BYTES_MAX: usize = 1 << 20;
/// How long it may take to send them.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(200);
/// Bytes of a connection's stack: a request's head and a JSON value of bounded depth.
const STACK_BYTES: usize = 256 << 10;

/// How much clients may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; the next one is told 503.
    pub connections: usize,
    /// Bytes of one body.
    pub body_bytes: usize,
}

impl Default for Limits {
    /// Firecracker's.
    fn default() -> Self {
        Self {
            connections: 10,
            body_bytes: 51200,
        }
    }
}

/// The API's server, listening.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    limits: Limits,
    counters: Arc<Counters>,
    answering: Answering,
}

/// How many requests are being answered. Clones count the same ones.
#[derive(Clone, Debug, Default)]
pub struct Answering(Arc<AtomicUsize>);

impl Answering {
    /// Waits until no request is being answered, but no longer than `patience`: for a
    /// process that ends because of one.
    pub fn wait(&self, patience: Duration) {
        let until = Instant::now() + patience;
        while self.0.load(Ordering::SeqCst) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Counts one until it is dropped.
    fn one(&self) -> Place {
        self.0.fetch_add(1, Ordering::SeqCst);
        Place(self.0.clone())
    }
}

impl Server {
    /// Listens at `path`, where nothing may be.
    ///
    /// # Errors
    /// What bind(2) says.
    pub fn bind(path: &Path, limits: Limits) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        Ok(Self {
            listener,
            path: path.to_path_buf(),
            limits,
            counters: Arc::default(),
            answering: Answering::default(),
        })
    }

    /// Counts what comes in.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// What is being answered.
    pub fn answering(&self) -> Answering {
        self.answering.clone()
    }

    /// Serves until the process ends. Connections get threads of their own, which begin
    /// where the calling thread is: confined if it is.
    ///
    /// # Errors
    /// When the socket itself fails.
    pub fn run(&self, serve: &Arc<dyn Serve>) -> io::Result<std::convert::Infallible> {
        let open = Arc::new(AtomicUsize::new(0));
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if is_passing(&error) => {
                    tracing::warn!("the API's socket: {error}");
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let place = Place::take(&open, self.limits.connections);
            if place.is_none() {
                turn_away(stream, self.limits.connections);
                continue;
            }
            let serve = serve.clone();
            let counters = self.counters.clone();
            let (limits, answering) = (self.limits, self.answering.clone());
            let spawned = std::thread::Builder::new()
                .name("api_connection".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    let _place = place;
                    converse(stream, serve.as_ref(), &counters, &answering, limits);
                });
            if let Err(error) = spawned {
                tracing::warn!("an API connection got no thread: {error}");
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether accept(2) may work again.
fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::INTR
                | Errno::CONNABORTED
                | Errno::MFILE
                | Errno::NFILE
                | Errno::NOMEM
                | Errno::NOBUFS
                | Errno::AGAIN
        )
    )
}

/// One of the places for connections.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(open: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        open.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |now| {
            (now < most).then_some(now + 1)
        })
        .ok()
        .map(|_| Self(open.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn turn_away(mut stream: UnixStream, most: usize) {
    let answer = Answer::fault(
        503,
        &format!("{most} connections are open already: close one first"),
    );
    // A client's socket takes this much at once.
    let _ = stream.set_nonblocking(true);
    let _ = stream.write_all(&answer.bytes(false));
    drain(&stream);
}

/// Reads what a client has sent and nobody will answer: unread bytes would make its
/// system call the answer that it already has a broken connection (Linux, unix(7)).
fn drain(mut stream: &UnixStream) {
    let mut left = DRAIN_BYTES_MAX;
    let mut piece = [0; 4096];
    let _ = stream.shutdown(std::net::Shutdown::Write);
    while let Ok(n @ 1..) = stream.read(&mut piece) {
        left = left.saturating_sub(n);
        if left == 0 {
            return;
        }
    }
}

/// Answers requests until the client is done, or says something that is not HTTP.
fn converse(
    stream: UnixStream,
    serve: &dyn Serve,
    counters: &Counters,
    answering: &Answering,
    limits: Limits,
) {
    if let Err(error) = stream.set_write_timeout(Some(WRITE_TIMEOUT)) {
        tracing::warn!("an API connection: {error}");
        return;
    }
    let mut requests = Requests::new(&stream, limits.body_bytes);
    loop {
        // Counted until its answer is written, or the connection is given up.
        let (answer, keep_alive, _one) = match requests.next() {
            Ok(Some(request)) => {
                let one = answering.one();
                (answer(&request, serve, counters), request.keep_alive, one)
            }
            Ok(None) => return,
            Err(ReadError::Io(error)) => {
                tracing::debug!("an API connection broke: {error}");
                return;
            }
            Err(error) => {
                tracing::error!("API: {error}");
                let _ = requests.answer(&Answer::fault(400, &error.to_string()), false);
                let _ = stream.set_read_timeout(Some(DRAIN_TIMEOUT));
                return drain(&stream);
            }
        };
        if let Err(error) = requests.answer(&answer, keep_alive) {
            tracing::warn!("an API client did not take its answer: {error}");
            return;
        }
        if !keep_alive {
            return;
        }
    }
}

fn answer(request: &Request, serve: &dyn Serve, counters: &Counters) -> Answer {
    let (method, path) = (&request.method, &request.path);
    tracing::info!("API: {method} {path}");
    let Some(known) = Method::parse(method) else {
        let message = format!("there is no method {method}: use GET, PUT, PATCH or DELETE");
        tracing::error!("API: {message}");
        return Answer::fault(400, &message);
    };
    let (route, call) = routes::parse(known, path, request.body.as_deref());
    let mut deprecated = false;
    let outcome = match call {
        Err(error) => Err(Refusal::BadRequest(error.to_string())),
        Ok(call) => {
            if let Some(what) = call.deprecated {
                deprecated = true;
                counters.count_deprecated();
                tracing::warn!("API: {method} {path}: {what} is deprecated");
            }
            serve.act(call.action)
        }
    };
    if let Some(route) = route {
        counters.count(route, outcome.is_err());
    }
    let mut answer = match outcome {
        Ok(Outcome::Done) => Answer {
            status: 204,
            body: None,
            media_type: JSON,
            deprecated: false,
        },
        Ok(Outcome::Body(value)) => Answer {
            status: 200,
            body: Some(value.to_string()),
            media_type: JSON,
            deprecated: false,
        },
        Ok(Outcome::Text { media_type, text }) => Answer {
            status: 200,
            body: Some(text),
            media_type,
            deprecated: false,
        },
        Err(refusal) => {
            tracing::error!("API: {method} {path}: {refusal}");
            let status = match refusal {
                Refusal::BadRequest(_) => 400,
                Refusal::TooLarge(_) => 413,
            };
            Answer::fault(status, &refusal.to_string())
        }
    };
    answer.deprecated = deprecated;
    answer
}
