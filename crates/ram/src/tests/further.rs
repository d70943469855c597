//! Memory that comes and goes: discarded pages, pluggable blocks, files of the host.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

use crate::{
    AccessListener, ByteSize, Cursor, Error, Further, Gpa, GuestRam, HIGH_START, Kind, PAGE_SIZE,
};

const MIB: u64 = 1 << 20;

fn with(further: Further) -> (GuestRam, u64) {
    let ram = GuestRam::with(ByteSize::mib(4), vec![further]).unwrap();
    let at = ram.regions().last().unwrap().start.0;
    (ram, at)
}

fn pluggable() -> (GuestRam, u64) {
    with(Further::Pluggable {
        len: 128 * MIB,
        block: 2 * MIB,
    })
}

fn file(content: &[u8], read_only: bool) -> (GuestRam, u64, File) {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    let further = Further::File {
        file: file.try_clone().unwrap(),
        read_only,
    };
    let (ram, at) = with(further);
    (ram, at, file)
}

fn put(ram: &GuestRam, at: u64, bytes: &[u8]) {
    ram.memory().write_slice(bytes, Gpa(at)).unwrap();
}

fn get(ram: &GuestRam, at: u64) -> [u8; 4] {
    ram.memory().read_obj(Gpa(at)).unwrap()
}

#[test]
fn discarded_pages_are_zero_given_back_and_recorded_as_written() {
    let ram = GuestRam::new(ByteSize::mib(4)).unwrap();
    for page in 0..4 {
        put(&ram, page * PAGE_SIZE, b"full");
    }
    assert_eq!(ram.resident_bytes().unwrap(), 4 * PAGE_SIZE);
    ram.epochs().watch(Gpa(PAGE_SIZE));
    let before = ram.epochs().cursor();
    // Part of the first page and of the last.
    let freed = ram.discard(Gpa(1), 3 * PAGE_SIZE).unwrap();
    assert_eq!(freed, 2 * PAGE_SIZE);
    assert_eq!(ram.resident_bytes().unwrap(), 2 * PAGE_SIZE);
    let content: Vec<_> = (0..4).map(|page| get(&ram, page * PAGE_SIZE)).collect();
    assert_eq!(content, [*b"full", [0; 4], [0; 4], *b"full"]);
    let written: Vec<_> = ram.epochs().written_since(before).collect();
    assert_eq!(written, [Gpa(PAGE_SIZE), Gpa(2 * PAGE_SIZE)]);
    assert_eq!(ram.epochs().take_watched_writes(), [Gpa(PAGE_SIZE)]);
}

#[test]
fn less_than_a_page_is_not_given_back() {
    let ram = GuestRam::new(ByteSize::mib(4)).unwrap();
    put(&ram, 0x1000, b"full");
    assert_eq!(ram.discard(Gpa(0x1001), PAGE_SIZE).unwrap(), 0);
    assert_eq!(ram.discard(Gpa(0x1000), PAGE_SIZE - 1).unwrap(), 0);
    assert_eq!(ram.discard(Gpa(0x1000), 0).unwrap(), 0);
    assert_eq!(get(&ram, 0x1000), *b"full");
}

#[test]
fn what_is_not_the_machines_own_memory_is_not_discarded() {
    let (ram, at, file) = file(&[7; 4096], false);
    for (at, len) in [
        (at, PAGE_SIZE),
        (4 * MIB, PAGE_SIZE),
        (3 * MIB, MIB + 1),
        (u64::MAX, 1),
        (0, u64::MAX),
    ] {
        let refused = ram.discard(Gpa(at), len);
        assert!(matches!(refused, Err(Error::Range { .. })), "{at:#x}");
    }
    assert_eq!(file.metadata().unwrap().len(), 4096);
    assert_eq!(get(&ram, at), [7; 4]);
    let (ram, at) = pluggable();
    assert!(ram.discard(Gpa(at), PAGE_SIZE).is_err(), "unplugged");
    ram.plug(Gpa(at), 2 * MIB).unwrap();
    put(&ram, at, b"full");
    assert_eq!(ram.discard(Gpa(at), PAGE_SIZE).unwrap(), PAGE_SIZE);
    assert_eq!(get(&ram, at), [0; 4]);
}

#[derive(Default)]
struct Told(Mutex<Vec<(bool, u64, u64)>>);

impl AccessListener for Told {
    fn granted(&self, at: Gpa, len: u64) {
        self.0.lock().unwrap().push((true, at.0, len));
    }

    fn withdrawn(&self, at: Gpa, len: u64) {
        self.0.lock().unwrap().push((false, at.0, len));
    }
}

