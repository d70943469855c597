//! The guest: long mode at CPL 0 with page tables that put everything where the
//! oracle has it. A program ends by OUT; faults end in handlers that do the same.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hv::{Exit, Gpa, GuestRam, Hypervisor, Io, Kick, Partition, Vcpu, VcpuState};
use hv_soft::{CpuModel, EngineStats, Options, SoftHypervisor, SoftVcpu};
use ram::ByteSize;
use vm_memory::Bytes;
use x86::state::{DescriptorTable, Segment};
use x86::xsave as area;

use crate::Error;
use crate::layout::{CODE, CODE_LEN, DATA, DATA_LEN, GS_BASE, NO_VECTOR, READ_ONLY, SLOTS, State};

const MEMORY_BYTES: u64 = 16 << 20;
// Guest-physical addresses.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const FIRST_TABLE: u64 = 0x4000;
const SYSTEM_AT: u64 = 0x10_0000;
const SLOTS_AT: u64 = 0x18_0000;
const DATA_AT: u64 = 0x20_0000;
const CODE_AT: u64 = 0x40_0000;
/// Linear address of IDT, GDT, TSS, handlers and their stack.
const SYSTEM: u64 = 0x3000_0000;
const IDT: u64 = SYSTEM;
const GDT: u64 = SYSTEM + 0x1000;
const TSS: u64 = SYSTEM + 0x1100;
const HANDLERS: u64 = SYSTEM + 0x2000;
const HANDLER_STACK_TOP: u64 = SYSTEM + 0x4000;
const END_PORT: u8 = 0xf4;
const HANDLER_BYTES: u64 = 16;
const CODE_SELECTOR: u16 = 8;

/// What ends a program in the guest: OUT, and a loop until the engine has seen it.
pub const GUEST_END: [u8; 4] = [0xe6, END_PORT, 0xeb, 0xfe];

/// How long a program may run.
const PATIENCE: Duration = Duration::from_secs(5);

/// Kicks a guest that does not come to its end.
struct Watchdog {
    /// Counts starts and ends: odd while a program runs.
    runs: Arc<AtomicU64>,
}

impl Watchdog {
    fn start(kicker: Arc<dyn Kick>) -> Self {
        let runs = Arc::new(AtomicU64::new(0));
        let watched = Arc::downgrade(&runs);
        std::thread::spawn(move || {
            let mut last = 0;
            while let Some(runs) = watched.upgrade() {
                let now = runs.load(Ordering::Relaxed);
                drop(runs);
                if now == last && now % 2 == 1 {
                    kicker.kick();
                }
                last = now;
                std::thread::sleep(PATIENCE);
            }
        });
        Self { runs }
    }

    fn toggle(&self) {
        self.runs.fetch_add(1, Ordering::Relaxed);
    }
}

/// A guest on the software engine.
pub struct Guest {
    ram: GuestRam,
    vcpu: SoftVcpu,
    ports: Ports,
    watchdog: Watchdog,
    template: VcpuState,
}

struct Ports {
    kicker: Arc<dyn Kick>,
    ended: Cell<bool>,
}

impl Io for Ports {
    fn mmio_read(&self, _: Gpa, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _: Gpa, _: &[u8]) {}

    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, port: u16, _: &[u8]) {
        if port == u16::from(END_PORT) {
            self.ended.set(true);
            self.kicker.kick();
        }
    }
}

fn engine(doing: &'static str) -> impl FnOnce(hv::Error) -> Error {
    move |source| Error::Engine { doing, source }
}

impl Guest {
    /// A guest with empty code and data.
    ///
    /// # Errors
    /// [`Error::Memory`] and [`Error::Engine`].
    pub fn start() -> Result<Self, Error> {
        Self::start_on(SoftHypervisor::new(Options {
            cpu_model: CpuModel::Host,
            ..Options::default()
        }))
    }

