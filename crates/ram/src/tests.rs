//! Memory, epochs, and files and sockets in and out of them.

mod further;

use std::collections::BTreeSet;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

use crate::volatile::{self, Slice, Wait};
use crate::{ByteSize, Cursor, Error, Gpa, GuestRam, HIGH_START, LOW_END, PAGE_SIZE, Pages};

const LONG: Wait = Wait::AsLongAsItTakes;

fn small() -> GuestRam {
    GuestRam::new(ByteSize::mib(1)).unwrap()
}

fn large() -> GuestRam {
    // Nothing of it is backed before it is touched.
    GuestRam::new(ByteSize::mib(4 * 1024)).unwrap()
}

fn slice(ram: &GuestRam, at: u64, len: usize) -> Slice<'_> {
    ram.memory().get_slice(Gpa(at), len).unwrap()
}

#[test]
fn memory_is_zero_and_keeps_what_is_written() {
    let ram = small();
    let mut bytes = [1; 3];
    ram.memory().read_slice(&mut bytes, Gpa(0xfffd)).unwrap();
    assert_eq!(bytes, [0; 3]);
    ram.memory().write_slice(b"abc", Gpa(0xfffd)).unwrap();
    ram.memory().read_slice(&mut bytes, Gpa(0xfffd)).unwrap();
    assert_eq!(&bytes, b"abc");
}

#[test]
fn host_addresses_are_the_base_plus_the_guest_address() {
    let ram = large();
    let base = ram.host_base().as_ptr().addr() as u64;
    for region in ram.regions() {
        for at in [region.start.0, region.end().0 - 1] {
            let host = ram.memory().get_host_address(Gpa(at)).unwrap();
            assert_eq!(host.addr() as u64, base + at);
        }
    }
}

#[test]
fn there_is_no_memory_in_the_gap_nor_past_the_end() {
    let ram = large();
    assert_eq!(ram.end(), Gpa(5 << 30));
    for at in [LOW_END, HIGH_START - 1, 5 << 30, u64::MAX] {
        assert!(ram.memory().write_slice(&[0], Gpa(at)).is_err(), "{at:#x}");
        assert!(!ram.contains(Gpa(at), 1));
    }
    assert!(ram.contains(Gpa(LOW_END - 1), 1));
    assert!(!ram.contains(Gpa(LOW_END - 1), 2));
    assert!(ram.contains(Gpa(HIGH_START), 1 << 30));
    assert!(!ram.contains(Gpa(0), u64::MAX));
}

#[test]
fn only_what_was_touched_is_backed() {
    let ram = large();
    assert_eq!(ram.resident_bytes().unwrap(), 0);
    ram.memory().write_slice(&[1], Gpa(HIGH_START)).unwrap();
    ram.memory().write_slice(&[1], Gpa(0)).unwrap();
    assert_eq!(ram.resident_bytes().unwrap(), 2 * PAGE_SIZE);
}

#[test]
fn records_of_untouched_memory_cost_nothing() {
    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE_SIZE
    };
    let before = resident();
    // 16 Mi pages: 68 MiB of records, were they backed.
    let ram = GuestRam::new(ByteSize::mib(64 << 10)).unwrap();
    assert!(
        resident() - before < 4 << 20,
        "{} bytes",
        resident() - before
    );
    drop(ram);
}

#[test]
fn memory_is_one_sealed_file() {
    let ram = small();
    ram.memory()
        .write_slice(b"in the file", Gpa(0x2000))
        .unwrap();
    let mut bytes = [0; 11];
    rustix::io::pread(ram.memfd().unwrap(), &mut bytes, 0x2000).unwrap();
    assert_eq!(&bytes, b"in the file");
    assert!(rustix::fs::ftruncate(ram.memfd().unwrap(), 0).is_err());
    assert!(rustix::fs::ftruncate(ram.memfd().unwrap(), 2 << 20).is_err());
}

