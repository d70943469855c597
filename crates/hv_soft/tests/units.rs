//! Units of the CPU that CR0, CR4 and XCR0 switch off, and what is special about the
//! operands of their instructions.

mod bare;
mod models;

use bare::{CODE, DATA, STOP};
use hv::VcpuState;
use hv_soft::CpuModel;
use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction, MemoryOperand, Register as R};
use models::{END, FSGSBASE, GP, NM, OSFXSR, OSXSAVE, UD, has, run, switched_on, vector};
use x86::features::Feature;

#[test]
fn avx_wants_osxsave_and_both_bits_of_xcr0() {
    if !has(Feature::Avx) {
        return;
    }
    let avx = |asm: &mut CodeAssembler| asm.vaddps(ymm1, ymm2, ymm3).unwrap();
    assert_eq!(vector(|_| {}, avx), END);
    assert_eq!(vector(|state| state.cr4 &= !OSXSAVE, avx), UD);
    assert_eq!(vector(|state| state.xcr0 = 3, avx), UD);
    // BMI wants neither.
    let bmi = |asm: &mut CodeAssembler| asm.andn(rax, rcx, rdx).unwrap();
    assert_eq!(vector(|state| state.cr4 &= !OSXSAVE, bmi), END);
    // XSETBV switches it on.
    let enabled = vector(
        |state| state.xcr0 = 1,
        |asm| {
            asm.xor(ecx, ecx).unwrap();
            asm.xor(edx, edx).unwrap();
            asm.mov(eax, 7).unwrap();
            asm.xsetbv().unwrap();
            avx(asm);
        },
    );
    assert_eq!(enabled, END);
}

#[test]
fn units_that_cr0_and_cr4_switch_off_fault_as_the_manual_says() {
    const EM: u64 = 4;
    const TS: u64 = 8;
    type Write = fn(&mut CodeAssembler);
    let x87: Write = |asm| asm.fld1().unwrap();
    let mmx: Write = |asm| asm.paddb(mm1, mm2).unwrap();
    let sse: Write = |asm| asm.addps(xmm1, xmm2).unwrap();
    let avx: Write = |asm| asm.vaddps(xmm1, xmm2, xmm3).unwrap();
    let wait: Write = |asm| asm.wait().unwrap();
    let table: [(Write, u64, u64, u64); 4] = [
        // with TS, with EM, without OSFXSR
        (x87, NM, NM, END),
        (mmx, NM, UD, END),
        (sse, NM, UD, UD),
        (wait, NM, END, END),
    ];
    for (i, (write, ts, em, fxsr)) in table.into_iter().enumerate() {
        assert_eq!(vector(|_| {}, write), END, "{i}");
        assert_eq!(vector(|state| state.cr0 |= TS, write), ts, "{i}");
        assert_eq!(vector(|state| state.cr0 |= EM, write), em, "{i}");
        assert_eq!(vector(|state| state.cr4 &= !OSFXSR, write), fxsr, "{i}");
    }
    if has(Feature::Avx) {
        assert_eq!(vector(|state| state.cr0 |= TS, avx), NM);
    }
}

#[test]
fn code_that_ran_faults_once_its_unit_is_off_and_runs_again_when_it_is_on() {
    let state = run(
        |_| {},
        |asm| {
            let (mut again, mut off) = (asm.create_label(), asm.create_label());
            asm.mov(esi, 3).unwrap();
            asm.set_label(&mut again).unwrap();
            asm.addps(xmm1, xmm2).unwrap();
            asm.dec(esi).unwrap();
            asm.jz(off).unwrap();
            // CR0.TS on and off again
            asm.mov(rax, cr0).unwrap();
            asm.or(eax, 8).unwrap();
            asm.mov(cr0, rax).unwrap();
            asm.clts().unwrap();
            asm.jmp(again).unwrap();
            asm.set_label(&mut off).unwrap();
            asm.mov(rax, cr0).unwrap();
            asm.or(eax, 8).unwrap();
            asm.mov(cr0, rax).unwrap();
            asm.inc(esi).unwrap();
            asm.jmp(again).unwrap();
        },
    );
    assert_eq!((state.gpr[0], state.gpr[6]), (NM, 1));
}

#[test]
fn segment_bases_are_read_and_written_where_cr4_allows_it() {
    if !has(Feature::Fsgsbase) {
        return;
    }
    let state = run(
        |_| {},
        |asm| {
            asm.mov(rax, 0x7f12_3456_789a_u64).unwrap();
            asm.wrfsbase(rax).unwrap();
            asm.wrgsbase(eax).unwrap();
            asm.rdfsbase(rsi).unwrap();
            asm.rdgsbase(r15).unwrap();
            asm.rdfsbase(r14d).unwrap();
            asm.rdfsbase(edi).unwrap();
        },
    );
    assert_eq!(state.segments[VcpuState::FS].base, 0x7f12_3456_789a);
    let got = [6, 15, 14, 7].map(|n: usize| state.gpr[n]);
    assert_eq!(
        got,
        [0x7f12_3456_789a, 0x3456_789a, 0x3456_789a, 0x3456_789a]
    );
    let bad = |asm: &mut CodeAssembler| {
        asm.mov(rax, 1_u64 << 63).unwrap();
        asm.wrgsbase(rax).unwrap();
    };
    assert_eq!(vector(|_| {}, bad), GP);
    let read = |asm: &mut CodeAssembler| asm.rdgsbase(rax).unwrap();
    assert_eq!(vector(|state| state.cr4 &= !FSGSBASE, read), UD);
}

