//! KVM's structures of registers, and the neutral ones: values only, no calls.

use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs, kvm_xsave,
};
use x86::descriptor;
use x86::state::{DescriptorTable, LocalApic, Segment, VcpuState};
use x86::{msr, xsave};

pub(crate) fn general(state: &VcpuState) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = state.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    }
}

pub(crate) fn load_general(state: &mut VcpuState, r: &kvm_regs) {
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    state.rip = r.rip;
    state.rflags = r.rflags;
}

fn segment(from: &Segment) -> kvm_segment {
    let bit = |bit: u16| u8::from(from.rights & bit != 0);
    let present = bit(descriptor::PRESENT);
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: from.rights as u8 & 0xf,
        present,
        dpl: (from.rights >> 5) as u8 & 3,
        db: bit(descriptor::BIG),
        s: bit(descriptor::NOT_SYSTEM),
        l: bit(descriptor::LONG),
        g: bit(descriptor::PAGES),
        avl: bit(AVAILABLE),
        unusable: 1 - present,
        padding: 0,
    }
}

/// For the system's own use.
const AVAILABLE: u16 = 1 << 12;

fn neutral_segment(from: &kvm_segment) -> Segment {
    let bit = |value: u8, bit: u16| if value != 0 { bit } else { 0 };
    let usable = u8::from(from.unusable == 0) & from.present;
    Segment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        rights: u16::from(from.type_ & 0xf)
            | bit(from.s, descriptor::NOT_SYSTEM)
            | u16::from(from.dpl & 3) << 5
            | bit(usable, descriptor::PRESENT)
            | bit(from.avl, AVAILABLE)
            | bit(from.l, descriptor::LONG)
            | bit(from.db, descriptor::BIG)
            | bit(from.g, descriptor::PAGES),
    }
}

fn table(from: DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: from.base,
        limit: from.limit,
        padding: [0; 3],
    }
}

fn neutral_table(from: kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: from.base,
        limit: from.limit,
    }
}

pub(crate) fn special(state: &VcpuState) -> kvm_sregs {
    let at = |index: usize| segment(&state.segments[index]);
    kvm_sregs {
        cs: at(VcpuState::CS),
        ds: at(VcpuState::DS),
        es: at(VcpuState::ES),
        fs: at(VcpuState::FS),
        gs: at(VcpuState::GS),
        ss: at(VcpuState::SS),
        tr: segment(&state.tr),
        ldt: segment(&state.ldtr),
        gdt: table(state.gdt),
        idt: table(state.idt),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.efer,
        apic_base: state.apic.base,
        // What is on its way is in the local APIC's state.
        interrupt_bitmap: [0; 4],
    }
}

