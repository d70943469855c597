//! Kernel images and initial RAM disks: loaded where they belong, or refused.
//!
//! The input: megabytes of zeros behind the kernel, half kilobytes of initial RAM disk (two
//! bytes), megabytes of memory, then the kernel's file.
#![no_main]

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use blueprint::Draft;
use libfuzzer_sys::fuzz_target;
use ram::{ByteSize, Gpa, GuestRam};
use vm_memory::Bytes as _;

const HIGH_MEMORY: u64 = 1 << 20;
const ZERO_PAGE: u64 = 0x7000;

/// A file that has a name as long as it is open.
fn file(bytes: &[u8], len: u64) -> (File, String) {
    let mut file = tempfile::tempfile_in(fuzz::scratch()).expect("a file");
    file.write_all(bytes).expect("some bytes");
    file.set_len(len).expect("a length");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&[zeros, initrd_low, initrd_high, memory], image)) = bytes.split_first_chunk() else {
        return;
    };
    let len = image.len() as u64 + (u64::from(zeros) << 20);
    let (_kernel, kernel_path) = file(image, len);
    let initrd_len = u64::from(u16::from_le_bytes([initrd_low, initrd_high])) * 512;
    let (initrd, initrd_path) = file(b"initrd", initrd_len);
    let draft = serde_json::json!({
        "boot-source": {
            "kernel_image_path": kernel_path,
            "initrd_path": (initrd_len > 0).then_some(initrd_path),
        },
        "machine-config": { "mem_size_mib": 32 + u64::from(memory) },
    });
    let blueprint = Draft::from_json(draft.to_string().as_bytes()).and_then(Draft::check);
    let blueprint = blueprint.expect("a small machine");
    let ram = GuestRam::new(ByteSize(blueprint.memory_bytes())).expect("memory");
    match machine::fuzz::load(&ram, &blueprint) {
        Ok(state) => {
            let memory = HIGH_MEMORY..blueprint.memory_bytes();
            assert!(memory.contains(&state.rip), "entry point {:#x}", state.rip);
            let field = |at| -> u64 {
                let value: u32 = ram.memory().read_obj(Gpa(ZERO_PAGE + at)).unwrap();
                value.into()
            };
            // Linux, Documentation/arch/x86/boot.rst: ramdisk_image, ramdisk_size
            let (start, len) = (field(0x218), field(0x21c));
            assert_eq!(len, initrd_len);
            if len > 0 {
                assert!(memory.contains(&start) && start + len <= memory.end);
                assert!(!(start..start + len).contains(&state.rip));
                let mut loaded = vec![0; len as usize];
                ram.memory().read_slice(&mut loaded, Gpa(start)).unwrap();
                let mut wanted = vec![0; len as usize];
                initrd.read_exact_at(&mut wanted, 0).unwrap();
                assert!(
                    loaded == wanted,
                    "the initial RAM disk is not what was in its file"
                );
            }
        }
        Err(refusal) => {
            let mut cause: Option<&dyn Error> = Some(&refusal);
            while let Some(error) = cause {
                assert!(!error.to_string().contains('\n'), "{error}");
                cause = error.source();
            }
        }
    }
});
