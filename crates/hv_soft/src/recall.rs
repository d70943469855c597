//! Translations that somebody made before: this machine, another one, another boot.
//!
//! Invariant: a kept block is used only after all guest code that it was made from
//! was compared with the guest's memory, after the block's own pages were watched.
//!
//! Left to others: keeping them (`translations`).

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use translations::{Key, Translations};
use translator::block::{Refused, Request};
use translator::{Placing, relocation};

use crate::cpu::Cpu;
use crate::translate::{Fetch, Translating};

/// Bytes that are compared at a time: most blocks are shorter.
const CHUNK: usize = 128;

impl Fetch<'_> {
    /// Whether guest memory holds `bytes` at `va`, for an instruction fetch. A block is
    /// some 34 bytes: no page is copied for them, as it is for a translation.
    fn holds(&self, mut va: u64, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let in_page = 4096 - (va & 0xfff) as usize;
            let (now, rest) = bytes.split_at(bytes.len().min(in_page));
            let Some(page) = self.page_of(va) else {
                return false;
            };
            if self.own(va) {
                self.watch(page);
            }
            if !self.memory_holds(u64::from(page) << 12 | va & 0xfff, now) {
                return false;
            }
            va = va.wrapping_add(now.len() as u64);
            bytes = rest;
        }
        true
    }

    /// As `holds`, by guest-physical address, within a page.
    fn memory_holds(&self, pa: u64, bytes: &[u8]) -> bool {
        let mut chunk = [0; CHUNK];
        (pa..)
            .step_by(CHUNK)
            .zip(bytes.chunks(CHUNK))
            .all(|(pa, bytes)| {
                let read = &mut chunk[..bytes.len()];
                self.ram.read(pa, read) && read == bytes
            })
    }
}

impl Translating {
    /// The block that `request` asks for in `self.block`, kept or made; whether it was
    /// kept.
    pub(crate) fn obtain(
        &mut self,
        kept: Option<&Translations>,
        request: &Request,
        fetch: &Fetch<'_>,
    ) -> Result<bool, Refused> {
        let Some(kept) = kept else {
            self.translator.translate(request, fetch, &mut self.block)?;
            return Ok(false);
        };
        let key = Key {
            va: request.va,
            mode: request.mode,
            kind: request.kind,
            features: request.features.bits(),
        };
        let placing = Placing {
            place: request.place,
            first_exit: request.first_exit,
            thunks: request.thunks,
            mode: request.mode,
        };
        let (block, guest) = (&mut self.block, &mut self.guest);
        if kept.find(key, |va, bytes| fetch.holds(va, bytes), block, guest) {
            let relocations = block.relocations.iter().copied();
            if relocation::place(&mut block.code, relocations, &placing) {
                return Ok(true);
            }
        }
        self.translator.translate(request, fetch, &mut self.block)?;
        kept.add(key, &self.block, fetch);
        Ok(false)
    }
}

impl Cpu {
    /// The guest rests: writes what was added, aside from the vCPU's thread, and gives
    /// the kept translations' memory back.
    pub(crate) fn save_translations(&self) {
        let Some(kept) = self.kept.clone() else {
            return;
        };
        kept.release();
        if let Some(saver) = &self.saver {
            saver.ask();
        }
    }
}

/// What a thread does to itself before it does anything.
#[derive(Clone)]
pub(crate) struct Confine(Arc<dyn Fn() -> io::Result<()> + Send + Sync>);

impl Confine {
    pub(crate) fn new(confine: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(confine))
    }
}

impl std::fmt::Debug for Confine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Confine")
    }
}

/// Who writes translations to disk: a thread of its own, there before any vCPU runs,
/// as a vCPU's thread may be forbidden to start threads and to open files.
#[derive(Clone)]
pub(crate) struct Saver(Sender<()>);

impl Saver {
    /// Starts it, to begin with `confine`; it ends with its last clone. `None` without a
    /// thread: translations are saved at the machine's end then.
    pub(crate) fn start(kept: &Arc<Translations>, confine: Option<Confine>) -> Option<Self> {
        let (ask, asked) = channel();
        let kept = Arc::clone(kept);
        std::thread::Builder::new()
            .name("translations".into())
            .spawn(move || {
                if let Some(Err(error)) = confine.map(|confine| (confine.0)()) {
                    tracing::warn!(%error, "translations are kept at the end only");
                    return;
                }
                while asked.recv().is_ok() {
                    save(&kept);
                }
            })
            .ok()?;
        Some(Self(ask))
    }

    fn ask(&self) {
        // It is gone only if it panicked or was not confined.
        let _ = self.0.send(());
    }
}

fn save(kept: &Arc<Translations>) {
    match kept.save() {
        Ok(None) => {}
        Ok(Some(saved)) => tracing::debug!(?saved, "translations"),
        Err(error) => tracing::warn!(
            error = &error as &dyn std::error::Error,
            "translations are not kept"
        ),
    }
    kept.release();
}
