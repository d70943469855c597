//! Privilege, descriptors, gates, stacks and registers of the system: every refusal
//! with its vector and error code.

mod bare;

use bare::{CODE, DATA, GDT, KERNEL_STACK, Machine, STACK, STOP, TSS, USER_CODE, USER_DATA};
use hv::{Exit, VcpuState};
use iced_x86::code_asm::*;

const IDT: u64 = 0x7000;
const NON_CANONICAL: u64 = 1 << 47;
/// Selectors of descriptors that a test adds.
const EXTRA: u16 = 0x40;

/// Adds descriptors at [`EXTRA`].
fn with_descriptors(words: &[u64]) -> Machine {
    let mut machine = Machine::new();
    for (i, word) in words.iter().enumerate() {
        machine.put_word(GDT + u64::from(EXTRA) + 8 * i as u64, *word);
    }
    machine.change(|state| state.gdt.limit = EXTRA + 8 * words.len() as u16 - 1);
    machine
}

/// Runs `bytes` with RAX and RSI as given, at CPL 3 if `user`; UD2 follows. Vector and
/// error code, and whether RIP is still at the instruction.
fn try_bytes(machine: &mut Machine, bytes: &[u8], user: bool) -> (u8, Option<u64>, bool) {
    machine.put(CODE, bytes);
    machine.put(CODE + bytes.len() as u64, &[0x0f, 0x0b]);
    if user {
        machine.map(CODE, CODE | 7);
        machine.enter_user();
    }
    let exception = machine.run_to_exception();
    (exception.vector, exception.code, exception.rip == CODE)
}

/// The vector and error code of a refusal, if there is one.
type Refused = Option<(u8, u64)>;

#[test]
fn privileged_instructions_fault_at_cpl_3_and_nothing_else_happens() {
    let refused: [(&str, &[u8], u8); 24] = [
        ("hlt", &[0xf4], 13),
        ("cli", &[0xfa], 13),
        ("sti", &[0xfb], 13),
        ("in al, dx", &[0xec], 13),
        ("out dx, al", &[0xee], 13),
        ("insb", &[0x6c], 13),
        ("rdmsr", &[0x0f, 0x32], 13),
        ("wrmsr", &[0x0f, 0x30], 13),
        ("mov rax, cr0", &[0x0f, 0x20, 0xc0], 13),
        ("mov cr3, rax", &[0x0f, 0x22, 0xd8], 13),
        ("mov rax, dr7", &[0x0f, 0x21, 0xf8], 13),
        ("mov dr0, rax", &[0x0f, 0x23, 0xc0], 13),
        ("clts", &[0x0f, 0x06], 13),
        ("lmsw ax", &[0x0f, 0x01, 0xf0], 13),
        ("lgdt [rsi]", &[0x0f, 0x01, 0x16], 13),
        ("lidt [rsi]", &[0x0f, 0x01, 0x1e], 13),
        ("lldt ax", &[0x0f, 0x00, 0xd0], 13),
        ("ltr ax", &[0x0f, 0x00, 0xd8], 13),
        ("invlpg [rsi]", &[0x0f, 0x01, 0x3e], 13),
        ("invpcid rax, [rsi]", &[0x66, 0x0f, 0x38, 0x82, 0x06], 13),
        ("wbinvd", &[0x0f, 0x09], 13),
        ("swapgs", &[0x0f, 0x01, 0xf8], 13),
        ("stac", &[0x0f, 0x01, 0xcb], 6),
        ("clac", &[0x0f, 0x01, 0xca], 6),
    ];
    for (name, bytes, vector) in refused {
        let mut machine = Machine::new();
        let code = (vector == 13).then_some(0);
        assert_eq!(
            try_bytes(&mut machine, bytes, true),
            (vector, code, true),
            "{name}"
        );
    }
}

