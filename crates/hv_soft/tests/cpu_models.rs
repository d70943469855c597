//! CPU models: what CPUID shows executes, what it hides does not; what CR0, CR4 and
//! XCR0 switch off; XSAVE and its relatives.

mod bare;

use bare::{CODE, DATA, Machine, STOP};
use hv::{Vcpu, VcpuState};
use hv_soft::{CpuModel, Options, host_features};
use iced_x86::code_asm::*;
use iced_x86::{
    Code, CpuidFeature, Encoder, Instruction, MemoryOperand, OpCodeOperandKind, OpKind,
    Register as R,
};
use x86::features::{Feature, Features};
use x86::xsave;

/// CR4.
const FSGSBASE: u64 = 1 << 16;
const OSXSAVE: u64 = 1 << 18;
const OSFXSR: u64 = 1 << 9;

fn machine(cpu_model: CpuModel) -> Machine {
    Machine::with(Options {
        cpu_model,
        ..Options::default()
    })
}

/// A machine with everything switched on that its model has.
fn switched_on(cpu_model: CpuModel) -> (Machine, Features) {
    let features = cpu_model.on(host_features()).unwrap();
    let mut machine = machine(cpu_model);
    machine.change(|state| switch_on(state, features));
    (machine, features)
}

fn switch_on(state: &mut VcpuState, features: Features) {
    if features.has(Feature::Xsave) {
        state.cr4 |= OSXSAVE;
    }
    if features.has(Feature::Fsgsbase) {
        state.cr4 |= FSGSBASE;
    }
    if features.has(Feature::Avx) {
        state.xcr0 = 7;
    }
}

fn models() -> Vec<CpuModel> {
    let host = host_features();
    CpuModel::ALL
        .into_iter()
        .filter(|model| model.on(host).is_ok())
        .collect()
}

/// The feature behind the decoder's name for it; nothing for what no model has.
fn feature(name: CpuidFeature) -> Option<Feature> {
    use CpuidFeature as C;
    Some(match name {
        C::FPU | C::FPU287 | C::FPU387 => Feature::Fpu,
        C::MMX => Feature::Mmx,
        C::SSE | C::SSE2 | C::FXSR | C::CLFSH => Feature::Sse,
        C::SSE3 => Feature::Sse3,
        C::SSSE3 => Feature::Ssse3,
        C::SSE4_1 => Feature::Sse41,
        C::SSE4_2 => Feature::Sse42,
        C::POPCNT => Feature::Popcnt,
        C::CMPXCHG16B => Feature::Cx16,
        C::CX8 | C::CMOV => Feature::Base,
        C::TSC => Feature::Tsc,
        C::AVX => Feature::Avx,
        C::AVX2 => Feature::Avx2,
        C::FMA => Feature::Fma,
        C::F16C => Feature::F16c,
        C::BMI1 => Feature::Bmi1,
        C::BMI2 => Feature::Bmi2,
        C::MOVBE => Feature::Movbe,
        C::ADX => Feature::Adx,
        C::RDRAND => Feature::Rdrand,
        C::RDSEED => Feature::Rdseed,
        C::AES => Feature::Aes,
        C::PCLMULQDQ => Feature::Pclmulqdq,
        C::SHA => Feature::Sha,
        C::RDTSCP => Feature::Rdtscp,
        C::RDPID => Feature::Rdpid,
        C::FSGSBASE => Feature::Fsgsbase,
        C::XSAVE => Feature::Xsave,
        C::XSAVEOPT => Feature::Xsaveopt,
        C::CLFLUSHOPT => Feature::Clflushopt,
        C::CLWB => Feature::Clwb,
        _ => return None,
    })
}

/// What is not for this test: the 8086 to the 486 and long mode have no bits, or are
/// another's to test; hidden hints do nothing, and F3 0F BC and BD are BSF and BSR.
fn beside_the_point(code: Code) -> bool {
    use CpuidFeature as C;
    let form = code.op_code();
    let hint = matches!(form.table(), iced_x86::OpCodeTableKind::T0F)
        && matches!(form.op_code() & 0xff, 0x0d | 0x18..=0x1f);
    !form.is_instruction()
        || !form.mode64()
        || code.is_privileged() && !matches!(code, Code::Xsetbv)
        || hint
        || without_meaning(code)
        || code.cpuid_features().iter().all(|name| {
            matches!(
                name,
                C::INTEL8086
                    | C::INTEL186
                    | C::INTEL286
                    | C::INTEL286_ONLY
                    | C::INTEL386
                    | C::INTEL386_ONLY
                    | C::INTEL486
                    | C::X64
                    | C::CPUID
                    | C::MSR
                    | C::PAUSE
                    | C::LZCNT
                    | C::MULTIBYTENOP
                    | C::SYSCALL
                    | C::SEP
                    | C::SMX
                    | C::VMX
                    | C::SVM
                    | C::PCOMMIT
            )
        })
        || code.cpuid_features() == [C::BMI1] && matches!(form.op_code(), 0xbc)
}