#[test]
fn rdtscp_and_rdpid_show_the_guests_tsc_aux() {
    let state = run(
        |state| {
            let aux = state
                .msrs
                .iter_mut()
                .find(|(index, _)| *index == 0xc000_0103);
            aux.unwrap().1 = 0x1234;
        },
        |asm| {
            asm.rdpid(rsi).unwrap();
            asm.rdpid(r15).unwrap();
            asm.rdtscp().unwrap();
        },
    );
    assert_eq!([6, 15, 1].map(|n: usize| state.gpr[n]), [0x1234; 3]);
    // With CR4.TSD, at CPL 0, they still execute.
    let tsd = vector(|state| state.cr4 |= 4, |asm| asm.rdtscp().unwrap());
    assert_eq!(tsd, END);
}

#[test]
fn the_clock_is_closed_to_programs_where_cr4_says_so() {
    for (tsd, wanted) in [(0, UD), (4, GP)] {
        for read in [
            (|asm| asm.rdtsc().unwrap()) as fn(&mut CodeAssembler),
            |asm| asm.rdtscp().unwrap(),
        ] {
            let (mut machine, _) = switched_on(CpuModel::V2);
            machine.map(CODE, CODE | 7);
            machine.enter_user();
            machine.change(|state| state.cr4 |= tsd);
            machine.code(|asm| {
                read(asm);
                asm.ud2().unwrap();
            });
            assert_eq!(u64::from(machine.run_to_exception().vector), wanted);
        }
    }
}

#[test]
fn masked_off_elements_do_not_fault_and_others_do() {
    if !has(Feature::Avx2) {
        return;
    }
    // Eight bytes before a page that is absent.
    let edge = DATA + 0x2ff8;
    let go = |selected: i32, write: fn(&mut CodeAssembler)| {
        let (mut machine, _) = switched_on(CpuModel::Host);
        machine.map(DATA + 0x3000, 0);
        machine.put_word(edge, 0x1111_2222_3333_4444);
        machine.code(|asm| {
            asm.mov(rbx, edge).unwrap();
            // The lowest `selected` dwords.
            asm.vpcmpeqd(ymm1, ymm1, ymm1).unwrap();
            asm.vpxor(xmm2, xmm2, xmm2).unwrap();
            asm.mov(eax, (1_u32 << selected) - 1).unwrap();
            for i in 0..4 {
                asm.bt(eax, i).unwrap();
                asm.sbb(ecx, ecx).unwrap();
                asm.vpinsrd(xmm2, xmm2, ecx, i).unwrap();
            }
            write(asm);
            asm.mov(eax, 0xffff).unwrap();
            asm.out(u32::from(STOP), al).unwrap();
            asm.hlt().unwrap();
        });
        let state = machine.run_to_stop();
        (state.gpr[0], state.cr2, machine.word(edge), state)
    };
    let load: fn(&mut CodeAssembler) = |asm| asm.vpmaskmovd(ymm3, ymm2, ptr(rbx)).unwrap();
    let store: fn(&mut CodeAssembler) = |asm| asm.vpmaskmovd(ptr(rbx), ymm2, ymm1).unwrap();
    let gather: fn(&mut CodeAssembler) = |asm| {
        asm.vpxor(xmm4, xmm4, xmm4).unwrap();
        asm.mov(ecx, 8).unwrap();
        asm.vpinsrd(xmm4, xmm4, ecx, 2).unwrap();
        let memory = MemoryOperand::with_base_index(R::RBX, R::XMM4);
        let code = Code::VEX_Vpgatherdd_xmm_vm32x_xmm;
        let gather = Instruction::with3(code, R::XMM5, memory, R::XMM2).unwrap();
        asm.add_instruction(gather).unwrap();
    };
    for write in [load, gather] {
        let (ended, ..) = go(2, write);
        assert_eq!(ended, END);
        let (ended, fault_at, ..) = go(3, write);
        assert_eq!((ended, fault_at), (14, DATA + 0x3000));
    }
    let (ended, _, stored, _) = go(1, store);
    assert_eq!((ended, stored), (END, 0x1111_2222_ffff_ffff));
    let (ended, fault_at, stored, _) = go(3, store);
    assert_eq!((ended, fault_at), (14, DATA + 0x3000));
    assert_eq!(
        stored, 0x1111_2222_3333_4444,
        "nothing is stored before a fault"
    );
}

#[test]
fn misaligned_operands_fault_only_where_the_instruction_says_aligned() {
    if !has(Feature::Avx) {
        return;
    }
    for at in [DATA + 16, DATA + 0xff0] {
        let aligned = vector(
            |state| state.gpr[3] = at,
            |asm| asm.vmovaps(ymm1, ptr(rbx)).unwrap(),
        );
        assert_eq!(aligned, GP, "{at:#x}");
        for write in [
            (|asm| asm.vmovups(ymm1, ptr(rbx + 1)).unwrap()) as fn(&mut CodeAssembler),
            |asm| asm.vaddps(ymm1, ymm1, ptr(rbx + 1)).unwrap(),
            |asm| asm.vaddps(xmm1, xmm1, ptr(rbx + 1)).unwrap(),
        ] {
            assert_eq!(vector(|state| state.gpr[3] = at, write), END, "{at:#x}");
        }
    }
}