#[test]
fn loads_of_data_segments_check_their_descriptors() {
    let present = 0x00cf_9300_0000_ffff_u64;
    let cases: [(u64, u16, Refused); 8] = [
        (present, EXTRA, None),
        (present & !(1 << 47), EXTRA, Some((11, 0x40))), // not present
        (0x00af_9900_0000_ffff, EXTRA, Some((13, 0x40))), // code, not readable
        (0x00af_9b00_0000_ffff, EXTRA, None),            // readable
        (0x0000_8900_0000_0067, EXTRA, Some((13, 0x40))), // a task state segment
        (present, EXTRA | 3, Some((13, 0x40))),          // DPL 0 below RPL 3
        (present, EXTRA + 8, Some((13, 0x48))),          // beyond the table
        (present, EXTRA | 4, Some((13, 0x44))),          // no LDT
    ];
    for (descriptor, selector, wanted) in cases {
        let mut machine = with_descriptors(&[descriptor]);
        machine.change(|state| state.gpr[0] = u64::from(selector));
        let got = try_bytes(&mut machine, &[0x8e, 0xd8], false);
        let wanted = wanted.map_or((6, None, false), |(v, code)| (v, Some(code), true));
        assert_eq!(got, wanted, "{descriptor:#x} {selector:#x}");
    }
    // Marks it accessed.
    let mut machine = with_descriptors(&[0x00cf_9200_0000_ffff]);
    machine.change(|state| state.gpr[0] = u64::from(EXTRA));
    try_bytes(&mut machine, &[0x8e, 0xd8], false);
    assert_eq!(machine.word(GDT + u64::from(EXTRA)) >> 40 & 1, 1);
}

#[test]
fn loads_of_ss_are_stricter() {
    let data = 0x00cf_9300_0000_ffff_u64;
    let cases: [(u64, u16, bool, Refused); 7] = [
        (data, EXTRA, false, None),
        (data & !(1 << 47), EXTRA, false, Some((12, 0x40))),
        (data & !(1 << 41), EXTRA, false, Some((13, 0x40))), // read-only
        (data, EXTRA | 3, false, Some((13, 0x40))),
        (data | 3 << 45, EXTRA, false, Some((13, 0x40))),
        (data, 0, false, None),         // null at CPL 0
        (data, 3, true, Some((13, 0))), // null at CPL 3
    ];
    for (descriptor, selector, user, wanted) in cases {
        let mut machine = with_descriptors(&[descriptor]);
        machine.change(|state| state.gpr[0] = u64::from(selector));
        let got = try_bytes(&mut machine, &[0x8e, 0xd0], user);
        let wanted = wanted.map_or((6, None, false), |(v, code)| (v, Some(code), true));
        assert_eq!(got, wanted, "{descriptor:#x} {selector:#x}");
    }
    let mut machine = Machine::new();
    assert_eq!(
        try_bytes(&mut machine, &[0x8e, 0xc8], false),
        (6, None, true),
        "mov cs"
    );
}

#[test]
fn the_task_register_wants_an_available_task() {
    let task = 0x0000_8900_8000_0067_u64;
    let cases: [(u64, u16, Refused); 5] = [
        (task, EXTRA, None),
        (task | 2 << 40, EXTRA, Some((13, 0x40))), // busy
        (task & !(1 << 47), EXTRA, Some((11, 0x40))),
        (0x0000_8200_8000_0067, EXTRA, Some((13, 0x40))), // an LDT
        (task, 0, Some((13, 0))),
    ];
    for (low, selector, wanted) in cases {
        let mut machine = with_descriptors(&[low, 0]);
        machine.change(|state| state.gpr[0] = u64::from(selector));
        let got = try_bytes(&mut machine, &[0x0f, 0x00, 0xd8], false);
        let wanted = wanted.map_or((6, None, false), |(v, code)| (v, Some(code), true));
        assert_eq!(got, wanted, "{low:#x}");
        if wanted.0 == 6 {
            // Busy now.
            assert_eq!(machine.word(GDT + u64::from(EXTRA)) >> 40 & 0xf, 11);
        }
    }
}

