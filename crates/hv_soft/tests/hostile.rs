//! Guests that do what no guest should: the engine survives each, can be stopped at
//! any time, and no byte of the host that it was not given changes.
//!
//! Whether the guest is told the right exception is others' business (`faults.rs`).
//! `KOMBI_HOSTILE_CASES` and `KOMBI_HOSTILE_SEED` make the random parts longer or
//! others.

mod bare;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bare::{CODE, DATA, DEVICE, DEVICE_PA, Machine, STACK, STOP, UNMAPPED};
use hv::{Exit, Gpa, Io, Kick, Vcpu, VcpuState};
use hv_soft::{CpuModel, Options, host_features};
use x86::features::Feature;
use x86::state::Segment;

/// How often a guest is kicked: the longest that one case runs.
const KICK_EVERY: Duration = Duration::from_millis(2);
/// A kick that has not come through by then never will.
const PATIENCE: Duration = Duration::from_secs(20);
const TABLES: u64 = 0x1000;
const RSP: usize = 4;

fn cases(otherwise: u64) -> u64 {
    number("KOMBI_HOSTILE_CASES").unwrap_or(otherwise)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

struct Random(u64);

impl Random {
    fn new(salt: u64) -> Self {
        let seed = number("KOMBI_HOSTILE_SEED").unwrap_or(1);
        Self((seed << 8 ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.bits() >> 11) % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len).map(|_| self.bits() as u8).collect()
    }
}

/// Devices that answer anything, and a port that ends the run.
struct Quiet(Arc<dyn Kick>);

impl Io for Quiet {
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        data.fill(at.0 as u8);
    }

    fn mmio_write(&self, _: Gpa, _: &[u8]) {}

    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, port: u16, _: &[u8]) {
        if port == u16::from(STOP) {
            self.0.kick();
        }
    }
}

/// Host memory that the guest knows of and must not reach.
static CANARY: [AtomicBool; 4096] = [const { AtomicBool::new(true) }; 4096];

fn canary() -> u64 {
    CANARY.as_ptr() as u64
}

struct Hostile {
    machine: Machine,
    io: Quiet,
    over: Arc<AtomicBool>,
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        assert!(CANARY.iter().all(|byte| byte.load(Ordering::Relaxed)));
    }
}

impl Hostile {
    fn new() -> Self {
        Self::on(Machine::new())
    }

    /// With all instructions that there are.
    fn with_host_model() -> Self {
        Self::on(Machine::with(Options {
            cpu_model: CpuModel::Host,
            ..Options::default()
        }))
    }

    fn on(machine: Machine) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (kicker, ended) = (machine.vcpu.kicker(), Arc::clone(&over));
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(KICK_EVERY);
                kicker.kick();
            }
        });
        Self {
            io: Quiet(machine.vcpu.kicker()),
            machine,
            over,
        }
    }

    /// Makes all memory the user's too, and the CPU run at CPL 3.
    fn become_user(&mut self) {
        for (at, entry) in [
            (TABLES, TABLES + 0x1007),
            (TABLES + 0x1000, TABLES + 0x2007),
            (TABLES + 0x1008, TABLES + 0x3007),
            (TABLES + 0x2000, TABLES + 0x4007),
            (TABLES + 0x3000, DEVICE_PA | 0x87),
        ] {
            self.machine.put_word(at, entry);
        }
        for page in 16..512 {
            self.machine.map(page << 12, page << 12 | 7);
        }
        // RSP0 of the task, and descriptors for the way back
        self.machine.put_word(0x8004, STACK);
        self.machine.change(|state| {
            let user = |selector, rights| Segment {
                selector,
                base: 0,
                limit: !0,
                rights,
            };
            state.segments = [user(0x1b, 0xc0f3); 6];
            state.segments[VcpuState::CS] = user(0x13, 0xa0fb);
        });
    }

    /// Runs until it is kicked or ends by itself, and says how.
    #[track_caller]
    fn run(&mut self) -> Exit {
        let start = Instant::now();
        let exit = self.machine.vcpu.run(&self.io);
        assert!(start.elapsed() < PATIENCE, "hardly to be stopped");
        exit.expect("the engine says that it is broken")
    }

    /// Runs through as many kicks.
    #[track_caller]
    fn run_through(&mut self, kicks: u32) {
        for _ in 0..kicks {
            if self.run() != Exit::Kicked {
                return;
            }
        }
    }
}

