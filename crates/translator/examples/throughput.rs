//! How fast the translator is, and how large what it makes: translates the .text
//! of an ELF file from its start to its end.
//!
//! `cargo run --release -p translator --example throughput -- target/guest/vmlinux`

use std::time::Instant;

use translator::context::Mode;
use translator::{Block, GuestCode, Kind, Options, Refused, Request, Thunks, Translator};
use x86::features::Features;

struct Text {
    start: u64,
    bytes: Vec<u8>,
}

impl GuestCode for Text {
    fn tail(&self, va: u64) -> Option<&[u8]> {
        let from = usize::try_from(va.checked_sub(self.start)?).ok()?;
        let to = usize::try_from((va | 0xfff) + 1 - self.start)
            .ok()?
            .min(self.bytes.len());
        self.bytes.get(from..to).filter(|bytes| !bytes.is_empty())
    }
}

fn word<const N: usize>(file: &[u8], at: usize) -> Option<[u8; N]> {
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// The first section that holds code (ELF-64 specification, section headers).
fn text(file: &[u8]) -> Option<Text> {
    let headers = u64::from_le_bytes(word(file, 0x28)?) as usize;
    let count = u16::from_le_bytes(word(file, 0x3c)?) as usize;
    for header in (0..count).map(|i| headers + i * 64) {
        let flags = u64::from_le_bytes(word(file, header + 8)?);
        if flags & 4 != 0 {
            let at = u64::from_le_bytes(word(file, header + 24)?) as usize;
            let len = u64::from_le_bytes(word(file, header + 32)?) as usize;
            let start = u64::from_le_bytes(word(file, header + 16)?);
            return Some(Text {
                start,
                bytes: file.get(at..at + len)?.to_vec(),
            });
        }
    }
    None
}

fn main() {
    let path = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "target/guest/vmlinux".to_owned());
    let file = match std::fs::read(&path) {
        Ok(file) => file,
        Err(error) => return eprintln!("failed to read {path}: {error}"),
    };
    let Some(text) = text(&file) else {
        return eprintln!("{path} is not an ELF-64 file with code");
    };
    let mut translator = Translator::new(Options::default());
    let mut block = Block::default();
    for round in 0..3 {
        let (mut blocks, mut instructions, mut guest, mut host) = (0_u64, 0_u64, 0_u64, 0_u64);
        let start = Instant::now();
        let (mut va, end) = (text.start, text.start + text.bytes.len() as u64);
        while va < end {
            // Between functions the kernel has INT3 and zeros.
            if text
                .tail(va)
                .is_some_and(|bytes| matches!(bytes, [0xcc, ..] | [0, 0, ..]))
            {
                va += 1;
                continue;
            }
            let request = Request {
                va,
                mode: Mode::Kernel,
                kind: Kind::Grouped,
                features: Features::EVERYTHING,
                place: 0x7000_0000,
                first_exit: 2,
                thunks: Thunks::default(),
            };
            match translator.translate(&request, &text, &mut block) {
                Ok(()) => {
                    blocks += 1;
                    instructions += u64::from(block.instructions);
                    guest += u64::from(block.guest_len);
                    host += block.code.len() as u64;
                    va += u64::from(block.guest_len).max(1);
                }
                Err(Refused::Fetch(_) | Refused::NotBounceable) => break,
            }
        }
        let time = start.elapsed().as_nanos() as f64;
        println!(
            "round {round}: {blocks} blocks, {instructions} instructions, {:.1} ns per instruction, \
             {:.2} host bytes per guest byte, {:.0} host bytes per block",
            time / instructions as f64,
            host as f64 / guest as f64,
            host as f64 / blocks as f64
        );
    }
}
