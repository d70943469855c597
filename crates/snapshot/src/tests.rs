//! Snapshots that are whole, damaged, of other versions, and made up.

use std::collections::BTreeMap;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

type Body = (String, Vec<u64>, BTreeMap<u8, Option<i128>>, Vec<Vec<u8>>);

fn body() -> Body {
    let map = [(1, Some(-5)), (2, None)].into();
    (
        "a machine".into(),
        vec![1, u64::MAX],
        map,
        vec![vec![7; 300]],
    )
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("state")
    }

    fn with(bytes: &[u8]) -> Self {
        let place = Self::new();
        std::fs::write(place.path(), bytes).unwrap();
        place
    }

    fn read(&self) -> Result<Body, Error> {
        super::read(&self.path())
    }

    fn names(&self) -> usize {
        std::fs::read_dir(self.0.path()).unwrap().count()
    }
}

fn written() -> Vec<u8> {
    let place = Place::new();
    let file = NewFile::create(&place.path()).unwrap();
    super::write(&file, &body()).unwrap();
    file.finish().unwrap();
    assert_eq!(place.names(), 1);
    std::fs::read(place.path()).unwrap()
}

/// `bytes` with a checksum that is right.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.len().saturating_sub(8));
    let checksum = CHECKSUM.checksum(&bytes);
    bytes.extend(checksum.to_le_bytes());
    bytes
}

#[test]
fn what_was_written_is_read() {
    let place = Place::with(&written());
    assert_eq!(place.read().unwrap(), body());
    assert_eq!(version_of(&place.path()).unwrap(), VERSION);
    assert_eq!(VERSION.to_string(), "v1.0.0");
}

#[test]
fn versions_that_are_not_ours_are_named_and_refused() {
    for (numbers, reads) in [
        ([1, 0, 9], true),
        ([1, 1, 0], false),
        ([0, 0, 0], false),
        ([2, 0, 0], false),
    ] {
        let mut bytes = written();
        for (at, number) in [8, 10, 12].into_iter().zip(numbers) {
            bytes[at..at + 2].copy_from_slice(&u16::to_le_bytes(number));
        }
        let place = Place::with(&sealed(bytes));
        assert_eq!(place.read().is_ok(), reads, "{numbers:?}");
        let [major, minor, patch] = numbers;
        let version = Version {
            major,
            minor,
            patch,
        };
        assert_eq!(version_of(&place.path()).unwrap(), version);
        if let Err(error) = place.read() {
            assert!(error.to_string().contains(&version.to_string()), "{error}");
        }
    }
}

#[test]
fn a_length_that_no_file_has_takes_no_memory() {
    for len in [BODY_BYTES_MAX + 1, u64::MAX, u64::MAX - 7] {
        let mut bytes = written();
        bytes[16..24].copy_from_slice(&len.to_le_bytes());
        let refused = Place::with(&sealed(bytes)).read().unwrap_err();
        assert!(matches!(refused, Error::Damaged { .. }), "{refused}");
    }
}

#[test]
fn what_is_no_file_or_no_snapshot_is_refused() {
    let place = Place::new();
    assert!(matches!(place.read(), Err(Error::Read { .. })));
    rustix::fs::mkfifoat(rustix::fs::CWD, place.path(), rustix::fs::Mode::RWXU).unwrap();
    assert!(matches!(place.read(), Err(Error::NotOne { .. })));
    for bytes in [
        &b""[..],
        b"KOMBI",
        &[0; 4096],
        b"#!/bin/sh\nexit 0, or something",
    ] {
        let refused = Place::with(bytes).read().unwrap_err();
        assert!(matches!(refused, Error::NotOne { .. }), "{refused}");
    }
}

#[test]
fn a_file_that_is_not_finished_leaves_what_was_there() {
    let place = Place::with(b"before");
    let file = NewFile::create(&place.path()).unwrap();
    super::write(&file, &body()).unwrap();
    assert_eq!(place.names(), 2);
    drop(file);
    assert_eq!(place.names(), 1);
    assert_eq!(std::fs::read(place.path()).unwrap(), b"before");
}

#[test]
fn a_full_disk_is_an_error_that_leaves_nothing() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const CHILD: &str = "KOMBI_TEST_FULL_DISK";
    let Some(dir) = std::env::var_os(CHILD) else {
        // A limit of bytes per file is as good as a full disk, and is this process's own.
        let place = Place::new();
        let child = std::process::Command::new("sh")
            // Beyond the limit is a signal, unless it is ignored.
            .args(["-c", r#"trap "" XFSZ; exec "$0" "$@""#])
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "tests::a_full_disk_is_an_error_that_leaves_nothing",
            ])
            .env(CHILD, place.0.path())
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        assert_eq!(place.names(), 0);
        return;
    };
    let limit = Rlimit {
        current: Some(100),
        ..getrlimit(Resource::Fsize)
    };
    let path = PathBuf::from(dir).join("state");
    let file = NewFile::create(&path).unwrap();
    setrlimit(Resource::Fsize, limit).unwrap();
    // The first 100 bytes fit.
    let refused = super::write(&file, &body()).unwrap_err().to_string();
    drop(file);
    let limit = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Fsize, limit).unwrap();
    assert!(refused.contains("failed to write"), "{refused}");
}

#[test]
fn a_directory_or_device_is_not_written_over() {
    let place = Place::new();
    std::fs::create_dir(place.path()).unwrap();
    assert!(NewFile::create(&place.path()).is_err());
    for path in ["/dev/null", "/", "..", "/nowhere/state"] {
        assert!(NewFile::create(Path::new(path)).is_err(), "{path}");
    }
    assert_eq!(place.names(), 1);
}

proptest! {
    #[test]
    fn no_bytes_upset_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Place::with(&bytes).read().is_err());
    }

    #[test]
    fn a_file_with_a_wrong_bit_or_end_is_refused(
        at in any::<prop::sample::Index>(),
        bit in 0..8_u8,
        cut in any::<bool>(),
    ) {
        let mut bytes = written();
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1_u8 << bit;
        }
        let refused = Place::with(&bytes).read();
        prop_assert!(refused.is_err());
        prop_assert!(!refused.unwrap_err().to_string().contains('\n'));
        bytes.push(0);
        prop_assert!(Place::with(&bytes).read().is_err());
    }

    #[test]
    fn a_body_that_somebody_made_is_read_or_refused(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
    ) {
        let mut bytes = written();
        for (at, byte) in flips {
            let at = HEAD_BYTES + at.index(bytes.len() - HEAD_BYTES);
            bytes[at] = byte;
        }
        let _ = Place::with(&sealed(bytes)).read();
    }
}