/// The 8087's and 287's own; the decoder knows them only if it is told to. CPUs since
/// do nothing. ENDBR is a hint.
fn without_meaning(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Fneni | Feni | Fndisi | Fdisi | Fnsetpm | Fsetpm | Endbr32 | Endbr64
    )
}

/// An instruction with this code whose memory operand is at RBX; nothing where an
/// operand is of a kind that only instructions beside the point have.
fn sample(code: Code) -> Option<Instruction> {
    use OpCodeOperandKind as K;
    let form = code.op_code();
    let mut ins = Instruction::default();
    ins.set_code(code);
    for k in 0..form.op_count() {
        let mut register = |register| {
            ins.set_op_kind(k, OpKind::Register);
            ins.set_op_register(k, register);
        };
        let n = k;
        match form.op_kind(k) {
            K::mem | K::mem_mib | K::sibmem => set_memory(&mut ins, k, R::None),
            K::mem_vsib32x | K::mem_vsib64x => set_memory(&mut ins, k, R::XMM5),
            K::mem_vsib32y | K::mem_vsib64y => set_memory(&mut ins, k, R::YMM5),
            K::mem_vsib32z | K::mem_vsib64z => set_memory(&mut ins, k, R::ZMM5),
            K::r8_or_mem | K::r8_reg | K::r8_opcode => register(R::CL + n),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => register(R::SI + n),
            K::r32_or_mem
            | K::r32_or_mem_mpx
            | K::r32_reg
            | K::r32_rm
            | K::r32_vvvv
            | K::r32_opcode => register(R::ESI + n),
            K::r64_or_mem
            | K::r64_or_mem_mpx
            | K::r64_reg
            | K::r64_rm
            | K::r64_vvvv
            | K::r64_opcode => register(R::RSI + n),
            K::mm_or_mem | K::mm_reg | K::mm_rm => register(R::MM1 + n),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                register(R::XMM1 + n);
            }
            K::xmmp3_vvvv => register(R::XMM4),
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                register(R::YMM1 + n);
            }
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => register(R::ZMM1 + n),
            K::zmmp3_vvvv => register(R::ZMM4),
            K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => register(R::K1 + n),
            K::kp1_reg => register(R::K2),
            K::bnd_or_mem_mpx | K::bnd_reg => register(R::BND0 + n),
            K::tmm_reg | K::tmm_rm | K::tmm_vvvv => register(R::TMM1 + n),
            K::st0 => register(R::ST0),
            K::sti_opcode => register(R::ST1),
            K::al => register(R::AL),
            K::cl => register(R::CL),
            K::ax => register(R::AX),
            K::eax => register(R::EAX),
            K::rax => register(R::RAX),
            K::dx => register(R::DX),
            K::imm8 | K::imm4_m2z | K::imm8_const_1 => ins.set_op_kind(k, OpKind::Immediate8),
            K::imm16 => ins.set_op_kind(k, OpKind::Immediate16),
            K::imm32 => ins.set_op_kind(k, OpKind::Immediate32),
            K::imm32sex64 => ins.set_op_kind(k, OpKind::Immediate32to64),
            K::seg_rDI => ins.set_op_kind(k, OpKind::MemorySegRDI),
            _ => return None,
        }
    }
    if form.can_use_op_mask_register() {
        ins.set_op_mask(R::K1);
    }
    Some(ins)
}

fn set_memory(ins: &mut Instruction, operand: u32, index: R) {
    ins.set_op_kind(operand, OpKind::Memory);
    ins.set_memory_base(R::RBX);
    ins.set_memory_index(index);
}