#[test]
fn memory_outlives_the_handle_it_was_taken_from() {
    let ram = small();
    let memory = ram.memory().clone();
    drop(ram);
    memory.write_slice(b"still here", Gpa(0)).unwrap();
    let mut bytes = [0; 10];
    memory.read_slice(&mut bytes, Gpa(0)).unwrap();
    assert_eq!(&bytes, b"still here");
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    for bytes in [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, 1 << 50, u64::MAX] {
        assert!(matches!(
            GuestRam::new(ByteSize(bytes)),
            Err(Error::Size { .. })
        ));
    }
}

#[test]
fn each_reader_sees_what_was_written_since_its_own_cursor() {
    let ram = small();
    let epochs = ram.epochs();
    ram.memory().write_slice(&[1], Gpa(0x1000)).unwrap();
    let early = epochs.cursor();
    ram.memory().write_slice(&[1], Gpa(0x2000)).unwrap();
    let late = epochs.cursor();
    ram.memory().write_slice(&[1], Gpa(0x3fff)).unwrap();
    let since = |cursor| {
        epochs
            .written_since(cursor)
            .map(|at| at.0)
            .collect::<Vec<_>>()
    };
    assert_eq!(since(Cursor::START), [0x1000, 0x2000, 0x3000]);
    assert_eq!(since(early), [0x2000, 0x3000]);
    assert_eq!(since(late), [0x3000]);
    assert_eq!(since(epochs.cursor()), [0u64; 0]);
    assert!(!epochs.was_written_since(Gpa(u64::MAX), Cursor::START));
}

#[test]
fn marks_outside_of_memory_are_ignored() {
    let ram = small();
    ram.epochs().mark(Gpa(u64::MAX), u64::MAX);
    ram.epochs().mark(Gpa(1 << 20), 1);
    ram.epochs().mark(Gpa(0), 0);
    assert_eq!(ram.epochs().written_since(Cursor::START).count(), 0);
    ram.epochs().mark(Gpa((1 << 20) - 1), u64::MAX);
    assert_eq!(ram.epochs().written_since(Cursor::START).count(), 1);
}

#[test]
fn writes_into_watched_pages_are_reported_once_and_in_order() {
    let ram = large();
    let epochs = ram.epochs();
    epochs.watch(Gpa(0x5123));
    epochs.watch(Gpa(HIGH_START + 0x1000));
    epochs.watch(Gpa(0x7000));
    epochs.unwatch(Gpa(0x7000));
    assert!(epochs.is_watched(Gpa(0x5fff)) && !epochs.is_watched(Gpa(0x7000)));
    assert!(!epochs.watched_write_pending());
    for at in [HIGH_START + 0x1fff, 0x5000, 0x7000, 0x5008, 0x6000] {
        ram.memory().write_slice(&[1], Gpa(at)).unwrap();
    }
    assert!(epochs.watched_write_pending());
    assert_eq!(
        epochs.take_watched_writes(),
        [Gpa(HIGH_START + 0x1000), Gpa(0x5000)]
    );
    assert!(!epochs.watched_write_pending());
    assert!(epochs.take_watched_writes().is_empty());
    ram.memory().write_slice(&[1], Gpa(0x5000)).unwrap();
    assert_eq!(epochs.take_watched_writes(), [Gpa(0x5000)]);
}

#[test]
fn a_reader_alongside_a_writer_misses_nothing() {
    let ram = small();
    let epochs = Arc::clone(ram.epochs());
    let writer = std::thread::spawn({
        let ram = ram.clone();
        move || {
            for n in 0u64..100_000 {
                ram.memory().write_obj(n, Gpa(0x4000)).unwrap();
            }
        }
    });
    // A copy that is kept up to date by cursors alone ends up the same.
    let mut copy = 0u64;
    let mut cursor = Cursor::START;
    let mut step = || {
        let next = epochs.cursor();
        if epochs.was_written_since(Gpa(0x4000), cursor) {
            copy = ram.memory().read_obj(Gpa(0x4000)).unwrap();
        }
        cursor = next;
    };
    while !writer.is_finished() {
        step();
    }
    writer.join().unwrap();
    step();
    assert_eq!(copy, 99_999);
}

