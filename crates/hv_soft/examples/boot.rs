//! Boots an ELF kernel with a serial console and nothing else: the shortest way to
//! see the engine at work, and to measure it.
//!
//! `cargo run --release -p hv_soft --example boot -- VMLINUX INITRAMFS [CMDLINE]`
//!
//! With `STATS=1` it says what the engine did, with `KEPT=FOLDER` translations are
//! kept there from one boot to the next.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use hv::{Gpa, GuestRam, Hypervisor, Interrupts, Io, Kick, Partition, Vcpu, VcpuState};
use hv_soft::{CpuModel, Options, SoftHypervisor};
use translations::Translations;
use vm_memory::{Bytes, GuestAddress};
use x86::state::{DescriptorTable, Segment};

const ZERO_PAGE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x20000;
const PAGE_TABLES: u64 = 0x9000;
const GDT: u64 = 0x500;
const MP_TABLE: u64 = 0x9fc00;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A 16550 without input, and the i8042's reset line.
struct Board {
    serial: Mutex<Serial>,
    interrupts: Arc<dyn Interrupts>,
    kick: OnceLock<Arc<dyn Kick>>,
    reset: AtomicBool,
}

#[derive(Default)]
struct Serial {
    registers: [u8; 8],
    divisor: [u8; 2],
    empty_pending: bool,
}

impl Io for Board {
    fn mmio_read(&self, _: Gpa, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _: Gpa, _: &[u8]) {}

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let Some(first) = data.first_mut() else {
            return;
        };
        if port == 0x64 || port == 0x61 {
            *first = if port == 0x61 { 0x20 } else { 0 };
            return;
        }
        let Some(register @ 0..=7) = port.checked_sub(0x3f8) else {
            return;
        };
        let mut serial = self.serial.lock().unwrap();
        let latch = serial.registers[3] & 0x80 != 0;
        let modem = serial.registers[4];
        *first = match register {
            0 | 1 if latch => serial.divisor[usize::from(register)],
            0 => 0,
            2 => {
                let fifo = if serial.registers[2] & 1 != 0 {
                    0xc0
                } else {
                    0
                };
                if serial.registers[1] & 2 != 0 && std::mem::take(&mut serial.empty_pending) {
                    self.interrupts.set_line(4, false);
                    fifo | 2
                } else {
                    fifo | 1
                }
            }
            5 => 0x60,
            6 if modem & 0x10 != 0 => (modem & 0xc) << 4 | (modem & 2) << 3 | (modem & 1) << 5,
            6 => 0xb0,
            _ => serial.registers[usize::from(register)],
        };
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        if port == 0x64 && value == 0xfe {
            self.reset.store(true, Ordering::Relaxed);
            if let Some(kick) = self.kick.get() {
                kick.kick();
            }
            return;
        }
        let Some(register @ 0..=7) = port.checked_sub(0x3f8) else {
            return;
        };
        let mut serial = self.serial.lock().unwrap();
        let latch = serial.registers[3] & 0x80 != 0;
        match register {
            0 | 1 if latch => serial.divisor[usize::from(register)] = value,
            0 => {
                if serial.registers[4] & 0x10 == 0 {
                    let mut out = std::io::stdout().lock();
                    let _ = out.write_all(&[value]);
                    let _ = out.flush();
                }
                self.raise(&mut serial);
            }
            1 => {
                serial.registers[1] = value & 0xf;
                self.raise(&mut serial);
            }
            _ => serial.registers[usize::from(register)] = value,
        }
    }
}

