//! What is kept is found again as it was, for the same guest code only, whatever
//! happened to the file meanwhile.

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, OnceLock};

use proptest::prelude::*;
use tempfile::TempDir;
use translations::{Error, Key, Refused, Translations};
use translator::context::Mode;
use translator::{Block, GuestCode, Kind, Options, Request, Thunks, Translator};

const VA: u64 = 0x40_0000;

struct Pages(Vec<u8>);

impl Pages {
    fn at(&self, va: u64, len: usize) -> Option<&[u8]> {
        let offset = usize::try_from(va.checked_sub(VA)?).ok()?;
        self.0.get(offset..offset.checked_add(len)?)
    }

    fn holds(&self, va: u64, bytes: &[u8]) -> bool {
        self.at(va, bytes.len()) == Some(bytes)
    }
}

impl GuestCode for Pages {
    fn tail(&self, va: u64) -> Option<&[u8]> {
        let offset = usize::try_from(va.checked_sub(VA)?).ok()?;
        self.0.get(offset..(offset | 0xfff) + 1)
    }
}

/// Four pages of instructions; at every 16th byte a number that differs by `seed`.
fn guest(seed: u8) -> Pages {
    let mut bytes = Vec::new();
    for i in 0_u32.. {
        if bytes.len() >= 0x4000 {
            break;
        }
        // mov eax, i; add eax, [rbx+8]; adc [rbx+16], eax; call, or push rcx and jz
        bytes.push(0xb8);
        bytes.extend((i << 8 | u32::from(seed)).to_le_bytes());
        bytes.extend([0x03, 0x43, 0x08, 0x11, 0x43, 0x10]);
        if i % 3 == 0 {
            bytes.extend([0xe8, 0x40, 0x08, 0, 0]);
        } else {
            bytes.extend([0x51, 0x74, (i % 50) as u8, 0x90, 0x90]);
        }
    }
    bytes.truncate(0x4000);
    Pages(bytes)
}

fn key(va: u64, kind: Kind) -> Key {
    Key {
        va,
        mode: Mode::Kernel,
        kind,
        features: translator::Features::EVERYTHING.bits(),
    }
}

fn translate(key: Key, pages: &Pages) -> Option<Block> {
    let request = Request {
        va: key.va,
        mode: key.mode,
        kind: key.kind,
        features: translator::Features::EVERYTHING,
        place: 0x7000_0000,
        first_exit: 100,
        thunks: Thunks {
            exit: 0x6fff_0000,
            jump_miss: 0x6fff_0100,
            ..Thunks::default()
        },
    };
    let mut block = Block::default();
    let mut translator = Translator::new(Options::default());
    translator
        .translate(&request, pages, &mut block)
        .is_ok()
        .then_some(block)
}

/// Keeps a block at every 16th byte.
fn fill(kept: &Translations, pages: &Pages) -> usize {
    let mut count = 0;
    for va in (VA..VA + 0x3ff0).step_by(16) {
        for kind in [Kind::Grouped, Kind::PerAccess] {
            if let Some(block) = translate(key(va, kind), pages) {
                kept.add(key(va, kind), &block, pages);
                count += 1;
            }
        }
    }
    count
}

/// How many of the blocks that [`fill`] keeps are found; each is what the translator
/// makes.
fn found(kept: &Translations, pages: &Pages) -> usize {
    let mut count = 0;
    for va in (VA..VA + 0x3ff0).step_by(16) {
        for kind in [Kind::Grouped, Kind::PerAccess] {
            let key = key(va, kind);
            let mut block = Block::default();
            let mut guest = Vec::new();
            let same = |va, bytes: &[u8]| pages.holds(va, bytes);
            if kept.find(key, same, &mut block, &mut guest) {
                assert_eq!(guest.len(), usize::from(block.guest_len));
                assert!(pages.holds(va, &guest));
                let wanted = translate(key, pages).unwrap();
                assert_eq!(block.code, wanted.code);
                assert_eq!(block.exits, wanted.exits);
                assert_eq!(block.positions, wanted.positions);
                assert_eq!(block.relocations, wanted.relocations);
                assert_eq!(block.consulted, wanted.consulted);
                assert_eq!(numbers(&block), numbers(&wanted));
                count += 1;
            }
        }
    }
    count
}

fn numbers(block: &Block) -> ([u32; 5], bool) {
    let numbers = [
        u32::from(block.indirect_entry),
        u32::from(block.direct_entry),
        block.stale,
        u32::from(block.guest_len),
        u32::from(block.instructions),
    ];
    (numbers, block.crosses_page)
}

fn open(folder: &Path) -> (Translations, Option<Error>) {
    Translations::open(Options::default(), folder).unwrap()
}

