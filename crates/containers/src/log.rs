//! What a container wrote: JSON lines as docker's json-file driver keeps them, in files that are rotated.
//!
//! `log.json` is written; `log.json.1` came before it, and so on.
//!
//! Invariants:
//! - A line is written whole, with one call. What a full disk does not take is lost, and the container goes on.
//! - Whatever a file holds, reading it gives entries: what is no JSON line is left out.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, LogOptions};

/// The file that is written.
const FILE: &str = "log.json";
/// Bytes of one entry; longer lines become several, as docker's do.
const ENTRY_BYTES_MAX: usize = 16 << 10;
/// Bytes of a line of the file: each byte of an entry may take six (`\u0000`), and there is something around it.
const LINE_BYTES_MAX: u64 = 6 * ENTRY_BYTES_MAX as u64 + 256;

/// How often a log is looked at anew because its files were moved on meanwhile.
const LOOKS_MAX: u32 = 100;

/// Where something was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output, and all of a terminal's.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A line, or a piece of a long one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The text; what is no UTF-8 is replaced. Ends with a line break where the line ended.
    pub log: String,
    /// Where it was written to.
    pub stream: Stream,
    /// When it came, RFC 3339 in UTC.
    pub time: String,
}

/// Writes a container's log.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    options: LogOptions,
    file: File,
    bytes: u64,
    /// Lines that have not ended, of both streams.
    begun: [Vec<u8>; 2],
}

