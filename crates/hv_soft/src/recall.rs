//! Translations that somebody made before: this machine, another one, another boot.
//!
//! Invariant: a kept block is used only after all guest code that it was made from
//! was compared with the guest's memory, after the block's own pages were watched.
//!
//! Left to others: keeping them (`translations`).

use std::sync::Arc;

use translations::{Key, Translations};
use translator::block::{Refused, Request};
use translator::{Placing, relocation};

use crate::cpu::Cpu;
use crate::translate::{Fetch, Translating};

/// Bytes compared at a time.
const CHUNK: usize = 256;

impl Fetch<'_> {
    /// Whether guest memory holds `bytes` at `va`, for an instruction fetch.
    fn holds(&self, mut va: u64, mut bytes: &[u8]) -> bool {
        let mut chunk = [0; CHUNK];
        while !bytes.is_empty() {
            let in_page = 4096 - (va & 0xfff) as usize;
            let (now, rest) = bytes.split_at(bytes.len().min(in_page).min(CHUNK));
            let Some(page) = self.page_of(va) else {
                return false;
            };
            self.watch(va, page);
            let read = &mut chunk[..now.len()];
            let pa = u64::from(page) << 12 | va & 0xfff;
            if !self.ram.read(pa, read) || read != now {
                return false;
            }
            va = va.wrapping_add(now.len() as u64);
            bytes = rest;
        }
        true
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
        };
        let placing = Placing {
            place: request.place,
            first_exit: request.first_exit,
            thunks: request.thunks,
            mode: request.mode,
        };
        let block = &mut self.block;
        if kept.find(key, |va, bytes| fetch.holds(va, bytes), block) {
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
        let save = move || save(&kept);
        // Without a thread they are saved at the machine's end.
        let _ = std::thread::Builder::new()
            .name("translations".into())
            .spawn(save);
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