fn reopened(folder: &Path) -> Translations {
    let (kept, error) = open(folder);
    assert!(error.is_none(), "{error:?}");
    kept
}

/// A folder with a saved file of `guest(1)`, and how many blocks it has.
fn saved() -> (TempDir, PathBuf, usize) {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("kombi/translations");
    let (kept, error) = open(&folder);
    assert!(error.is_none());
    let count = fill(&kept, &guest(1));
    let saved = kept.save().unwrap().unwrap();
    assert_eq!((saved.added, saved.entries as usize), (count as u64, count));
    (dir, folder, count)
}

fn file(folder: &Path) -> PathBuf {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "translations"))
        .collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

#[test]
fn what_was_kept_is_found_again_before_and_after_a_save() {
    let kept = Translations::in_memory(Options::default());
    let count = fill(&kept, &guest(1));
    assert!(count > 1000);
    assert_eq!(found(&kept, &guest(1)), count);
    assert_eq!(kept.save().unwrap(), None);

    let (_dir, folder, count) = saved();
    let kept = reopened(&folder);
    assert_eq!(found(&kept, &guest(1)), count);
    let counts = kept.counts();
    assert_eq!((counts.found, counts.in_file), (count as u64, count as u32));
}

#[test]
fn what_was_kept_for_one_cpu_is_not_found_for_another() {
    let (_dir, folder, _) = saved();
    let kept = reopened(&folder);
    let pages = guest(1);
    let mut block = Block::default();
    let mut guest = Vec::new();
    let mut finds = |key| {
        let same = |va, bytes: &[u8]| pages.holds(va, bytes);
        kept.find(key, same, &mut block, &mut guest)
    };
    let own = key(VA, Kind::Grouped);
    assert!(finds(own));
    for bit in 0..64 {
        let features = own.features ^ 1 << bit;
        assert!(!finds(Key { features, ..own }), "feature {bit}");
    }
}

#[test]
fn one_other_byte_of_guest_code_is_other_code() {
    let (_dir, folder, _) = saved();
    let kept = reopened(&folder);
    let pages = guest(1);
    let key = key(VA, Kind::Grouped);
    let block = translate(key, &pages).unwrap();
    let own = (VA, block.guest_len);
    assert!(!block.consulted.is_empty(), "the code jumps");
    let shaping = block.consulted.iter().map(|at| (at.va, at.len));
    for (va, len) in shaping.chain([own]) {
        for at in va..va + u64::from(len) {
            let mut other = guest(1);
            other.0[(at - VA) as usize] ^= 0x80;
            let (mut block, mut guest) = (Block::default(), Vec::new());
            let same = |va, bytes: &[u8]| other.holds(va, bytes);
            assert!(
                !kept.find(key, same, &mut block, &mut guest),
                "byte {at:#x}"
            );
        }
    }
    let same = |va, bytes: &[u8]| pages.holds(va, bytes);
    assert!(kept.find(key, same, &mut Block::default(), &mut Vec::new()));
}

#[test]
fn several_codes_at_one_address_are_told_apart() {
    let (_dir, folder, count) = saved();
    let kept = reopened(&folder);
    assert_eq!(found(&kept, &guest(2)), 0);
    fill(&kept, &guest(2));
    for seed in [1, 2] {
        assert_eq!(found(&kept, &guest(seed)), count);
    }
    kept.save().unwrap().unwrap();
    let kept = reopened(&folder);
    for seed in [1, 2] {
        assert_eq!(found(&kept, &guest(seed)), count);
    }
}

#[test]
fn nothing_new_is_not_written() {
    let (_dir, folder, _) = saved();
    let before = fs::metadata(file(&folder)).unwrap().ino();
    let kept = reopened(&folder);
    found(&kept, &guest(1));
    assert_eq!(kept.save().unwrap(), None);
    assert_eq!(fs::metadata(file(&folder)).unwrap().ino(), before);
}

#[test]
fn folder_and_file_are_their_owners_alone() {
    let (_dir, folder, _) = saved();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&folder), mode(&file(&folder))), (0o700, 0o600));
}

#[test]
fn two_machines_that_write_at_once_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("t");
    let start = Arc::new(Barrier::new(4));
    let writers: Vec<_> = (1..=4)
        .map(|seed| {
            let (folder, start) = (folder.clone(), Arc::clone(&start));
            std::thread::spawn(move || {
                let (kept, _) = open(&folder);
                let count = fill(&kept, &guest(seed));
                start.wait();
                kept.save().unwrap().unwrap();
                // What the others added is there after a save as well.
                assert_eq!(found(&kept, &guest(seed)), count);
                count
            })
        })
        .collect();
    let counts: Vec<_> = writers.into_iter().map(|w| w.join().unwrap()).collect();
    let kept = reopened(&folder);
    for (seed, count) in (1..=4).zip(counts) {
        assert_eq!(found(&kept, &guest(seed)), count, "of {seed}");
    }
}

