//! Single steps, breakpoints and watchpoints, alignment checks: what a debugger in the
//! guest relies on.

mod bare;

use bare::{CODE, DATA, KERNEL_STACK, Machine, SAY, STACK, STOP};
use hv::Vcpu;
use iced_x86::code_asm::*;

const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;
const AC: u64 = 1 << 18;
const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;
/// What DR6 is when nothing happened.
const QUIET: u64 = 0xffff_0ff0;
const LOG: u64 = DATA + 0x1_0000;
/// Linear address of the word with the place where the next entry of the log goes.
const NEXT: u64 = DATA + 0x2_0000;

/// A handler of #DB that logs RIP, DR6 and RFLAGS, and goes on; `rf` sets RF in the
/// frame.
fn log_steps(machine: &mut Machine, rf: bool) {
    machine.put_word(NEXT, LOG);
    machine.set_gate(1, CODE + 0x4000);
    machine.code_at(CODE + 0x4000, |asm| {
        asm.push(rax).unwrap();
        asm.push(rbx).unwrap();
        asm.mov(rbx, qword_ptr(NEXT)).unwrap();
        asm.mov(rax, qword_ptr(rsp + 16)).unwrap();
        asm.mov(qword_ptr(rbx), rax).unwrap();
        asm.mov(rax, dr6).unwrap();
        asm.mov(qword_ptr(rbx + 8), rax).unwrap();
        asm.mov(rax, qword_ptr(rsp + 32)).unwrap();
        asm.mov(qword_ptr(rbx + 16), rax).unwrap();
        asm.add(qword_ptr(NEXT), 24).unwrap();
        asm.mov(rax, QUIET).unwrap();
        asm.mov(dr6, rax).unwrap();
        if rf {
            asm.or(dword_ptr(rsp + 32), RF as i32).unwrap();
        }
        asm.pop(rbx).unwrap();
        asm.pop(rax).unwrap();
        asm.iretq().unwrap();
    });
}

/// (RIP, DR6 without what is always set, RF) of each #DB.
fn log(machine: &Machine) -> Vec<(u64, u64, bool)> {
    let end = machine.word(NEXT);
    let entries = (LOG..end).step_by(24);
    let entry = |at| {
        (
            machine.word(at),
            machine.word(at + 8) & !QUIET,
            machine.word(at + 16) & RF != 0,
        )
    };
    entries.map(entry).collect()
}

fn rips(machine: &Machine) -> Vec<u64> {
    log(machine).iter().map(|(rip, ..)| rip - CODE).collect()
}

fn set_tf(asm: &mut CodeAssembler) {
    asm.pushfq().unwrap();
    asm.or(dword_ptr(rsp), TF as i32).unwrap();
    asm.popfq().unwrap();
}

fn clear_tf(asm: &mut CodeAssembler) {
    asm.pushfq().unwrap();
    asm.and(dword_ptr(rsp), !(TF as i32)).unwrap();
    asm.popfq().unwrap();
}

/// Where the code that `write` adds would go on.
fn here(asm: &mut CodeAssembler) -> u64 {
    asm.assemble(CODE).unwrap().len() as u64
}

