//! Every reason for which KVM gives a guest back to us.

mod bare;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bare::{CODE, DEVICE, DEVICE_PA, Machine, SAY, STOP, Said, on_kvm, stop, wait_for_interrupts};
use hv::{Error, Exit, Hypervisor, Partition, Vcpu};
use hv_kvm::{KvmHypervisor, Options};
use iced_x86::code_asm::*;

#[test]
fn device_memory_is_accessed_in_the_width_of_the_instruction() {
    let Some(mut machine) = on_kvm() else { return };
    machine.code(|asm| {
        asm.mov(rsi, DEVICE).unwrap();
        asm.mov(eax, 0x0403_0201).unwrap();
        asm.mov(byte_ptr(rsi), al).unwrap();
        asm.mov(word_ptr(rsi + 2), ax).unwrap();
        asm.mov(dword_ptr(rsi + 4), eax).unwrap();
        asm.mov(qword_ptr(rsi + 8), rax).unwrap();
        asm.movzx(ebx, word_ptr(rsi + 16)).unwrap();
        asm.add(dword_ptr(rsi + 20), eax).unwrap();
        asm.movsxd(rcx, dword_ptr(rsi + 24)).unwrap();
        stop(asm);
    });
    let state = machine.run_to_stop();
    let store = |at: u64, bytes: &[u8]| Said::Store(DEVICE_PA + at, bytes.to_vec());
    let load = |at: u64, size| Said::Load(DEVICE_PA + at, size);
    assert_eq!(
        machine.said(),
        [
            store(0, &[1]),
            store(2, &[1, 2]),
            store(4, &[1, 2, 3, 4]),
            store(8, &[1, 2, 3, 4, 0, 0, 0, 0]),
            load(16, 2),
            load(20, 4),
            store(20, &[0x82, 0x84, 0x86, 0x88]),
            load(24, 4),
        ]
    );
    assert_eq!(
        (state.gpr[3], state.gpr[1]),
        (0x8281, 0xffff_ffff_8483_8281)
    );
}

#[test]
fn ports_are_accessed_in_their_width_also_by_string_instructions() {
    let Some(mut machine) = on_kvm() else { return };
    machine.put(bare::DATA, b"abcdef");
    machine.code(|asm| {
        asm.mov(rsi, bare::DATA).unwrap();
        asm.mov(edx, u32::from(SAY)).unwrap();
        asm.mov(ecx, 3).unwrap();
        asm.rep().outsw().unwrap();
        asm.in_(eax, dx).unwrap();
        asm.mov(rdi, bare::DATA + 0x100).unwrap();
        asm.mov(ecx, 4).unwrap();
        asm.rep().insb().unwrap();
        stop(asm);
    });
    let state = machine.run_to_stop();
    let mut said = machine.said();
    let ins = said.split_off(4);
    assert_eq!(
        said,
        [
            Said::Port(b"ab".to_vec()),
            Said::Port(b"cd".to_vec()),
            Said::Port(b"ef".to_vec()),
            Said::In(SAY, 4),
        ]
    );
    assert_eq!(ins, vec![Said::In(SAY, 1); 4]);
    assert_eq!(state.gpr[0], 0x4443_4241);
    assert_eq!(machine.word(bare::DATA + 0x100), 0x4141_4141);
}

#[test]
fn an_access_that_is_interrupted_by_a_kick_is_complete_when_the_run_ends() {
    let Some(mut machine) = on_kvm() else { return };
    let stop_at_once = u32::from(STOP);
    machine.code(|asm| {
        asm.mov(edx, stop_at_once).unwrap();
        asm.mov(ebx, 7).unwrap();
        asm.out(dx, al).unwrap();
        asm.mov(ebx, 8).unwrap();
        asm.out(dx, al).unwrap();
    });
    let state = machine.run_to_stop();
    // RIP is behind the OUT, and what follows has not run.
    assert_eq!((state.rip, state.gpr[3]), (CODE + 11, 7));
    assert_eq!(machine.run_to_stop().gpr[3], 8);
}

#[test]
fn a_guest_without_handlers_faults_three_times_and_ends() {
    let Some(mut machine) = on_kvm() else { return };
    machine.change(|state| state.idt.limit = 0);
    machine.code(|asm| asm.ud2().unwrap());
    assert_eq!(machine.run(), Exit::TripleFault);
}

