//! The metadata service: frames as a guest sends them, each with its length in front, and
//! what the host puts into the store. The first bytes of a frame are made right, or few
//! would come in.
#![no_main]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use mmds::{Address, Counters, Endpoint, Metadata, Store, Version};

const SERVER: [u8; 4] = [169, 254, 169, 254];

/// The internet checksum (RFC 1071).
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Addresses, lengths and checksums of a TCP segment as a guest would make them.
fn repair(frame: &mut [u8]) {
    if frame.len() < 54 {
        return;
    }
    frame[6] &= 0xfe;
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    let len = (frame.len() - 14) as u16;
    frame[16..18].copy_from_slice(&len.to_be_bytes());
    frame[20..22].fill(0);
    frame[22] |= 1;
    frame[23] = 6;
    frame[24..26].fill(0);
    frame[30..34].copy_from_slice(&SERVER);
    let sum = checksum(&[&frame[14..34]]);
    frame[24..26].copy_from_slice(&sum);
    frame[36..38].copy_from_slice(&80_u16.to_be_bytes());
    frame[50..52].fill(0);
    let segment = (len - 20).to_be_bytes();
    let sum = checksum(&[&frame[26..34], &[0, 6], &segment, &frame[34..]]);
    frame[50..52].copy_from_slice(&sum);
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&how, mut rest)) = bytes.split_first() else {
        return;
    };
    if how & 1 != 0 {
        let mut store = Store::new(1000);
        for text in rest.split(|&byte| byte == 0) {
            let Ok(value) = serde_json::from_slice(text) else {
                return;
            };
            let _ = store.patch(value);
            assert!(store.value().to_string().len() <= 1000);
        }
        return;
    }
    let mut now = Instant::now();
    let mut metadata = Metadata::new("vm", 4096, now).unwrap();
    let value = serde_json::json!({"a": {"b": "c"}, "list": [1, 2]});
    metadata.store.put(value).unwrap();
    if how & 2 != 0 {
        metadata.version = Version::V2;
    }
    let counters = Arc::new(Counters::default());
    let metadata = Arc::new(Mutex::new(metadata));
    let mut endpoint = Endpoint::new(Address::default(), metadata, counters, now).unwrap();
    // The number that the server's next segment is to be answered with.
    let mut acknowledge = [0; 4];
    while let Some((&[high, low], behind)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_be_bytes([high & 7, low])).min(behind.len());
        let mut frame = behind[..len].to_vec();
        rest = &behind[len..];
        if high & 0x80 == 0 {
            if high & 0x40 == 0 && frame.len() >= 54 {
                frame[42..46].copy_from_slice(&acknowledge);
            }
            repair(&mut frame);
        }
        if endpoint.is_for_me(&frame) {
            endpoint.take(&frame, now);
        }
        now += Duration::from_millis(u64::from(high & 0x38) << 6);
        let mut sent = 0;
        while let Some(answer) = endpoint.next_frame(now) {
            sent += 1;
            assert!(sent < 1000, "the endpoint never stops");
            assert!(answer.len() <= 1514, "a frame of {} bytes", answer.len());
            if answer.len() >= 54 && answer[12..14] == [8, 0] {
                assert_eq!(
                    checksum(&[&answer[14..34]]),
                    [0, 0],
                    "the IP header's checksum"
                );
                assert_eq!(answer[26..30], SERVER, "somebody else's address");
                let sequence = u32::from_be_bytes(answer[38..42].try_into().unwrap());
                acknowledge = sequence.wrapping_add(1).to_be_bytes();
            }
        }
        let _next = endpoint.poll_at(now);
    }
});