#[test]
fn gates_are_checked_before_anything_is_pushed() {
    let gate = |change: fn(u64) -> u64, high: u64| {
        let mut machine = Machine::new();
        let at = IDT + 16 * 0x30;
        let low = machine.word(at);
        machine.put_word(at, change(low));
        machine.put_word(at + 8, high);
        try_bytes(&mut machine, &[0xcd, 0x30], false)
    };
    let own = 0x30 * 8 + 2;
    assert_eq!(gate(|low| low & !(1 << 47), 0), (11, Some(own), true));
    assert_eq!(
        gate(|low| low & !(0x1f << 40) | 0xc << 40, 0),
        (13, Some(own), true)
    );
    assert_eq!(gate(|low| low & !(0xffff << 16), 0), (13, Some(0), true));
    // A data segment, no segment, one beyond the table.
    assert_eq!(
        gate(|low| low & !(0xffff << 16) | 0x18 << 16, 0),
        (13, Some(0x18), true)
    );
    assert_eq!(
        gate(|low| low & !(0xffff << 16) | 0x48 << 16, 0),
        (13, Some(0x48), true)
    );
    assert_eq!(gate(|low| low, 0x8000), (13, Some(0), true));
}

#[test]
fn software_interrupts_need_the_gates_privilege_and_hardware_does_not() {
    let mut machine = Machine::new();
    assert_eq!(
        try_bytes(&mut machine, &[0xcd, 0x30], true),
        (13, Some(0x30 * 8 + 2), true)
    );
    let mut machine = Machine::new();
    assert_eq!(
        try_bytes(&mut machine, &[0xcc], true),
        (13, Some(3 * 8 + 2), true)
    );
    // ICEBP goes through the gate like hardware.
    let mut machine = Machine::new();
    assert_eq!(try_bytes(&mut machine, &[0xf1], true), (1, None, false));
    let mut machine = Machine::new();
    let at = IDT + 16 * 3;
    let low = machine.word(at);
    machine.put_word(at, low | 3 << 45);
    assert_eq!(try_bytes(&mut machine, &[0xcc], true), (3, None, false));
}

#[test]
fn an_exception_at_cpl_3_arrives_on_the_tasks_stack_with_the_old_one_saved() {
    let mut machine = Machine::new();
    machine.change(|state| state.rflags |= 0x200);
    let (vector, ..) = try_bytes(&mut machine, &[0x0f, 0x0b], true);
    let state = hv::Vcpu::state(&machine.vcpu).unwrap();
    assert_eq!((vector, state.gpr[4]), (6, KERNEL_STACK - 40));
    let frame: Vec<u64> = (0..5).map(|i| machine.word(state.gpr[4] + 8 * i)).collect();
    let flags = 0x1_0202;
    assert_eq!(
        frame,
        [
            CODE,
            u64::from(USER_CODE),
            flags,
            STACK,
            u64::from(USER_DATA)
        ]
    );
    // An interrupt gate; a null SS of the new privilege.
    assert_eq!(state.rflags & 0x200, 0);
    assert_eq!(state.segments[VcpuState::SS].selector, 0);
}

#[test]
fn interrupt_stacks_are_taken_and_their_tables_checked() {
    let with_ist = |ist: u64, stack: u64, limit: u32| {
        let mut machine = Machine::new();
        let at = IDT + 16 * 6;
        let low = machine.word(at);
        machine.put_word(at, low | ist << 32);
        machine.put_word(TSS + 0x24 + 8 * (ist - 1), stack);
        machine.change(|state| state.tr.limit = limit);
        machine.put(CODE, &[0x0f, 0x0b]);
        machine.run_to_exception()
    };
    let exception = with_ist(2, 0x7_0005, 0x67);
    // Aligned to 16 bytes, whatever the table says.
    assert_eq!(
        (exception.vector, exception.state.gpr[4]),
        (6, 0x7_0000 - 40)
    );
    assert_eq!(exception.rsp, STACK);
    // Beyond the limit: #TS, of a hardware event.
    let exception = with_ist(7, 0x7_0000, 0x5a);
    assert_eq!((exception.vector, exception.code), (10, Some(1)));
    let exception = with_ist(1, NON_CANONICAL + 0x1000, 0x67);
    assert_eq!((exception.vector, exception.code), (12, Some(1)));
}