pub(crate) fn load_special(state: &mut VcpuState, s: &kvm_sregs) {
    state.segments[VcpuState::CS] = neutral_segment(&s.cs);
    state.segments[VcpuState::DS] = neutral_segment(&s.ds);
    state.segments[VcpuState::ES] = neutral_segment(&s.es);
    state.segments[VcpuState::FS] = neutral_segment(&s.fs);
    state.segments[VcpuState::GS] = neutral_segment(&s.gs);
    state.segments[VcpuState::SS] = neutral_segment(&s.ss);
    state.tr = neutral_segment(&s.tr);
    state.ldtr = neutral_segment(&s.ldt);
    state.gdt = neutral_table(s.gdt);
    state.idt = neutral_table(s.idt);
    (state.cr0, state.cr2, state.cr3, state.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
    state.cr8 = s.cr8;
    state.efer = s.efer;
    state.apic.base = s.apic_base;
}

pub(crate) fn debug(state: &VcpuState) -> kvm_debugregs {
    let [d0, d1, d2, d3, dr6, dr7] = state.debug;
    kvm_debugregs {
        db: [d0, d1, d2, d3],
        dr6,
        dr7,
        ..Default::default()
    }
}

pub(crate) fn load_debug(state: &mut VcpuState, d: &kvm_debugregs) {
    let [d0, d1, d2, d3] = d.db;
    state.debug = [d0, d1, d2, d3, d.dr6, d.dr7];
}

/// Extended state; `None` when there is more of it than KVM's area takes.
pub(crate) fn extended(state: &VcpuState) -> Option<kvm_xsave> {
    let mut area = kvm_xsave::default();
    if state.xsave.len() > size_of_val(&area.region) {
        return None;
    }
    for (word, bytes) in area.region.iter_mut().zip(state.xsave.chunks(4)) {
        let mut whole = [0; 4];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(whole);
    }
    Some(area)
}

/// Those components of extended state that [`load_extended`] gives, put into an area that
/// may hold more; `None` as with [`extended`].
pub(crate) fn extended_within(
    whole: &kvm_xsave,
    state: &VcpuState,
    avx: bool,
) -> Option<kvm_xsave> {
    let part = extended(state)?;
    let known = components(avx);
    let word_at = |area: &kvm_xsave, at: usize| {
        let [low, high] = [area.region[at / 4], area.region[at / 4 + 1]];
        u64::from(high) << 32 | u64::from(low)
    };
    let there =
        word_at(whole, xsave::XSTATE_BV) & !known | word_at(&part, xsave::XSTATE_BV) & known;
    let mut area = kvm_xsave {
        region: whole.region,
        ..Default::default()
    };
    let mut copy = |bytes: std::ops::Range<usize>| {
        let words = bytes.start / 4..bytes.end / 4;
        area.region[words.clone()].copy_from_slice(&part.region[words]);
    };
    copy(0..xsave::LEGACY_BYTES);
    if avx {
        copy(xsave::YMM_HIGH);
    }
    area.region[xsave::XSTATE_BV / 4] = there as u32;
    area.region[xsave::XSTATE_BV / 4 + 1] = (there >> 32) as u32;
    Some(area)
}

fn components(avx: bool) -> u64 {
    xsave::X87 | xsave::SSE | if avx { xsave::AVX } else { 0 }
}

/// As much of extended state as the guest may have.
pub(crate) fn load_extended(state: &mut VcpuState, area: &kvm_xsave, avx: bool) {
    let len = if avx {
        xsave::AVX_BYTES
    } else {
        xsave::SSE_BYTES
    };
    let bytes = area.region.iter().flat_map(|word| word.to_le_bytes());
    state.xsave = bytes.take(len).collect();
    // KVM shows all that the host has, whether the guest may use it or not.
    let there = components(avx);
    if let Some(word) = state.xsave.get_mut(xsave::XSTATE_BV..)
        && let Some(word) = word.first_chunk_mut::<8>()
    {
        *word = (u64::from_le_bytes(*word) & there).to_le_bytes();
    }
}

/// Registers of the local APIC that are state (SDM vol. 3, table 11-1): by their offset.
fn apic_offsets(x2apic: bool) -> impl Iterator<Item = u16> {
    let one = [0x20, 0x30, 0x80, 0xd0, 0xe0, 0xf0];
    let rows = (0x100..0x290).step_by(16);
    let rest = [
        0x2f0, 0x300, 0x310, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380, 0x390, 0x3e0,
    ];
    let all = one.into_iter().chain(rows).chain(rest);
    all.filter(move |at| !x2apic || *at != FORMAT)
}

const ID: u16 = 0x20;
const VERSION: u16 = 0x30;
const LOGICAL: u16 = 0xd0;
const FORMAT: u16 = 0xe0;
const IN_SERVICE: u16 = 0x100;
const REQUESTED: u16 = 0x200;
const LVT_TIMER: u16 = 0x320;
const CURRENT_COUNT: u16 = 0x390;
/// Timer mode: deadline.
const DEADLINE: u32 = 2 << 17;
const TIMER_MODE: u32 = 3 << 17;
const MASKED: u32 = 1 << 16;

fn word(page: &kvm_lapic_state, at: u16) -> u32 {
    let at = usize::from(at);
    let bytes = page.regs.get(at..at + 4).unwrap_or(&[0; 4]);
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u32::from(*byte as u8))
}

fn set_word(page: &mut kvm_lapic_state, at: u16, value: u32) {
    let at = usize::from(at);
    if let Some(bytes) = page.regs.get_mut(at..at + 4) {
        for (byte, value) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *byte = value as _;
        }
    }
}

/// Takes back what the local APIC did when it handed `vector` to the CPU, which has not
/// seen it yet.
pub(crate) fn put_back(page: &mut kvm_lapic_state, vector: u8) {
    let row = u16::from(vector / 32) * 16;
    let bit = 1 << (vector % 32);
    let service = word(page, IN_SERVICE + row);
    if service & bit == 0 {
        return;
    }
    set_word(page, IN_SERVICE + row, service & !bit);
    let requested = word(page, REQUESTED + row) | bit;
    set_word(page, REQUESTED + row, requested);
}

/// Whether the timer is one with a deadline that interrupts.
pub(crate) fn has_deadline(page: &kvm_lapic_state) -> bool {
    word(page, LVT_TIMER) & (TIMER_MODE | MASKED) == DEADLINE
}

/// Whether the timer's interrupt is on its way or being served.
pub(crate) fn timer_is_seen(page: &kvm_lapic_state) -> bool {
    let vector = word(page, LVT_TIMER) as u8;
    let (row, bit) = (u16::from(vector / 32) * 16, 1 << (vector % 32));
    (word(page, IN_SERVICE + row) | word(page, REQUESTED + row)) & bit != 0
}

/// The registers of `page`.
pub(crate) fn load_apic(apic: &mut LocalApic, page: &kvm_lapic_state) {
    let x2apic = apic.base & msr::APIC_BASE_X2APIC != 0;
    let deadline = word(page, LVT_TIMER) & TIMER_MODE == DEADLINE;
    apic.registers = apic_offsets(x2apic)
        .filter(|at| *at != CURRENT_COUNT || !deadline)
        .map(|at| (at, word(page, at)))
        .collect();
}

