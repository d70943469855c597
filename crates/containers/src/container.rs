//! One container: reading it, waiting for it, holding it.
//!
//! Invariant: only who has a [`Supervision`] writes its state. Its lock file holds the exit code once there is one, so
//! that who waited on the open file learns it even where the container is gone by then.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::files::{lock, open_lock, read, remove_tree, replace, try_lock};
use crate::root::{GONE, sync_dir};
use crate::{Error, Phase, Record, State};

pub(crate) const RECORD: &str = "record.json";
pub(crate) const STATE: &str = "state.json";
const LOCK: &str = "lock";
/// What stands for the exit code of a container whose supervisor was killed, as docker has it behind a restart.
const EXIT_LOST: u8 = 255;
/// How often a lock is looked at that must not be waited for without end.
const PAUSE: Duration = Duration::from_millis(5);

/// A container as it was when it was looked at.
#[derive(Clone, Debug)]
pub struct Container {
    dir: PathBuf,
    record: Record,
    state: State,
}

/// What who waits learns of a container's holder.
enum Holder {
    /// It ended, with this exit code.
    Said(u8),
    /// It is still there.
    Stays,
    /// There is none, and none said anything.
    None,
}

impl Container {
    pub(crate) fn at(dir: PathBuf) -> Result<Self, Error> {
        let gone = |error| match error {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                let name = dir.file_name().unwrap_or_default().to_string_lossy();
                Error::NotHere {
                    given: name.into_owned(),
                }
            }
            error => error,
        };
        let record = read(&dir.join(RECORD)).map_err(gone)?;
        let mut state: State = read(&dir.join(STATE)).map_err(gone)?;
        if state.phase == Phase::Running && !is_held(&dir)? {
            // It may have ended between the two looks.
            state = read(&dir.join(STATE)).map_err(gone)?;
            if state.phase == Phase::Running {
                state = lost(state);
            }
        }
        Ok(Self { dir, record, state })
    }

    /// What was asked.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// What became of it.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Where its files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether its command runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.state.phase == Phase::Running
    }

    /// Whether somebody holds it now.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_held(&self) -> Result<bool, Error> {
        is_held(&self.dir)
    }

    /// Waits for its end, also of one that is yet to start, at most `patience`; gives its exit code, none when the time
    /// was over.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn wait(&self, patience: Option<Duration>) -> Result<Option<u8>, Error> {
        let end = patience.map(|patience| Instant::now() + patience);
        loop {
            match self.wait_for_holder(end)? {
                Holder::Said(exit_code) => return Ok(Some(exit_code)),
                Holder::Stays => return Ok(None),
                // Nobody ran it yet, or it is gone, or who ran it went without a word.
                Holder::None => match Self::at(self.dir.clone()) {
                    Ok(now) if now.state.phase == Phase::Created => {}
                    Ok(now) => return Ok(Some(now.state.exit_code.unwrap_or(EXIT_LOST))),
                    Err(Error::NotHere { .. }) => {
                        return Ok(Some(self.state.exit_code.unwrap_or(EXIT_LOST)));
                    }
                    Err(error) => return Err(error),
                },
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                return Ok(None);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until the lock is free, and reads what its holder left.
    fn wait_for_holder(&self, end: Option<Instant>) -> Result<Holder, Error> {
        let path = self.dir.join(LOCK);
        let mut file = match File::options().read(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Holder::None),
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        match end {
            None => lock(&file, FlockOperation::LockShared).map_err(Error::io("lock", &path))?,
            Some(end) => {
                let how = FlockOperation::NonBlockingLockShared;
                while !try_lock(&file, how).map_err(Error::io("lock", &path))? {
                    if Instant::now() >= end {
                        return Ok(Holder::Stays);
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        }
        let mut text = String::new();
        file.read_to_string(&mut text)
            .map_err(Error::io("read", &path))?;
        Ok(text.trim().parse().map_or(Holder::None, Holder::Said))
    }

    /// Becomes the one who runs it.
    ///
    /// # Errors
    /// [`Error::Running`], [`Error::Io`].
    pub fn supervise(self) -> Result<Supervision, Error> {
        // Who only looks has the lock for a moment.
        const OTHERS: Duration = Duration::from_secs(2);
        let path = self.dir.join(LOCK);
        let file = open_lock(&path)?;
        let end = Instant::now() + OTHERS;
        let how = FlockOperation::NonBlockingLockExclusive;
        while !try_lock(&file, how).map_err(Error::io("lock", &path))? {
            if Instant::now() >= end {
                return Err(Error::Running {
                    name: self.record.name,
                });
            }
            std::thread::sleep(PAUSE);
        }
        file.set_len(0).map_err(Error::io("write", &path))?;
        Ok(Supervision {
            dir: self.dir,
            record: self.record,
            state: self.state,
            file,
        })
    }

    /// Out of the way, then removed. Only with the root's lock held.
    pub(crate) fn give_up(&self) -> Result<(), Error> {
        let path = self.dir.join(LOCK);
        let file = match File::options().read(true).open(&path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        if let Some(file) = &file {
            let how = FlockOperation::NonBlockingLockShared;
            if !try_lock(file, how).map_err(Error::io("lock", path))? {
                return Err(Error::Running {
                    name: self.record.name.clone(),
                });
            }
        }
        go(&self.dir)
    }
}

/// Takes a directory away: at once for whoever looks, then its files.
fn go(dir: &Path) -> Result<(), Error> {
    let gone = dir.with_extension(GONE);
    match fs::rename(dir, &gone) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Error::io("remove", dir))?,
    }
    remove_tree(&gone)
}

fn is_held(dir: &Path) -> Result<bool, Error> {
    let path = dir.join(LOCK);
    let file = match File::options().read(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let free = try_lock(&file, FlockOperation::NonBlockingLockShared);
    Ok(!free.map_err(Error::io("lock", path))?)
}

/// The state of a container whose supervisor went without a word.
fn lost(state: State) -> State {
    State {
        phase: Phase::Exited,
        pid: None,
        exit_code: Some(EXIT_LOST),
        error: Some("its supervisor was killed, or the host restarted".to_owned()),
        ..state
    }
}

/// The right to run a container, for as long as this lives.
#[derive(Debug)]
pub struct Supervision {
    dir: PathBuf,
    record: Record,
    state: State,
    file: File,
}

impl Supervision {
    /// What was asked.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Where its files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its command runs.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn started(&mut self) -> Result<(), Error> {
        self.state = State {
            phase: Phase::Running,
            pid: Some(std::process::id()),
            started: Some(crate::now()),
            ..State::created()
        };
        replace(&self.dir.join(STATE), &self.state)
    }

    /// It is over. Removes it, if that was asked.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn ended(mut self, exit_code: u8, error: Option<String>) -> Result<(), Error> {
        self.state = State {
            phase: Phase::Exited,
            pid: None,
            finished: Some(crate::now()),
            exit_code: Some(exit_code),
            error,
            ..self.state
        };
        let told = self
            .file
            .seek(SeekFrom::Start(0))
            .and_then(|_| write!(self.file, "{exit_code}"))
            .map_err(Error::io("write", self.dir.join(LOCK)));
        if self.record.remove_at_end {
            return go(&self.dir).and(told);
        }
        // A full disk may take one of the two, not both without a try.
        replace(&self.dir.join(STATE), &self.state)
            .and(told)
            .and_then(|()| sync_dir(&self.dir))
    }
}