/// Addresses and numbers where things tend to break.
fn odd(random: &mut Random) -> u64 {
    let base = random.pick(&[
        0,
        DATA,
        DATA + 0xff8,
        STACK,
        CODE,
        DEVICE,
        DEVICE + 0x1f_fffc,
        UNMAPPED,
        TABLES,
        0xfff_ffff,
        0x8000_0000_0000,
        0x7fff_ffff_fff8,
        0xffff_8000_0000_0000,
        u64::MAX - 7,
        1 << 63,
        canary(),
        canary() + 2048,
    ]);
    if random.below(8) == 0 {
        random.bits()
    } else {
        base.wrapping_add(random.below(64)).wrapping_sub(32)
    }
}

fn odd_registers(machine: &mut Machine, random: &mut Random) {
    let values: Vec<u64> = (0..16).map(|_| odd(random)).collect();
    let stack = if random.below(2) == 0 {
        STACK
    } else {
        values[RSP]
    };
    machine.change(|state| {
        state.gpr.copy_from_slice(&values);
        state.gpr[RSP] = stack;
    });
}

#[test]
fn a_guest_that_spins_with_interrupts_off_can_be_stopped() {
    let spins: [&[u8]; 12] = [
        b"\xeb\xfe",                                 // jmp .
        b"\xfa\xeb\xfe",                             // cli; jmp .
        b"\x31\xc9\xe3\xfe",                         // xor ecx, ecx; jrcxz .
        b"\x48\x8d\x05\xf9\xff\xff\xff\xff\xe0",     // lea rax, [rip - 7]; jmp rax
        b"\x68\x00\x00\x01\x00\xc3",                 // push 0x10000; ret
        b"\xe8\x00\x00\x00\x00\x58\x50\xc3",         // call +0; pop rax; push rax; ret
        b"\xb9\xff\xff\xff\xff\xe2\xfe\xeb\xf7",     // mov ecx, -1; loop .; again
        b"\xeb\x00\xeb\xfc",                         // jmp +0; jmp back
        b"\xbe\x00\x00\x10\x00\xf0\xff\x06\xeb\xfb", // lock inc [rsi] for ever
        b"\x0f\xa2\xeb\xfc",                         // cpuid for ever
        b"\x0f\x30\xeb\xfc",                         // wrmsr, whatever comes of it
        b"\xbf\x00\x00\x00\x40\xaa\xeb\xf8",         // stosb to a device
    ];
    let mut hostile = Hostile::new();
    for code in spins {
        hostile.machine.reset();
        hostile.machine.put(CODE, code);
        hostile.machine.change(|state| state.rflags = 2);
        hostile.run_through(3);
    }
}

#[test]
fn strings_of_giant_length_can_be_stopped_wherever_they_go() {
    let mut hostile = Hostile::new();
    for opcode in [
        0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0x6c, 0x6d, 0x6e, 0x6f,
    ] {
        for (prefix, pointer, flags) in [
            (0xf3, DEVICE, 2),
            (0xf3, DATA, 2),
            (0xf2, DATA, 2),
            (0xf3, DEVICE + 0x1f_ffff, 0x402),
            (0xf3, canary(), 2),
            (0xf3, CODE, 2),
        ] {
            hostile.machine.reset();
            hostile.machine.put(CODE, &[prefix, opcode, 0xeb, 0xfc]);
            hostile.machine.change(|state| {
                state.gpr[1] = u64::MAX;
                state.gpr[2] = 0x3f8;
                state.gpr[6] = pointer;
                state.gpr[7] = pointer;
                state.rflags = flags;
            });
            hostile.run_through(2);
        }
    }
}

