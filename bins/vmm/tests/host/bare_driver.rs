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
    let mut code = first_request(chain, first);
    code.extend(say(then));
    code
}

/// Makes one request, which reads sector 0 of a disk, calls `page` and says the letter that this returns; then the same
/// with sector 1.
pub(crate) fn two_reads_called(chain: &[(u32, u32, u32)], page: u32) -> Vec<u8> {
    // cpuid: what another agent wrote is executed after an instruction that serializes (Intel SDM, 8.1.3).
    // mov esp, a stack
    let mut called = vec![0x0f, 0xa2, 0xbc];
    called.extend((RINGS + 0x10_0000).to_le_bytes());
    called.push(0xbb);
    called.extend(page.to_le_bytes()); // mov ebx, page
    // call rbx; mov dx, 0x3f8; out dx, al
    called.extend(b"\xff\xd3\x66\xba\xf8\x03\xee");
    let mut code = first_request(chain, 0);
    code.extend(&called);
    // The sector; offered; the kick.
    for (to, offset, value) in [
        (0x86, BUFFER - RINGS + 8, 1_u32),
        (0x86, 0x1000, 2 << 16),
        (0x87, 0x50, 0),
    ] {
        code.extend([0xc7, to]);
        code.extend(offset.to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    // mov eax, [rsi + 0x2000]; shr eax, 16; cmp eax, 2; jne back
    code.extend(b"\x8b\x86\x00\x20\x00\x00\xc1\xe8\x10\x83\xf8\x02\x75\xf2");
    code.extend(&called);
    code.extend(say(""));
    code
}

/// As [`request`], up to its end.
fn first_request(chain: &[(u32, u32, u32)], first: u32) -> Vec<u8> {
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
    code
}