impl Writer {
    /// Goes on with the log in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(dir: &Path, options: LogOptions) -> Result<Self, Error> {
        let path = dir.join(FILE);
        let file = append(&path).map_err(Error::io("open", &path))?;
        let bytes = file.metadata().map_err(Error::io("read", &path))?.len();
        Ok(Self {
            path,
            options,
            file,
            bytes,
            begun: [Vec::new(), Vec::new()],
        })
    }

    /// Takes what came; lines that ended are written.
    ///
    /// # Errors
    /// The first that the disk had; what it did not take is lost.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let mut outcome = Ok(());
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let begun = &mut self.begun[stream as usize];
            begun.extend_from_slice(piece);
            while let Some(entry) = next_entry(&mut self.begun[stream as usize]) {
                outcome = outcome.and(self.put(stream, &entry));
            }
        }
        outcome
    }

    /// Writes lines that will not end any more.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn finish(mut self) -> io::Result<()> {
        let mut outcome = Ok(());
        for stream in [Stream::Stdout, Stream::Stderr] {
            let rest = std::mem::take(&mut self.begun[stream as usize]);
            if !rest.is_empty() {
                outcome = outcome.and(self.put(stream, &rest));
            }
        }
        outcome
    }

    fn put(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let entry = Entry {
            log: String::from_utf8_lossy(bytes).into_owned(),
            stream,
            time: crate::now(),
        };
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        let full = |limit| self.bytes > 0 && self.bytes + line.len() as u64 > limit;
        if self.options.max_size.is_some_and(full) {
            self.rotate()?;
        }
        let before = self.bytes;
        if let Err(error) = self.file.write_all(&line) {
            // Half a line would spoil the next one.
            let _ = self.file.set_len(before);
            return Err(error);
        }
        self.bytes += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        // Where the last one failed before it had a new file, nothing is left to be moved.
        if self.path.try_exists()? {
            self.move_on()?;
        }
        self.file = append(&self.path)?;
        self.bytes = 0;
        Ok(())
    }

    /// Each file takes the next one's name, from the oldest on, which goes.
    fn move_on(&self) -> io::Result<()> {
        let older = self.options.max_file.saturating_sub(1);
        if older == 0 {
            return fs::remove_file(&self.path);
        }
        for nth in (1..older).rev() {
            match fs::rename(nth_path(&self.path, nth), nth_path(&self.path, nth + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&self.path, nth_path(&self.path, 1))
    }
}

/// A line that ended, or as much of a long one as an entry takes, cut where a character ends.
fn next_entry(begun: &mut Vec<u8>) -> Option<Vec<u8>> {
    let whole = begun.ends_with(b"\n") && begun.len() <= ENTRY_BYTES_MAX;
    if whole {
        return Some(std::mem::take(begun));
    }
    let piece = begun.get(..ENTRY_BYTES_MAX)?;
    let continues = |byte: &u8| byte & 0xc0 == 0x80;
    let split = piece.iter().rposition(|byte| !continues(byte)).unwrap_or(0);
    let complete = std::str::from_utf8(piece.get(split..)?).is_ok();
    // What is no UTF-8 at all is cut anywhere.
    let at = match complete || split < ENTRY_BYTES_MAX - 4 {
        true => ENTRY_BYTES_MAX,
        false => split,
    };
    Some(begun.drain(..at).collect())
}

fn append(path: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

/// The file that `nth` others came after; that is written where there are none.
fn nth_path(path: &Path, nth: u32) -> PathBuf {
    match nth {
        0 => path.to_path_buf(),
        _ => path.with_extension(format!("json.{nth}")),
    }
}

/// Reads a container's log, from its oldest entry on, and what is written meanwhile.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    /// Files that are to be read, the next one first; each is open, so that a rotation takes none away.
    files: VecDeque<BufReader<File>>,
}

impl Reader {
    /// The log in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let mut reader = Self {
            path: dir.join(FILE),
            files: VecDeque::new(),
        };
        reader.open_newer()?;
        Ok(reader)
    }

    /// The next entry; none at the log's present end: more may come.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        loop {
            let Some(file) = self.files.front_mut() else {
                if !self.open_newer()? {
                    return Ok(None);
                }
                continue;
            };
            match read_line(file).map_err(Error::io("read", &self.path))? {
                Some(line) => match serde_json::from_slice(&line) {
                    Ok(entry) => return Ok(Some(entry)),
                    // A line that a full disk cut, or that is not ours.
                    Err(_) => continue,
                },
                None if self.files.len() > 1 => {
                    self.files.pop_front();
                }
                None if !self.open_newer()? => return Ok(None),
                None => {}
            }
        }
    }

    /// Opens the files that came after the last one we know, if any did; of all of them where we know none.
    fn open_newer(&mut self) -> Result<bool, Error> {
        let known = match self.files.back() {
            Some(last) => Some(identity(last.get_ref()).map_err(Error::io("read", &self.path))?),
            None => None,
        };
        let mut newer = self.look(known)?;
        for _ in 0..LOOKS_MAX {
            // While another file is begun, names say nothing about the order.
            let first = newer.first().map(|(first, _)| *first).or(known);
            if self.present()? == first {
                break;
            }
            newer = self.look(known)?;
        }
        let any = !newer.is_empty();
        let files = newer.into_iter().rev();
        self.files
            .extend(files.map(|(_, file)| BufReader::new(file)));
        Ok(any)
    }

    /// Which file is written.
    fn present(&self) -> Result<Option<Identity>, Error> {
        match File::open(&self.path).and_then(|file| identity(&file)) {
            Ok(present) => Ok(Some(present)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("open", &self.path)(error)),
        }
    }

    /// The files after the known one, the newest first. While they are moved on, one that was seen is met again behind its
    /// next name, and one name is nobody's.
    fn look(&self, known: Option<Identity>) -> Result<Vec<(Identity, File)>, Error> {
        let mut newer: Vec<(Identity, File)> = Vec::new();
        let mut missing = 0;
        for nth in 0.. {
            let path = nth_path(&self.path, nth);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound && missing == 0 => {
                    missing += 1;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(Error::io("open", path)(error)),
            };
            missing = 0;
            let own = identity(&file).map_err(Error::io("read", path))?;
            if known == Some(own) {
                break;
            }
            // All of them are open, so that no other file gets their identity.
            if newer.iter().all(|(other, _)| *other != own) {
                newer.push((own, file));
            }
        }
        Ok(newer)
    }
}

/// Device and inode: a file's, whatever it is called.
type Identity = (u64, u64);

fn identity(file: &File) -> io::Result<Identity> {
    file.metadata().map(|meta| (meta.dev(), meta.ino()))
}