#[test]
fn interrupts_and_signals_never_touch_what_the_guests_stack_pointer_names() {
    let mut hostile = Hostile::new();
    for stack in [
        canary() + 4096,
        canary() + 2048,
        0,
        8,
        DEVICE + 64,
        DEVICE,
        UNMAPPED,
        1 << 63,
        0x8000_0000_0000,
        u64::MAX,
        STACK + 1,
        0x1_0000_0000,
    ] {
        for code in [
            &b"\xeb\xfe"[..],            // jmp .
            b"\xfb\x90\xeb\xfd",         // sti; spin
            b"\x50\x58\x9c\x9d\xeb\xfa", // push, pop, pushf, popf
            b"\xcd\x20\xeb\xfc",         // int 0x20
            b"\xe8\x00\x00\x00\x00\xeb\xf9",
            b"\xc8\x10\x00\x00\xc9\xeb\xf9", // enter; leave
            b"\x31\xd2\xf7\xf2\xeb\xfa",     // a division by zero
            b"\x48\xcf",                     // iretq
            b"\xcb",                         // retf
        ] {
            hostile.machine.reset();
            hostile.machine.put(CODE, code);
            hostile.machine.change(|state| {
                state.gpr[RSP] = stack;
                state.gpr[5] = stack;
            });
            hostile.run_through(2);
        }
    }
}

#[test]
fn tables_of_the_cpu_may_be_anywhere() {
    let mut hostile = Hostile::new();
    for base in [
        DEVICE,
        DEVICE + 0x1f_fff8,
        UNMAPPED,
        0xff_fff8,
        0x8000_0000_0000,
        u64::MAX - 3,
        canary(),
        CODE,
    ] {
        for which in 0..4 {
            // ud2; and: mov ds, ax; ltr ax; lldt ax; int 3
            for code in [
                &b"\x0f\x0b"[..],
                b"\xb8\x18\x00\x00\x00\x8e\xd8\x0f\x00\xd8\x0f\x00\xd0\xcc\xf4",
            ] {
                hostile.machine.reset();
                hostile.machine.put(CODE, code);
                hostile.machine.change(|state| match which {
                    0 => state.idt.base = base,
                    1 => state.gdt.base = base,
                    2 => state.tr.base = base,
                    _ => {
                        state.idt.base = base;
                        state.gdt.base = base;
                        state.tr.base = base;
                        state.gpr[RSP] = base;
                    }
                });
                hostile.run_through(2);
            }
        }
    }
}

#[test]
fn page_tables_may_hold_anything_and_lie_anywhere() {
    let mut hostile = Hostile::new();
    let mut random = Random::new(2);
    for case in 0..cases(300) {
        hostile.machine.reset();
        // mov rax, [rsi]; mov [rdi], rax; push rax; invlpg [rsi]; mov rax, cr3; mov cr3, rax; again
        let code = b"\x48\x8b\x06\x48\x89\x07\x50\x58\x0f\x01\x3e\x0f\x20\xd8\x0f\x22\xd8\xeb\xed";
        hostile.machine.put(CODE, code);
        for _ in 0..random.below(8) {
            let at = TABLES + random.below(0x5000 / 8) * 8;
            let entry = match random.below(6) {
                0 => random.bits(),
                1 => at & !0xfff | 0x67,
                2 => DEVICE_PA | random.bits() & 0xfff,
                3 => (1 << (12 + random.below(52))) | 7,
                4 => hostile.machine.word(at) ^ 1 << random.below(64),
                _ => 0x3f_ffff_f000 | random.bits() & 0xfff,
            };
            hostile.machine.put_word(at, entry);
        }
        if case % 4 == 0 {
            let root = random.pick(&[
                TABLES,
                TABLES + 0x1000,
                DEVICE_PA,
                0xff_f000,
                0x100_0000,
                !0xfff & ((1 << 46) - 1),
            ]);
            hostile.machine.change(|state| state.cr3 = root);
        }
        let (from, to) = (odd(&mut random), odd(&mut random));
        hostile.machine.change(|state| {
            state.gpr[6] = from;
            state.gpr[7] = to;
            state.efer |= 0x800;
        });
        hostile.run_through(1);
    }
}

