//! The state of x87, SSE and AVX in memory: XSAVE and its relatives, FNSAVE, and what
//! a vCPU's own state carries of it.

mod bare;
mod models;

use bare::{DATA, Machine, STOP};
use hv::VcpuState;
use hv_soft::CpuModel;
use iced_x86::code_asm::*;
use models::{END, GP, OSXSAVE, UD, has, run, switched_on, vector};
use x86::features::Feature;
use x86::xsave;

/// Bytes of a state's upper halves.
fn upper(state: &VcpuState) -> Option<&[u8]> {
    let there = u64::from(state.xsave[xsave::XSTATE_BV]) & xsave::AVX != 0;
    there.then(|| &state.xsave[xsave::YMM_HIGH])
}

#[test]
fn upper_halves_survive_exits_and_the_state_carries_them() {
    if !has(Feature::Avx2) {
        return;
    }
    let state = run(
        |_| {},
        |asm| {
            asm.vpcmpeqd(ymm15, ymm15, ymm15).unwrap();
            asm.vpsrld(ymm3, ymm15, 8).unwrap();
            // Leaves translated code.
            asm.xor(eax, eax).unwrap();
            asm.cpuid().unwrap();
            asm.vpaddd(ymm3, ymm3, ymm15).unwrap();
        },
    );
    let halves = upper(&state).unwrap().to_vec();
    assert_eq!(halves[3 * 16..4 * 16], [0xfe, 0xff, 0xff, 0].repeat(4));
    assert_eq!(halves[15 * 16..], [0xff; 16]);
    // What is loaded comes back, and is gone after VZEROUPPER.
    let kept = run(
        |now| now.xsave.clone_from(&state.xsave),
        |asm| asm.nop().unwrap(),
    );
    assert_eq!(kept.xsave, state.xsave);
    let zeroed = run(
        |now| now.xsave.clone_from(&state.xsave),
        |asm| asm.vzeroupper().unwrap(),
    );
    assert_eq!(upper(&zeroed), None);
    assert_eq!(zeroed.xsave[xsave::XMM], state.xsave[xsave::XMM]);
}

/// Sets EDX:EAX to the components.
fn components(asm: &mut CodeAssembler, mask: u32) {
    asm.mov(eax, mask).unwrap();
    asm.xor(edx, edx).unwrap();
}

const AREA: u64 = DATA + 0x1000;