#[test]
fn only_plugged_blocks_may_be_reached_and_unplugged_ones_are_given_back() {
    let (ram, at) = pluggable();
    assert_eq!(at % (128 * MIB), 0);
    let (told, forgotten) = (Arc::new(Told::default()), Arc::new(Told::default()));
    let listener: Arc<dyn AccessListener> = told.clone();
    ram.listen(Arc::downgrade(&listener));
    let gone: Arc<dyn AccessListener> = forgotten.clone();
    ram.listen(Arc::downgrade(&gone));
    drop((gone, forgotten));

    assert!(!ram.contains(Gpa(at), 1) && ram.plugged(Gpa(at), 128 * MIB) == Some(false));
    ram.plug(Gpa(at + 2 * MIB), 4 * MIB).unwrap();
    assert!(ram.allows(Gpa(at + 2 * MIB), 4 * MIB, true));
    assert!(!ram.contains(Gpa(at + 6 * MIB - 1), 2));
    assert_eq!(ram.plugged(Gpa(at), 128 * MIB), None);
    put(&ram, at + 4 * MIB, b"full");
    put(&ram, at + 2 * MIB, b"full");
    let slice = ram.memory().get_slice(Gpa(at + 4 * MIB), 4096).unwrap();
    assert!(slice.bitmap().allows(4096, true));
    ram.unplug(Gpa(at + 4 * MIB), 2 * MIB).unwrap();
    assert!(!slice.bitmap().allows(1, false));
    assert!(!ram.contains(Gpa(at + 4 * MIB), 1) && ram.contains(Gpa(at + 2 * MIB), 2 * MIB));
    assert_eq!(ram.resident_bytes().unwrap(), PAGE_SIZE);
    ram.plug(Gpa(at + 4 * MIB), 2 * MIB).unwrap();
    assert_eq!(get(&ram, at + 4 * MIB), [0; 4]);

    let told = told.0.lock().unwrap().clone();
    let block = |granted, mib, len| (granted, at + mib * MIB, len * MIB);
    let wanted = [block(true, 2, 4), block(false, 4, 2), block(true, 4, 2)];
    assert_eq!(told, wanted);
}

#[test]
fn blocks_are_plugged_whole_and_once() {
    let (ram, at) = pluggable();
    ram.plug(Gpa(at), 2 * MIB).unwrap();
    for (from, len) in [
        (at, 2 * MIB),
        (at, 4 * MIB),
        (at + MIB, 2 * MIB),
        (at + 2 * MIB, MIB),
        (at + 2 * MIB, 0),
        (at + 126 * MIB, 4 * MIB),
        (0, 2 * MIB),
        (u64::MAX, 2 * MIB),
    ] {
        assert!(ram.plug(Gpa(from), len).is_err(), "{from:#x} {len:#x}");
    }
    assert!(ram.unplug(Gpa(at), 4 * MIB).is_err());
    assert!(ram.unplug(Gpa(at + 2 * MIB), 2 * MIB).is_err());
    ram.unplug(Gpa(at), 2 * MIB).unwrap();
}

#[test]
fn a_file_is_memory_behind_the_memory() {
    let (ram, at, mut file) = file(&[7; 5000], false);
    let region = ram.regions().last().unwrap();
    assert_eq!((region.start, region.len), (Gpa(HIGH_START), 2 * MIB));
    assert_eq!(region.kind, Kind::File { read_only: false });
    assert_eq!((ram.size(), ram.end()), (ByteSize::mib(4), region.end()));
    let base = ram.host_base().as_ptr().addr() as u64;
    let host = ram.memory().get_host_address(region.start).unwrap();
    assert_eq!(host.addr() as u64, base + at);

    assert_eq!(get(&ram, at + 4998), [7, 7, 0, 0]);
    put(&ram, at + 4096, b"new");
    // Behind the file: nobody keeps it, but the guest may store there.
    put(&ram, at + 2 * MIB - 4, b"lost");
    file.rewind().unwrap();
    let mut content = Vec::new();
    file.read_to_end(&mut content).unwrap();
    assert_eq!((content.len(), &content[4096..4099]), (5000, &b"new"[..]));
    assert!(
        ram.epochs()
            .was_written_since(Gpa(at + 4096), Cursor::START)
    );
    assert!(!ram.epochs().was_written_since(Gpa(at), Cursor::START));
    let written: Vec<_> = ram.epochs().written_since(Cursor::START).collect();
    assert_eq!(written, [Gpa(at + 4096), Gpa(at + 2 * MIB - 4096)]);
}

#[test]
fn a_read_only_file_is_not_to_be_written() {
    let (ram, at, _file) = file(&[7; 4096], true);
    assert!(ram.contains(Gpa(at), 4096) && !ram.allows(Gpa(at), 1, true));
    let slice = ram.memory().get_slice(Gpa(at), 16).unwrap();
    assert!(slice.bitmap().allows(16, false) && !slice.bitmap().allows(16, true));
    assert_eq!(get(&ram, at), [7; 4]);
}

