//! Breakpoints of the debug registers (SDM vol. 3, §17.2): on execution, on stores, on
//! any access, on ports.
//!
//! Nothing is slower while none is set, and little else while one is. No block runs
//! past an address with a breakpoint and none is linked to it, so that the dispatch
//! loop sees every arrival. A page with a watched byte never gets into a TLB, so that
//! the engine sees every access to it.
//!
//! Invariant: `stops` holds every address with a breakpoint on execution. It keeps
//! those of before as well: a kernel loads DR7 on every switch to a debugged thread,
//! and what was cut for it last time still is.
//!
//! Not matched: what the CPU itself writes when it enters a handler.

use x86::control::cr4;

use crate::cpu::Cpu;
use crate::exceptions::{Fault, UD};

/// DR6: a debug register was accessed while DR7.GD was set.
const DR6_BD: u64 = 1 << 13;
/// DR7: any access to a debug register is a debug exception.
const DR7_GD: u64 = 1 << 13;
/// Addresses that blocks end at, besides those that are armed.
const STOPS_MAX: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Execute,
    Write,
    Port,
    Access,
}

/// One of DR0 to DR3, enabled.
#[derive(Clone, Copy, Debug)]
struct Breakpoint {
    kind: Kind,
    /// First address, and bytes.
    at: u64,
    len: u64,
    /// DR6 bit.
    bit: u64,
}

impl Breakpoint {
    fn touches(&self, at: u64, len: u64) -> bool {
        at.wrapping_sub(self.at) < self.len || self.at.wrapping_sub(at) < len
    }
}

/// The debug registers, as they are used.
#[derive(Default)]
pub(crate) struct Breakpoints {
    enabled: Vec<Breakpoint>,
    executes: bool,
    watches: bool,
    stops: Vec<u64>,
    /// DR6 bits of what the present instruction accessed.
    pub(crate) hit: u64,
}

impl Breakpoints {
    /// Whether some access is watched.
    #[inline]
    pub(crate) fn watches(&self) -> bool {
        self.watches
    }

    /// Addresses that no block may run past.
    pub(crate) fn stops(&self) -> &[u64] {
        &self.stops
    }

    /// Whether jumps to an address must come to the dispatch loop.
    #[inline]
    pub(crate) fn stops_at(&self, va: u64) -> bool {
        !self.stops.is_empty() && self.stops.contains(&va)
    }

    /// DR6 bits of the breakpoints on execution at `va`.
    #[inline]
    pub(crate) fn at(&self, va: u64) -> u64 {
        if self.executes {
            self.bits(|b| b.kind == Kind::Execute && b.at == va)
        } else {
            0
        }
    }

    /// Whether some byte of a page is watched.
    pub(crate) fn watches_page(&self, va: u64) -> bool {
        self.watches
            && self
                .enabled
                .iter()
                .any(|b| matches!(b.kind, Kind::Write | Kind::Access) && (b.at ^ va) & !0xfff == 0)
    }

    /// Notes an access.
    #[inline]
    pub(crate) fn accessed(&mut self, va: u64, len: usize, write: bool) {
        if self.watches {
            self.hit |= self.bits(|b| {
                (b.kind == Kind::Access || (b.kind == Kind::Write && write))
                    && b.touches(va, len as u64)
            });
        }
    }

    /// Notes an access to a port.
    pub(crate) fn port(&mut self, port: u16, size: usize) {
        if !self.enabled.is_empty() {
            self.hit |=
                self.bits(|b| b.kind == Kind::Port && b.touches(u64::from(port), size as u64));
        }
    }

    fn bits(&self, hit: impl Fn(&Breakpoint) -> bool) -> u64 {
        let hits = self.enabled.iter().filter(|b| hit(b));
        hits.fold(0, |bits, b| bits | b.bit)
    }