#[test]
fn files_are_read_into_and_written_from_scattered_memory() {
    let ram = small();
    let file = tempfile::tempfile().unwrap();
    (&file).write_all(b"0123456789").unwrap();
    let into = [slice(&ram, 0x1ffe, 4), slice(&ram, 0x5000, 3)];
    let before = ram.epochs().cursor();
    assert_eq!(volatile::read_at(&file, &into, 1, LONG).unwrap(), 7);
    let written: Vec<_> = ram.epochs().written_since(before).map(|at| at.0).collect();
    assert_eq!(written, [0x1000, 0x2000, 0x5000]);
    let mut bytes = [0; 4];
    ram.memory().read_slice(&mut bytes, Gpa(0x1ffe)).unwrap();
    assert_eq!(&bytes, b"1234");

    assert_eq!(volatile::write_at(&file, &into, 10, LONG).unwrap(), 7);
    let mut bytes = [0; 7];
    rustix::io::pread(&file, &mut bytes, 10).unwrap();
    assert_eq!(&bytes, b"1234567");
    assert_eq!(volatile::read_at(&file, &into, 1000, LONG).unwrap(), 0);
    assert!(volatile::read_at(&file, &into, u64::MAX, LONG).is_err());
}

#[test]
fn a_call_that_may_not_wait_does_the_same_or_says_why_not() {
    let ram = small();
    let file = tempfile::tempfile().unwrap();
    (&file).write_all(b"0123456789").unwrap();
    let into = [slice(&ram, 0x1000, 4)];
    let kinds = [
        std::io::ErrorKind::WouldBlock,
        std::io::ErrorKind::Unsupported,
    ];
    match volatile::read_at(&file, &into, 3, Wait::NotAtAll) {
        Ok(n) => assert_eq!(
            (n, ram.memory().read_obj(Gpa(0x1000)).ok()),
            (4, Some(*b"3456"))
        ),
        Err(error) => assert!(kinds.contains(&error.kind()), "{error}"),
    }
    match volatile::write_at(&file, &into, 10, Wait::NotAtAll) {
        Ok(n) => assert_eq!((n, file.metadata().unwrap().len()), (4, 14)),
        Err(error) => assert!(kinds.contains(&error.kind()), "{error}"),
    }
}

#[test]
fn only_pages_that_a_short_read_reached_are_recorded() {
    let ram = small();
    let file = tempfile::tempfile().unwrap();
    (&file).write_all(b"abc").unwrap();
    let into = [
        slice(&ram, 0x1000, 2),
        slice(&ram, 0x2000, 4096),
        slice(&ram, 0x4000, 1),
    ];
    assert_eq!(volatile::read_at(&file, &into, 0, LONG).unwrap(), 3);
    let written: Vec<_> = ram
        .epochs()
        .written_since(Cursor::START)
        .map(|at| at.0)
        .collect();
    assert_eq!(written, [0x1000, 0x2000]);
}

#[test]
fn sockets_send_and_receive_without_waiting_or_signals() {
    let ram = small();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let memory = [slice(&ram, 0, 3)];
    let empty = volatile::receive(&ours, &memory).unwrap_err();
    assert_eq!(empty.kind(), std::io::ErrorKind::WouldBlock);
    ram.memory().write_slice(b"hey", Gpa(0)).unwrap();
    assert_eq!(volatile::send(ours.as_fd(), &memory).unwrap(), 3);
    assert_eq!(
        volatile::receive(&theirs, &[slice(&ram, 0x100, 10)]).unwrap(),
        3
    );
    let mut bytes = [0; 3];
    ram.memory().read_slice(&mut bytes, Gpa(0x100)).unwrap();
    assert_eq!(&bytes, b"hey");
    drop(theirs);
    assert_eq!(volatile::receive(&ours, &memory).unwrap(), 0);
    let closed = volatile::send(&ours, &memory).unwrap_err();
    assert_eq!(closed.kind(), std::io::ErrorKind::BrokenPipe);
}