#[test]
fn system_registers_may_be_written_with_anything() {
    let mut hostile = Hostile::new();
    let mut random = Random::new(3);
    let writes: [&[u8]; 16] = [
        b"\x0f\x22\xc0",     // mov cr0, rax
        b"\x0f\x22\xd0",     // mov cr2, rax
        b"\x0f\x22\xd8",     // mov cr3, rax
        b"\x0f\x22\xe0",     // mov cr4, rax
        b"\x44\x0f\x22\xc0", // mov cr8, rax
        b"\x44\x0f\x22\xf8", // mov cr15, rax
        b"\x0f\x23\xf8",     // mov dr7, rax
        b"\x0f\x23\xc0",     // mov dr0, rax
        b"\x0f\x23\xf0",     // mov dr6, rax
        b"\x0f\x30",         // wrmsr
        b"\x0f\x32",         // rdmsr
        b"\x0f\x01\xd1",     // xsetbv
        b"\x0f\x01\xf0",     // lmsw ax
        b"\x0f\x01\x16",     // lgdt [rsi]
        b"\x0f\x01\x1e",     // lidt [rsi]
        b"\x50\x9d",         // push rax; popfq
    ];
    let msrs = [
        0x10,
        0x1b,
        0x174,
        0x175,
        0x176,
        0x1a0,
        0x277,
        0x2ff,
        0x6e0,
        0x808,
        0x80b,
        0x80f,
        0x830,
        0x832,
        0x838,
        0x83e,
        0x83f,
        0xda0,
        0xc000_0080,
        0xc000_0081,
        0xc000_0082,
        0xc000_0084,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
        0xc000_0103,
        0x4b56_4d00,
        0x4b56_4d01,
        0x4b56_4d02,
        0x4b56_4d04,
    ];
    for _ in 0..cases(600) {
        hostile.machine.reset();
        let mut code = Vec::new();
        for _ in 0..1 + random.below(4) {
            let value = match random.below(4) {
                0 => random.bits(),
                1 => 1 << random.below(64),
                2 => 0x8005_0033 ^ 1 << random.below(32),
                _ => odd(&mut random),
            };
            code.extend_from_slice(&[0x48, 0xb8]); // mov rax
            code.extend_from_slice(&value.to_le_bytes());
            code.extend_from_slice(&[0x48, 0x89, 0xc2, 0x48, 0xc1, 0xea, 0x20]); // edx: the upper half
            let msr: u32 = if random.below(4) == 0 {
                random.bits() as u32
            } else {
                random.pick(&msrs)
            };
            code.push(0xb9); // mov ecx
            code.extend_from_slice(&msr.to_le_bytes());
            code.extend_from_slice(random.pick(&writes));
        }
        // inc [DATA]; fld1; movaps xmm0, xmm1; push rax; jmp .
        code.extend_from_slice(b"\xff\x04\x25\x00\x00\x10\x00\xd9\xe8\x0f\x28\xc1\x50\xeb\xfe");
        hostile.machine.put(CODE, &code);
        let pointer = odd(&mut random);
        hostile.machine.change(|state| state.gpr[6] = pointer);
        hostile.run_through(1);
    }
}

#[test]
fn interrupt_controllers_take_accesses_of_every_width_anywhere() {
    let mut hostile = Hostile::new();
    let mut random = Random::new(4);
    let accesses: [&[u8]; 16] = [
        b"\x8a\x06",
        b"\x66\x8b\x06",
        b"\x8b\x06",
        b"\x48\x8b\x06",
        b"\x0f\x10\x06",
        b"\x88\x06",
        b"\x66\x89\x06",
        b"\x89\x06",
        b"\x48\x89\x06",
        b"\x0f\x11\x06",
        b"\x48\x0f\xab\x1e",     // bts [rsi], rbx
        b"\xf0\x48\x0f\xc7\x0e", // lock cmpxchg16b [rsi]
        b"\xdb\x3e",             // fstp tbyte [rsi]
        b"\xf0\x48\x0f\xb1\x1e", // lock cmpxchg [rsi], rbx
        b"\xa5",
        b"\x48\xab",
    ];
    for _ in 0..cases(400) {
        hostile.machine.reset();
        hostile.machine.map(0x18_0000, 0xfee0_0000 | 3);
        hostile.machine.map(0x18_1000, 0xfec0_0000 | 3);
        let mut code = b"\xfb".to_vec();
        for _ in 0..24 {
            code.push(0xbe); // mov esi
            let at = (0x18_0000 + random.below(0x2000) as u32) & !(random.below(2) as u32 * 15);
            code.extend_from_slice(&at.to_le_bytes());
            code.extend_from_slice(b"\x89\xf7\xb8"); // mov edi, esi; mov eax
            code.extend_from_slice(&(random.bits() as u32).to_le_bytes());
            code.extend_from_slice(random.pick(&accesses));
        }
        code.extend_from_slice(b"\xfb\xf4\xeb\xfd"); // sti; hlt; again
        hostile.machine.put(CODE, &code);
        hostile.run_through(1);
    }
}

