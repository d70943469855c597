//! Memory behind the memory: files of the host, blocks that come and go, pages that are
//! given back.

mod bare;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use bare::{DATA, Machine, SAY, STOP, Said};
use hv::{Exit, Gpa, GuestRam};
use hv_soft::SoftHypervisor;
use iced_x86::code_asm::*;
use ram::{ByteSize, Further};

/// A linear page of which the tests choose what is behind it.
const WINDOW: u64 = 0x15_0000;
const FUNCTION: u64 = 0x18_0000;
const MIB: u64 = 1 << 20;

fn machine(further: Further, count: u8) -> (Machine, u64) {
    let ram = GuestRam::with(ByteSize::mib(16), vec![further]).unwrap();
    let at = ram.regions().last().unwrap().start.0;
    let mut machine = Machine::around(ram, SoftHypervisor::default(), count);
    machine.map(WINDOW, at | 3);
    (machine, at)
}

fn with_file(content: &[u8], read_only: bool) -> (Machine, u64, File) {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    let further = Further::File {
        file: file.try_clone().unwrap(),
        read_only,
    };
    let (machine, at) = machine(further, 1);
    (machine, at, file)
}

fn pluggable(count: u8) -> (Machine, u64) {
    let further = Further::Pluggable {
        len: 4 * MIB,
        block: 2 * MIB,
    };
    machine(further, count)
}

fn say(asm: &mut CodeAssembler) {
    asm.out(i32::from(SAY), eax).unwrap();
}

fn stop(asm: &mut CodeAssembler) {
    asm.out(i32::from(STOP), al).unwrap();
}

fn on_say(machine: &Machine, f: impl Fn(u32) + Send + 'static) {
    *machine.board.on_say.lock().unwrap() = Some(Box::new(f));
}

#[test]
fn a_file_is_loaded_stored_into_and_executed() {
    let mut content = vec![7; 4096];
    // mov eax, 42; ret
    content[16..22].copy_from_slice(&[0xb8, 42, 0, 0, 0, 0xc3]);
    let (mut machine, _, file) = with_file(&content, false);
    machine.code(|asm| {
        asm.mov(eax, dword_ptr(WINDOW)).unwrap();
        say(asm);
        asm.call(WINDOW + 16).unwrap();
        say(asm);
        asm.mov(byte_ptr(WINDOW + 17), 43).unwrap();
        asm.call(WINDOW + 16).unwrap();
        say(asm);
        stop(asm);
    });
    machine.run_to_stop();
    assert_eq!(machine.said(), [0x0707_0707, 42, 43].map(Said::Port));
    let mut byte = [0];
    file.read_exact_at(&mut byte, 17).unwrap();
    assert_eq!(byte, [43]);
}

#[test]
fn stores_of_every_kind_into_a_read_only_file_change_nothing() {
    type Store = fn(&mut CodeAssembler);
    let stores: [Store; 8] = [
        |asm| asm.mov(dword_ptr(WINDOW + 8), 1).unwrap(),
        |asm| asm.lock().inc(dword_ptr(WINDOW + 8)).unwrap(),
        |asm| asm.xchg(qword_ptr(WINDOW + 8), rbx).unwrap(),
        |asm| asm.movups(xmmword_ptr(WINDOW + 8), xmm0).unwrap(),
        |asm| {
            asm.mov(rdi, WINDOW + 8).unwrap();
            asm.mov(ecx, 100).unwrap();
            asm.rep().stosb().unwrap();
        },
        |asm| {
            asm.mov(rsi, DATA).unwrap();
            asm.mov(rdi, WINDOW + 8).unwrap();
            asm.mov(ecx, 10).unwrap();
            asm.rep().movsq().unwrap();
        },
        |asm| {
            asm.mov(rsp, WINDOW + 64).unwrap();
            asm.push(rax).unwrap();
        },
        |asm| asm.mov(qword_ptr(WINDOW + 0xffc), rax).unwrap(),
    ];
    for (nth, store) in stores.into_iter().enumerate() {
        let (mut machine, at, file) = with_file(&[7; 4096], true);
        // The next page too, for what runs into it; loads first, so that a TLB has it.
        machine.map(WINDOW + 4096, (at + 4096) | 3);
        machine.code(|asm| {
            asm.mov(eax, dword_ptr(WINDOW)).unwrap();
            asm.mov(ebx, dword_ptr(WINDOW + 4096)).unwrap();
            store(asm);
            asm.mov(eax, dword_ptr(WINDOW + 8)).unwrap();
            say(asm);
            stop(asm);
        });
        machine.run_to_stop();
        assert_eq!(
            machine.said().last(),
            Some(&Said::Port(0x0707_0707)),
            "{nth}"
        );
        let mut content = [0; 4096];
        file.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(content, [7; 4096], "{nth}");
    }
}

#[test]
fn tables_in_a_read_only_file_lead_nowhere() {
    let mut table = vec![0; 4096];
    // As the machine's own first table.
    table[..8].copy_from_slice(&(bare::TABLES + 0x1007).to_le_bytes());
    let (mut machine, at, _file) = with_file(&table, true);
    machine.code(stop);
    machine.change(|state| state.cr3 = at);
    assert_eq!(machine.run(), Exit::TripleFault);
}

