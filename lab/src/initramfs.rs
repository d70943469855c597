//! An initial RAM disk in the "newc" format of cpio (Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst).

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const DEVICE: u32 = 0o020_600;

/// An initial RAM disk under construction. Parents come before their children.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

impl Initramfs {
    /// With a console and busybox as `/bin/busybox`; `script` runs as PID 1 in its
    /// shell.
    pub fn with_busybox(busybox: &[u8], script: &str) -> Self {
        let mut disk = Self::default();
        for directory in ["dev", "proc", "sys", "bin"] {
            disk.add(directory, DIRECTORY, &[], 0);
        }
        disk.add("dev/console", DEVICE, &[], 5 << 8 | 1);
        disk.add("bin/busybox", PROGRAM, busybox, 0);
        disk.add(
            "init",
            PROGRAM,
            format!("#!/bin/busybox sh\n{script}\n").as_bytes(),
            0,
        );
        disk
    }

    /// Adds a program as `/bin/NAME`.
    pub fn add_program(&mut self, name: &str, content: &[u8]) {
        self.add(&format!("bin/{name}"), PROGRAM, content, 0);
    }

    /// The finished disk.
    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[], 0);
        self.bytes
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8], device: u32) {
        self.entries += 1;
        let (major, minor) = (device >> 8, device & 0xff);
        let len = content.len() as u32;
        let name_len = name.len() as u32 + 1;
        self.bytes.extend(b"070701");
        let numbers = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            len,
            0,
            0,
            major,
            minor,
            name_len,
            0,
        ];
        for number in numbers {
            self.bytes.extend(format!("{number:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