/// Puts saved registers into `page`, which is KVM's own. What the APIC is stays: its id
/// and version.
pub(crate) fn apic(page: &mut kvm_lapic_state, saved: &LocalApic) {
    let x2apic = saved.base & msr::APIC_BASE_X2APIC != 0;
    for (at, value) in &saved.registers {
        let derived = matches!(*at, ID | VERSION) || (x2apic && *at == LOGICAL);
        if !derived && apic_offsets(x2apic).any(|known| known == *at) {
            set_word(page, *at, *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> VcpuState {
        let mut state = VcpuState::after_reset();
        for (i, register) in state.gpr.iter_mut().enumerate() {
            *register = 0x1111 * i as u64;
        }
        (state.rip, state.rflags) = (0x1234, 0x202);
        state.segments[VcpuState::CS] = Segment {
            selector: 0x10,
            base: 0,
            limit: !0,
            rights: 0xa09b,
        };
        state.segments[VcpuState::GS].base = 0xffff_8880_0000_0000;
        state.ldtr.rights = 0;
        (state.cr2, state.cr3, state.cr4, state.cr8) = (2, 0x3000, 0x620, 5);
        state.debug = [1, 2, 3, 4, 0xffff_0ff1, 0x401];
        state
    }

    #[test]
    fn registers_come_back_as_they_went() {
        let (state, mut back) = (some(), VcpuState::after_reset());
        load_general(&mut back, &general(&state));
        load_special(&mut back, &special(&state));
        load_debug(&mut back, &debug(&state));
        assert_eq!(back, state);
        assert_eq!((special(&state).ldt.unusable, special(&state).cs.l), (1, 1));
    }

    #[test]
    fn extended_state_has_only_what_the_guest_may_have() {
        let mut state = some();
        state.xsave = (0..xsave::AVX_BYTES).map(|i| i as u8).collect();
        state.xsave[xsave::XSTATE_BV..][..8].copy_from_slice(&7_u64.to_le_bytes());
        let area = extended(&state).unwrap();
        let mut back = VcpuState::after_reset();
        load_extended(&mut back, &area, true);
        assert_eq!(back.xsave, state.xsave);
        load_extended(&mut back, &area, false);
        assert_eq!(back.xsave.len(), xsave::SSE_BYTES);
        assert_eq!(back.xsave[xsave::XSTATE_BV], 3);
        state.xsave = vec![0; 5000];
        assert!(extended(&state).is_none());
    }

    /// What user code has in components that its kernel knows nothing of stays.
    #[test]
    fn extended_state_beyond_what_is_known_stays_as_it_is() {
        let mut whole = kvm_xsave::default();
        whole.region.fill(0x1111_1111);
        whole.region[xsave::XSTATE_BV / 4] = 0xe7;
        whole.region[xsave::XSTATE_BV / 4 + 1] = 0;
        for avx in [false, true] {
            let mut state = some();
            load_extended(&mut state, &whole, avx);
            let same = extended_within(&whole, &state, avx).unwrap();
            assert!(same.region == whole.region, "avx: {avx}");
            state.xsave[xsave::XMM.start] = 7;
            // All of x87 is as after a reset.
            state.xsave[xsave::XSTATE_BV] &= !1;
            let area = extended_within(&whole, &state, avx).unwrap();
            let changed: Vec<_> = (0..area.region.len())
                .filter(|word| area.region[*word] != whole.region[*word])
                .collect();
            assert_eq!(changed, [xsave::XMM.start / 4, xsave::XSTATE_BV / 4]);
            assert_eq!(area.region[xsave::XSTATE_BV / 4], 0xe6);
        }
    }

    #[test]
    fn an_interrupt_that_the_guest_has_not_seen_goes_back_to_the_apic() {
        let mut page = kvm_lapic_state::default();
        set_word(&mut page, IN_SERVICE + 0x10, 1 << 3);
        put_back(&mut page, 35);
        assert_eq!(word(&page, IN_SERVICE + 0x10), 0);
        assert_eq!(word(&page, REQUESTED + 0x10), 1 << 3);
        // One that no APIC handed over.
        put_back(&mut page, 64);
        assert_eq!(word(&page, REQUESTED + 0x20), 0);
    }

    #[test]
    fn apic_registers_come_back_but_for_what_the_apic_is() {
        let mut page = kvm_lapic_state::default();
        set_word(&mut page, ID, 7);
        set_word(&mut page, 0xf0, 0x1ff);
        set_word(&mut page, LVT_TIMER, 0x40 | DEADLINE);
        assert!(has_deadline(&page) && !timer_is_seen(&page));
        let mut saved = LocalApic {
            base: 0xfee0_0d00,
            ..LocalApic::default()
        };
        load_apic(&mut saved, &page);
        assert!(saved.registers.is_sorted());
        let mut other = kvm_lapic_state::default();
        apic(&mut other, &saved);
        assert_eq!((word(&other, ID), word(&other, 0xf0)), (0, 0x1ff));
        assert!(has_deadline(&other));
    }
}
