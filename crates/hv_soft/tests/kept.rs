//! Kept translations in a running machine: used where the guest's code is the one they
//! were made from, and nowhere else.

mod bare;

use std::sync::Arc;

use bare::{CODE, DATA, Machine};
use hv_soft::{Options, SoftHypervisor};
use iced_x86::code_asm::*;
use translations::Translations;

fn kept() -> Arc<Translations> {
    let options = Options::default();
    Arc::new(Translations::in_memory(options.translator()))
}

fn machine(kept: &Arc<Translations>) -> Machine {
    Machine::on(SoftHypervisor::default().with_translations(Arc::clone(kept)))
}

/// Sums 1 to 100 and adds `extra`.
fn program(machine: &mut Machine, extra: i32) {
    machine.code(|asm| {
        let mut again = asm.create_label();
        asm.mov(rbx, DATA).unwrap();
        asm.mov(ecx, 100).unwrap();
        asm.xor(eax, eax).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.add(eax, ecx).unwrap();
        asm.push(rax).unwrap();
        asm.pop(rdx).unwrap();
        asm.mov(dword_ptr(rbx), eax).unwrap();
        asm.dec(ecx).unwrap();
        asm.jnz(again).unwrap();
        asm.add(eax, extra).unwrap();
        asm.out(u32::from(bare::STOP), al).unwrap();
        asm.hlt().unwrap();
    });
}

#[test]
fn another_machine_with_the_same_code_translates_nothing() {
    let kept = kept();
    for again in [false, true] {
        let mut machine = machine(&kept);
        program(&mut machine, 7);
        assert_eq!(machine.run_to_stop().gpr[0], 5057);
        assert_eq!(machine.word(DATA), 5050);
        let stats = machine.vcpu.stats();
        assert_eq!(stats.translations == 0, again, "{stats:?}");
        assert_eq!(stats.recalled != 0, again, "{stats:?}");
    }
}

#[test]
fn code_that_differs_in_one_byte_gets_its_own_translation() {
    let kept = kept();
    for extra in [7, 8, 7, 9] {
        let mut machine = machine(&kept);
        program(&mut machine, extra);
        assert_eq!(machine.run_to_stop().gpr[0], 5050 + extra as u64);
    }
}

#[test]
fn code_that_changes_back_is_recalled_in_the_same_machine() {
    let kept = kept();
    let mut machine = machine(&kept);
    for (extra, known) in [(7, false), (8, false), (7, true), (8, true)] {
        let before = machine.vcpu.stats();
        program(&mut machine, extra);
        machine.change(|state| state.rip = CODE);
        assert_eq!(machine.run_to_stop().gpr[0], 5050 + extra as u64);
        let after = machine.vcpu.stats();
        assert_eq!(
            after.translations == before.translations,
            known,
            "{after:?}"
        );
    }
}

#[test]
fn a_page_that_only_the_other_machine_maps_faults_here() {
    let kept = kept();
    for mapped in [true, false] {
        let mut machine = machine(&kept);
        // mov eax, 0x11223344 across the end of the page; out STOP, al; hlt
        let at = CODE + 0xffd;
        machine.put(at, &[0xb8, 0x44, 0x33, 0x22, 0x11, 0xe6, bare::STOP, 0xf4]);
        if !mapped {
            machine.map(CODE + 0x1000, 0);
        }
        machine.change(|state| state.rip = at);
        if mapped {
            assert_eq!(machine.run_to_stop().gpr[0], 0x1122_3344);
        } else {
            let fault = machine.run_to_exception();
            assert_eq!((fault.vector, fault.rip), (14, at));
        }
    }
}
