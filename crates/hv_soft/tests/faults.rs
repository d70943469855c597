//! Faults are precise, wherever they come from.

mod bare;

use bare::{CODE, DATA, DEVICE, Machine, STACK, STOP, UNMAPPED};
use hv_soft::{CpuModel, Options};
use iced_x86::code_asm::*;

#[test]
fn a_page_fault_in_mid_block_has_the_state_before_its_instruction() {
    let mut machine = Machine::new();
    let mut at = 0;
    machine.code(|asm| {
        asm.mov(ebx, 1).unwrap();
        asm.mov(rsi, UNMAPPED).unwrap();
        asm.inc(ebx).unwrap();
        at = CODE + asm.assemble(CODE).unwrap().len() as u64;
        asm.add(dword_ptr(rsi + 8), ebx).unwrap();
        asm.inc(ebx).unwrap();
        asm.hlt().unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!(
        (exception.vector, exception.code, exception.rip),
        (14, Some(2), at)
    );
    assert_eq!(
        (exception.state.cr2, exception.state.gpr[3]),
        (UNMAPPED + 8, 2)
    );
    assert_eq!(exception.rsp, STACK);
}

#[test]
fn a_store_to_a_read_only_page_faults_as_present_and_changes_nothing() {
    let mut machine = Machine::new();
    machine.map(DATA, DATA | 1);
    machine.put_word(DATA, 7);
    machine.code(|asm| {
        asm.mov(rax, qword_ptr(DATA)).unwrap();
        asm.mov(qword_ptr(DATA), rsp).unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.code), (14, Some(3)));
    assert_eq!(machine.word(DATA), 7);
}

#[test]
fn a_store_across_pages_into_an_absent_one_writes_neither() {
    let mut machine = Machine::new();
    machine.map(DATA + 0x1000, 0);
    machine.code(|asm| {
        asm.mov(rax, 0x1122_3344_5566_7788_u64).unwrap();
        asm.mov(rsi, DATA + 0xffc).unwrap();
        asm.mov(qword_ptr(rsi), rax).unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!(
        (exception.vector, exception.code, exception.state.cr2),
        (14, Some(2), DATA + 0x1000)
    );
    assert_eq!(machine.word(DATA + 0xff8), 0);
}

#[test]
fn an_access_across_pages_reads_and_writes_both() {
    let mut machine = Machine::new();
    machine.put_word(DATA + 0xffc, 0x1_ffff_ffff);
    machine.code(|asm| {
        asm.mov(esi, DATA as u32 + 0xffc).unwrap();
        asm.lock().add(qword_ptr(rsi), 1).unwrap();
        asm.movups(xmm0, xmmword_ptr(rsi - 4)).unwrap();
        asm.movups(xmmword_ptr(DATA + 0x1ffa), xmm0).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    assert_eq!(machine.word(DATA + 0xffc), 0x2_0000_0000);
    assert_eq!(machine.word(DATA + 0x1ffe), 0x2_0000_0000);
}

#[test]
fn a_division_by_zero_names_its_instruction() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.xor(ecx, ecx).unwrap();
        asm.mov(ebx, 5).unwrap();
        asm.div(ecx).unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!(
        (exception.vector, exception.rip, exception.state.gpr[3]),
        (0, CODE + 7, 5)
    );
}

#[test]
fn addresses_that_are_not_canonical_raise_gp_or_ss() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.mov(rsi, 0x8000_0000_0000_u64).unwrap();
        asm.mov(rax, qword_ptr(rsi)).unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.code), (13, Some(0)));

    // The handler's frame needs a stack: the task's first IST entry.
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.mov(rbp, 1_u64 << 63).unwrap();
        asm.mov(rax, qword_ptr(rbp)).unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.code), (12, Some(0)));
}

#[test]
fn misaligned_sse_operands_raise_gp_also_on_the_way_of_device_memory() {
    for at in [DATA + 8, DEVICE + 8, DATA + 0xff8] {
        let mut machine = Machine::new();
        machine.code(|asm| {
            asm.mov(rsi, at).unwrap();
            asm.movaps(xmm0, xmmword_ptr(rsi)).unwrap();
        });
        let exception = machine.run_to_exception();
        assert_eq!((exception.vector, exception.code), (13, Some(0)), "{at:#x}");
    }
}

#[test]
fn instructions_that_cpuid_does_not_show_are_undefined() {
    let hidden: [&[u8]; 8] = [
        &[0xc5, 0xf8, 0x77],                   // vzeroupper
        &[0xc4, 0xe2, 0xfb, 0xf5, 0xc0],       // pdep
        &[0x0f, 0x01, 0xd0],                   // xgetbv
        &[0xf3, 0x0f, 0xae, 0xc0],             // rdfsbase eax
        &[0x0f, 0x05],                         // syscall with EFER.SCE clear
        &[0x0f, 0xae, 0x20],                   // xsave [rax]
        &[0x62, 0xf1, 0x7c, 0x48, 0x28, 0xc0], // vmovaps zmm0, zmm0
        &[0x0f, 0x0b],                         // ud2
    ];
    for bytes in hidden {
        let mut machine = Machine::with(Options {
            cpu_model: CpuModel::V2,
            ..Options::default()
        });
        machine.put(CODE, bytes);
        let exception = machine.run_to_exception();
        assert_eq!((exception.vector, exception.rip), (6, CODE), "{bytes:x?}");
    }
}

#[test]
fn hostile_prefixes_end_in_an_exception() {
    let hostile: [&[u8]; 7] = [
        &[0xf0, 0x90],       // lock nop
        &[0xf0, 0x8b, 0x00], // lock mov
        &[0xf0, 0xf4],       // lock hlt
        &[0x66; 15],         // nothing but prefixes
        &[
            0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e,
            0x90, 0x90,
        ],
        &[0xf0, 0xff, 0xe0],                            // lock jmp rax
        &[0x65, 0x0f, 0xb4, 0x04, 0x25, 0, 0, 0, 0x80], // lfs eax, gs:[unmapped]
    ];
    for bytes in hostile {
        let mut machine = Machine::new();
        machine.put(CODE, bytes);
        machine.put(CODE + bytes.len() as u64, &[0x0f, 0x0b]);
        let exception = machine.run_to_exception();
        assert!(
            matches!(exception.vector, 6 | 13 | 14),
            "{bytes:x?}: {exception:x?}"
        );
    }
}

#[test]
fn a_fault_without_a_handler_is_a_triple_fault() {
    let mut machine = Machine::new();
    machine.change(|state| state.idt.limit = 0);
    machine.code(|asm| asm.ud2().unwrap());
    assert_eq!(machine.run(), hv::Exit::TripleFault);
}

#[test]
fn a_fault_while_delivering_a_fault_is_a_double_fault() {
    let mut machine = Machine::new();
    // #NP while delivering #GP
    let gate = 0x7000 + 16 * 13;
    let low = machine.word(gate);
    machine.put_word(gate, low & !(1 << 47));
    machine.code(|asm| {
        asm.mov(rsi, 0x8000_0000_0000_u64).unwrap();
        asm.mov(rax, qword_ptr(rsi)).unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.code), (8, Some(0)));
}