#[test]
fn prefixes_piled_up_before_any_opcode_do_no_harm() {
    const PREFIXES: [u8; 15] = [
        0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0x40, 0x48, 0x4f, 0x41,
    ];
    let mut hostile = Hostile::new();
    let mut random = Random::new(5);
    for case in 0..cases(600) {
        hostile.machine.reset();
        if case % 2 == 0 {
            hostile.become_user();
        }
        odd_registers(&mut hostile.machine, &mut random);
        let mut code: Vec<u8> = (0..random.below(17))
            .map(|_| random.pick(&PREFIXES))
            .collect();
        if random.below(2) == 0 {
            code.push(0x0f);
        }
        code.extend(random.bytes(12));
        code.extend_from_slice(&[0xeb, 0xfe]);
        // at a page's end, half of the time
        let at = if random.below(2) == 0 {
            CODE
        } else {
            CODE + 0x1000 - random.below(16)
        };
        hostile.machine.put(at, &code);
        hostile.machine.change(|state| state.rip = at);
        hostile.run_through(1);
    }
}

/// Lets a machine of the host's model use AVX and the instructions for segment bases.
fn switch_on(machine: &mut Machine) {
    let has = |feature| host_features().has(feature);
    machine.change(|state| {
        if has(Feature::Fsgsbase) {
            state.cr4 |= 1 << 16;
        }
        if has(Feature::Xsave) {
            state.cr4 |= 1 << 18;
        }
        if has(Feature::Avx) {
            state.xcr0 = 7;
        }
    });
}

#[test]
fn every_opcode_of_every_map_with_random_operands_does_no_harm() {
    let mut hostile = Hostile::with_host_model();
    let mut random = Random::new(6);
    let maps: [&[u8]; 8] = [
        &[],
        &[0x0f],
        &[0x0f, 0x38],
        &[0x0f, 0x3a],
        &[0xc5, 0xf9],             // VEX
        &[0xc4, 0xe2, 0x79],       // VEX, 0F 38
        &[0xc4, 0xe3, 0x7d],       // VEX.256, 0F 3A
        &[0x62, 0xf2, 0x7d, 0x48], // EVEX
    ];
    for user in [false, true] {
        for map in maps {
            for opcode in 0..=255_u8 {
                hostile.machine.reset();
                switch_on(&mut hostile.machine);
                if user {
                    hostile.become_user();
                }
                odd_registers(&mut hostile.machine, &mut random);
                let mut code = Vec::new();
                for _ in 0..3 {
                    if random.below(2) == 0 {
                        code.push(random.pick(&[0x66, 0xf2, 0xf3, 0x48, 0xf0]));
                    }
                    code.extend_from_slice(map);
                    code.push(opcode);
                    let operands = 1 + random.below(6);
                    code.extend(random.bytes(operands));
                }
                code.extend_from_slice(&[0xe6, STOP, 0xf4]);
                hostile.machine.put(CODE, &code);
                hostile.run_through(1);
            }
        }
    }
}

#[test]
fn random_bytes_as_code_do_no_harm() {
    let mut hostile = Hostile::with_host_model();
    let mut random = Random::new(7);
    for case in 0..cases(1000) {
        hostile.machine.reset();
        switch_on(&mut hostile.machine);
        if case % 3 == 0 {
            hostile.become_user();
        }
        odd_registers(&mut hostile.machine, &mut random);
        let len = 16 + random.below(400);
        let mut code = random.bytes(len);
        // Jumps to and fro, into the middle of instructions; stores into the code.
        for _ in 0..random.below(12) {
            let at = random.below(len - 8) as usize;
            let piece: [u8; 4] = match random.below(4) {
                0 => [0xeb, random.below(128) as u8, 0x90, 0x90],
                1 => [0xeb, 0x80 | random.below(128) as u8, 0x90, 0x90],
                2 => [0x88, 0x05, random.below(64) as u8, 0], // mov [rip + …], al
                _ => [0x75, random.bits() as u8, 0x0f, random.bits() as u8],
            };
            code[at..at + 4].copy_from_slice(&piece);
        }
        hostile.machine.put(CODE, &code);
        hostile.run_through(1);
    }
    let stats = hostile.machine.vcpu.stats();
    assert!(stats.exceptions > 0 && stats.translations > 0 && stats.bounces > 0);
}