#[test]
fn no_kick_is_lost() {
    let Some(mut machine) = on_kvm() else { return };
    machine.code(|asm| {
        let mut again = asm.create_label();
        asm.set_label(&mut again).unwrap();
        asm.jmp(again).unwrap();
    });
    // Before the run, between runs, and in the middle of one.
    let kick = machine.vcpu.kicker();
    for _ in 0..100 {
        kick.kick();
        assert_eq!(machine.run(), Exit::Kicked);
    }
    kick.kick();
    kick.kick();
    assert_eq!(machine.run(), Exit::Kicked);
    let ends = std::thread::spawn({
        let kick = Arc::clone(&kick);
        move || {
            std::thread::sleep(Duration::from_millis(50));
            kick.kick();
            Instant::now()
        }
    });
    assert_eq!(machine.run(), Exit::Kicked);
    let took = ends.join().unwrap().elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn kicks_from_a_thread_that_never_rests_end_every_run() {
    let Some(mut machine) = on_kvm() else { return };
    machine.code(|asm| {
        let mut again = asm.create_label();
        asm.mov(rsi, DEVICE).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.mov(eax, dword_ptr(rsi)).unwrap();
        asm.jmp(again).unwrap();
    });
    let (start, go) = std::sync::mpsc::channel();
    let kick = machine.vcpu.kicker();
    let kicker = std::thread::spawn(move || {
        while go.recv().is_ok() {
            kick.kick();
        }
    });
    for _ in 0..500 {
        start.send(()).unwrap();
        assert_eq!(machine.run(), Exit::Kicked);
    }
    drop(start);
    kicker.join().unwrap();
}

#[test]
fn a_kick_wakes_a_guest_that_waits_in_hlt_and_it_waits_again_afterwards() {
    let Some(mut machine) = on_kvm() else { return };
    wait_for_interrupts(&mut machine, |_| {});
    let kick = machine.vcpu.kicker();
    for _ in 0..3 {
        let kick = Arc::clone(&kick);
        let ends = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            kick.kick();
        });
        let state = machine.run_to_stop();
        ends.join().unwrap();
        assert!(state.events.halted);
    }
}

#[test]
fn a_state_that_the_processor_cannot_have_is_refused() {
    let Some(mut machine) = on_kvm() else { return };
    let good = machine.vcpu.state().unwrap();
    let broken: [fn(&mut x86::VcpuState); 4] = [
        |state| state.cr4 = 1 << 40,
        |state| state.xcr0 = 1 << 40,
        |state| state.xsave = vec![0; 10_000],
        |state| state.msrs = vec![(0x1234_5678, 1)],
    ];
    for breaks in broken {
        let mut state = good.clone();
        breaks(&mut state);
        let refused = machine.vcpu.set_state(&state).unwrap_err();
        assert!(matches!(refused, Error::State { .. }), "{refused:?}");
    }
    machine.vcpu.set_state(&good).unwrap();
}

#[test]
fn an_instruction_that_kvm_cannot_complete_ends_the_run_with_its_place() {
    let Some(mut machine) = on_kvm() else { return };
    // Code in device memory: nothing can execute it, and KVM says so rather than read
    // devices.
    machine.code(|asm| {
        asm.mov(rax, DEVICE).unwrap();
        asm.jmp(rax).unwrap();
    });
    let board = Arc::clone(&machine.board);
    let error = machine.vcpu.run(&*board).unwrap_err();
    let Error::Engine { rip, why, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(*rip, DEVICE, "{error}");
    assert!(why.contains("KVM"), "{error}");
}

#[test]
fn there_are_as_many_vcpus_as_asked_for_up_to_a_limit() {
    let Ok(kvm) = KvmHypervisor::open(Options::default()) else {
        assert!(on_kvm().is_none());
        return;
    };
    let ram = || hv::GuestRam::new(ram::ByteSize::mib(16)).unwrap();
    let mut partition = kvm.create(ram(), 2).unwrap();
    assert!(partition.vcpu(0).is_ok() && partition.vcpu(1).is_ok());
    for index in [0, 1, 2] {
        let error = partition.vcpu(index).unwrap_err();
        assert!(matches!(error, Error::NoSuchVcpu { .. }), "{error:?}");
    }
    let error = kvm.create(ram(), 33).unwrap_err();
    assert!(
        matches!(error, Error::TooManyVcpus { most: 32, .. }),
        "{error:?}"
    );
}

#[test]
fn machines_of_several_regions_have_all_their_memory() {
    let Ok(kvm) = KvmHypervisor::open(Options::default()) else {
        assert!(on_kvm().is_none());
        return;
    };
    // Only what is touched is backed.
    let ram = hv::GuestRam::new(ram::ByteSize::mib(3 * 1024 + 16)).unwrap();
    let mut machine = Machine::with(&kvm, ram);
    // A table of its own for the fourth GiB of addresses.
    machine.put_word(0x2018, 0x9003);
    machine.put_word(0x9000, (4 << 30) | 0x83);
    machine.code(|asm| {
        asm.mov(rax, 0xc000_0000_u64).unwrap();
        asm.mov(dword_ptr(rax + 0x1000), 0x5a5a).unwrap();
        stop(asm);
    });
    machine.run_to_stop();
    assert_eq!(machine.word((4 << 30) + 0x1000), 0x5a5a);
}