fn area(machine: &Machine) -> Vec<u8> {
    let words = (0..xsave::AVX_BYTES as u64 / 8).map(|i| machine.word(AREA + 8 * i));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Runs code with the area's address in RBX, and gives the area and the state.
fn with_area(before: &[u8], write: impl FnOnce(&mut CodeAssembler)) -> (Vec<u8>, VcpuState) {
    let (mut machine, _) = switched_on(CpuModel::Host);
    machine.put(AREA, before);
    machine.code(|asm| {
        asm.mov(rbx, AREA).unwrap();
        write(asm);
        asm.mov(eax, 0xffff).unwrap();
        asm.out(u32::from(STOP), al).unwrap();
        asm.hlt().unwrap();
    });
    let state = machine.run_to_stop();
    (area(&machine), state)
}

#[test]
fn xsave_writes_what_is_asked_and_nothing_beside_it() {
    if !has(Feature::Avx2) {
        return;
    }
    let fill = |asm: &mut CodeAssembler| {
        asm.vpcmpeqd(ymm2, ymm2, ymm2).unwrap();
        asm.fld1().unwrap();
    };
    let (area, _) = with_area(&[0xaa; xsave::AVX_BYTES], |asm| {
        fill(asm);
        components(asm, 6);
        asm.xsave64(ptr(rbx)).unwrap();
    });
    // x87's part is as it was, and so is its bit.
    assert_eq!(area[..xsave::MXCSR], [0xaa; xsave::MXCSR]);
    assert_eq!(area[xsave::X87_REGISTERS], [0xaa; 128]);
    assert_eq!(area[xsave::MXCSR..][..4], [0x80, 0x1f, 0, 0]);
    assert_eq!(area[xsave::XMM.start + 32..][..16], [0xff; 16]);
    assert_eq!(area[xsave::YMM_HIGH.start + 32..][..16], [0xff; 16]);
    assert_eq!(area[xsave::XSTATE_BV], 0xaa & !7 | 6);
    assert_eq!(area[xsave::XSTATE_BV + 1..576], [0xaa; 63]);
    // Everything, and loaded again.
    let (area, saved) = with_area(&[0; xsave::AVX_BYTES], |asm| {
        fill(asm);
        components(asm, 7);
        asm.xsave(ptr(rbx)).unwrap();
        asm.vzeroall().unwrap();
        asm.fninit().unwrap();
        components(asm, 7);
        asm.xrstor(ptr(rbx)).unwrap();
    });
    assert_eq!(area[xsave::XSTATE_BV], 7);
    assert_eq!(area[40..42], [0xff, 0x3f], "1.0 in ST(0)");
    assert_eq!(
        saved.xsave[xsave::X87_REGISTERS],
        area[xsave::X87_REGISTERS]
    );
    assert_eq!(upper(&saved).unwrap(), &area[xsave::YMM_HIGH]);
}

#[test]
fn xsaveopt_leaves_out_what_is_not_in_use() {
    if !has(Feature::Xsaveopt) || !has(Feature::Avx) {
        return;
    }
    let (area, _) = with_area(&[0xaa; xsave::AVX_BYTES], |asm| {
        components(asm, 7);
        asm.xsaveopt(ptr(rbx)).unwrap();
    });
    assert_eq!(area[xsave::XSTATE_BV], 0xaa & !7 | 3);
    assert_eq!(area[xsave::YMM_HIGH], [0xaa; 256]);
    let (area, _) = with_area(&[0xaa; xsave::AVX_BYTES], |asm| {
        components(asm, 7);
        asm.xsave(ptr(rbx)).unwrap();
    });
    assert_eq!(area[xsave::XSTATE_BV], 0xaa & !7 | 3);
    assert_eq!(
        area[xsave::YMM_HIGH],
        [0; 256],
        "XSAVE writes it all the same"
    );
}

#[test]
fn xrstor_initializes_what_the_area_does_not_hold() {
    if !has(Feature::Avx2) {
        return;
    }
    let mut before = vec![0xbb; xsave::AVX_BYTES];
    before[xsave::XSTATE_BV..xsave::XSTATE_BV + 24].fill(0);
    before[xsave::MXCSR..xsave::MXCSR + 4].copy_from_slice(&0x3f80_u32.to_le_bytes());
    let (_, state) = with_area(&before, |asm| {
        asm.vpcmpeqd(ymm2, ymm2, ymm2).unwrap();
        asm.fld1().unwrap();
        components(asm, 7);
        asm.xrstor(ptr(rbx)).unwrap();
    });
    assert_eq!(upper(&state), None);
    assert_eq!(state.xsave[xsave::XMM], [0; 256]);
    assert_eq!(state.xsave[..5], [0x7f, 3, 0, 0, 0]);
    // MXCSR comes from memory whatever XSTATE_BV says.
    assert_eq!(state.xsave[xsave::MXCSR..][..4], [0x80, 0x3f, 0, 0]);
}

#[test]
fn xrstor_and_xsave_refuse_what_the_manual_says() {
    if !has(Feature::Avx) {
        return;
    }
    let refused = |offset: usize, value: u8, displacement: u64, write: fn(&mut CodeAssembler)| {
        let mut before = vec![0; xsave::AVX_BYTES];
        before[offset] = value;
        let (_, state) = with_area(&before, |asm| {
            asm.add(rbx, displacement as i32).unwrap();
            components(asm, 7);
            write(asm);
        });
        state.gpr[0]
    };
    let restore: fn(&mut CodeAssembler) = |asm| asm.xrstor(ptr(rbx)).unwrap();
    let save: fn(&mut CodeAssembler) = |asm| asm.xsave(ptr(rbx)).unwrap();
    assert_eq!(refused(0, 0, 0, restore), END);
    assert_eq!(refused(0, 0, 16, restore), GP, "alignment");
    assert_eq!(refused(0, 0, 16, save), GP, "alignment");
    assert_eq!(refused(xsave::XSTATE_BV, 8, 0, restore), GP, "component 3");
    assert_eq!(
        refused(xsave::XSTATE_BV + 15, 0x80, 0, restore),
        GP,
        "compact"
    );
    assert_eq!(
        refused(xsave::XSTATE_BV + 16, 1, 0, restore),
        GP,
        "reserved"
    );
    assert_eq!(
        refused(xsave::XSTATE_BV + 24, 1, 0, restore),
        END,
        "not checked"
    );
    assert_eq!(refused(xsave::MXCSR + 2, 1, 0, restore), GP, "MXCSR");
    let off = vector(|state| state.cr4 &= !OSXSAVE, |asm| asm.xgetbv().unwrap());
    assert_eq!(off, UD);
    for (ecx_value, eax_value) in [(0, 0), (0, 5), (0, 15), (1, 7)] {
        let refused = vector(
            |_| {},
            |asm| {
                asm.mov(ecx, ecx_value).unwrap();
                components(asm, eax_value);
                asm.xsetbv().unwrap();
            },
        );
        assert_eq!(refused, GP, "XCR{ecx_value} = {eax_value}");
    }
}

#[test]
fn xgetbv_tells_what_is_enabled_and_what_is_in_use() {
    if !has(Feature::Avx) || !has(Feature::Xgetbv1) {
        return;
    }
    let state = run(
        |_| {},
        |asm| {
            for (register, dirty) in [(rsi, false), (rdi, true)] {
                if dirty {
                    asm.vcmpps(ymm1, ymm1, ymm1, 15).unwrap();
                }
                asm.mov(ecx, 1).unwrap();
                asm.xgetbv().unwrap();
                asm.mov(register, rax).unwrap();
            }
            asm.xor(ecx, ecx).unwrap();
            asm.xgetbv().unwrap();
            asm.mov(rbp, rax).unwrap();
        },
    );
    assert_eq!((state.gpr[6], state.gpr[7], state.gpr[5]), (3, 7, 7));
}

#[test]
fn the_x87_environment_goes_to_memory_and_back() {
    let (area, state) = with_area(&[0; 512], |asm| {
        asm.fldpi().unwrap();
        asm.fldz().unwrap();
        asm.fnstenv(ptr(rbx)).unwrap();
        // All exceptions are masked now.
        asm.fnstcw(ptr(rbx + 32)).unwrap();
        asm.fnsave(ptr(rbx + 64)).unwrap();
        asm.fnstsw(ax).unwrap();
        asm.mov(rsi, rax).unwrap();
        asm.frstor(ptr(rbx + 64)).unwrap();
        asm.fnstsw(ax).unwrap();
        asm.mov(rdi, rax).unwrap();
        asm.fldenv(ptr(rbx)).unwrap();
        asm.fstp(st1).unwrap();
        asm.fstp(tbyte_ptr(rbx + 256)).unwrap();
    });
    // TOP is 6; registers 6 and 7 hold zero and pi.
    assert_eq!(area[..2], [0x7f, 3]);
    assert_eq!(area[4..6], [0, 0x30]);
    assert_eq!(area[8..10], [0xff, 0x1f]);
    assert_eq!(area[64 + 28..][..10], [0; 10]);
    assert_eq!(area[64 + 28 + 18..][..2], [0, 0x40]);
    assert_eq!((state.gpr[6] & 0xffff, state.gpr[7] & 0x3800), (0, 0x3000));
    assert_eq!(area[256..266], [0; 10], "zero was on top");
}
