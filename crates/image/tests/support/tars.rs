//! Makes tar streams, also ones no honest tool would make.

use tar::{EntryType, Header};

/// A tar stream being made.
#[derive(Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    pub fn new() -> Tar {
        Tar::default()
    }

    pub fn file(self, path: &str, data: &[u8]) -> Tar {
        self.entry(path.as_bytes(), EntryType::Regular, b"", data, |_| ())
    }

    pub fn dir(self, path: &str) -> Tar {
        self.entry(path.as_bytes(), EntryType::Directory, b"", b"", |h| {
            h.set_mode(0o755)
        })
    }

    pub fn symlink(self, path: &str, target: &str) -> Tar {
        self.entry(
            path.as_bytes(),
            EntryType::Symlink,
            target.as_bytes(),
            b"",
            |_| (),
        )
    }

    pub fn hard_link(self, path: &str, target: &str) -> Tar {
        self.entry(
            path.as_bytes(),
            EntryType::Link,
            target.as_bytes(),
            b"",
            |_| (),
        )
    }

    /// PAX records for the next entry.
    pub fn pax(self, records: &[(&[u8], &[u8])]) -> Tar {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut length = body + 1;
            while length != body + length.to_string().len() {
                length = body + length.to_string().len();
            }
            data.extend(format!("{length} ").bytes());
            data.extend_from_slice(key);
            data.push(b'=');
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.raw(b"pax", EntryType::XHeader, b"", &data, |_| ())
    }

    /// Any entry; long names and targets become GNU's extra entries.
    pub fn entry(
        mut self,
        path: &[u8],
        kind: EntryType,
        link: &[u8],
        data: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Tar {
        if path.len() > 100 {
            let long = [path, b"\0"].concat();
            self = self.raw(b"././@LongLink", EntryType::GNULongName, b"", &long, |_| ());
        }
        if link.len() > 100 {
            let long = [link, b"\0"].concat();
            self = self.raw(b"././@LongLink", EntryType::GNULongLink, b"", &long, |_| ());
        }
        self.raw(path, kind, link, data, change)
    }

    /// One header with its data, nothing checked.
    pub fn raw(
        mut self,
        path: &[u8],
        kind: EntryType,
        link: &[u8],
        data: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Tar {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        let old = header.as_old_mut();
        old.name
            .iter_mut()
            .zip(path)
            .for_each(|(to, from)| *to = *from);
        old.linkname
            .iter_mut()
            .zip(link)
            .for_each(|(to, from)| *to = *from);
        change(&mut header);
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// The stream with its end.
    pub fn end(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }
}