impl Board {
    fn raise(&self, serial: &mut Serial) {
        serial.empty_pending = true;
        if serial.registers[1] & 2 != 0 {
            self.interrupts.set_line(4, false);
            self.interrupts.set_line(4, true);
        }
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64> {
    let mut word = [0; 8];
    word[..N].copy_from_slice(bytes.get(at..at + N).ok_or("truncated kernel")?);
    Ok(u64::from_le_bytes(word))
}

fn load(ram: &GuestRam, kernel: &[u8], initrd: &[u8], command_line: &str) -> Result<u64> {
    let memory = ram.memory();
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at));
    for i in 0..number::<2>(kernel, 56)? {
        let header = (number::<8>(kernel, 32)? + i * 56) as usize;
        if number::<4>(kernel, header)? == 1 {
            let offset = number::<8>(kernel, header + 8)? as usize;
            let size = number::<8>(kernel, header + 32)? as usize;
            let piece = kernel
                .get(offset..offset + size)
                .ok_or("truncated kernel")?;
            put(number::<8>(kernel, header + 24)?, piece)?;
        }
    }
    let size = ram.size().bytes();
    let initrd_at = (size - initrd.len() as u64) & !0xfff;
    put(initrd_at, initrd)?;
    put(COMMAND_LINE, &[command_line.as_bytes(), b"\0"].concat())?;
    put(ZERO_PAGE + 0x1fe, &0xaa55_u16.to_le_bytes())?;
    put(ZERO_PAGE + 0x202, &0x5372_6448_u32.to_le_bytes())?;
    put(ZERO_PAGE + 0x206, &0x20f_u16.to_le_bytes())?;
    put(ZERO_PAGE + 0x210, &[0xff])?;
    put(ZERO_PAGE + 0x218, &(initrd_at as u32).to_le_bytes())?;
    put(ZERO_PAGE + 0x21c, &(initrd.len() as u32).to_le_bytes())?;
    put(ZERO_PAGE + 0x228, &(COMMAND_LINE as u32).to_le_bytes())?;
    put(ZERO_PAGE + 0x230, &0x100_0000_u32.to_le_bytes())?;
    put(
        ZERO_PAGE + 0x238,
        &(command_line.len() as u32 + 1).to_le_bytes(),
    )?;
    put(ZERO_PAGE + 0x1e8, &[2])?;
    for (i, (at, len)) in [(0_u64, MP_TABLE), (0x10_0000, size - 0x10_0000)]
        .into_iter()
        .enumerate()
    {
        let entry = ZERO_PAGE + 0x2d0 + 20 * i as u64;
        put(entry, &[at.to_le_bytes(), len.to_le_bytes()].concat())?;
        put(entry + 16, &1_u32.to_le_bytes())?;
    }
    put(MP_TABLE, &mp_table())?;
    put(PAGE_TABLES, &(PAGE_TABLES + 0x1003).to_le_bytes())?;
    put(PAGE_TABLES + 0x1000, &(PAGE_TABLES + 0x2003).to_le_bytes())?;
    for i in 0..512_u64 {
        put(
            PAGE_TABLES + 0x2000 + 8 * i,
            &(i << 21 | 0x83).to_le_bytes(),
        )?;
    }
    for (i, word) in [0, 0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff]
        .into_iter()
        .enumerate()
    {
        put(GDT + 8 * i as u64, &word.to_le_bytes())?;
    }
    number::<8>(kernel, 24)
}

