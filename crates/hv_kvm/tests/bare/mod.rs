//! A machine without an operating system, on any engine: identity-mapped memory, a GDT, a
//! device that remembers what it was told.
//!
//! | guest-linear | what |
//! |---|---|
//! | 0 to 1 GiB | memory, of which there are 16 MiB, in pages of 2 MiB: code at 0x10000 |
//! | 1 GiB, one 2 MiB page | device memory at 0xd000_0000 |
//! | 2 GiB, one 2 MiB page | IOAPIC and what else is at 0xfec0_0000 |

#![allow(dead_code)] // each test crate uses its part

use std::sync::{Arc, Mutex, OnceLock};

use hv::{
    Completion, Error, Exit, Gpa, GuestRam, Hypervisor, Interrupts, Io, Kick, Partition, Vcpu,
};
use hv_kvm::{KvmHypervisor, KvmPartition, Options};
use hv_soft::{Options as SoftOptions, SoftHypervisor};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use x86::VcpuState;
use x86::state::{DescriptorTable, Segment};

pub(crate) const CODE: u64 = 0x1_0000;
pub(crate) const DATA: u64 = 0x10_0000;
pub(crate) const STACK: u64 = 0x9_0000;
pub(crate) const DEVICE: u64 = 0x4000_0000;
pub(crate) const DEVICE_PA: u64 = 0xd000_0000;
pub(crate) const IOAPIC: u64 = 0x8000_0000;
/// OUT to this port ends the run.
pub(crate) const STOP: u16 = 0x11;
/// OUT to this port is remembered.
pub(crate) const SAY: u16 = 0x10;
const TABLES: u64 = 0x1000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
const TSS: u64 = 0x8000;

/// What the guest did to its devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Port(Vec<u8>),
    In(u16, usize),
    Load(u64, usize),
    Store(u64, Vec<u8>),
}

type OnSay = Box<dyn Fn(u64) + Send>;

#[derive(Default)]
pub(crate) struct Board {
    pub(crate) said: Mutex<Vec<Said>>,
    kicks: OnceLock<Arc<dyn Kick>>,
    pub(crate) on_say: Mutex<Option<OnSay>>,
}

impl Board {
    fn note(&self, said: Said) {
        self.said.lock().unwrap().push(said);
    }
}

impl Io for Board {
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        self.note(Said::Load(at.0, data.len()));
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = 0x81 + i as u8;
        }
    }

    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        self.note(Said::Store(at.0, data.to_vec()));
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Said::In(port, data.len()));
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = 0x41 + i as u8;
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if port == STOP {
            self.kicks.get().unwrap().kick();
        } else if port == SAY {
            self.note(Said::Port(data.to_vec()));
            let mut word = [0; 8];
            word[..data.len()].copy_from_slice(data);
            if let Some(f) = &*self.on_say.lock().unwrap() {
                f(u64::from_le_bytes(word));
            }
        }
    }
}

pub(crate) struct Machine<P: Partition> {
    pub(crate) ram: GuestRam,
    pub(crate) vcpu: P::Vcpu,
    pub(crate) board: Arc<Board>,
    pub(crate) interrupts: Arc<dyn Interrupts>,
    pub(crate) partition: P,
}

/// A machine on KVM; `None` where there is none to use, after a look at what is said then.
pub(crate) fn on_kvm() -> Option<Machine<KvmPartition>> {
    match KvmHypervisor::open(Options::default()) {
        Ok(kvm) => Some(Machine::new(&kvm)),
        Err(error) => {
            assert!(matches!(error, Error::HostLacks { .. }), "{error:?}");
            let words = error.to_string();
            assert!(
                words.contains("/dev/kvm") && words.contains("--engine soft"),
                "{words}"
            );
            None
        }
    }
}

pub(crate) fn soft() -> SoftHypervisor {
    SoftHypervisor::new(SoftOptions::default())
}

/// The software engine, which executes what KVM cannot.
pub(crate) fn completions(ram: &GuestRam, vcpus: u8) -> Result<Vec<Box<dyn Completion>>, Error> {
    let mut partition = soft().create(ram.clone(), vcpus)?;
    let completion =
        |index| -> Result<Box<dyn Completion>, Error> { Ok(Box::new(partition.vcpu(index)?)) };
    (0..vcpus).map(completion).collect()
}

impl<P: Partition> Machine<P> {
    pub(crate) fn new<H: Hypervisor<Partition = P>>(engine: &H) -> Self {
        let ram = GuestRam::new(ram::ByteSize::mib(16)).unwrap();
        Self::with(engine, ram)
    }