/// Runs one instruction at CPL 0, and gives the vector of the fault that it raised.
fn execute(machine: &mut Machine, at: u64, bytes: &[u8], features: Features) -> Option<u8> {
    machine.put(at, bytes);
    machine.put(at + bytes.len() as u64, &[0xe6, STOP, 0xf4]);
    let mut state = bare::state();
    switch_on(&mut state, features);
    state.rip = at;
    state.gpr = [0; 16];
    state.gpr[4] = bare::STACK;
    state.gpr[3] = DATA;
    state.gpr[7] = DATA;
    machine.vcpu.set_state(&state).unwrap();
    let state = machine.run_to_stop();
    let ended = state.rip == at + bytes.len() as u64 + 2;
    (!ended).then_some(state.gpr[0] as u8)
}

#[test]
fn what_cpuid_shows_executes_and_what_it_hides_is_undefined() {
    for model in models() {
        let (mut machine, features) = switched_on(model);
        let (mut shown, mut hidden, mut wrong) = (0, 0, Vec::new());
        let codes = Code::values().filter(|code| !beside_the_point(*code));
        for (code, at) in codes.zip((CODE..).step_by(32)) {
            let may = code
                .cpuid_features()
                .iter()
                .all(|name| feature(*name).is_some_and(|feature| features.has(feature)));
            let mut encoder = Encoder::new(64);
            let ins = sample(code);
            if ins.is_none_or(|ins| encoder.encode(&ins, at).is_err()) {
                // Of what no model has, a few cannot be made here.
                if may {
                    wrong.push(format!("{code:?}: no sample"));
                }
                continue;
            }
            let vector = execute(&mut machine, at, &encoder.take_buffer(), features);
            if may == (vector == Some(6)) {
                wrong.push(format!("{code:?}: {vector:?}"));
            }
            *(if may { &mut shown } else { &mut hidden }) += 1;
        }
        println!("{}: {shown} codes execute, {hidden} do not", model.name());
        assert!(wrong.is_empty(), "{}: {wrong:#?}", model.name());
        assert!(shown > 600 && hidden > 1000);
    }
}

#[test]
fn cpuid_shows_what_the_model_has_and_cr4_in_osxsave() {
    for model in models() {
        let (mut machine, features) = switched_on(model);
        for leaf in [1_u32, 7, 0x8000_0001] {
            machine.code(|asm| {
                asm.mov(eax, leaf).unwrap();
                asm.xor(ecx, ecx).unwrap();
                asm.cpuid().unwrap();
                asm.out(u32::from(STOP), al).unwrap();
                asm.hlt().unwrap();
            });
            machine.change(|state| state.rip = CODE);
            let state = machine.run_to_stop();
            let got = [0, 3, 1, 2].map(|n: usize| state.gpr[n] as u32);
            for feature in Feature::ALL {
                let Some(place) = feature.place().filter(|place| place.leaf == leaf) else {
                    continue;
                };
                let shown = got[place.register] >> place.bit & 1 != 0;
                assert_eq!(shown, features.has(*feature), "{feature:?} of {model:?}");
            }
            if leaf == 1 {
                assert_eq!(got[2] >> 27 & 1 != 0, features.has(Feature::Xsave));
            }
        }
    }
}

/// Runs what `write` writes in a machine of this host's model, to its end or a fault.
fn run(change: impl Fn(&mut VcpuState), write: impl FnOnce(&mut CodeAssembler)) -> VcpuState {
    let (mut machine, _) = switched_on(CpuModel::Host);
    machine.change(change);
    machine.code(|asm| {
        write(asm);
        asm.mov(eax, 0xffff).unwrap();
        asm.out(u32::from(STOP), al).unwrap();
        asm.hlt().unwrap();
    });
    machine.run_to_stop()
}

/// The vector of the fault that `write`'s code ends by; 0xffff at its end.
fn vector(change: impl Fn(&mut VcpuState), write: impl FnOnce(&mut CodeAssembler)) -> u64 {
    run(change, write).gpr[0]
}

const END: u64 = 0xffff;
const UD: u64 = 6;
const NM: u64 = 7;
const GP: u64 = 13;

fn has(feature: Feature) -> bool {
    CpuModel::Host.on(host_features()).unwrap().has(feature)
}

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

#[test]
fn a_state_with_what_the_model_lacks_is_refused() {
    let mut machine = machine(CpuModel::V2);
    let mut state = machine.vcpu.state().unwrap();
    state.xcr0 = 7;
    assert!(machine.vcpu.set_state(&state).is_err());
    state.xcr0 = 1;
    state.cr4 |= OSXSAVE;
    assert!(machine.vcpu.set_state(&state).is_err());
    state.cr4 &= !OSXSAVE;
    state.xsave.truncate(512);
    assert!(machine.vcpu.set_state(&state).is_err());
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
