//! Good kernels end up where they belong, hostile ones earn an error.

use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{SETUP_RNG_SEED, setup_header};
use proptest::prelude::*;
use ram::{ByteSize, Gpa, GuestMemory, GuestRam};
use tempfile::TempDir;
use vm_memory::{ByteValued, Bytes};
use x86::registers::RSI;

use super::*;
use crate::layout::{CMDLINE, SETUP_DATA, ZERO_PAGE};

const MIB: u64 = 1 << 20;

/// An ELF kernel of one segment: `code` at `start`, `memory_len` bytes there.
pub(crate) fn elf(start: u64, code: &[u8], memory_len: u64) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend(2_u16.to_le_bytes()); // ET_EXEC
    image.extend(62_u16.to_le_bytes()); // EM_X86_64
    image.extend(1_u32.to_le_bytes());
    image.extend(start.to_le_bytes()); // e_entry
    image.extend(64_u64.to_le_bytes()); // e_phoff
    image.extend(0_u64.to_le_bytes());
    image.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    image.extend(1_u32.to_le_bytes()); // PT_LOAD
    image.extend(5_u32.to_le_bytes());
    for word in [120, start, start, code.len() as u64, memory_len, 0x1000] {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    image
}

/// A bzImage whose protected-mode part is `packed`, that runs at 16 MiB in
/// `init_size` bytes.
fn bzimage(packed: &[u8], init_size: u32) -> Vec<u8> {
    let mut image = vec![0; 1024];
    let header = setup_header {
        setup_sects: 1,
        syssize: (packed.len() / 16) as u32,
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x020f,
        loadflags: 1,
        xloadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        pref_address: 16 * MIB,
        init_size,
        ..setup_header::default()
    };
    let bytes = header.as_slice();
    image[0x1f1..0x1f1 + bytes.len()].copy_from_slice(bytes);
    image.extend(packed);
    image
}

struct Host {
    ram: GuestRam,
    dir: TempDir,
}

