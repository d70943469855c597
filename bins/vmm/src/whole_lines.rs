//! A file or FIFO to which whole lines are appended.
//!
//! Invariant: what cannot be written entirely (the disk is full, the FIFO is) does not
//! damage the next line. Of a regular file the piece is taken back; where that cannot
//! be, as somebody else appended behind it or it is no regular file, the next line
//! starts with a newline.
//!
//! Left to others: what the lines say.

use std::fs::File;
use std::io::{Error, ErrorKind, Result, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What lines go to.
#[derive(Debug)]
pub(crate) struct WholeLines {
    /// Opened for appending.
    file: File,
    /// It ends with a piece of a line.
    torn: bool,
}

impl WholeLines {
    /// Opens or makes what is at `path`: a FIFO whether or not somebody reads it.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        Ok(Self { file, torn: false })
    }

    /// Appends `line`, which has no newline, without waiting.
    ///
    /// # Errors
    /// The host's: then nothing was written, as far as readers are concerned.
    pub(crate) fn append(&mut self, line: &[u8]) -> Result<()> {
        let before: &[u8] = if self.torn { b"\n" } else { b"" };
        let line = [before, line, b"\n"].concat();
        let mut written = 0;
        while let Some(rest) = line.get(written..).filter(|rest| !rest.is_empty()) {
            let error = match self.file.write(rest) {
                Ok(0) => ErrorKind::WriteZero.into(),
                Ok(more) => {
                    written += more;
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            if written > 0 {
                // With the piece goes the newline behind an earlier one.
                self.torn |= self.take_back(written as u64).is_err();
            }
            return Err(error);
        }
        self.torn = false;
        Ok(())
    }

    /// Shortens the file by the piece of `len` bytes that was written last.
    fn take_back(&mut self, len: u64) -> Result<()> {
        let end = self.file.stream_position()?;
        // Of a FIFO the position is an error already.
        if self.file.metadata()?.len() != end {
            return Err(Error::other("somebody appended behind it"));
        }
        self.file.set_len(end.saturating_sub(len))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::Command;

    use super::*;

    /// Set in the process whose files may not grow beyond [`FILE_BYTES_MAX`].
    const FILE: &str = "KOMBI_TEST_FILE_ON_A_FULL_DISK";
    const FILE_BYTES_MAX: usize = 512;

    #[test]
    fn a_line_that_a_full_disk_tears_is_taken_back() {
        let Some(path) = std::env::var_os(FILE) else {
            return in_a_process_with_a_limit();
        };
        let mut lines = WholeLines::open(path.as_ref()).unwrap();
        let content = || std::fs::read_to_string(&path).unwrap();
        let long = "x".repeat(299);
        lines.append(long.as_bytes()).unwrap();
        for _ in 0..2 {
            let full = lines.append(long.as_bytes()).unwrap_err();
            assert_eq!(full.kind(), ErrorKind::FileTooLarge);
            assert_eq!(content(), format!("{long}\n"));
        }
        // What still fits is appended; so is everything once there is room.
        lines.append(b"short").unwrap();
        assert_eq!(content(), format!("{long}\nshort\n"));
        lines.append(long.as_bytes()).unwrap_err();
        File::create(&path).unwrap();
        lines.append(long.as_bytes()).unwrap();
        assert_eq!(content(), format!("{long}\n"));
    }

    /// Runs the test above again. A limit stands for the disk's end: it ends files in
    /// the middle of a write in the same way, and needs no mount.
    fn in_a_process_with_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        // Without SIGXFSZ the write itself fails (setrlimit(2)).
        let limited = "trap '' XFSZ; exec prlimit --fsize=\"$0\" \"$@\"";
        let output = Command::new("sh")
            .args(["-c", limited, &FILE_BYTES_MAX.to_string()])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("whole_lines::tests::a_line_that_a_full_disk_tears_is_taken_back")
            .env(FILE, &path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let written = std::fs::read(&path).unwrap();
        assert!((300..FILE_BYTES_MAX).contains(&written.len()), "{output:?}");
    }

    #[test]
    fn a_line_behind_a_torn_one_that_stays_starts_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let mut lines = WholeLines::open(&path).unwrap();
        // More than a FIFO takes at once (pipe(7): 64 KiB, a piece if it is not empty).
        let full = lines.append(&vec![b'x'; 1 << 20]).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        let mut reader = File::open(&path).unwrap();
        let mut piece = vec![0; 1 << 20];
        let len = reader.read(&mut piece).unwrap();
        assert!(len > 0 && piece[..len].iter().all(|byte| *byte == b'x'));
        lines.append(b"next").unwrap();
        lines.append(b"another").unwrap();
        let len = reader.read(&mut piece).unwrap();
        assert_eq!(&piece[..len], b"\nnext\nanother\n");
    }
}
