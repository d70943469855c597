//! The state of one virtual CPU, neutral between engines: what the software
//! engine writes KVM can load, and the reverse. Saved-state formats have types
//! of their own and convert from these.

use serde::{Deserialize, Serialize};

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights as in descriptor bits 40..=55: type, S, DPL, P, then
    /// AVL, L, D/B, G at bits 12..=15 (the limit's bits 48..=51 are zero).
    pub rights: u16,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// The local APIC as its register page: 4 KiB of 32-bit registers at the
/// offsets of SDM vol. 3, table 11-1, only the defined ones kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalApic {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// (offset, value) pairs in ascending order of offset.
    pub registers: Vec<(u16, u32)>,
    /// IA32_TSC_DEADLINE in guest TSC ticks; zero is disarmed.
    pub tsc_deadline: u64,
}

/// An exception that was raised and whose handler was not entered yet. RIP is what that
/// will find on its stack: for faults, the instruction that will raise it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingException {
    /// Vector.
    pub vector: u8,
    /// Error code, where there is one.
    pub error_code: Option<u32>,
}

/// An event that was being delivered, or waits, when the state was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingEvents {
    /// STI or MOV SS shadow: no interrupt before the next instruction ends.
    pub interrupt_shadow: bool,
    /// A non-maskable interrupt waits.
    pub nmi_pending: bool,
    /// The CPU is in the handler of one: others wait until IRET.
    #[serde(default)]
    pub nmi_blocked: bool,
    /// An exception on its way to the guest.
    #[serde(default)]
    pub exception: Option<PendingException>,
    /// The CPU sits in HLT.
    pub halted: bool,
    /// The CPU waits for another one to start it, as after INIT.
    #[serde(default)]
    pub waits_for_startup: bool,
}

/// Everything that makes one virtual CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Address of the next instruction.
    pub rip: u64,
    /// RFLAGS, bit 1 set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// GDTR.
    pub gdt: DescriptorTable,
    /// IDTR.
    pub idt: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority.
    pub cr8: u64,
    /// XCR0; 1 where XSAVE is not exposed.
    pub xcr0: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// DR0 to DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// The XSAVE area in standard form ([`crate::xsave`]), at least its legacy region
    /// and header. A component whose bit in XSTATE_BV is clear is in its initial
    /// state.
    pub xsave: Vec<u8>,
    /// Model-specific registers, (index, value), ascending; EFER, the APIC base
    /// and the TSC deadline are not repeated here.
    pub msrs: Vec<(u32, u64)>,
    /// Rate of the TSC, in kHz; 0 where it is not known.
    #[serde(default)]
    pub tsc_khz: u32,
    /// The local APIC.
    pub apic: LocalApic,
    /// Events in flight.
    pub events: PendingEvents,
}

/// The IOAPIC (Intel 82093AA, §3).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApic {
    /// The identification register.
    pub id: u32,
    /// The register select register.
    pub select: u8,
    /// The redirection table, an entry for each pin.
    pub redirection: [u64; 24],
    /// Level-triggered pins whose lines are high, a bit for each.
    pub lines: u32,
    /// Edges that came and were not delivered yet, a bit for each pin.
    pub edges: u32,
}

/// What the vCPUs of a machine share, besides memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedState {
    /// The IOAPIC. There are no 8259s and no 8254.
    pub ioapic: IoApic,
    /// KVM's clock, in nanoseconds since the machine was made.
    pub clock: u64,
    /// The time of day, in nanoseconds since 1970, when the clock was read: who wants it
    /// to have gone on adds the time since. Taking the state does not look at it.
    pub time_of_day: u64,
}

/// Whether two rates of a TSC, in kHz, are the same but for how exactly they were
/// measured: 250 parts in a million, Linux's own tolerance. A rate that is not known is any.
#[must_use]
pub fn same_tsc_rate(one: u32, other: u32) -> bool {
    one == 0
        || other == 0
        || u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one.max(other)) * 250
}

impl VcpuState {
    /// Index of ES in [`VcpuState::segments`].
    pub const ES: usize = 0;
    /// Index of CS.
    pub const CS: usize = 1;
    /// Index of SS.
    pub const SS: usize = 2;
    /// Index of DS.
    pub const DS: usize = 3;
    /// Index of FS.
    pub const FS: usize = 4;
    /// Index of GS.
    pub const GS: usize = 5;

    /// The state after RESET (SDM vol. 3, table 10-1), which machine boot code
    /// then changes into what the boot protocol wants.
    #[must_use]
    pub fn after_reset() -> Self {
        let data = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            rights: 0x0093,
        };
        let code = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            limit: 0xffff,
            rights: 0x009b,
        };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: 2,
            segments: [data, code, data, data, data, data],
            tr: Segment {
                rights: 0x008b,
                limit: 0xffff,
                ..Segment::default()
            },
            ldtr: Segment {
                rights: 0x0082,
                limit: 0xffff,
                ..Segment::default()
            },
            gdt: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            idt: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            xcr0: 1,
            efer: 0,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            xsave: crate::xsave::after_reset(),
            msrs: Vec::new(),
            tsc_khz: 0,
            apic: LocalApic {
                base: 0xfee0_0900,
                registers: Vec::new(),
                tsc_deadline: 0,
            },
            events: PendingEvents::default(),
        }
    }
}