impl Host {
    fn new(mib: u64) -> Self {
        let ram = GuestRam::new(ByteSize::mib(mib)).unwrap();
        Self {
            ram,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    fn load(&self, image: &[u8]) -> Result<kernel::Kernel, Error> {
        let path = self.file("kernel", image);
        kernel::load(self.memory(), memory_map(&self.ram).low_end, &path)
    }

    fn blueprint(&self, kernel: &[u8], initrd: Option<&[u8]>) -> Blueprint {
        let kernel = self.file("kernel", kernel);
        let initrd = initrd.map(|bytes| self.file("initrd", bytes));
        let draft = serde_json::json!({
            "boot-source": {
                "kernel_image_path": kernel, "initrd_path": initrd, "boot_args": "a=b"
            }
        });
        blueprint::Draft::from_json(draft.to_string().as_bytes())
            .unwrap()
            .check()
            .unwrap()
    }
}

fn refusal(host: &Host, image: &[u8]) -> String {
    let text = host.load(image).unwrap_err().to_string();
    assert!(
        text.contains(host.dir.path().to_str().unwrap()),
        "names its path: {text}"
    );
    text.replace(host.dir.path().to_str().unwrap(), "")
}

#[test]
fn an_elf_kernel_is_loaded_where_it_says_and_bss_is_zero() {
    let host = Host::new(32);
    let kernel = host.load(&elf(16 * MIB, b"code", MIB)).unwrap();
    assert_eq!((kernel.entry, kernel.end), (Gpa(16 * MIB), 17 * MIB));
    let mut code = [0xff; 6];
    host.memory().read_slice(&mut code, Gpa(16 * MIB)).unwrap();
    assert_eq!(&code, b"code\0\0");
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry_and_keeps_room_to_unpack() {
    let host = Host::new(64);
    let mut packed = vec![0; 0x400];
    packed[0x200] = 0x90;
    let kernel = host.load(&bzimage(&packed, 8 << 20)).unwrap();
    assert_eq!((kernel.entry, kernel.end), (Gpa(0x10_0200), 24 * MIB));
    assert_eq!(host.memory().read_obj::<u8>(kernel.entry).unwrap(), 0x90);
}

#[test]
fn kernels_that_cannot_boot_are_refused_with_path_and_reason() {
    let host = Host::new(32);
    let good = elf(16 * MIB, &[0x90; 4096], 4096);
    let patched = |at: usize, byte: u8| {
        let mut image = good.clone();
        image[at] = byte;
        image
    };
    let table: &[(&[u8], &str)] = &[
        (b"", "kernel \"/kernel\" is empty"),
        (
            b"#!/bin/sh\n",
            "kernel \"/kernel\" is neither an ELF file nor a bzImage",
        ),
        (
            &good[..63],
            "kernel \"/kernel\" is truncated: its headers want more than its 63 bytes",
        ),
        (
            &good[..100],
            "kernel \"/kernel\" is truncated: its headers want more than its 100 bytes",
        ),
        (
            &good[..4000],
            "kernel \"/kernel\" is truncated: its headers want more than its 4000 bytes",
        ),
        (
            &patched(4, 1),
            "kernel \"/kernel\" cannot be booted: it is not an ELF file for 64-bit x86",
        ),
        (
            &patched(18, 183),
            "kernel \"/kernel\" cannot be booted: it is not an ELF file for 64-bit x86",
        ),
        (
            &patched(54, 57),
            "kernel \"/kernel\" cannot be booted: its program headers are malformed",
        ),
        (
            &patched(56, 0),
            "kernel \"/kernel\" cannot be booted: it has no program headers, or too many",
        ),
        (
            &patched(57, 1),
            "kernel \"/kernel\" cannot be booted: it has no program headers, or too many",
        ),
        (
            &patched(27, 0),
            "kernel \"/kernel\" cannot be booted: its entry point is in none of its segments",
        ),
        (
            &elf(4096, b"low", 4096),
            "kernel \"/kernel\" cannot be booted: it wants to be loaded below 1 MiB",
        ),
        (
            &elf(31 * MIB, b"big", 2 * MIB),
            "kernel \"/kernel\" needs memory up to 0x2100000, the guest's ends at 0x2000000",
        ),
        (
            &elf(u64::MAX - 1, b"wraps", 4096),
            "kernel \"/kernel\" needs memory up to 0xffffffffffffffff, the guest's ends at 0x2000000",
        ),
        (
            &bzimage(&[0; 0x400], 17 << 20),
            "kernel \"/kernel\" needs memory up to 0x2100000, the guest's ends at 0x2000000",
        ),
        (
            &bzimage(&[0; 0x400], 1)[..1500],
            "kernel \"/kernel\" is truncated: its headers want more than its 1500 bytes",
        ),
        (
            &bzimage(&[], 1),
            "kernel \"/kernel\" cannot be booted: its protected-mode part is empty",
        ),
    ];
    for (image, wanted) in table {
        assert_eq!(&refusal(&host, image), wanted);
    }
}

#[test]
fn directories_and_missing_files_are_no_kernels_and_pipes_do_not_hang() {
    let host = Host::new(32);
    let fifo = host.dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
    for path in [
        Path::new("/"),
        Path::new("/nonexistent/kernel"),
        &fifo,
        Path::new("/dev/null"),
    ] {
        let error = kernel::load(host.memory(), 32 * MIB, path).unwrap_err();
        assert!(matches!(error, Error::OpenKernel { .. }), "{error}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn the_initial_ram_disk_lies_page_aligned_at_the_top() {
    let host = Host::new(32);
    let path = host.file("initrd", &[7; 5000]);
    let initrd = initrd::load(host.memory(), MIB, 32 * MIB, &path).unwrap();
    assert_eq!((initrd.start, initrd.len), (Gpa(32 * MIB - 8192), 5000));
    assert_eq!(
        host.memory()
            .read_obj::<u8>(Gpa(32 * MIB - 8192 + 4999))
            .unwrap(),
        7
    );
}

#[test]
fn an_initial_ram_disk_does_not_lie_where_the_kernel_wants_zeros() {
    let host = Host::new(32);
    let kernel = host.load(&elf(16 * MIB, b"", MIB)).unwrap();
    assert_eq!(kernel.end, 17 * MIB);
}

#[test]
fn an_initial_ram_disk_that_would_cover_the_kernel_is_refused() {
    let host = Host::new(32);
    let path = host.file("initrd", &[7; 5000]);
    let floor = 32 * MIB - 8191;
    let error = initrd::load(host.memory(), floor, 32 * MIB, &path).unwrap_err();
    assert!(
        matches!(
            error,
            Error::InitrdTooLarge {
                len: 5000,
                room: 4096,
                ..
            }
        ),
        "{error}"
    );
    let empty = host.file("empty", b"");
    let error = initrd::load(host.memory(), MIB, 32 * MIB, &empty).unwrap_err();
    assert!(matches!(error, Error::InitrdEmpty { .. }), "{error}");
    let error = initrd::load(host.memory(), MIB, 32 * MIB, Path::new("/")).unwrap_err();
    assert!(matches!(error, Error::OpenInitrd { .. }), "{error}");
}

#[test]
fn the_zero_page_tells_of_memory_command_line_ram_disk_and_acpi() {
    // Sparse: nothing of the 5 GiB is touched but what boot writes.
    let host = Host::new(5 * 1024);
    let blueprint = host.blueprint(&elf(16 * MIB, b"code", MIB), Some(b"initrd"));
    let state = load(&host.ram, &blueprint, &[]).unwrap();
    assert_eq!((state.rip, state.gpr[RSI]), (16 * MIB, ZERO_PAGE.0));

    let params = boot_params::read(host.memory());
    let e820: Vec<_> = params
        .e820_table
        .iter()
        .take(params.e820_entries.into())
        .map(|entry| (entry.addr, entry.size, entry.r#type))
        .collect();
    assert_eq!(
        e820,
        [
            (0, 0x9_fc00, 1),
            (0xe_0000, 0x1_e000, 3),
            (0xf_e000, 0x2000, 2),
            (MIB, 3 * 1024 * MIB - MIB, 1),
            (4096 * MIB, 2048 * MIB, 1),
        ]
    );
    let header = params.hdr;
    assert_eq!(
        ({ header.boot_flag }, { header.header }),
        (0xaa55, 0x5372_6448)
    );
    assert_eq!({ header.type_of_loader }, 0xff);
    assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
    assert_eq!({ header.ramdisk_size }, 6);
    assert_eq!(u64::from(header.ramdisk_image), 2048 * MIB - 4096);

    let mut line = [0xff; 4];
    host.memory().read_slice(&mut line, CMDLINE).unwrap();
    assert_eq!(
        (&line, u64::from(header.cmd_line_ptr)),
        (b"a=b\0", CMDLINE.0)
    );

    assert_eq!({ header.setup_data }, SETUP_DATA.0);
    let seed: [u64; 6] = host.memory().read_obj(SETUP_DATA).unwrap();
    assert_eq!(
        (seed[0], seed[1]),
        (0, u64::from(SETUP_RNG_SEED) | 32 << 32)
    );
    assert!(seed[2..].iter().all(|word| *word != 0), "random");
}

#[test]
fn a_bzimages_own_header_reaches_the_zero_page() {
    let host = Host::new(128);
    let blueprint = host.blueprint(&bzimage(&[0; 0x400], 8 << 20), None);
    load(&host.ram, &blueprint, &[]).unwrap();
    let header = boot_params::read(host.memory()).hdr;
    assert_eq!(
        ({ header.init_size }, { header.pref_address }),
        (8 << 20, 16 * MIB)
    );
    assert_eq!(
        ({ header.code32_start }, { header.type_of_loader }),
        (0x10_0000, 0xff)
    );
}

#[test]
fn a_bzimage_that_claims_a_ram_disk_does_not_get_one() {
    let host = Host::new(128);
    let mut image = bzimage(&[0x90; 0x400], MIB as u32);
    for (at, value) in [(0x218, 2 * MIB as u32), (0x21c, 15872_u32)] {
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    load(&host.ram, &host.blueprint(&image, None), &[]).unwrap();
    let header = boot_params::read(host.memory()).hdr;
    assert_eq!((header.ramdisk_image, header.ramdisk_size), (0, 0));
}

/// Walks four levels of page tables as SDM vol. 3, §4.5 describes.
fn walk(memory: &GuestMemory, cr3: u64, at: u64) -> Option<u64> {
    let mut table = cr3;
    for level in [39, 30, 21] {
        let entry: u64 = memory
            .read_obj(Gpa(table + (at >> level & 511) * 8))
            .unwrap();
        if entry & 1 == 0 {
            return None;
        }
        if entry & 0x80 != 0 {
            let mask = (1 << level) - 1;
            return Some(entry & !mask & !0xfff | at & mask);
        }
        table = entry & !0xfff;
    }
    None
}

#[test]
fn the_first_4_gib_are_mapped_one_to_one_and_no_more() {
    let host = Host::new(32);
    let state = cpu::prepare(host.memory(), Gpa(MIB)).unwrap();
    for at in [
        0,
        0x1234,
        MIB,
        0x3fff_ffff,
        0x4000_0000,
        0xfee0_0000,
        0xffff_ffff,
    ] {
        assert_eq!(walk(host.memory(), state.cr3, at), Some(at));
    }
    assert_eq!(walk(host.memory(), state.cr3, 1 << 32), None);
    assert_eq!(walk(host.memory(), state.cr3, 1 << 39), None);
}

#[test]
fn segments_agree_with_the_descriptor_table() {
    let host = Host::new(32);
    let state = cpu::prepare(host.memory(), Gpa(MIB)).unwrap();
    for segment in state.segments.iter().chain([&state.tr]) {
        assert!(segment.selector + 7 <= state.gdt.limit);
        let at = Gpa(state.gdt.base + u64::from(segment.selector));
        let descriptor: u64 = host.memory().read_obj(at).unwrap();
        let rights = (descriptor >> 40) as u16 & 0xf0ff;
        assert_eq!(rights, segment.rights, "{segment:x?}");
        let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
        let limit = if rights & 0x8000 != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        };
        assert_eq!(limit, segment.limit);
    }
}

/// A small machine for many tries: memory only ever grows by what is loaded.
fn try_kernel(image: &[u8]) -> Result<kernel::Kernel, Error> {
    let host = Host::new(32);
    host.load(image)
}

proptest! {
    #[test]
    fn random_bytes_are_never_a_kernel(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(try_kernel(&bytes).is_err());
    }

    #[test]
    fn elf_headers_with_wild_numbers_are_loaded_or_refused(
        changes in prop::collection::vec((16_usize..120, any::<u8>()), 1..24),
    ) {
        let mut image = elf(16 * MIB, &[0x90; 64], 4096);
        for (at, byte) in changes {
            image[at] = byte;
        }
        if let Ok(kernel) = try_kernel(&image) {
            prop_assert!(kernel.entry.0 >= MIB && kernel.end <= 32 * MIB);
        }
    }

    #[test]
    fn notes_with_wild_numbers_are_loaded_or_refused(
        notes in prop::collection::vec(any::<u8>(), 0..200), offset in 0_u64..400, len in 0_u64..400,
    ) {
        let mut image = elf(16 * MIB, &notes, 4096);
        // A second header would overlap the code: make room by moving the table.
        let table = image.len() as u64;
        let load = image[64..120].to_vec();
        image[32..40].copy_from_slice(&table.to_le_bytes());
        image[56] = 2;
        image.extend(load);
        image.extend(4_u32.to_le_bytes()); // PT_NOTE
        image.extend(0_u32.to_le_bytes());
        for word in [offset, 0, 0, len, len, 4] {
            image.extend(word.to_le_bytes());
        }
        if let Ok(kernel) = try_kernel(&image) {
            prop_assert_eq!(kernel.entry, Gpa(16 * MIB));
        }
    }

    #[test]
    fn bzimage_headers_with_wild_numbers_are_loaded_or_refused(
        changes in prop::collection::vec((0x1f1_usize..0x270, any::<u8>()), 1..24),
    ) {
        let mut image = bzimage(&[0x90; 0x400], 4096);
        for (at, byte) in changes {
            image[at] = byte;
        }
        if let Ok(kernel) = try_kernel(&image) {
            prop_assert!(kernel.entry.0 >= MIB && kernel.end <= 32 * MIB);
        }
    }
}
