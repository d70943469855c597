//! Which instructions the guest may execute now: its CPU model's, less what CR0, CR4
//! and XCR0 switch off.
//!
//! Invariant: every translation was made for `Cpu::executable` as it is; a change
//! drops them all. Linux changes it at boot only.

use iced_x86::Code;
use x86::control::{cr0, cr4, vector};
use x86::features::{AVX_STATE, Feature, Features};
use x86::xsave;

use crate::cpu::Cpu;
use crate::exceptions::{Fault, NM, UD};

const SSE: Features = Features::of(&[
    Feature::Sse,
    Feature::Sse3,
    Feature::Ssse3,
    Feature::Sse41,
    Feature::Sse42,
    Feature::Aes,
    Feature::Pclmulqdq,
    Feature::Sha,
]);
const MMX: Features = Features::of(&[Feature::Mmx]);
const X87: Features = Features::of(&[Feature::Fpu]);
const CLOCK: Features = Features::of(&[Feature::Tsc, Feature::Rdtscp]);
const BASES: Features = Features::of(&[Feature::Fsgsbase]);

impl Cpu {
    /// What `executable` should be.
    fn executable_now(&self) -> Features {
        let (cr0, cr4) = (self.regs.cr0, self.regs.cr4);
        let mut now = self.model;
        if cr0 & (cr0::TS | cr0::EM) != 0 {
            now = now.without(X87.with(MMX).with(SSE));
        }
        if cr4 & cr4::OSFXSR == 0 {
            now = now.without(SSE);
        }
        if cr0 & cr0::TS != 0 || !self.avx_enabled() {
            now = now.without(AVX_STATE);
        }
        if cr4 & cr4::FSGSBASE == 0 {
            now = now.without(BASES);
        }
        if cr4 & cr4::TSD != 0 {
            now = now.without(CLOCK);
        }
        now
    }

    fn avx_enabled(&self) -> bool {
        let both = xsave::SSE | xsave::AVX;
        self.regs.cr4 & cr4::OSXSAVE != 0 && self.regs.xcr0 & both == both
    }

    /// After a change of CR0, CR4 or XCR0. Between blocks only.
    pub(crate) fn units_changed(&mut self) {
        let now = self.executable_now();
        if now != self.executable {
            self.executable = now;
            if self.stats.translations != 0 {
                self.flush_code();
            }
        }
    }

    /// Why the guest may not execute this instruction, if it may not (SDM vol. 3,
    /// tables 2-3 and 13-1; vol. 2, 2.4).
    #[inline]
    pub(crate) fn check_executable(&self, code: Code) -> Result<(), Fault> {
        let feature = translator::feature(code);
        if self.executable.has(feature) {
            return Ok(());
        }
        self.why_not(code, feature)
    }

    #[cold]
    fn why_not(&self, code: Code, feature: Feature) -> Result<(), Fault> {
        let (cr0, cr4) = (self.regs.cr0, self.regs.cr4);
        let emulated = cr0 & cr0::EM != 0;
        if !self.model.has(feature) || BASES.has(feature) {
            Err(UD)
        } else if CLOCK.has(feature) {
            // RDTSC itself looks at CR4.TSD.
            Ok(())
        } else if X87.has(feature) {
            let waits = code == Code::Wait;
            if waits && cr0 & (cr0::TS | cr0::MP) != cr0::TS | cr0::MP {
                self.wait()
            } else {
                Err(NM)
            }
        } else if AVX_STATE.has(feature) && !self.avx_enabled()
            || SSE.has(feature) && (emulated || cr4 & cr4::OSFXSR == 0)
            || MMX.has(feature) && emulated
        {
            Err(UD)
        } else {
            Err(NM)
        }
    }

    /// #MF where an x87 exception waits.
    fn wait(&self) -> Result<(), Fault> {
        let mut image = crate::enter::Fpu([0; 512]);
        crate::enter::fxsave(&mut image);
        if image.0[2] & 0x80 != 0 {
            Err(Fault::Exception(vector::MF, None))
        } else {
            Ok(())
        }
    }
}