    pub(crate) fn with<H: Hypervisor<Partition = P>>(engine: &H, ram: GuestRam) -> Self {
        let mut machine = Self::around(engine, ram);
        machine.lay_out();
        machine.vcpu.set_state(&state()).unwrap();
        machine
    }

    /// Around the memory of another machine, as that left it.
    pub(crate) fn around<H: Hypervisor<Partition = P>>(engine: &H, ram: GuestRam) -> Self {
        let mut partition = engine.create(ram.clone(), 1).unwrap();
        let vcpu = partition.vcpu(0).unwrap();
        let board = Arc::new(Board::default());
        let _ = board.kicks.set(vcpu.kicker());
        let interrupts = partition.interrupts();
        Self {
            ram,
            vcpu,
            board,
            interrupts,
            partition,
        }
    }

    fn lay_out(&mut self) {
        self.put_word(TABLES, TABLES + 0x1003);
        self.put_word(TABLES + 0x1000, TABLES + 0x2003);
        self.put_word(TABLES + 0x1008, TABLES + 0x3003);
        self.put_word(TABLES + 0x1010, TABLES + 0x4003);
        for i in 0..512 {
            self.put_word(TABLES + 0x2000 + 8 * i, i << 21 | 0x83);
        }
        self.put_word(TABLES + 0x3000, DEVICE_PA | 0x83);
        self.put_word(TABLES + 0x4000, 0xfec0_0000 | 0x83);
        let user = [0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
        let descriptors = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
        let descriptors = descriptors.into_iter().chain(user);
        for (i, word) in descriptors.enumerate() {
            self.put_word(GDT + 8 * i as u64, word);
        }
    }

    /// User code may reach the large page at `at`; from there, exceptions come to
    /// [`STACK`].
    pub(crate) fn user_may(&mut self, at: u64) {
        self.put_word(TABLES, TABLES + 0x1007);
        self.put_word(TABLES + 0x1000, TABLES + 0x2007);
        self.put_word(TABLES + 0x2000 + 8 * (at >> 21), at | 0x87);
        self.put_word(TSS + 4, STACK);
    }

    pub(crate) fn set_gate(&mut self, vector: u8, handler: u64) {
        let at = IDT + 16 * u64::from(vector);
        let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        self.put_word(at, low);
        self.put_word(at + 8, handler >> 32);
    }

    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        let memory = self.ram.memory();
        memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn put_word(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        let memory = self.ram.memory();
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
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

    /// Ends the run when the guest has said `value` or more.
    pub(crate) fn stop_at(&self, value: u64) {
        let kick = self.vcpu.kicker();
        *self.board.on_say.lock().unwrap() = Some(Box::new(move |said| {
            if said >= value {
                kick.kick();
            }
        }));
    }

    pub(crate) fn said(&self) -> Vec<Said> {
        self.board.said.lock().unwrap().clone()
    }
}

/// The code that ends a run.
pub(crate) fn stop(asm: &mut CodeAssembler) {
    asm.out(i32::from(STOP), al).unwrap();
}

pub(crate) fn wrmsr(asm: &mut CodeAssembler, index: u32, value: u64) {
    asm.mov(ecx, index).unwrap();
    asm.mov(eax, value as u32).unwrap();
    asm.mov(edx, (value >> 32) as u32).unwrap();
    asm.wrmsr().unwrap();
}

/// Writes the entry of an IOAPIC's pin: the vector, and bits 8 to 31 of the entry.
pub(crate) fn program_pin(asm: &mut CodeAssembler, pin: u32, low: u32) {
    asm.mov(rbx, IOAPIC).unwrap();
    for (index, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, low)] {
        asm.mov(dword_ptr(rbx), index as i32).unwrap();
        asm.mov(dword_ptr(rbx + 0x10), value as i32).unwrap();
    }
}

/// A guest that enables its APIC, does what `write` adds, and waits in HLT for ever. At
/// each interrupt on vector 0x40 it says how many there were.
pub(crate) fn wait_for_interrupts<P: Partition>(
    machine: &mut Machine<P>,
    write: impl FnOnce(&mut CodeAssembler),
) {
    machine.code(|asm| {
        let mut again = asm.create_label();
        wrmsr(asm, 0x80f, 0x1ff);
        asm.xor(r12d, r12d).unwrap();
        write(asm);
        asm.set_label(&mut again).unwrap();
        asm.sti().unwrap();
        asm.hlt().unwrap();
        asm.jmp(again).unwrap();
    });
    machine.code_at(CODE + 0x1000, |asm| {
        asm.inc(r12d).unwrap();
        asm.mov(eax, r12d).unwrap();
        asm.out(i32::from(SAY), eax).unwrap();
        wrmsr(asm, 0x80b, 0);
        asm.iretq().unwrap();
    });
    machine.set_gate(0x40, CODE + 0x1000);
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