#[test]
fn a_file_that_shrinks_is_zeros_to_loads_stores_and_fetches() {
    let mut content = vec![7; 3 * 4096];
    content[8192..8198].copy_from_slice(&[0xb8, 42, 0, 0, 0, 0xc3]);
    let (mut machine, at, file) = with_file(&content, false);
    machine.map(WINDOW + 4096, (at + 4096) | 3);
    machine.map(WINDOW + 8192, (at + 8192) | 3);
    on_say(&machine, move |value| {
        if value == 0x0707_0707 {
            file.set_len(0).unwrap();
        }
    });
    // What the lost page's zeros run into: add [rax], al again and again.
    machine.code_at(WINDOW + 3 * 4096, |asm| {
        asm.mov(eax, 9).unwrap();
        asm.ret().unwrap();
    });
    machine.code(|asm| {
        asm.mov(eax, dword_ptr(WINDOW)).unwrap();
        say(asm);
        asm.mov(eax, dword_ptr(WINDOW)).unwrap();
        say(asm);
        asm.mov(dword_ptr(WINDOW + 4), 5).unwrap();
        asm.lock().inc(dword_ptr(WINDOW + 4)).unwrap();
        asm.mov(eax, dword_ptr(WINDOW + 4)).unwrap();
        say(asm);
        asm.mov(rsi, WINDOW + 4096).unwrap();
        asm.mov(rdi, DATA).unwrap();
        asm.mov(ecx, 512).unwrap();
        asm.rep().movsq().unwrap();
        asm.mov(eax, dword_ptr(DATA + 100)).unwrap();
        say(asm);
        asm.mov(rax, DATA).unwrap();
        asm.call(WINDOW + 8192).unwrap();
        say(asm);
        stop(asm);
    });
    machine.run_to_stop();
    assert_eq!(machine.said(), [0x0707_0707, 0, 6, 0, 9].map(Said::Port));
}

#[test]
fn an_unplugged_block_is_no_memory_to_the_vcpu_that_asked() {
    let (mut machine, at) = pluggable(1);
    let ram = machine.ram.clone();
    on_say(&machine, move |value| match value {
        1 => ram.plug(Gpa(at), 2 * MIB).unwrap(),
        2 => ram.unplug(Gpa(at), 2 * MIB).unwrap(),
        _ => {}
    });
    machine.code(|asm| {
        asm.mov(dword_ptr(WINDOW), 77).unwrap();
        for what in [1, 2, 1] {
            asm.mov(eax, what).unwrap();
            say(asm);
            asm.mov(eax, dword_ptr(WINDOW)).unwrap();
            asm.mov(dword_ptr(WINDOW), 78).unwrap();
            say(asm);
        }
        stop(asm);
    });
    machine.run_to_stop();
    let store = |value: u32| Said::Store(at, value.to_le_bytes().into());
    assert_eq!(
        machine.said(),
        [
            store(77),
            Said::Port(1),
            Said::Port(0),
            Said::Port(2),
            Said::Load(at, 4),
            store(78),
            Said::Port(0x8483_8281),
            Said::Port(1),
            Said::Port(0),
        ]
    );
}

#[test]
fn a_vcpu_that_runs_loses_a_block_before_unplugging_returns() {
    let (mut machine, at) = pluggable(1);
    machine.ram.plug(Gpa(at), 2 * MIB).unwrap();
    machine.code(|asm| {
        let mut again = asm.create_label();
        asm.set_label(&mut again).unwrap();
        asm.lock().inc(dword_ptr(WINDOW + 4)).unwrap();
        asm.cmp(dword_ptr(WINDOW), 0x8483_8281_u32 as i32).unwrap();
        asm.jne(again).unwrap();
        stop(asm);
    });
    let ram = machine.ram.clone();
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        let before = ram.resident_bytes().unwrap();
        ram.unplug(Gpa(at), 2 * MIB).unwrap();
        let after = ram.resident_bytes().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        (before - after, ram.resident_bytes().unwrap() - after)
    });
    machine.run_to_stop();
    let (given_back, taken_again) = other.join().unwrap();
    assert_eq!(given_back, 4096);
    // Pages of the machine's own memory may come, the block's may not.
    assert_eq!(taken_again, 0);
    assert!(machine.said().contains(&Said::Load(at, 4)));
}

#[test]
fn code_in_a_page_that_was_given_back_is_not_run_any_more() {
    let mut machine = Machine::new();
    for (at, value) in [(FUNCTION, 1), (FUNCTION + 4096, 2)] {
        machine.code_at(at, |asm| {
            asm.mov(eax, value).unwrap();
            asm.ret().unwrap();
        });
    }
    let ram = machine.ram.clone();
    on_say(&machine, move |value| {
        if value == 1 {
            assert_eq!(ram.discard(Gpa(FUNCTION), 4096).unwrap(), 4096);
        }
    });
    // Zeros are add [rax], al: on into the next page.
    machine.code(|asm| {
        for _ in 0..2 {
            asm.mov(rax, DATA).unwrap();
            asm.call(FUNCTION).unwrap();
            say(asm);
        }
        stop(asm);
    });
    machine.run_to_stop();
    assert_eq!(machine.said(), [1, 2].map(Said::Port));
}