#[test]
fn every_instruction_traps_once_with_tf() {
    let mut machine = Machine::new();
    log_steps(&mut machine, false);
    let mut wanted = vec![];
    machine.put_word(DATA, 5);
    machine.code(|asm| {
        let mut over = asm.create_label();
        set_tf(asm);
        asm.nop().unwrap();
        wanted.push(here(asm));
        asm.add(dword_ptr(DATA), 3).unwrap();
        wanted.push(here(asm));
        asm.cmp(dword_ptr(DATA), 8).unwrap();
        wanted.push(here(asm));
        let compared = here(asm);
        asm.jne(over).unwrap();
        asm.push(rax).unwrap();
        asm.pop(rcx).unwrap();
        // Behind JNE, PUSH and POP.
        wanted.extend([compared + 2, compared + 3, compared + 4]);
        asm.je(over).unwrap();
        asm.ud2().unwrap();
        asm.set_label(&mut over).unwrap();
        asm.nop().unwrap();
        let at = here(asm);
        wanted.push(at - 1);
        wanted.push(at);
        asm.xlatb().unwrap();
        wanted.push(here(asm));
        // Those of `clear_tf`: PUSHFQ, AND, and POPFQ, which still traps.
        let before = here(asm);
        clear_tf(asm);
        wanted.push(before + 1);
        wanted.push(here(asm) - 1);
        wanted.push(here(asm));
        asm.nop().unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.change(|state| state.gpr[3] = DATA + 0x1000);
    machine.run_to_stop();
    assert_eq!(rips(&machine), wanted);
    assert!(log(&machine).iter().all(|(_, why, rf)| *why == BS && !rf));
    assert_eq!(machine.word(DATA), 8);
}

#[test]
fn a_repeated_string_instruction_traps_behind_each_element() {
    let mut machine = Machine::new();
    log_steps(&mut machine, false);
    let (mut movs, mut next) = (0, 0);
    machine.put(DATA, b"abc");
    machine.code(|asm| {
        asm.mov(esi, DATA as u32).unwrap();
        asm.mov(edi, DATA as u32 + 64).unwrap();
        asm.mov(ecx, 3).unwrap();
        set_tf(asm);
        movs = here(asm);
        asm.rep().movsb().unwrap();
        next = here(asm);
        clear_tf(asm);
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    let log = log(&machine);
    assert_eq!(rips(&machine)[..4], [movs, movs, next, next + 1]);
    // Within the instruction RF is set, behind it not.
    assert!(log[0].2 && log[1].2 && !log[2].2);
    assert_eq!(machine.word(DATA + 64) & 0xff_ffff, 0x63_6261);
}

#[test]
fn a_load_of_ss_holds_the_trap_back_and_sti_does_not() {
    let mut machine = Machine::new();
    log_steps(&mut machine, false);
    let mut wanted = vec![];
    machine.code(|asm| {
        asm.mov(eax, 0x18).unwrap();
        set_tf(asm);
        asm.mov(ss, eax).unwrap();
        asm.mov(rsp, rsp).unwrap();
        wanted.push(here(asm));
        asm.sti().unwrap();
        wanted.push(here(asm));
        asm.cli().unwrap();
        wanted.push(here(asm));
        clear_tf(asm);
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    assert_eq!(rips(&machine)[..3], wanted[..]);
}

#[test]
fn a_handler_runs_without_tf_and_its_return_steps_on() {
    let mut machine = Machine::new();
    log_steps(&mut machine, false);
    machine.set_gate(0x80, CODE + 0x2000);
    machine.code_at(CODE + 0x2000, |asm| {
        asm.inc(edx).unwrap();
        asm.iretq().unwrap();
    });
    let mut wanted = vec![];
    machine.code(|asm| {
        set_tf(asm);
        asm.int(0x80).unwrap();
        // TF comes back with IRETQ, and traps behind the instruction that follows.
        asm.nop().unwrap();
        wanted.push(here(asm));
        clear_tf(asm);
        asm.out(i32::from(STOP), al).unwrap();
    });
    let state = machine.run_to_stop();
    assert_eq!((rips(&machine)[0], state.gpr[2]), (wanted[0], 1));
}

#[test]
fn a_fault_of_a_stepped_instruction_is_but_a_fault() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        set_tf(asm);
        asm.ud2().unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!(exception.vector, 6);
    let flags = machine.word(exception.state.gpr[4] + 16);
    assert_eq!(flags & (TF | RF), TF | RF);
    assert_eq!(exception.state.debug[4], QUIET);
}

#[test]
fn syscall_masks_tf_before_it_would_trap_and_sysret_traps_at_its_target() {
    let mut machine = Machine::new();
    machine.map(CODE, CODE | 7);
    machine.change(|state| {
        state.efer |= 1;
        state.msrs.extend([
            (0xc000_0081, 0x1b_0010 << 32),
            (0xc000_0082, CODE + 0x800),
            (0xc000_0084, TF),
        ]);
        state.msrs.sort_unstable();
        state.rflags |= TF;
    });
    machine.put_word(0x6000 + 0x20, 0x00cf_f300_0000_ffff);
    machine.enter_user();
    log_steps(&mut machine, false);
    machine.put(CODE, &[0x0f, 0x05, 0x90, 0x0f, 0x0b]); // syscall; nop; ud2
    machine.code_at(CODE + 0x800, |asm| {
        asm.inc(edx).unwrap();
        asm.sysretq().unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (6, CODE + 3));
    // Behind SYSRET and behind NOP; UD2 faults.
    assert_eq!(rips(&machine), [2, 3]);
    assert_eq!(exception.state.gpr[2], 1);
}

/// DR7 for one breakpoint in DR0.
fn enabled(kind: u64, len: u64) -> u64 {
    0x400 | 2 | kind << 16 | len << 18
}

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;
const ACCESS: u64 = 3;
const BYTE: u64 = 0;
const FOUR: u64 = 3;
const EIGHT: u64 = 2;

fn set_breakpoint(asm: &mut CodeAssembler, at: u64, control: u64) {
    asm.mov(rax, at).unwrap();
    asm.mov(dr0, rax).unwrap();
    asm.mov(rax, control).unwrap();
    asm.mov(dr7, rax).unwrap();
}

#[test]
fn a_breakpoint_stops_before_its_instruction_however_it_is_reached() {
    let mut machine = Machine::new();
    log_steps(&mut machine, true);
    let body = CODE + 0x200;
    // Warm before it is set: linked, and in the jump cache.
    machine.code_at(body, |asm| {
        let mut again = asm.create_label();
        asm.mov(ecx, 3).unwrap(); // 5 bytes
        asm.set_label(&mut again).unwrap();
        asm.inc(edx).unwrap();
        asm.dec(ecx).unwrap();
        asm.jne(again).unwrap();
        asm.ret().unwrap();
    });
    machine.code(|asm| {
        asm.xor(edx, edx).unwrap();
        asm.mov(rbx, body).unwrap();
        asm.mov(rsi, body + 5).unwrap();
        asm.mov(ecx, 1).unwrap();
        asm.call(body).unwrap();
        asm.call(rbx).unwrap();
        asm.mov(ecx, 1).unwrap();
        asm.call(rsi).unwrap();
        set_breakpoint(asm, body + 5, enabled(EXECUTE, 0));
        asm.call(body).unwrap();
        asm.call(rbx).unwrap();
        asm.mov(ecx, 1).unwrap();
        asm.call(rsi).unwrap();
        // Off, and the code runs as before; on again.
        set_breakpoint(asm, body + 5, 0x400);
        asm.call(body).unwrap();
        set_breakpoint(asm, body + 5, enabled(EXECUTE, 0));
        asm.mov(ecx, 1).unwrap();
        asm.call(rsi).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    let state = machine.run_to_stop();
    assert_eq!(state.gpr[2], 7 + 7 + 3 + 1);
    assert_eq!(log(&machine), vec![(body + 5, 1, false); 8]);
}

#[test]
fn watchpoints_trap_behind_the_access_and_only_at_their_bytes() {
    let mut machine = Machine::new();
    log_steps(&mut machine, false);
    let at = DATA + 0x100;
    let (mut hits, mut next) = (vec![], 0);
    machine.code(|asm| {
        asm.mov(esi, at as u32).unwrap();
        asm.mov(dword_ptr(rsi), 1).unwrap();
        set_breakpoint(asm, at, enabled(WRITE, FOUR));
        let mut hit = |asm: &mut CodeAssembler| hits.push(here(asm));
        asm.mov(dword_ptr(rsi - 4), 1).unwrap();
        asm.mov(dword_ptr(rsi + 4), 1).unwrap();
        asm.mov(eax, dword_ptr(rsi)).unwrap();
        asm.mov(dword_ptr(rsi), 2).unwrap();
        hit(asm);
        asm.mov(byte_ptr(rsi + 3), 2).unwrap();
        hit(asm);
        asm.mov(qword_ptr(rsi - 7), 3).unwrap();
        hit(asm);
        asm.lock().add(dword_ptr(rsi), 2).unwrap();
        hit(asm);
        asm.movups(xmmword_ptr(rsi - 12), xmm0).unwrap();
        hit(asm);
        asm.lea(rdi, ptr(rsi - 2)).unwrap();
        asm.stosq().unwrap();
        hit(asm);
        asm.mov(rsp, rsi).unwrap();
        asm.add(rsp, 8).unwrap();
        asm.push(rax).unwrap();
        hit(asm);
        asm.mov(rsp, STACK).unwrap();
        asm.xchg(dword_ptr(rsi), eax).unwrap();
        hit(asm);
        set_breakpoint(asm, at, enabled(ACCESS, BYTE));
        asm.mov(eax, dword_ptr(rsi)).unwrap();
        hit(asm);
        asm.mov(al, byte_ptr(rsi + 1)).unwrap();
        asm.cmp(dword_ptr(rsi - 3), eax).unwrap();
        hit(asm);
        set_breakpoint(asm, at, 0x400);
        asm.mov(dword_ptr(rsi), 2).unwrap();
        next = here(asm);
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    assert_eq!(rips(&machine), hits);
    assert!(log(&machine).iter().all(|(_, why, rf)| *why == 1 && !rf));
    assert!(next > 0);
}

#[test]
fn a_repeated_move_stops_behind_the_element_that_is_watched() {
    let mut machine = Machine::new();
    log_steps(&mut machine, false);
    let (mut movs, mut counts) = (0, vec![]);
    machine.code(|asm| {
        asm.mov(edi, DATA as u32).unwrap();
        asm.mov(ecx, 64).unwrap();
        set_breakpoint(asm, DATA + 16, enabled(WRITE, EIGHT));
        movs = here(asm);
        asm.rep().stosd().unwrap();
        counts.push(here(asm));
        asm.out(i32::from(STOP), al).unwrap();
    });
    let state = machine.run_to_stop();
    assert_eq!((state.gpr[1], state.gpr[7]), (0, DATA + 256));
    assert_eq!(rips(&machine), [movs, movs]);
    assert!(log(&machine).iter().all(|(_, _, rf)| *rf));
}

#[test]
fn port_breakpoints_need_cr4_de() {
    for de in [0, 8] {
        let mut machine = Machine::new();
        log_steps(&mut machine, false);
        machine.change(|state| state.cr4 |= de);
        machine.code(|asm| {
            set_breakpoint(asm, u64::from(SAY), enabled(PORT, BYTE));
            asm.out(i32::from(SAY), al).unwrap();
            asm.out(i32::from(STOP), al).unwrap();
        });
        machine.run_to_stop();
        assert_eq!(log(&machine).len(), usize::from(de != 0));
    }
}

#[test]
fn debug_registers_keep_their_rules() {
    let run = |de: u64, gd: bool, write: fn(&mut CodeAssembler)| {
        let mut machine = Machine::new();
        machine.change(|state| {
            state.cr4 |= de;
            state.debug[5] |= if gd { 1 << 13 } else { 0 };
        });
        machine.code(|asm| {
            write(asm);
            asm.ud2().unwrap();
        });
        machine.run_to_exception()
    };
    let at = |exception: &bare::Exception| (exception.vector, exception.rip == CODE);
    // DR4 and DR5 are DR6 and DR7, or nothing.
    let fours: fn(&mut CodeAssembler) = |asm| asm.mov(rbx, dr4).unwrap();
    let exception = run(0, false, fours);
    assert_eq!((exception.vector, exception.state.gpr[3]), (6, QUIET));
    assert_eq!(at(&run(0, false, fours)), (6, false));
    assert_eq!(at(&run(8, false, fours)), (6, true));
    // General detect: a fault, which clears DR7.GD.
    let exception = run(0, true, |asm| asm.mov(rbx, dr0).unwrap());
    assert_eq!(at(&exception), (1, true));
    assert_eq!(exception.state.debug[4], QUIET | BD);
    assert_eq!(exception.state.debug[5], 0x400);
    // Upper halves.
    for write in [
        (|asm: &mut CodeAssembler| {
            asm.mov(rax, 1_u64 << 32).unwrap();
            asm.mov(dr6, rax).unwrap();
        }) as fn(&mut CodeAssembler),
        |asm| {
            asm.mov(rax, 1_u64 << 32).unwrap();
            asm.mov(dr7, rax).unwrap();
        },
    ] {
        let exception = run(0, false, write);
        assert_eq!((exception.vector, exception.code), (13, Some(0)));
    }
    // Reserved bits read as they must.
    let exception = run(0, false, |asm| {
        asm.mov(eax, u32::MAX).unwrap();
        asm.mov(dr6, rax).unwrap();
        asm.mov(rbx, dr6).unwrap();
        asm.mov(eax, 0xdc00).unwrap();
        asm.mov(dr7, rax).unwrap();
        asm.mov(rcx, dr7).unwrap();
    });
    assert_eq!(exception.state.gpr[3], 0xffff_efff);
    assert_eq!(exception.state.gpr[1], 0x400);
}

#[test]
fn alignment_is_checked_at_cpl_3_as_cpus_do() {
    // What a CPU of the host's kind raised when it was asked.
    let cases: [(&[u8], u64, Option<u8>); 17] = [
        (&[0x8b, 0x06], 1, Some(17)), // mov eax, [rsi]
        (&[0x8b, 0x06], 4, None),
        (&[0x66, 0x8b, 0x06], 1, Some(17)),       // mov ax, [rsi]
        (&[0x48, 0x8b, 0x06], 4, Some(17)),       // mov rax, [rsi]
        (&[0x48, 0x89, 0x06], 4, Some(17)),       // mov [rsi], rax
        (&[0x8a, 0x06], 1, None),                 // mov al, [rsi]
        (&[0x0f, 0x10, 0x06], 1, None),           // movups xmm0, [rsi]
        (&[0x0f, 0x28, 0x06], 8, Some(13)),       // movaps xmm0, [rsi]
        (&[0xf3, 0x0f, 0x10, 0x06], 2, Some(17)), // movss xmm0, [rsi]
        (&[0xf2, 0x0f, 0x10, 0x06], 4, Some(17)), // movsd xmm0, [rsi]
        (&[0xdd, 0x06], 4, Some(17)),             // fld qword [rsi]
        (&[0xdb, 0x2e], 4, Some(17)),             // fld tbyte [rsi]
        (&[0xdb, 0x2e], 8, None),
        (&[0x0f, 0xae, 0x06], 2, Some(17)), // fxsave [rsi]
        (&[0x0f, 0xae, 0x06], 8, Some(13)),
        (&[0xf0, 0x0f, 0xc1, 0x06], 1, Some(17)), // lock xadd [rsi], eax
        (&[0xf3, 0x48, 0xa5], 1, None),           // rep movsq of nothing
    ];
    for (bytes, offset, vector) in cases {
        let mut machine = Machine::new();
        machine.map(CODE, CODE | 7);
        machine.map(DATA, DATA | 7);
        machine.put(CODE, bytes);
        machine.put(CODE + bytes.len() as u64, &[0x0f, 0x0b]);
        machine.change(|state| {
            state.cr0 |= 1 << 18;
            state.rflags |= AC;
            state.gpr[6] = DATA + offset;
        });
        machine.enter_user();
        let exception = machine.run_to_exception();
        let wanted = match vector {
            Some(17) => (17, Some(0), CODE),
            Some(vector) => (vector, Some(0), CODE),
            None => (6, None, CODE + bytes.len() as u64),
        };
        let got = (exception.vector, exception.code, exception.rip);
        assert_eq!(got, wanted, "{bytes:x?} at {offset}");
        assert_eq!(exception.state.gpr[4] & !0xff, KERNEL_STACK - 0x100);
    }
    // Before a page fault; not without CR0.AM; not in the kernel.
    for (am, user, vector) in [(1 << 18, true, 17), (0, true, 14), (1 << 18, false, 14)] {
        let mut machine = Machine::new();
        machine.map(CODE, CODE | if user { 7 } else { 3 });
        machine.put(CODE, &[0x8b, 0x06]);
        machine.change(|state| {
            state.cr0 |= am;
            state.rflags |= AC;
            state.gpr[6] = bare::UNMAPPED + 1;
        });
        if user {
            machine.enter_user();
        }
        assert_eq!(machine.run_to_exception().vector, vector);
    }
    assert!(Machine::new().vcpu.state().is_ok());
}