#[test]
fn a_second_fault_is_double_only_where_both_count() {
    // First fault, and a gate that is not present for it.
    let broken = |first: u8, bytes: &[u8]| {
        let mut machine = Machine::new();
        let at = IDT + 16 * u64::from(first);
        let low = machine.word(at);
        machine.put_word(at, low & !(1 << 47));
        machine.change(|state| {
            state.gpr[6] = bare::UNMAPPED;
            state.gpr[7] = NON_CANONICAL;
        });
        let (vector, code, _) = try_bytes(&mut machine, bytes, false);
        (vector, code)
    };
    // #UD is benign: its #NP is delivered as such.
    assert_eq!(broken(6, &[0x0f, 0x0b]), (11, Some(6 * 8 + 3)));
    assert_eq!(broken(3, &[0xcc]), (11, Some(3 * 8 + 2)));
    // #GP, #PF and #DE are not.
    assert_eq!(broken(13, &[0x8b, 0x07]), (8, Some(0)));
    assert_eq!(broken(14, &[0x8b, 0x06]), (8, Some(0)));
    assert_eq!(broken(0, &[0x31, 0xc9, 0xf7, 0xf1]), (8, Some(0)));
}

#[test]
fn a_page_fault_while_a_page_fault_is_delivered_is_double_and_keeps_its_address() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.mov(rsp, bare::UNMAPPED + 0x100).unwrap();
        asm.mov(eax, dword_ptr(rsp + 0x10_0000)).unwrap();
    });
    // The double fault needs a stack of its own.
    let at = IDT + 16 * 8;
    let low = machine.word(at);
    machine.put_word(at, low | 1 << 32);
    machine.put_word(TSS + 0x24, 0x7_0000);
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.code), (8, Some(0)));
    assert_eq!(exception.rsp, bare::UNMAPPED + 0x100);
    assert_eq!(exception.state.cr2, bare::UNMAPPED + 0x100 - 48);
}

#[test]
fn a_fault_of_the_double_fault_is_a_triple_fault() {
    let mut machine = Machine::new();
    machine.code(|asm| {
        asm.mov(rsp, bare::UNMAPPED + 0x100).unwrap();
        asm.ud2().unwrap();
    });
    assert_eq!(machine.run(), Exit::TripleFault);
}

/// IRETQ with this frame at CPL 0.
fn iret(machine: &mut Machine, frame: [u64; 5]) -> (u8, Option<u64>, u64) {
    machine.code(|asm| {
        for word in frame.iter().rev() {
            asm.mov(rax, *word).unwrap();
            asm.push(rax).unwrap();
        }
        asm.iretq().unwrap();
    });
    machine.put(CODE + 0x800, &[0x0f, 0x0b]);
    let exception = machine.run_to_exception();
    (exception.vector, exception.code, exception.rip)
}

