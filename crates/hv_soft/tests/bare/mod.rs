//! A machine without an operating system: identity-mapped memory, a GDT, an IDT
//! whose handlers stop the run, a device that remembers what it was told.
//!
//! | guest-linear | what |
//! |---|---|
//! | 0 to 2 MiB | memory in 4 KiB pages: tables, code at 0x10000, data at 0x100000 |
//! | 2 to 16 MiB | memory in 2 MiB pages |
//! | 1 GiB, one 2 MiB page | device memory at 0xd000_0000 |
//!
//! Upper levels let everybody in, leaves only the supervisor: [`Machine::map`] with
//! bit 2 gives a page to CPL 3.

#![allow(dead_code)] // each test crate uses its part

use std::sync::{Arc, Mutex, OnceLock};

use hv::{Exit, Gpa, GuestRam, Hypervisor, Interrupts, Io, Kick, Partition, Vcpu, VcpuState};
use hv_soft::{Options, SoftHypervisor, SoftPartition, SoftVcpu};
use iced_x86::code_asm::CodeAssembler;
use vm_memory::{Bytes, GuestAddress};
use x86::state::{DescriptorTable, Segment};

pub(crate) const CODE: u64 = 0x1_0000;
pub(crate) const DATA: u64 = 0x10_0000;
pub(crate) const STACK: u64 = 0x9_0000;
pub(crate) const DEVICE: u64 = 0x4000_0000;
pub(crate) const DEVICE_PA: u64 = 0xd000_0000;
pub(crate) const UNMAPPED: u64 = 0x8000_0000;
/// OUT to this port ends the run.
pub(crate) const STOP: u8 = 0x11;
/// OUT to this port is remembered.
pub(crate) const SAY: u8 = 0x10;
pub(crate) const TABLES: u64 = 0x1000;
pub(crate) const SMALL_TABLE: u64 = TABLES + 0x4000;
pub(crate) const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
pub(crate) const TSS: u64 = 0x8000;
/// Where handlers of what happens at CPL 3 have their stack.
pub(crate) const KERNEL_STACK: u64 = 0x8_0000;
pub(crate) const USER_CODE: u16 = 0x2b;
pub(crate) const USER_DATA: u16 = 0x23;
const HANDLERS: u64 = 0x9000;
const HANDLER_LEN: u64 = 16;

/// What the guest did to its devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Port(u32),
    Load(u64, usize),
    Store(u64, Vec<u8>),
}

type OnSay = Box<dyn Fn(u32) + Send>;

#[derive(Default)]
pub(crate) struct Board {
    pub(crate) said: Mutex<Vec<Said>>,
    kicks: OnceLock<Vec<Arc<dyn Kick>>>,
    pub(crate) on_say: Mutex<Option<OnSay>>,
}

impl Io for Board {
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        self.said.lock().unwrap().push(Said::Load(at.0, data.len()));
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = 0x81 + i as u8;
        }
    }

    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        self.said
            .lock()
            .unwrap()
            .push(Said::Store(at.0, data.to_vec()));
    }

    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        let mut word = [0; 4];
        word[..data.len()].copy_from_slice(data);
        let value = u32::from_le_bytes(word);
        if port == u16::from(STOP) {
            for kick in self.kicks.get().unwrap() {
                kick.kick();
            }
        } else if port == u16::from(SAY) {
            self.said.lock().unwrap().push(Said::Port(value));
            if let Some(f) = &*self.on_say.lock().unwrap() {
                f(value);
            }
        }
    }
}

pub(crate) struct Machine {
    pub(crate) ram: GuestRam,
    pub(crate) vcpu: SoftVcpu,
    /// All but the first, which [`Machine::run`] leaves alone.
    pub(crate) others: Vec<SoftVcpu>,
    pub(crate) board: Arc<Board>,
    pub(crate) interrupts: Arc<dyn Interrupts>,
    _partition: SoftPartition,
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Self {
        Self::with_vcpus(options, 1)
    }

    pub(crate) fn with_vcpus(options: Options, count: u8) -> Self {
        Self::on_vcpus(SoftHypervisor::new(options), count)
    }

    pub(crate) fn on(engine: SoftHypervisor) -> Self {
        Self::on_vcpus(engine, 1)
    }

    fn on_vcpus(engine: SoftHypervisor, count: u8) -> Self {
        Self::around(
            GuestRam::new(ram::ByteSize::mib(16)).unwrap(),
            engine,
            count,
        )
    }

    /// `ram` has 16 MiB, and whatever further.
    pub(crate) fn around(ram: GuestRam, engine: SoftHypervisor, count: u8) -> Self {
        let mut partition = engine.create(ram.clone(), count).unwrap();
        let vcpu = partition.vcpu(0).unwrap();
        let others: Vec<_> = (1..count).map(|i| partition.vcpu(i).unwrap()).collect();
        let board = Arc::new(Board::default());
        let all = std::iter::once(&vcpu).chain(&others);
        let _ = board.kicks.set(all.map(Vcpu::kicker).collect());
        let interrupts = partition.interrupts();
        let mut machine = Self {
            ram,
            vcpu,
            others,
            board,
            interrupts,
            _partition: partition,
        };
        machine.lay_out();
        machine.vcpu.set_state(&state()).unwrap();
        machine
    }

    /// Everything as [`Machine::new`] has it: memory up to 2 MiB, and the CPU.
    pub(crate) fn reset(&mut self) {
        self.put(0, &vec![0; 2 << 20]);
        self.lay_out();
        self.vcpu.set_state(&state()).unwrap();
    }