/// A line that is all there; longer than any of ours, it is read in pieces, which are no entries.
fn read_line(file: &mut BufReader<File>) -> io::Result<Option<Vec<u8>>> {
    let at = file.stream_position()?;
    let mut line = Vec::new();
    let count = file
        .by_ref()
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut line)?;
    if line.ends_with(b"\n") || count as u64 == LINE_BYTES_MAX {
        return Ok(Some(line));
    }
    // Its rest is still to come.
    file.seek(SeekFrom::Start(at))?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(reader: &mut Reader) -> Vec<Entry> {
        std::iter::from_fn(|| reader.next_entry().expect("readable")).collect()
    }

    fn text(entries: &[Entry], stream: Stream) -> String {
        let of = entries.iter().filter(|entry| entry.stream == stream);
        of.map(|entry| entry.log.as_str()).collect()
    }

    #[test]
    fn what_was_written_is_read_and_what_comes_later_too() {
        let dir = tempfile::tempdir().expect("made");
        let mut reader = Reader::open(dir.path()).expect("opened");
        assert_eq!(all(&mut reader), []);
        let mut writer = Writer::open(dir.path(), LogOptions::default()).expect("opened");
        writer.write(Stream::Stdout, b"one\ntw").expect("written");
        writer.write(Stream::Stderr, b"err\n").expect("written");
        let first = all(&mut reader);
        assert_eq!(text(&first, Stream::Stdout), "one\n");
        assert_eq!(text(&first, Stream::Stderr), "err\n");
        writer.write(Stream::Stdout, b"o").expect("written");
        writer.finish().expect("written");
        assert_eq!(text(&all(&mut reader), Stream::Stdout), "two");
        let again = all(&mut Reader::open(dir.path()).expect("opened"));
        assert_eq!(text(&again, Stream::Stdout), "one\ntwo");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let dir = tempfile::tempdir().expect("made");
        let mut writer = Writer::open(dir.path(), LogOptions::default()).expect("opened");
        let line = format!("x{}", "ä".repeat(20_000));
        writer
            .write(Stream::Stdout, line.as_bytes())
            .expect("written");
        writer.write(Stream::Stdout, b"\n").expect("written");
        writer.finish().expect("written");
        let entries = all(&mut Reader::open(dir.path()).expect("opened"));
        assert_eq!(entries.len(), 3);
        assert!(text(&entries, Stream::Stdout) == line + "\n");
    }

    #[test]
    fn a_full_log_loses_its_oldest_file() {
        let dir = tempfile::tempdir().expect("made");
        let options = LogOptions {
            max_size: Some(1000),
            max_file: 3,
        };
        let mut follower = Reader::open(dir.path()).expect("opened");
        let mut followed = Vec::new();
        let mut writer = Writer::open(dir.path(), options).expect("opened");
        for nth in 0..100 {
            writer
                .write(Stream::Stdout, format!("line {nth}\n").as_bytes())
                .expect("written");
            followed.extend(all(&mut follower));
        }
        let names: std::collections::BTreeSet<_> = fs::read_dir(dir.path())
            .expect("readable")
            .map(|entry| {
                entry
                    .expect("entry")
                    .file_name()
                    .into_string()
                    .expect("utf-8")
            })
            .collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        assert_eq!(names, ["log.json", "log.json.1", "log.json.2"]);
        for name in names {
            assert!(fs::metadata(dir.path().join(name)).expect("there").len() <= 1000);
        }
        let kept = all(&mut Reader::open(dir.path()).expect("opened"));
        assert!(kept.len() > 20 && kept.len() < 60, "{}", kept.len());
        assert_eq!(
            kept.last().map(|entry| entry.log.as_str()),
            Some("line 99\n")
        );
        let whole: String = (0..100).map(|nth| format!("line {nth}\n")).collect();
        assert_eq!(text(&followed, Stream::Stdout), whole);
    }

    #[test]
    fn files_of_others_are_no_entries_and_no_end() {
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join(FILE);
        let mut junk = vec![b'x'; 300_000];
        junk.extend(b"\n{\"log\":1}\n\xff\xfe\n\n{}\n");
        fs::write(&path, &junk).expect("written");
        let mut writer = Writer::open(dir.path(), LogOptions::default()).expect("opened");
        writer.write(Stream::Stdout, b"ours\n").expect("written");
        let entries = all(&mut Reader::open(dir.path()).expect("opened"));
        assert_eq!(text(&entries, Stream::Stdout), "ours\n");
        assert_eq!(entries.len(), 1);
    }

    #[test]
    fn who_follows_misses_no_file_that_came_and_was_moved_on_between_two_looks() {
        let dir = tempfile::tempdir().expect("made");
        let options = LogOptions {
            max_size: Some(1000),
            max_file: 10,
        };
        let mut writer = Writer::open(dir.path(), options).expect("opened");
        writer.write(Stream::Stdout, b"first\n").expect("written");
        let mut follower = Reader::open(dir.path()).expect("opened");
        let mut followed = all(&mut follower);
        for nth in 0..40 {
            writer
                .write(Stream::Stdout, format!("line {nth}\n").as_bytes())
                .expect("written");
        }
        followed.extend(all(&mut follower));
        let kept = all(&mut Reader::open(dir.path()).expect("opened"));
        assert_eq!(kept.len(), 41, "all is on disk");
        assert_eq!(followed.len(), kept.len(), "the follower saw all");
    }

    #[test]
    fn a_rotation_that_failed_half_way_is_not_the_end_of_the_log() {
        for max_file in [1, 3] {
            let dir = tempfile::tempdir().expect("made");
            let options = LogOptions {
                max_size: Some(1000),
                max_file,
            };
            let mut writer = Writer::open(dir.path(), options).expect("opened");
            writer.write(Stream::Stdout, &[b'x'; 900]).expect("written");
            writer.write(Stream::Stdout, b"\n").expect("written");
            // The state in which rotate() leaves things when its append() fails (no inode, no descriptor).
            fs::remove_file(dir.path().join(FILE)).expect("removed");
            let outcome: Vec<bool> = (0..5)
                .map(|nth| {
                    writer
                        .write(
                            Stream::Stdout,
                            format!("later {nth} {}\n", "y".repeat(200)).as_bytes(),
                        )
                        .is_ok()
                })
                .collect();
            assert_eq!(outcome, [true; 5], "max_file {max_file}");
        }
    }

    #[test]
    fn who_opens_a_log_while_its_files_move_on_reads_nothing_twice() {
        let dir = tempfile::tempdir().expect("made");
        let options = LogOptions {
            max_size: Some(2000),
            max_file: 4,
        };
        let (mut looks, mut twice) = (0, 0);
        let mut look = || {
            let read = all(&mut Reader::open(dir.path()).expect("opened"));
            let mut seen = std::collections::HashSet::new();
            looks += 1;
            twice += usize::from(!read.iter().all(|entry| seen.insert(entry.log.clone())));
            read.len()
        };
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let mut writer = Writer::open(dir.path(), options).expect("opened");
                for nth in 0..20_000 {
                    let line = format!("line {nth}\n");
                    writer
                        .write(Stream::Stdout, line.as_bytes())
                        .expect("written");
                }
            });
            while !writing.is_finished() {
                look();
            }
        });
        // What is kept are three full files of 20 lines and more, and one more.
        assert!(look() > 60);
        assert_eq!(twice, 0, "of {looks} looks");
    }

    proptest! {
        #[test]
        fn text_comes_back_however_it_was_cut(
            pieces in prop::collection::vec(("[a-zä\n]{0,40}", any::<bool>()), 0..40),
            max_size in prop::option::of(200_u64..5000),
        ) {
            let dir = tempfile::tempdir().expect("made");
            let options = LogOptions { max_size, max_file: 1000 };
            let mut writer = Writer::open(dir.path(), options).expect("opened");
            let (mut out, mut err) = (String::new(), String::new());
            for (piece, to_stderr) in &pieces {
                let (stream, all) = match to_stderr {
                    true => (Stream::Stderr, &mut err),
                    false => (Stream::Stdout, &mut out),
                };
                all.push_str(piece);
                // Bytes, not characters, arrive.
                let (front, rest) = piece.as_bytes().split_at(piece.len() / 2);
                writer.write(stream, front).expect("written");
                writer.write(stream, rest).expect("written");
            }
            writer.finish().expect("written");
            let entries = all(&mut Reader::open(dir.path()).expect("opened"));
            prop_assert_eq!(text(&entries, Stream::Stdout), out);
            prop_assert_eq!(text(&entries, Stream::Stderr), err);
        }

        #[test]
        fn bytes_that_are_no_text_lose_nothing_else(bytes in prop::collection::vec(any::<u8>(), 0..60_000)) {
            let dir = tempfile::tempdir().expect("made");
            let mut writer = Writer::open(dir.path(), LogOptions::default()).expect("opened");
            writer.write(Stream::Stdout, &bytes).expect("written");
            writer.write(Stream::Stdout, b"\nend\n").expect("written");
            let entries = all(&mut Reader::open(dir.path()).expect("opened"));
            prop_assert!(entries.iter().all(|entry| entry.log.len() <= 3 * ENTRY_BYTES_MAX));
            prop_assert_eq!(entries.last().map(|entry| entry.log.as_str()), Some("end\n"));
        }
    }
}
