//! A guest of a few instructions that drives one virtio device.
#![allow(dead_code)] // each test program uses its part

use super::say;

/// Of a descriptor: the device writes it (VIRTQ_DESC_F_WRITE).
pub(crate) const WRITE: u32 = 2;
const NEXT: u32 = 1;
const RINGS: u32 = 0x0180_0000;
/// Memory for a request: a number of 32 bits, then zeros.
pub(crate) const BUFFER: u32 = RINGS + 0x3000;

/// Makes one request of the device in the first slot, of descriptors (address, length,
/// flags), waits for it without looking at anything but its ring, and says `then`. [`BUFFER`]
/// begins with `first`.
pub(crate) fn request(chain: &[(u32, u32, u32)], first: u32, then: &str) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend(0xd000_0000_u32.to_le_bytes()); // mov edi, the registers
    code.push(0xbe);
    code.extend(RINGS.to_le_bytes()); // mov esi, the rings
    let mut store = |to: u8, offset: u32, value: u32| {
        code.extend([0xc7, to]);
        code.extend(offset.to_le_bytes());
        code.extend(value.to_le_bytes());
    };
    const REGISTER: u8 = 0x87; // mov dword [rdi + offset], value
    const MEMORY: u8 = 0x86; // mov dword [rsi + offset], value
    for (index, (address, len, flags)) in (0_u32..).zip(chain) {
        let next = index + 1;
        let more = (next as usize) < chain.len();
        let linked = if more {
            flags | NEXT | next << 16
        } else {
            *flags
        };
        for (offset, value) in [(0, *address), (8, *len), (12, linked)] {
            store(MEMORY, index * 16 + offset, value);
        }
    }
    store(MEMORY, BUFFER - RINGS, first);
    // Offered.
    store(MEMORY, 0x1000, 1 << 16);
    for (offset, value) in [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        // VIRTIO_F_VERSION_1
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, 0),
        (0x38, 4),
        (0x80, RINGS),
        (0x90, RINGS + 0x1000),
        (0xa0, RINGS + 0x2000),
        (0x44, 1),
        (0x70, 15),
        // The kick.
        (0x50, 0),
    ] {
        store(REGISTER, offset, value);
    }
    // mov eax, [rsi + 0x2000]; shr eax, 16; jz back
    code.extend(b"\x8b\x86\x00\x20\x00\x00\xc1\xe8\x10\x74\xf5");
    code.extend(say(then));
    code
}