#[test]
fn iret_checks_where_it_returns_to() {
    let to = CODE + 0x800;
    let (code, data) = (0x10_u64, 0x18_u64);
    let user = (u64::from(USER_CODE), u64::from(USER_DATA));
    let run = |frame| {
        let mut machine = Machine::new();
        machine.map(CODE, CODE | 7);
        iret(&mut machine, frame)
    };
    assert_eq!(run([to, code, 2, STACK, data]), (6, None, to));
    assert_eq!(run([to, user.0, 2, STACK, user.1]), (6, None, to));
    let fails = |frame, wanted| {
        let (vector, error, rip) = run(frame);
        assert_eq!((vector, error), (13, Some(wanted)), "{frame:x?}");
        assert_ne!(rip, to);
    };
    fails([to, 0, 2, STACK, data], 0);
    fails([to, data, 2, STACK, data], 0x18);
    fails([to, 0x48, 2, STACK, data], 0x48);
    fails([to, user.0, 2, STACK, data], 0x18); // SS of another privilege
    fails([to, user.0, 2, STACK, 0], 0); // a null SS at CPL 3
    fails([to, code | 3, 2, STACK, user.1], 0x10); // DPL 0 code for CPL 3
    fails([NON_CANONICAL, code, 2, STACK, data], 0);
    // With NT there is no task to return to.
    let mut machine = Machine::new();
    machine.change(|state| state.rflags |= 1 << 14);
    let (vector, error, _) = iret(&mut machine, [to, code, 2, STACK, data]);
    assert_eq!((vector, error), (13, Some(0)));
}

#[test]
fn iret_to_cpl_3_empties_inner_data_segments() {
    let mut machine = Machine::new();
    machine.map(CODE, CODE | 7);
    let frame = [
        CODE + 0x800,
        u64::from(USER_CODE),
        2,
        STACK,
        u64::from(USER_DATA),
    ];
    assert_eq!(iret(&mut machine, frame).0, 6);
    let state = hv::Vcpu::state(&machine.vcpu).unwrap();
    assert_eq!(state.segments[VcpuState::DS].selector, 0);
}