    fn lay_out(&mut self) {
        self.put_word(TABLES, TABLES + 0x1007);
        self.put_word(TABLES + 0x1000, TABLES + 0x2007);
        self.put_word(TABLES + 0x1008, TABLES + 0x3007);
        self.put_word(TABLES + 0x2000, SMALL_TABLE | 7);
        for i in 1..8 {
            self.put_word(TABLES + 0x2000 + 8 * i, i << 21 | 0x83);
        }
        self.put_word(TABLES + 0x3000, DEVICE_PA | 0x83);
        for i in 0..512 {
            self.map(i << 12, i << 12 | 3);
        }
        let descriptors = [
            0,
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
        ];
        for (i, word) in descriptors.into_iter().enumerate() {
            self.put_word(GDT + 8 * i as u64, word);
        }
        self.put_word(TSS + 4, KERNEL_STACK);
        // The map of ports lies beyond the limit: none is open at CPL 3.
        self.put(TSS + 0x66, &0x68_u16.to_le_bytes());
        for vector in 0..256 {
            let handler = HANDLERS + vector * HANDLER_LEN;
            self.set_gate(vector as u8, handler);
            // mov eax, vector; out STOP, al; hlt
            let code = [
                &[0xb8][..],
                &(vector as u32).to_le_bytes(),
                &[0xe6, STOP, 0xf4],
            ]
            .concat();
            self.put(handler, &code);
        }
    }

    /// Goes on at CPL 3.
    pub(crate) fn enter_user(&mut self) {
        self.change(|state| {
            state.segments[VcpuState::CS] = flat(USER_CODE, 0xa0fb);
            for index in [VcpuState::SS, VcpuState::DS, VcpuState::ES] {
                state.segments[index] = flat(USER_DATA, 0xc0f3);
            }
        });
    }

    pub(crate) fn set_gate(&mut self, vector: u8, handler: u64) {
        let at = IDT + 16 * u64::from(vector);
        let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        self.put_word(at, low);
        self.put_word(at + 8, handler >> 32);
    }

    /// Sets the page table entry of a page below 2 MiB.
    pub(crate) fn map(&mut self, va: u64, entry: u64) {
        self.put_word(SMALL_TABLE + (va >> 12) * 8, entry);
    }

    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.ram
            .memory()
            .write_slice(bytes, GuestAddress(at))
            .unwrap();
    }

    pub(crate) fn put_word(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram
            .memory()
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Puts code at [`CODE`].
    pub(crate) fn code(&mut self, write: impl FnOnce(&mut CodeAssembler)) {
        self.code_at(CODE, write);
    }

    pub(crate) fn code_at(&mut self, at: u64, write: impl FnOnce(&mut CodeAssembler)) {
        let mut asm = CodeAssembler::new(64).unwrap();
        write(&mut asm);
        let bytes = asm.assemble(at).unwrap();
        self.put(at, &bytes);
    }

    pub(crate) fn change(&mut self, f: impl FnOnce(&mut VcpuState)) {
        let mut state = self.vcpu.state().unwrap();
        f(&mut state);
        self.vcpu.set_state(&state).unwrap();
    }

    pub(crate) fn run(&mut self) -> Exit {
        let board = Arc::clone(&self.board);
        self.vcpu.run(&*board).unwrap()
    }

    /// Runs until the guest stops, and gives its state.
    pub(crate) fn run_to_stop(&mut self) -> VcpuState {
        assert_eq!(self.run(), Exit::Kicked);
        self.vcpu.state().unwrap()
    }

    /// Runs into an exception: its vector, error code if it has one, and the RIP
    /// and state at the handler.
    pub(crate) fn run_to_exception(&mut self) -> Exception {
        let state = self.run_to_stop();
        let vector = state.gpr[0] as u8;
        assert_eq!(
            state.rip & !0xf,
            HANDLERS + u64::from(vector) * HANDLER_LEN,
            "not in a handler: {state:x?}"
        );
        let with_code = matches!(vector, 8 | 10..=14 | 17);
        let mut at = state.gpr[4];
        let code = with_code.then(|| self.word(at));
        if with_code {
            at += 8;
        }
        Exception {
            vector,
            code,
            rip: self.word(at),
            rsp: self.word(at + 24),
            state,
        }
    }

    /// What ends the runs of its vCPUs.
    pub(crate) fn kicks(&self) -> Vec<Arc<dyn Kick>> {
        std::iter::once(&self.vcpu)
            .chain(&self.others)
            .map(Vcpu::kicker)
            .collect()
    }

    pub(crate) fn said(&self) -> Vec<Said> {
        self.board.said.lock().unwrap().clone()
    }
}

#[derive(Debug)]
pub(crate) struct Exception {
    pub(crate) vector: u8,
    pub(crate) code: Option<u64>,
    pub(crate) rip: u64,
    pub(crate) rsp: u64,
    pub(crate) state: VcpuState,
}

fn flat(selector: u16, rights: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: !0,
        rights,
    }
}

pub(crate) fn state() -> VcpuState {
    let mut state = VcpuState::after_reset();
    state.segments = [flat(0x18, 0xc093); 6];
    state.segments[VcpuState::CS] = flat(0x10, 0xa09b);
    state.gdt = DescriptorTable {
        base: GDT,
        limit: 47,
    };
    state.idt = DescriptorTable {
        base: IDT,
        limit: 0xfff,
    };
    state.tr = Segment {
        selector: 0,
        base: TSS,
        limit: 0x67,
        rights: 0x8b,
    };
    state.cr0 = 0x8001_0033;
    state.cr3 = TABLES;
    state.cr4 = 0x620;
    state.efer = 0x500;
    state.rip = CODE;
    state.gpr[4] = STACK;
    state.apic.base = 0xfee0_0d00;
    state
}