    /// A guest on an engine with settings of its own.
    ///
    /// # Errors
    /// As [`Guest::start`].
    pub fn start_on(engine_of_it: SoftHypervisor) -> Result<Self, Error> {
        let ram = GuestRam::new(ByteSize(MEMORY_BYTES))?;
        let mut partition = engine_of_it
            .create(ram.clone(), 1)
            .map_err(engine("make a machine"))?;
        let vcpu = partition.vcpu(0).map_err(engine("hand out its CPU"))?;
        let ports = Ports {
            kicker: vcpu.kicker(),
            ended: Cell::new(false),
        };
        let watchdog = Watchdog::start(vcpu.kicker());
        let guest = Self {
            ram,
            vcpu,
            ports,
            watchdog,
            template: template(),
        };
        guest.page_tables()?;
        guest.tables()?;
        Ok(guest)
    }

    /// Writes to the guest's memory at a linear address of [`crate::layout`].
    ///
    /// # Errors
    /// [`Error::Access`].
    ///
    /// # Panics
    /// At other addresses.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.ram.memory().write_slice(bytes, Gpa(physical(at)))?)
    }

    /// Reads from the guest's memory.
    ///
    /// # Errors
    /// [`Error::Access`].
    ///
    /// # Panics
    /// At addresses that [`crate::layout`] does not know.
    pub fn read(&self, at: u64, len: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len];
        self.ram
            .memory()
            .read_slice(&mut bytes, Gpa(physical(at)))?;
        Ok(bytes)
    }

    /// What the engine did so far.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.vcpu.stats()
    }

    /// Runs from `state` to [`GUEST_END`] or to a fault.
    ///
    /// # Errors
    /// [`Error::Engine`]; [`Error::Ended`] when it ended otherwise.
    pub fn run(&mut self, state: &State) -> Result<State, Error> {
        let mut start = self.template.clone();
        start.gpr = state.gpr;
        start.rip = state.rip;
        start.rflags = state.rflags;
        start.xsave = state.xsave.to_vec();
        self.vcpu
            .set_state(&start)
            .map_err(engine("take a state"))?;
        self.ports.ended.set(false);
        self.watchdog.toggle();
        let exit = self.vcpu.run(&self.ports);
        self.watchdog.toggle();
        let exit = exit.map_err(engine("run"))?;
        if exit != Exit::Kicked || !self.ports.ended.get() {
            return Err(Error::Ended(exit));
        }
        let end = self.vcpu.state().map_err(engine("give its state"))?;
        let mut result = State {
            gpr: end.gpr,
            rip: end.rip,
            rflags: end.rflags,
            ..state.clone()
        };
        result.vector = NO_VECTOR;
        for (to, from) in result.xsave.iter_mut().zip(&end.xsave) {
            *to = *from;
        }
        if end
            .xsave
            .get(area::XSTATE_BV)
            .is_none_or(|bv| u64::from(*bv) & area::AVX == 0)
        {
            result.xsave[area::YMM_HIGH].fill(0);
        }
        if (HANDLERS..HANDLERS + 32 * HANDLER_BYTES).contains(&end.rip) {
            self.take_frame(&mut result, end.cr2)?;
        }
        Ok(result)
    }

    /// What the CPU pushed for the handler that ended the program.
    fn take_frame(&self, result: &mut State, cr2: u64) -> Result<(), Error> {
        result.vector = (result.rip - HANDLERS) / HANDLER_BYTES;
        let frame = self.read(HANDLER_STACK_TOP - 48, 48)?;
        let word = |i: usize| {
            frame.chunks_exact(8).nth(i).map_or(0, |w| {
                u64::from_le_bytes([w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]])
            })
        };
        result.rip = word(1);
        result.rflags = word(3);
        result.gpr[4] = word(4);
        result.cr2 = cr2;
        result.wrote = word(0) >> 1 & 1;
        Ok(())
    }

    fn put(&self, at: u64, value: u64) -> Result<(), Error> {
        Ok(self
            .ram
            .memory()
            .write_slice(&value.to_le_bytes(), Gpa(at))?)
    }

    fn page_tables(&self) -> Result<(), Error> {
        const PRESENT: u64 = 1;
        const WRITABLE: u64 = 2;
        self.put(PML4, PDPT | PRESENT | WRITABLE)?;
        self.put(PDPT, DIRECTORY | PRESENT | WRITABLE)?;
        let ranges = [
            (DATA, DATA_AT, DATA_LEN),
            (SLOTS, SLOTS_AT, 4096),
            (SYSTEM, SYSTEM_AT, 0x4000),
            (CODE, CODE_AT, CODE_LEN),
        ];
        for (table, (linear, physical, len)) in (FIRST_TABLE..).step_by(4096).zip(ranges) {
            // Each range lies in 2 MiB of its own.
            self.put(DIRECTORY + (linear >> 21) * 8, table | PRESENT | WRITABLE)?;
            for offset in (0..len as u64).step_by(4096) {
                let writable = if linear + offset == READ_ONLY {
                    0
                } else {
                    WRITABLE
                };
                let entry = table + ((linear + offset) >> 12 & 511) * 8;
                self.put(entry, (physical + offset) | PRESENT | writable)?;
            }
        }
        Ok(())
    }

    fn tables(&self) -> Result<(), Error> {
        let at = |linear: u64| linear - SYSTEM + SYSTEM_AT;
        self.put(at(GDT) + 8, 0x00af_9b00_0000_ffff)?;
        self.put(at(GDT) + 16, 0x00cf_9300_0000_ffff)?;
        // IST 1 (SDM vol. 3, 8.7)
        self.put(at(TSS) + 0x24, HANDLER_STACK_TOP)?;
        for vector in 0..32 {
            let handler = HANDLERS + vector * HANDLER_BYTES;
            let gate = handler & 0xffff
                | u64::from(CODE_SELECTOR) << 16
                | 1 << 32
                | 0x8e << 40
                | (handler >> 16 & 0xffff) << 48;
            self.put(at(IDT) + vector * 16, gate)?;
            self.put(at(IDT) + vector * 16 + 8, handler >> 32)?;
            self.ram
                .memory()
                .write_slice(&GUEST_END, Gpa(at(handler)))?;
        }
        Ok(())
    }
}

