//! What whoever started this process is told: one JSON object a line.
//!
//! ```json
//! {"event":"started"}
//! {"event":"stopped","outcome":"power-off","message":null}
//! ```
//! `outcome` is `power-off`, `reset`, `triple-fault`, `stopped` (by a signal) or
//! `error`; `message` is a reason for people, in one line.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use serde::Serialize;

/// The events.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    Started,
    Stopped {
        outcome: &'a str,
        message: Option<&'a str>,
    },
}

/// Where events go; nowhere when nobody asked.
#[derive(Debug, Default)]
pub(crate) struct Status(Option<File>);

impl Status {
    /// Events go to `fd`.
    pub(crate) fn to(fd: OwnedFd) -> Self {
        Self(Some(fd.into()))
    }

    /// The guest runs.
    pub(crate) fn started(&mut self) {
        self.write(&Event::Started);
    }

    /// The machine is gone.
    pub(crate) fn stopped(&mut self, outcome: &str, message: Option<&str>) {
        self.write(&Event::Stopped { outcome, message });
    }

    fn write(&mut self, event: &Event<'_>) {
        let Some(file) = &mut self.0 else {
            return;
        };
        let written = serde_json::to_vec(event)
            .map_err(std::io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                file.write_all(&line)
            });
        if let Err(error) = written {
            tracing::warn!(%error, "nobody takes status events any more");
            self.0 = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn events_are_one_json_object_a_line() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut status = Status::to(ours.into());
        status.started();
        status.stopped("reset", Some("Kernel panic: \"x\""));
        drop(status);
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert_eq!(
            text,
            "{\"event\":\"started\"}\n\
             {\"event\":\"stopped\",\"outcome\":\"reset\",\"message\":\"Kernel panic: \\\"x\\\"\"}\n"
        );
    }

    #[test]
    fn a_listener_that_is_gone_is_no_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let mut status = Status::to(ours.into());
        status.started();
        assert!(status.0.is_none());
    }
}