#[test]
fn nmis_wait_for_iret() {
    let mut machine = Machine::new();
    // An NMI to itself through x2APIC, twice; the handler counts.
    machine.change(|state| state.apic.base |= 1 << 10);
    machine.set_gate(2, CODE + 0x800);
    let send = |asm: &mut CodeAssembler| {
        asm.mov(ecx, 0x830).unwrap();
        asm.mov(eax, 0x4_4400).unwrap(); // self, NMI, asserted
        asm.xor(edx, edx).unwrap();
        asm.wrmsr().unwrap();
    };
    machine.code_at(CODE + 0x800, |asm| {
        asm.inc(ebx).unwrap();
        asm.cmp(ebx, 1).unwrap();
        let mut done = asm.create_label();
        asm.jne(done).unwrap();
        send(asm);
        asm.mov(rsi, rbx).unwrap();
        asm.set_label(&mut done).unwrap();
        asm.iretq().unwrap();
    });
    machine.code(|asm| {
        asm.xor(ebx, ebx).unwrap();
        send(asm);
        asm.nop().unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    let state = machine.run_to_stop();
    // The second one came after the first one's IRET.
    assert_eq!((state.gpr[3], state.gpr[6]), (2, 1));
}

#[test]
fn enter_copies_the_frames_of_outer_procedures() {
    let mut machine = Machine::new();
    for (i, word) in [0x11, 0x22, 0x33].into_iter().enumerate() {
        machine.put_word(DATA + 0x800 - 8 * (i as u64 + 1), word);
    }
    machine.code(|asm| {
        asm.mov(ebp, DATA as u32 + 0x800).unwrap();
        asm.enter(0x20, 3).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    let state = machine.run_to_stop();
    let frame = STACK - 8;
    let words: Vec<u64> = (0..4).map(|i| machine.word(frame - 8 * i)).collect();
    assert_eq!(words, [DATA + 0x800, 0x11, 0x22, frame]);
    assert_eq!((state.gpr[5], state.gpr[4]), (frame, frame - 24 - 0x20));
}

#[test]
fn enter_that_does_not_fit_changes_nothing() {
    let mut machine = Machine::new();
    machine.map(STACK - 0x2000, 0);
    machine.code(|asm| asm.enter(0x1800, 0).unwrap());
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.code), (14, Some(2)));
    assert_eq!((exception.rsp, exception.rip), (STACK, CODE));
}

#[test]
fn far_calls_and_returns_keep_and_leave_privilege() {
    let mut machine = Machine::new();
    machine.put_word(DATA, CODE + 0x800);
    machine.put_word(DATA + 8, 0x10);
    machine.code_at(CODE + 0x800, |asm| {
        asm.mov(rbx, qword_ptr(rsp + 8)).unwrap();
        asm.db(&[0x48, 0xcb]).unwrap(); // retfq
    });
    machine.code(|asm| {
        asm.mov(esi, DATA as u32).unwrap();
        asm.db(&[0x48, 0xff, 0x1e]).unwrap(); // call far m16:64 [rsi]
        asm.out(i32::from(STOP), al).unwrap();
    });
    let state = machine.run_to_stop();
    assert_eq!((state.gpr[3], state.gpr[4]), (0x10, STACK));

    // To CPL 3, and the four words are popped.
    let mut machine = Machine::new();
    machine.map(CODE, CODE | 7);
    let frame = [
        CODE + 0x800,
        u64::from(USER_CODE),
        STACK - 0x100,
        u64::from(USER_DATA),
    ];
    machine.put(CODE + 0x800, &[0x0f, 0x0b]);
    machine.code(|asm| {
        for word in frame.into_iter().rev() {
            asm.push(word as i32).unwrap();
        }
        asm.db(&[0x48, 0xcb]).unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (6, CODE + 0x800));
    assert_eq!(exception.rsp, STACK - 0x100);

    // Inwards never.
    let mut machine = Machine::new();
    machine.map(CODE, CODE | 7);
    machine.map(STACK, STACK | 7);
    machine.put_word(STACK, CODE);
    machine.put_word(STACK + 8, 0x10);
    assert_eq!(
        try_bytes(&mut machine, &[0x48, 0xcb], true),
        (13, Some(0x10), true)
    );
}

#[test]
fn wild_register_writes_fault_and_leave_no_trace() {
    // MSR, value, whether it is refused.
    let cases: [(u32, u64, bool); 23] = [
        (0xc000_0080, 1 << 1, true), // EFER: reserved
        (0xc000_0080, 0, true),      // EFER.LME cannot go
        (0xc000_0080, 0xd01, false),
        (0xc000_0082, NON_CANONICAL, true), // LSTAR
        (0xc000_0083, NON_CANONICAL, true), // CSTAR
        (0xc000_0084, 1 << 32, true),       // FMASK
        (0xc000_0100, NON_CANONICAL, true), // FS base
        (0xc000_0101, NON_CANONICAL, true),
        (0xc000_0102, NON_CANONICAL, true),
        (0xc000_0103, 1 << 32, true), // TSC_AUX
        (0xc000_0103, 7, false),
        (0x277, 0x0007_0406_0007_0406, false), // PAT
        (0x277, 2, true),
        (0x277, 8 << 56, true),
        (0x175, NON_CANONICAL, true), // SYSENTER
        (0x176, NON_CANONICAL, true),
        (0x1d9, 0, false), // DEBUGCTL
        (0x1d9, 2, true),
        (0x10a, 1, true),      // ARCH_CAPABILITIES: read-only
        (0x1b, 1 << 63, true), // APIC base
        (0x12345, 0, true),
        (0xffff_ffff, 0, true),
        (0x8ff, 0, true), // x2APIC: no such register
    ];
    for (index, value, refused) in cases {
        let mut machine = Machine::new();
        machine.change(|state| {
            state.gpr[1] = u64::from(index);
            state.gpr[0] = value & 0xffff_ffff;
            state.gpr[2] = value >> 32;
        });
        let got = try_bytes(&mut machine, &[0x0f, 0x30], false);
        let wanted = if refused {
            (13, Some(0), true)
        } else {
            (6, None, false)
        };
        assert_eq!(got, wanted, "{index:#x} {value:#x}");
    }
    let reads: [(u32, bool); 4] = [
        (0x12345, true),
        (0x4000_0000, true),
        (0x1d9, false),
        (0x8b, false),
    ];
    for (index, refused) in reads {
        let mut machine = Machine::new();
        machine.change(|state| state.gpr[1] = u64::from(index));
        let got = try_bytes(&mut machine, &[0x0f, 0x32], false);
        assert_eq!(got.0, if refused { 13 } else { 6 }, "{index:#x}");
    }
}

#[test]
fn control_registers_keep_their_rules() {
    let cases: [(&str, &[u8], u64, u8); 12] = [
        ("cr0: paging off", &[0x0f, 0x22, 0xc0], 0x1_0033, 13),
        ("cr0: no protection", &[0x0f, 0x22, 0xc0], 0x8000_0000, 13),
        ("cr0: NW without CD", &[0x0f, 0x22, 0xc0], 0xa001_0033, 13),
        ("cr0: upper half", &[0x0f, 0x22, 0xc0], 0x1_8001_0033, 13),
        ("cr0", &[0x0f, 0x22, 0xc0], 0x8005_003b, 6),
        ("cr1", &[0x0f, 0x22, 0xc8], 0, 6),
        ("cr5", &[0x0f, 0x22, 0xe8], 0, 6),
        ("cr8: 16", &[0x44, 0x0f, 0x22, 0xc0], 16, 13),
        ("cr8: 15", &[0x44, 0x0f, 0x22, 0xc0], 15, 6),
        ("lmsw", &[0x0f, 0x01, 0xf0], 0, 6), // cannot clear PE
        ("cr3: beyond memory", &[0x0f, 0x22, 0xd8], 1 << 46, 13),
        ("cr2: anything", &[0x0f, 0x22, 0xd0], NON_CANONICAL, 6),
    ];
    for (name, bytes, value, vector) in cases {
        let mut machine = Machine::new();
        machine.change(|state| state.gpr[0] = value);
        assert_eq!(try_bytes(&mut machine, bytes, false).0, vector, "{name}");
    }
    // LIDT and LGDT of a base that is not canonical.
    for bytes in [&[0x0f, 0x01, 0x16], &[0x0f, 0x01, 0x1e]] {
        let mut machine = Machine::new();
        machine.put_word(DATA + 2, NON_CANONICAL);
        machine.change(|state| state.gpr[6] = DATA);
        assert_eq!(try_bytes(&mut machine, bytes, false), (13, Some(0), true));
    }
}

#[test]
fn ports_are_open_by_iopl_or_by_the_tasks_map() {
    let run = |change: &dyn Fn(&mut Machine)| {
        let mut machine = Machine::new();
        change(&mut machine);
        machine.change(|state| state.gpr[2] = 0x80);
        try_bytes(&mut machine, &[0xee], true).0
    };
    assert_eq!(run(&|_| {}), 13);
    assert_eq!(
        run(&|machine| machine.change(|state| state.rflags |= 3 << 12)),
        6
    );
    let map = |bit: bool| {
        move |machine: &mut Machine| {
            machine.put(TSS + 0x66, &0x68_u16.to_le_bytes());
            machine.put(TSS + 0x68 + 0x10, &[u8::from(bit), 0xff]);
            machine.change(|state| state.tr.limit = 0x80);
        }
    };
    assert_eq!(run(&map(true)), 13);
    assert_eq!(run(&map(false)), 6);
}

#[test]
fn popf_at_cpl_3_keeps_what_is_not_its_own() {
    let mut machine = Machine::new();
    machine.map(STACK - 0x1000, (STACK - 0x1000) | 7);
    machine.map(STACK, STACK | 7);
    machine.put_word(STACK, !0);
    machine.change(|state| state.rflags |= 0x200);
    machine.map(CODE, CODE | 7);
    // TF is among them: #DB behind the instruction that follows POPF.
    machine.put(CODE, &[0x9d, 0x90, 0x0f, 0x0b]);
    machine.enter_user();
    let exception = machine.run_to_exception();
    assert_eq!((exception.vector, exception.rip), (1, CODE + 2));
    let flags = machine.word(exception.state.gpr[4] + 16);
    assert_eq!(flags, 0x24_4fd7 | 0x200);
}