fn mp_table() -> Vec<u8> {
    let mut entries = vec![0, 0, 0x14, 3];
    entries.extend(0x600_u32.to_le_bytes());
    entries.extend(0x201_u32.to_le_bytes());
    entries.extend([0; 8]);
    entries.extend([1, 0]);
    entries.extend(b"ISA   ");
    entries.extend([2, 2, 0x11, 1]);
    entries.extend(0xfec0_0000_u32.to_le_bytes());
    for irq in 0..16 {
        entries.extend([3, 0, 0, 0, 0, irq, 2, irq]);
    }
    entries.extend([4, 3, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0, 0xff, 1]);
    let mut table = b"PCMP".to_vec();
    table.extend(((44 + entries.len()) as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"KOMBI   EXAMPLE     ");
    table.extend([0; 6]);
    table.extend(21_u16.to_le_bytes());
    table.extend(0xfee0_0000_u32.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);
    let mut pointer = b"_MP_".to_vec();
    pointer.extend((MP_TABLE as u32 + 16).to_le_bytes());
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend(table);
    pointer
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

fn state(entry: u64) -> VcpuState {
    let mut state = VcpuState::after_reset();
    let flat = |selector, rights| Segment {
        selector,
        base: 0,
        limit: !0,
        rights,
    };
    state.segments = [flat(0x18, 0xc093); 6];
    state.segments[VcpuState::CS] = flat(0x10, 0xa09b);
    state.gdt = DescriptorTable {
        base: GDT,
        limit: 31,
    };
    state.cr0 = 0x8005_0033 & !(1 << 18);
    state.cr3 = PAGE_TABLES;
    state.cr4 = 0x20;
    state.efer = 0x500;
    state.rip = entry;
    state.gpr[x86::registers::RSI] = ZERO_PAGE;
    state.apic.base = 0xfee0_0d00;
    state
}

/// MODEL, as in `--cpu-model`.
fn model() -> Result<CpuModel> {
    let Ok(name) = std::env::var("MODEL") else {
        return Ok(CpuModel::default());
    };
    let model = CpuModel::ALL.into_iter().find(|model| model.name() == name);
    model.ok_or_else(|| format!("no CPU model {name}").into())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, kernel, initrd, rest @ ..] = arguments.as_slice() else {
        return Err("usage: boot VMLINUX INITRAMFS [CMDLINE]".into());
    };
    let command_line = rest
        .first()
        .map_or("console=ttyS0 quiet reboot=k panic=-1", String::as_str);
    let start = Instant::now();
    let kernel = std::fs::read(kernel)?;
    let initrd = std::fs::read(initrd)?;
    let memory = std::env::var("MEM").map_or(Ok(256), |mib| mib.parse())?;
    let ram = GuestRam::new(ram::ByteSize::mib(memory))?;
    let entry = load(&ram, &kernel, &initrd, command_line)?;
    let options = Options {
        count_instructions: std::env::var_os("COUNT").is_some(),
        code_cache_bytes: std::env::var("CACHE").map_or(Ok(32 << 20), |n| n.parse())?,
        cpu_model: model()?,
        smt: false,
    };
    let loaded = start.elapsed();
    let mut engine = SoftHypervisor::new(options);
    let kept = match std::env::var_os("KEPT") {
        Some(folder) => {
            let (kept, refused) = Translations::open(options.translator(), folder.as_ref())?;
            if let Some(error) = refused {
                eprintln!("{error}");
            }
            Some(Arc::new(kept))
        }
        None => None,
    };
    if let Some(kept) = &kept {
        engine = engine.with_translations(Arc::clone(kept));
    }
    let mut partition = engine.create(ram.clone(), 1)?;
    let mut vcpu = partition.vcpu(0)?;
    vcpu.set_state(&state(entry))?;
    let board = Board {
        serial: Mutex::default(),
        interrupts: partition.interrupts(),
        kick: OnceLock::new(),
        reset: AtomicBool::new(false),
    };
    let _ = board.kick.set(vcpu.kicker());
    let created = start.elapsed();
    if let Some(every) = std::env::var_os("WATCH") {
        let every = every.to_str().unwrap_or("1000").parse()?;
        let kick = vcpu.kicker();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(std::time::Duration::from_millis(every));
                kick.kick();
            }
        });
    }
    // Signals are blocked on the thread that runs the vCPU: not this one.
    let (vcpu, exit) = std::thread::scope(|scope| {
        let run = || loop {
            let exit = vcpu.run(&board);
            match exit {
                Ok(hv::Exit::Kicked) if !board.reset.load(Ordering::Relaxed) => {
                    let state = vcpu.state().expect("the state can always be taken");
                    eprintln!(
                        "at {:#x}, rsp {:#x}, rax {:#x}, flags {:#x}",
                        state.rip, state.gpr[4], state.gpr[0], state.rflags
                    );
                }
                exit => break (vcpu, exit),
            }
        };
        scope.spawn(run).join().map_err(|_| "the vCPU panicked")
    })?;
    let exit = exit?;
    let ended = start.elapsed();
    if std::env::var_os("STATS").is_some() {
        eprintln!(
            "{exit:?}: load {loaded:?}, create {:?}, run {:?}",
            created - loaded,
            ended - created
        );
        eprintln!("{:#?}", vcpu.stats());
        let status = std::fs::read_to_string("/proc/self/status")?;
        for line in status
            .lines()
            .filter(|line| line.starts_with("Rss") || line.starts_with("Vm"))
        {
            eprintln!("{line}");
        }
        eprintln!("guest memory resident: {} KiB", ram.resident_bytes()? >> 10);
    }
    if let Some(kept) = kept {
        let started = Instant::now();
        let counts = kept.counts();
        let saved = kept.save()?;
        eprintln!("{counts:?}, {saved:?} in {:?}", started.elapsed());
    }
    if exit == hv::Exit::TripleFault {
        let state = vcpu.state()?;
        return Err(format!("triple fault at {:#x}, cr2 {:#x}", state.rip, state.cr2).into());
    }
    Ok(())
}