    fn load(&mut self, debug: &[u64; 6], extensions: bool) {
        let [addresses @ .., _, dr7] = debug;
        self.enabled.clear();
        for (n, &address) in addresses.iter().enumerate() {
            if dr7 >> (2 * n) & 3 == 0 {
                continue;
            }
            let kind = match dr7 >> (16 + 4 * n) & 3 {
                0 => Kind::Execute,
                1 => Kind::Write,
                2 if extensions => Kind::Port,
                2 => continue,
                _ => Kind::Access,
            };
            let len = match dr7 >> (18 + 4 * n) & 3 {
                _ if kind == Kind::Execute => 1,
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            self.enabled.push(Breakpoint {
                kind,
                at: address & !(len - 1),
                len,
                bit: 1 << n,
            });
        }
        let any = |kinds: &[Kind]| self.enabled.iter().any(|b| kinds.contains(&b.kind));
        self.executes = any(&[Kind::Execute]);
        self.watches = any(&[Kind::Write, Kind::Access]);
    }
}

impl Cpu {
    /// The debug registers or CR4.DE changed: makes the tables agree.
    pub(crate) fn rearm(&mut self) {
        let extensions = self.regs.cr4 & cr4::DE != 0;
        self.breakpoints.load(&self.regs.debug, extensions);
        for breakpoint in self.breakpoints.enabled.clone() {
            match breakpoint.kind {
                Kind::Execute => self.stop_at(breakpoint.at),
                Kind::Write | Kind::Access => self.flush_page(breakpoint.at),
                Kind::Port => {}
            }
        }
    }

    /// Drops every block that runs past `va` or starts there.
    fn stop_at(&mut self, va: u64) {
        if self.breakpoints.stops.contains(&va) {
            return;
        }
        if self.breakpoints.stops.len() >= STOPS_MAX {
            let executed = |at: &u64| {
                let mut enabled = self.breakpoints.enabled.iter();
                enabled.any(|b| b.kind == Kind::Execute && b.at == *at)
            };
            let kept = self.breakpoints.stops.iter().copied().filter(executed);
            self.breakpoints.stops = kept.collect();
        }
        self.breakpoints.stops.push(va);
        for id in self.blocks.covering(va) {
            if let Some(record) = self.blocks.kill(id) {
                let code = self.blocks.buf.address(record.indirect());
                self.drop_jump(record.va, record.mode(), code);
            }
        }
    }

    /// Reads DR `index` (4 and 5 are 6 and 7 where CR4.DE allows it).
    pub(crate) fn read_debug(&mut self, index: usize) -> Result<u64, Fault> {
        let slot = self.debug_slot(index)?;
        Ok(self.regs.debug[slot])
    }

    /// Writes DR `index`.
    pub(crate) fn write_debug(&mut self, index: usize, value: u64) -> Result<(), Fault> {
        let slot = self.debug_slot(index)?;
        self.regs.debug[slot] = match slot {
            // DR6 and DR7 have 32 bits (SDM vol. 3, §17.2).
            4 | 5 if value >> 32 != 0 => return Err(crate::exceptions::GP),
            4 => value & 0xe00f | 0xffff_0ff0,
            5 => value & !0xdc00 | 0x400,
            _ => value,
        };
        if slot != 4 {
            self.rearm();
        }
        Ok(())
    }

    fn debug_slot(&self, index: usize) -> Result<usize, Fault> {
        let slot = match index {
            0..=3 => index,
            4 | 5 if self.regs.cr4 & cr4::DE != 0 => return Err(UD),
            4 | 6 => 4,
            _ => 5,
        };
        if self.regs.debug[5] & DR7_GD != 0 {
            return Err(Fault::Debug(DR6_BD));
        }
        Ok(slot)
    }

    /// A debug exception is raised, for `why`, bits of DR6.
    pub(crate) fn note_debug(&mut self, why: u64) {
        let [_, _, _, _, dr6, dr7] = &mut self.regs.debug;
        *dr6 = *dr6 & !0xf | why;
        *dr7 &= !DR7_GD;
    }
}