#[test]
fn a_machine_goes_on_with_the_file_that_another_one_replaced() {
    let (_dir, folder, count) = saved();
    let (old, new) = (reopened(&folder), reopened(&folder));
    fill(&new, &guest(2));
    new.save().unwrap().unwrap();
    assert_eq!(found(&old, &guest(1)), count);
    assert_eq!(found(&old, &guest(2)), 0);
}

#[track_caller]
fn is_rebuilt(folder: &Path, wanted: &str) {
    let (kept, error) = open(folder);
    let error = error.expect("a complaint");
    let source = std::error::Error::source(&error).map(ToString::to_string);
    let text = format!("{error}: {}", source.unwrap_or_default());
    assert!(text.contains(wanted), "{text}");
    assert_eq!(found(&kept, &guest(1)), 0);
    let count = fill(&kept, &guest(1));
    kept.save().unwrap().unwrap();
    assert_eq!(found(&reopened(folder), &guest(1)), count);
}

#[test]
fn a_truncated_file_is_rebuilt() {
    for keep in [0, 20, 63, 64, 100, 5000, 100_000] {
        let (_dir, folder, _) = saved();
        let path = file(&folder);
        let handle = fs::OpenOptions::new().write(true).open(&path).unwrap();
        handle.set_len(keep).unwrap();
        is_rebuilt(&folder, "truncated");
    }
}

#[test]
fn a_longer_file_is_rebuilt() {
    let (_dir, folder, _) = saved();
    let path = file(&folder);
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend([0; 8]);
    fs::write(&path, bytes).unwrap();
    is_rebuilt(&folder, "behind its end");
}

#[test]
fn a_foreign_file_is_rebuilt() {
    let (_dir, folder, _) = saved();
    fs::write(file(&folder), vec![0x5a; 1 << 20]).unwrap();
    is_rebuilt(&folder, "no file of translations");
}

#[test]
fn another_builds_file_is_rebuilt() {
    let (_dir, folder, _) = saved();
    let path = file(&folder);
    let mut bytes = fs::read(&path).unwrap();
    bytes[16] ^= 1;
    let crc = crc32fast::hash(&bytes[16..64]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    is_rebuilt(&folder, "another version");
}

#[test]
fn other_options_have_another_file() {
    let (_dir, folder, _) = saved();
    let options = Options {
        count_instructions: true,
    };
    let (kept, error) = Translations::open(options, &folder).unwrap();
    assert!(error.is_none());
    assert_eq!(kept.counts().in_file, 0);
}

#[test]
fn damage_costs_the_damaged_records_only() {
    let (_dir, folder, count) = saved();
    let path = file(&folder);
    let mut bytes = fs::read(&path).unwrap();
    let len = bytes.len();
    for at in [len - 1000, len - 50_000, len - 100_000] {
        bytes[at] ^= 4;
    }
    fs::write(&path, bytes).unwrap();
    let kept = reopened(&folder);
    let still = found(&kept, &guest(1));
    assert!((count - 3..count).contains(&still), "{still} of {count}");
}

#[test]
fn what_others_may_write_is_not_used() {
    let (_dir, folder, _) = saved();
    let path = file(&folder);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    is_rebuilt(&folder, "others may write it");
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );

    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let error = Translations::open(Options::default(), &folder).unwrap_err();
    assert!(matches!(error, Error::NotOurs { .. }), "{error:?}");
}

#[test]
fn what_belongs_to_others_is_not_used() {
    if !rustix::process::geteuid().is_root() {
        // Somebody else's folder that everybody has.
        let error = Translations::open(Options::default(), Path::new("/usr")).unwrap_err();
        assert!(matches!(error, Error::NotOurs { .. }), "{error:?}");
        return;
    }
    let (_dir, folder, _) = saved();
    std::os::unix::fs::chown(file(&folder), Some(65534), None).unwrap();
    is_rebuilt(&folder, "belongs to another user");
    std::os::unix::fs::chown(&folder, Some(65534), None).unwrap();
    let error = Translations::open(Options::default(), &folder).unwrap_err();
    assert!(
        error.to_string().contains("belongs to another user"),
        "{error}"
    );
}

