//! Ways between guest and devices that need no exit, or begin outside: interrupts,
//! doorbells, the log of writes, memory that comes and goes.

mod bare;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bare::{
    DATA, DEVICE, DEVICE_PA, Machine, Said, on_kvm, program_pin, stop, wait_for_interrupts, wrmsr,
};
use hv::{Exit, Gpa, GuestRam, Interrupts, Partition, Vcpu};
use hv_kvm::{KvmHypervisor, Options};
use iced_x86::code_asm::*;
use ram::{ByteSize, Cursor, Further};
use rustix::event::{EventfdFlags, eventfd};

const LEVEL: u32 = 1 << 15;

#[test]
fn an_edge_on_a_line_interrupts_a_guest_in_hlt_once() {
    let Some(mut machine) = on_kvm() else { return };
    wait_for_interrupts(&mut machine, |asm| {
        program_pin(asm, 5, 0x40);
        asm.mov(eax, 100).unwrap();
        asm.out(i32::from(bare::SAY), eax).unwrap();
        asm.xor(r12d, r12d).unwrap();
    });
    let lines = Arc::clone(&machine.interrupts);
    let kick = machine.vcpu.kicker();
    *machine.board.on_say.lock().unwrap() = Some(Box::new(move |said| match said {
        100 => pulse(&*lines),
        1 | 2 => pulse(&*lines),
        _ => kick.kick(),
    }));
    assert_eq!(machine.run(), Exit::Kicked);
    let counted: Vec<_> = [100_u32, 1, 2, 3]
        .map(|n| Said::Port(n.to_le_bytes().into()))
        .into();
    assert_eq!(machine.said(), counted);
}

fn pulse(lines: &dyn Interrupts) {
    lines.set_line(5, true);
    lines.set_line(5, false);
}

#[test]
fn a_level_that_stays_high_interrupts_again_after_each_end_of_interrupt() {
    let Some(mut machine) = on_kvm() else { return };
    wait_for_interrupts(&mut machine, |asm| program_pin(asm, 6, 0x40 | LEVEL));
    let lines = Arc::clone(&machine.interrupts);
    lines.set_line(6, true);
    let kick = machine.vcpu.kicker();
    let low = Arc::clone(&lines);
    *machine.board.on_say.lock().unwrap() = Some(Box::new(move |said| {
        if said == 3 {
            low.set_line(6, false);
            kick.kick();
        }
    }));
    assert_eq!(machine.run(), Exit::Kicked);
    // Low again: but for one that KVM had on its way, no further one comes.
    let kick = machine.vcpu.kicker();
    let ends = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        kick.kick();
    });
    assert_eq!(machine.run(), Exit::Kicked);
    ends.join().unwrap();
    let said = machine.said();
    assert!((3..=4).contains(&said.len()), "{said:?}");
    // Lines that do not exist are nobody's.
    lines.set_line(24, true);
    lines.set_line(u32::MAX, true);
}

#[test]
fn the_deadline_timer_wakes_a_guest_in_hlt() {
    let Some(mut machine) = on_kvm() else { return };
    wait_for_interrupts(&mut machine, |asm| {
        wrmsr(asm, 0x832, 2 << 17 | 0x40);
        asm.rdtsc().unwrap();
        asm.shl(rdx, 32).unwrap();
        asm.or(rax, rdx).unwrap();
        asm.add(rax, 100_000_000).unwrap();
        asm.mov(rdx, rax).unwrap();
        asm.shr(rdx, 32).unwrap();
        asm.mov(ecx, 0x6e0).unwrap();
        asm.wrmsr().unwrap();
    });
    machine.stop_at(1);
    let start = Instant::now();
    assert_eq!(machine.run(), Exit::Kicked);
    let khz = machine.vcpu.tsc_khz().unwrap();
    let wanted = Duration::from_secs_f64(100_000.0 / f64::from(khz));
    let took = start.elapsed();
    assert!(took >= wanted * 9 / 10, "{took:?} of {wanted:?}");
}

#[test]
fn a_doorbell_rings_without_an_exit_and_for_its_value_only() {
    let Some(mut machine) = on_kvm() else { return };
    let bell = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let at = Gpa(DEVICE_PA + 0x50);
    assert!(machine.partition.doorbell(at, 3, bell.as_fd()).unwrap());
    machine.code(|asm| {
        asm.mov(rsi, DEVICE + 0x50).unwrap();
        for value in [3, 4, 3] {
            asm.mov(dword_ptr(rsi), value).unwrap();
        }
        stop(asm);
    });
    machine.run_to_stop();
    assert_eq!(machine.said(), [Said::Store(at.0, vec![4, 0, 0, 0])]);
    let mut count = [0; 8];
    rustix::io::read(&bell, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 2);
}

#[test]
fn the_log_of_writes_ends_in_memorys_epochs() {
    let Some(mut machine) = on_kvm() else { return };
    machine.code(|asm| {
        for page in [0, 3] {
            asm.mov(rax, DATA + 4096 * page).unwrap();
            asm.mov(dword_ptr(rax), 1).unwrap();
        }
        stop(asm);
    });
    let shared = machine.partition.shared();
    assert!(shared.collect_writes().is_err());
    shared.log_writes(true).unwrap();
    shared.collect_writes().unwrap();
    let before = machine.ram.epochs().cursor();
    machine.run_to_stop();
    shared.collect_writes().unwrap();
    let written: Vec<_> = machine.ram.epochs().written_since(before).collect();
    let data: Vec<_> = written.into_iter().filter(|at| at.0 >= DATA).collect();
    assert_eq!(data, [Gpa(DATA), Gpa(DATA + 3 * 4096)]);
    // Collected once, and no more of it.
    let after = machine.ram.epochs().cursor();
    shared.collect_writes().unwrap();
    assert_eq!(machine.ram.epochs().written_since(after).next(), None);
    shared.log_writes(false).unwrap();
    assert!(shared.collect_writes().is_err());
    assert_ne!(before, Cursor::START);
}

#[test]
fn blocks_that_are_unplugged_are_device_memory_to_the_guest() {
    let Ok(kvm) = KvmHypervisor::open(Options::default()) else {
        assert!(on_kvm().is_none());
        return;
    };
    let further = Further::Pluggable {
        len: 4 << 20,
        block: 2 << 20,
    };
    let ram = GuestRam::with(ByteSize::mib(16), vec![further]).unwrap();
    let region = ram.regions().last().unwrap();
    let mut machine = Machine::with(&kvm, ram.clone());
    let mut accesses = || {
        machine.board.said.lock().unwrap().clear();
        // Wherever the region is, it is at 3 GiB in the guest's eyes.
        machine.put_word(0x2018, 0x9003);
        machine.put_word(0x9000, region.start.0 | 0x83);
        machine.change(|state| state.rip = bare::CODE);
        machine.code(|asm| {
            asm.mov(rax, 0xc000_0000_u64).unwrap();
            asm.inc(qword_ptr(rax)).unwrap();
            stop(asm);
        });
        machine.run_to_stop();
        machine.said().len()
    };
    assert_eq!(accesses(), 2);
    ram.plug(region.start, 2 << 20).unwrap();
    assert_eq!(accesses(), 0);
    assert_eq!(accesses(), 0);
    ram.unplug(region.start, 2 << 20).unwrap();
    assert_eq!(accesses(), 2);
}