proptest! {
    #[test]
    fn epochs_agree_with_a_set_of_pages(
        steps in proptest::collection::vec(
            (any::<bool>(), 0u64..(1 << 20), 0usize..20_000),
            1..40,
        ),
    ) {
        let ram = small();
        let mut expected = BTreeSet::new();
        let mut cursor = Cursor::START;
        for (new_cursor, at, len) in steps {
            if new_cursor {
                cursor = ram.epochs().cursor();
                expected.clear();
            }
            let len = len.min((1 << 20) - at as usize);
            ram.memory().write_slice(&vec![1; len], Gpa(at)).unwrap();
            if len > 0 {
                expected.extend(at / PAGE_SIZE..=(at + len as u64 - 1) / PAGE_SIZE);
            }
            let got: BTreeSet<_> =
                ram.epochs().written_since(cursor).map(|at| at.0 / PAGE_SIZE).collect();
            prop_assert_eq!(&got, &expected);
        }
    }
}

#[test]
fn what_is_populated_is_backed_and_nothing_else() {
    let ram = large();
    crate::populate(ram.memory(), Gpa(0x1800), 0x2000);
    assert_eq!(ram.resident_bytes().unwrap(), 3 * PAGE_SIZE);
    crate::populate(ram.memory(), Gpa(HIGH_START), 5);
    assert_eq!(ram.resident_bytes().unwrap(), 4 * PAGE_SIZE);
    for (at, len) in [(LOW_END - 1, 2), (LOW_END, 1), (0, u64::MAX), (5 << 30, 1)] {
        crate::populate(ram.memory(), Gpa(at), len);
    }
    assert_eq!(ram.resident_bytes().unwrap(), 4 * PAGE_SIZE);
}

/// Huge pages of 2 MiB that the host has free.
fn free_huge_pages() -> u64 {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[test]
fn huge_pages_are_reserved_or_it_is_said_how_many_are_missing() {
    let huge = |mib| GuestRam::of_pages(Pages::Huge, ByteSize::mib(mib), Vec::new());
    // More than hosts have.
    let error = huge(1 << 20).unwrap_err();
    assert!(matches!(error, Error::HugePages { .. }), "{error:?}");
    let words = error.to_string();
    assert!(words.contains("need 524288 huge pages"), "{words}");
    assert!(words.contains("/proc/sys/vm/nr_hugepages"), "{words}");
    let (free, made) = (free_huge_pages(), huge(8));
    if free < 4 {
        assert!(matches!(made, Err(Error::HugePages { .. })), "{made:?}");
        return;
    }
    let ram = made.unwrap();
    ram.memory().write_slice(&[7; 4096], Gpa(3 << 20)).unwrap();
    // A part of a page becomes zero, and the host does not get it.
    assert_eq!(ram.discard(Gpa(3 << 20), 4096).unwrap(), 0);
    assert_eq!(ram.discard(Gpa(1 << 20), 5 << 20).unwrap(), 4 << 20);
    let mut there = [1; 4096];
    ram.memory().read_slice(&mut there, Gpa(3 << 20)).unwrap();
    assert_eq!(there.iter().max(), Some(&0));
    let file = tempfile::tempfile().unwrap();
    ram.memory().write_slice(&[9; 16], Gpa(5 << 20)).unwrap();
    ram.write_image(&file).unwrap();
    let copy = GuestRam::from_image(ByteSize::mib(8), Vec::new(), file).unwrap();
    let mut there = [0; 16];
    copy.memory().read_slice(&mut there, Gpa(5 << 20)).unwrap();
    assert_eq!(there, [9; 16]);
}

#[test]
fn the_host_is_asked_for_large_pages() {
    let ram = GuestRam::of_pages(Pages::Transparent, ByteSize::mib(64), Vec::new()).unwrap();
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", ram.host_base().as_ptr() as usize);
    let flags = maps
        .split_once(&start)
        .and_then(|(_, rest)| rest.lines().find(|line| line.starts_with("VmFlags:")));
    // hg: MADV_HUGEPAGE (Documentation/filesystems/proc.rst).
    assert!(
        flags.unwrap().split(' ').any(|flag| flag == "hg"),
        "{flags:?}"
    );
}