fn physical(linear: u64) -> u64 {
    for (start, at, len) in [
        (DATA, DATA_AT, DATA_LEN),
        (SLOTS, SLOTS_AT, 4096),
        (CODE, CODE_AT, CODE_LEN),
        (SYSTEM, SYSTEM_AT, 0x4000),
    ] {
        if (start..start + len as u64).contains(&linear) {
            return linear - start + at;
        }
    }
    panic!("{linear:#x} is not an address of the layout")
}

fn template() -> VcpuState {
    let mut state = VcpuState::after_reset();
    let data = Segment {
        selector: 16,
        base: 0,
        limit: u32::MAX,
        rights: 0xc093,
    };
    state.segments = [data; 6];
    state.segments[VcpuState::CS] = Segment {
        selector: CODE_SELECTOR,
        base: 0,
        limit: u32::MAX,
        rights: 0xa09b,
    };
    state.segments[VcpuState::GS].base = GS_BASE;
    state.tr = Segment {
        selector: 24,
        base: TSS,
        limit: 0x67,
        rights: 0x008b,
    };
    state.gdt = DescriptorTable {
        base: GDT,
        limit: 0xff,
    };
    state.idt = DescriptorTable {
        base: IDT,
        limit: 0xfff,
    };
    // PE, MP, ET, NE, WP, PG
    state.cr0 = 0x8001_0033;
    state.cr3 = PML4;
    // PAE, OSFXSR, OSXMMEXCPT
    state.cr4 = 0x620;
    if std::is_x86_feature_detected!("avx") {
        // OSXSAVE
        state.cr4 |= 1 << 18;
        state.xcr0 = 7;
    }
    // LME, LMA, NXE
    state.efer = 0xd00;
    state
}