#[test]
fn a_file_without_bytes_is_refused() {
    let further = Further::File {
        file: tempfile::tempfile().unwrap(),
        read_only: false,
    };
    let refused = GuestRam::with(ByteSize::mib(4), vec![further]);
    assert!(matches!(refused, Err(Error::Size { bytes: 0, .. })));
}

#[test]
fn what_a_file_loses_becomes_zeros_and_nothing_ends() {
    let (ram, at, file) = file(&[7; 5 * 4096], false);
    assert_eq!(get(&ram, at + 2 * 4096), [7; 4]);
    file.set_len(4096 + 10).unwrap();
    // Each of these would be SIGBUS.
    assert_eq!(get(&ram, at + 4 * 4096), [0; 4]);
    put(&ram, at + 4 * 4096, b"kept");
    assert_eq!(get(&ram, at + 2 * 4096), [0; 4]);
    put(&ram, at + 2 * 4096 + 4, b"lost");
    assert_eq!(get(&ram, at + 4 * 4096), *b"kept");
    assert_eq!(get(&ram, at), [7; 4]);
    assert_eq!(get(&ram, at + 4096 + 8), [7, 7, 0, 0]);
    // What comes back is behind the zeros.
    file.write_all_at(&[9; 4096], 2 * 4096).unwrap();
    assert_eq!(get(&ram, at + 2 * 4096 + 4), *b"lost");
}

#[test]
fn lost_pages_are_healed_without_a_signal_too() {
    let (ram, at, file) = file(&[7; 5 * 4096], false);
    assert!(!ram.heal_files().unwrap());
    file.set_len(0).unwrap();
    // The kernel's own access.
    let copy = tempfile::tempfile().unwrap();
    let slice = ram.memory().get_slice(Gpa(at), 4096).unwrap();
    let write = || {
        let from = std::slice::from_ref(&slice);
        crate::volatile::write_at(&copy, from, 0, crate::volatile::Wait::AsLongAsItTakes)
    };
    let failed = write().unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(libc::EFAULT));
    assert!(ram.heal_files().unwrap());
    assert!(!ram.heal_files().unwrap());
    assert_eq!(write().unwrap(), 4096);
}

#[test]
fn several_threads_that_meet_a_lost_page_all_go_on() {
    let (ram, at, file) = file(&[7; 64 * 4096], false);
    file.set_len(0).unwrap();
    let sums: Vec<u32> = std::thread::scope(|scope| {
        let read = |first: u64| {
            let ram = &ram;
            move || {
                let pages = (0..64).map(|n| at + (n + first) % 64 * 4096);
                pages.map(|at| u32::from(get(ram, at)[0])).sum()
            }
        };
        let threads: Vec<_> = [0, 16, 32, 48].map(|n| scope.spawn(read(n))).into();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(sums, [0; 4]);
}

#[test]
fn an_address_of_nobody_is_not_repaired() {
    let (ram, at, file) = file(&[7; 4096], false);
    let base = ram.host_base().as_ptr().addr() as u64;
    for address in [0, base, base + at - 1, base + at + 4096, u64::MAX] {
        assert!(!crate::repair(address), "{address:#x}");
    }
    assert!(crate::repair(base + at), "there is a byte: try again");
    drop((ram, file));
    assert!(!crate::repair(base + at));
}

proptest! {
    #[test]
    fn any_sequence_of_plugs_and_unplugs_agrees_with_a_model(
        steps in prop::collection::vec((any::<bool>(), 0_u64..18, 0_u64..6), 1..40)
    ) {
        let ram = GuestRam::with(
            ByteSize::mib(2),
            vec![Further::Pluggable { len: 32 * MIB, block: 2 * MIB }],
        ).unwrap();
        let at = ram.regions().last().unwrap().start.0;
        let mut model = [false; 16];
        for (plug, first, n) in steps {
            let blocks = first as usize..(first + n) as usize;
            let fits = model.get(blocks.clone())
                .is_some_and(|all| !all.is_empty() && all.iter().all(|is| *is != plug));
            let (from, len) = (Gpa(at + first * 2 * MIB), n * 2 * MIB);
            let done = if plug { ram.plug(from, len) } else { ram.unplug(from, len) };
            prop_assert_eq!(done.is_ok(), fits);
            if fits {
                model[blocks].fill(plug);
            }
            for (block, plugged) in model.iter().enumerate() {
                let at = Gpa(at + block as u64 * 2 * MIB);
                prop_assert_eq!(ram.contains(at, 2 * MIB), *plugged);
                prop_assert_eq!(ram.plugged(at, 2 * MIB), Some(*plugged));
            }
        }
    }
}