#[test]
fn links_and_pipes_are_not_followed() {
    let (_dir, folder, _) = saved();
    let path = file(&folder);
    let elsewhere = folder.join("elsewhere");
    fs::rename(&path, &elsewhere).unwrap();
    symlink(&elsewhere, &path).unwrap();
    is_rebuilt(&folder, "failed to open");

    fs::remove_file(&path).unwrap();
    let cwd = rustix::fs::CWD;
    rustix::fs::mkfifoat(cwd, &path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    is_rebuilt(&folder, "not a regular file");
}

#[test]
fn a_writer_that_died_leaves_nothing_in_the_way() {
    let (_dir, folder, _) = saved();
    let name = file(&folder).file_name().unwrap().to_owned();
    let mut left = name;
    left.push(".new");
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(folder.join(&left))
        .unwrap();
    let kept = reopened(&folder);
    fill(&kept, &guest(3));
    kept.save().unwrap().unwrap();
    assert!(!folder.join(&left).exists());
}

#[test]
fn a_folder_that_is_too_large_loses_its_oldest_files() {
    let (_dir, folder, count) = saved();
    for i in 0..5_u64 {
        let path = folder.join(format!("{i:016x}-0.translations"));
        let old = fs::File::create(&path).unwrap();
        old.set_len(20 << 20).unwrap();
        let then = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 + i);
        old.set_modified(then).unwrap();
    }
    let kept = reopened(&folder);
    fill(&kept, &guest(2));
    kept.save().unwrap().unwrap();
    let left: Vec<_> = (0..5_u64)
        .filter(|i| folder.join(format!("{i:016x}-0.translations")).exists())
        .collect();
    assert_eq!(left, [2, 3, 4]);
    assert_eq!(found(&reopened(&folder), &guest(2)), count);
}

#[test]
fn a_guest_that_fills_an_address_with_code_does_not_push_out_what_is_used() {
    let (_dir, folder, count) = saved();
    let kept = reopened(&folder);
    assert_eq!(found(&kept, &guest(1)), count);
    for seed in 2..40 {
        fill(&kept, &guest(seed));
    }
    kept.save().unwrap().unwrap();
    assert_eq!(found(&reopened(&folder), &guest(1)), count);
}

#[test]
fn a_locked_folder_is_given_up_on() {
    let (_dir, folder, _) = saved();
    let lock = fs::File::open(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    let kept = reopened(&folder);
    fill(&kept, &guest(2));
    assert!(matches!(kept.save(), Err(Error::Busy { .. })));
}

/// Hostile bytes behind a good head, and anywhere.
fn hostile() -> impl Strategy<Value = (Vec<(usize, u8)>, bool)> {
    let change = (any::<prop::sample::Index>(), any::<u8>())
        .prop_map(|(at, byte)| (at.index(1 << 17), byte));
    (prop::collection::vec(change, 1..400), any::<bool>())
}

/// `PROPTEST_CASES` says how many cases, or it is a few.
fn cases(few: u32) -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(few),
    }
}

proptest! {
    #![proptest_config(cases(60))]

    /// Nothing panics, hangs or gives a block whose positions lie outside of it, even
    /// where the checksums are right.
    #[test]
    fn no_file_does_harm((changes, mend) in hostile()) {
        static GOOD: OnceLock<(TempDir, PathBuf, Vec<u8>)> = OnceLock::new();
        let (_dir, folder, good) = GOOD.get_or_init(|| {
            let (dir, folder, _) = saved();
            let bytes = fs::read(file(&folder)).unwrap();
            (dir, folder, bytes)
        });
        let (path, new) = (file(folder), guest(9));
        let mut bytes = good.clone();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if mend {
            let head = crc32fast::hash(&bytes[16..64]);
            bytes[12..16].copy_from_slice(&head.to_le_bytes());
            mend_records(&mut bytes);
        }
        fs::write(&path, bytes).unwrap();
        if let Ok((kept, error)) = Translations::open(Options::default(), folder) {
            if let Some(Error::Unusable { source, .. }) = error {
                prop_assert!(matches!(
                    source,
                    Refused::Damaged | Refused::Length | Refused::OtherBuild
                ));
            }
            for va in (VA..VA + 0x3ff0).step_by(16) {
                let mut block = Block::default();
                let key = key(va, Kind::Grouped);
                if kept.find(key, |_, _| true, &mut block, &mut Vec::new()) {
                    prop_assert!((block.stale as usize) < block.code.len());
                    prop_assert!(usize::from(block.direct_entry) + 5 <= block.code.len());
                }
            }
            for va in (VA..VA + 0x3000).step_by(32) {
                let key = key(va, Kind::Grouped);
                kept.add(key, &translate(key, &new).unwrap(), &new);
            }
            kept.save().unwrap().unwrap();
        }
    }
}

/// Gives every record that can be told the checksum of its bytes.
fn mend_records(bytes: &mut [u8]) {
    let slots = 8_usize << u32::from_le_bytes(bytes[40..44].try_into().unwrap()).min(20);
    let mut at = 64 + slots;
    while at + 8 <= bytes.len() {
        let len = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        if len < 8 || at + len > bytes.len() {
            break;
        }
        let crc = crc32fast::hash(&bytes[at + 4..at + len]);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        at += len;
    }
}
