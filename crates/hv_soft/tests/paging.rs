//! Who may access which page, what a page fault says, what the TLB may still know.

mod bare;

use bare::{CODE, DATA, GDT, Machine, SAY, SMALL_TABLE, STOP, Said, TABLES};
use hv::Vcpu;
use iced_x86::code_asm::*;

const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PCIDE: u64 = 1 << 17;
const PGE: u64 = 1 << 7;
const UMIP: u64 = 1 << 11;
const AC: u64 = 1 << 18;
const USER_PAGE: u64 = DATA + 0x4000;
const OTHER_PAGE: u64 = DATA + 0x8000;

fn machine(features: u64) -> Machine {
    let mut machine = Machine::new();
    machine.map(USER_PAGE, USER_PAGE | 7);
    machine.change(|state| state.cr4 |= features);
    machine
}

fn says(machine: &mut Machine) -> Vec<u32> {
    machine.run_to_stop();
    let said = |said: &Said| match said {
        Said::Port(value) => *value,
        other => panic!("{other:?}"),
    };
    machine.said().iter().map(said).collect()
}

fn say(asm: &mut CodeAssembler) {
    asm.out(i32::from(SAY), eax).unwrap();
}

fn stop(asm: &mut CodeAssembler) {
    asm.out(i32::from(STOP), al).unwrap();
}

#[test]
fn smep_keeps_the_kernel_from_executing_user_pages() {
    for (features, vector) in [(0, 6), (SMEP, 14)] {
        let mut machine = machine(features);
        machine.put(USER_PAGE, &[0x0f, 0x0b]);
        machine.code(|asm| {
            asm.mov(rax, qword_ptr(USER_PAGE)).unwrap();
            asm.jmp(USER_PAGE).unwrap();
        });
        let exception = machine.run_to_exception();
        assert_eq!((exception.vector, exception.rip), (vector, USER_PAGE));
        if vector == 14 {
            assert_eq!(
                (exception.code, exception.state.cr2),
                (Some(0x11), USER_PAGE)
            );
        }
    }
}

#[test]
fn smap_lets_the_kernel_access_user_pages_between_stac_and_clac_only() {
    for write in [false, true] {
        let mut machine = machine(SMAP);
        machine.put_word(USER_PAGE, 5);
        let mut at = 0;
        machine.code(|asm| {
            asm.mov(esi, USER_PAGE as u32).unwrap();
            asm.stac().unwrap();
            asm.mov(eax, dword_ptr(rsi)).unwrap();
            asm.add(dword_ptr(rsi), 2).unwrap();
            asm.stac().unwrap();
            asm.pushfq().unwrap();
            asm.pop(rbx).unwrap();
            asm.clac().unwrap();
            asm.pushfq().unwrap();
            asm.pop(rdx).unwrap();
            asm.clac().unwrap();
            asm.inc(ecx).unwrap();
            at = CODE + asm.assemble(CODE).unwrap().len() as u64;
            if write {
                asm.mov(dword_ptr(rsi), eax).unwrap();
            } else {
                asm.mov(eax, dword_ptr(rsi)).unwrap();
            }
        });
        let exception = machine.run_to_exception();
        let code = if write { 3 } else { 1 };
        assert_eq!(
            (exception.vector, exception.code, exception.rip),
            (14, Some(code), at)
        );
        assert_eq!(exception.state.cr2, USER_PAGE);
        assert_eq!(exception.state.gpr[3] & AC, AC);
        assert_eq!(exception.state.gpr[2] & AC, 0);
        assert_eq!((machine.word(USER_PAGE), exception.state.gpr[1]), (7, 1));
    }
}

#[test]
fn without_smap_ac_is_but_a_flag() {
    let mut machine = machine(0);
    machine.code(|asm| {
        asm.mov(eax, dword_ptr(USER_PAGE)).unwrap();
        asm.stac().unwrap();
        asm.mov(eax, dword_ptr(USER_PAGE)).unwrap();
        asm.clac().unwrap();
        asm.mov(eax, dword_ptr(USER_PAGE)).unwrap();
        stop(asm);
    });
    machine.run_to_stop();
}

#[test]
fn smap_follows_ac_through_popf_calls_and_exceptions() {
    let mut machine = machine(SMAP);
    // The handler of #UD: AC stays, and so does the right; skips UD2.
    machine.set_gate(6, CODE + 0x800);
    machine.code_at(CODE + 0x800, |asm| {
        asm.mov(eax, dword_ptr(USER_PAGE)).unwrap();
        asm.add(qword_ptr(rsp), 2).unwrap();
        asm.and(dword_ptr(rsp + 16), !(AC as i32)).unwrap();
        asm.iretq().unwrap();
    });
    let far = CODE + 0x2000;
    machine.code_at(far, |asm| {
        asm.mov(eax, dword_ptr(USER_PAGE)).unwrap();
        asm.ret().unwrap();
    });
    let mut at = 0;
    machine.code(|asm| {
        asm.push(AC as i32).unwrap();
        asm.popfq().unwrap();
        asm.call(far).unwrap();
        asm.mov(rbx, far).unwrap();
        asm.call(rbx).unwrap();
        asm.ud2().unwrap();
        at = CODE + asm.assemble(CODE).unwrap().len() as u64;
        asm.mov(eax, dword_ptr(USER_PAGE)).unwrap();
    });
    let exception = machine.run_to_exception();
    assert_eq!(
        (exception.vector, exception.code, exception.rip),
        (14, Some(1), at)
    );
}

#[test]
fn smap_covers_the_cpus_own_accesses_whatever_ac_is() {
    let mut machine = machine(SMAP);
    machine.map(GDT, GDT | 7);
    machine.code(|asm| {
        asm.stac().unwrap();
        asm.mov(rbx, qword_ptr(GDT)).unwrap();
        asm.mov(ecx, 0x18).unwrap();
        asm.mov(ds, ecx).unwrap();
    });
    // The IDT's code segment cannot be read either: a triple fault.
    assert_eq!(machine.run(), hv::Exit::TripleFault);
    assert_eq!(machine.vcpu.state().unwrap().cr2 & !0xfff, GDT);
}

#[test]
fn a_user_page_of_the_tables_of_exceptions_is_no_matter_without_smap() {
    let mut machine = machine(0);
    machine.map(GDT, GDT | 7);
    machine.code(|asm| {
        asm.mov(ecx, 0x18).unwrap();
        asm.mov(ds, ecx).unwrap();
        stop(asm);
    });
    machine.run_to_stop();
}

#[test]
fn umip_refuses_to_show_tables_at_cpl_3() {
    let instructions: [&[u8]; 5] = [
        &[0x0f, 0x01, 0x06], // sgdt [rsi]
        &[0x0f, 0x01, 0x0e], // sidt [rsi]
        &[0x0f, 0x00, 0xc0], // sldt eax
        &[0x0f, 0x00, 0xc8], // str eax
        &[0x0f, 0x01, 0xe0], // smsw eax
    ];
    for bytes in instructions {
        for umip in [0, UMIP] {
            let mut machine = machine(umip);
            machine.map(CODE, CODE | 7);
            machine.put(CODE, bytes);
            machine.put(CODE + bytes.len() as u64, &[0x0f, 0x0b]);
            machine.change(|state| state.gpr[6] = USER_PAGE);
            machine.enter_user();
            let exception = machine.run_to_exception();
            let wanted = if umip == 0 { (6, None) } else { (13, Some(0)) };
            assert_eq!((exception.vector, exception.code), wanted, "{bytes:x?}");
        }
    }
}

/// What a walk with these leaf and upper bits should give: `None`, or the code.
fn fault_code(levels: [u64; 4], access: Try, user: bool, features: u64) -> Option<u64> {
    let kind = match access {
        Try::Read => 0,
        Try::Write => 2,
        Try::Execute => 0x10,
    };
    let code = kind | if user { 4 } else { 0 };
    for entry in levels {
        if entry & 1 == 0 {
            return Some(code);
        }
        if entry & 1 << 51 != 0 {
            return Some(code | 9);
        }
    }
    let all = |bit: u64| levels.iter().all(|entry| entry & bit != 0);
    let of_user = all(4);
    let bad = match access {
        Try::Read | Try::Write if user => !of_user,
        Try::Read | Try::Write => of_user && features & SMAP != 0,
        Try::Execute => {
            levels.iter().any(|entry| entry >> 63 != 0)
                || if user {
                    !of_user
                } else {
                    of_user && features & SMEP != 0
                }
        }
    };
    (bad || (access == Try::Write && !all(2))).then_some(code | 1)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Try {
    Read,
    Write,
    Execute,
}

#[test]
fn every_bit_at_every_level_counts() {
    // 512 GiB: tables of their own at DATA.
    let va = 1_u64 << 39;
    let tables = [TABLES + 8, DATA + 0x1000, DATA + 0x2000, DATA + 0x3000];
    let leaf = DATA + 0x5000;
    for level in 0..4 {
        for change in [0, 1, 2, 4, 1 << 51, 1 << 63] {
            for access in [Try::Read, Try::Write, Try::Execute] {
                for user in [false, true] {
                    for features in [0, SMEP | SMAP] {
                        let mut machine = machine(features);
                        machine.map(CODE, CODE | if user { 7 } else { 3 });
                        let mut levels = [7; 4];
                        levels[level] ^= change;
                        for i in 0..4 {
                            let to = if i < 3 { tables[i + 1] } else { leaf };
                            machine.put_word(tables[i], to | levels[i]);
                        }
                        machine.put(leaf, &[0x0f, 0x0b]);
                        machine.code(|asm| {
                            asm.mov(rsi, va).unwrap();
                            match access {
                                Try::Read => asm.mov(eax, dword_ptr(rsi)).unwrap(),
                                Try::Write => asm.mov(dword_ptr(rsi), 1).unwrap(),
                                Try::Execute => asm.jmp(rsi).unwrap(),
                            }
                            asm.ud2().unwrap();
                        });
                        machine.change(|state| state.efer |= 1 << 11);
                        if user {
                            machine.enter_user();
                        }
                        let exception = machine.run_to_exception();
                        let wanted = fault_code(levels, access, user, features);
                        let case = (level, change, access, user, features);
                        assert_eq!(exception.code, wanted, "{case:x?}");
                        if wanted.is_some() {
                            assert_eq!((exception.vector, exception.state.cr2), (14, va));
                        } else {
                            assert_eq!(exception.vector, 6);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn reserved_bits_of_large_pages_fault_and_pat_bits_do_not() {
    // level of the leaf, low bits, whether they are reserved
    for (level, bits, bad) in [
        (3, 1 << 12, false), // PAT
        (3, 1 << 13, true),
        (3, 1 << 29, true),
        (3, 0x18, false), // PWT, PCD
        (2, 1 << 12, false),
        (2, 1 << 13, true),
        (2, 1 << 20, true),
        (4, 0, true), // no 512 GiB pages
    ] {
        let mut machine = machine(0);
        let leaf = 0x83 | bits;
        match level {
            4 => machine.put_word(TABLES + 8, leaf),
            3 => {
                machine.put_word(TABLES + 8, DATA | 3);
                machine.put_word(DATA, leaf);
            }
            _ => {
                machine.put_word(TABLES + 8, DATA | 3);
                machine.put_word(DATA, DATA + 0x1003);
                machine.put_word(DATA + 0x1000, leaf);
            }
        }
        machine.put_word(0x12_3458, 0x99);
        machine.code(|asm| {
            asm.mov(rsi, 1_u64 << 39 | 0x12_3458).unwrap();
            asm.mov(rbx, qword_ptr(rsi)).unwrap();
            asm.ud2().unwrap();
        });
        let exception = machine.run_to_exception();
        if bad {
            assert_eq!(
                (exception.vector, exception.code),
                (14, Some(9)),
                "{level} {bits:#x}"
            );
        } else {
            assert_eq!(
                (exception.vector, exception.state.gpr[3]),
                (6, 0x99),
                "{level} {bits:#x}"
            );
        }
    }
}

#[test]
fn accessed_and_dirty_bits_tell_what_was_done() {
    let mut machine = machine(0);
    let entry = |page: u64| SMALL_TABLE + (page >> 12) * 8;
    let [read, written, popped, untouched] = [0, 1, 2, 3].map(|i| DATA + 0x1_0000 + i * 0x1000);
    machine.code(|asm| {
        asm.mov(eax, dword_ptr(read)).unwrap();
        asm.mov(dword_ptr(written + 8), eax).unwrap();
        // Many accesses of the stack in one block, none of which writes.
        asm.mov(rbx, rsp).unwrap();
        asm.mov(rsp, popped).unwrap();
        let mut block = asm.create_label();
        asm.jmp(block).unwrap();
        asm.set_label(&mut block).unwrap();
        asm.pop(rcx).unwrap();
        asm.mov(rdx, qword_ptr(rsp + 8)).unwrap();
        asm.pop(rcx).unwrap();
        asm.mov(rdx, qword_ptr(rsp + 8)).unwrap();
        asm.mov(rsp, rbx).unwrap();
        stop(asm);
    });
    machine.run_to_stop();
    let bits = |page| machine.word(entry(page)) & 0x60;
    assert_eq!((bits(read), bits(written)), (0x20, 0x60));
    assert_eq!((bits(popped), bits(untouched)), (0x20, 0));
    assert_eq!(machine.word(TABLES + 0x2000) & 0x60, 0x20);
}

/// Two address spaces that differ in what is at [`OTHER_PAGE`]: tables for the
/// second one, with identifier 2.
fn two_spaces(global: bool) -> (Machine, u64) {
    let mut machine = machine(PCIDE | PGE);
    let (pml4, pdpt, directory, table) = (DATA, DATA + 0x1000, DATA + 0x2000, DATA + 0x3000);
    machine.put_word(pml4, pdpt | 7);
    machine.put_word(pdpt, directory | 7);
    machine.put_word(directory, table | 7);
    for i in 0..512_u64 {
        machine.put_word(table + 8 * i, i << 12 | 3);
    }
    let bits = if global { 0x103 } else { 3 };
    machine.put_word(table + (OTHER_PAGE >> 12) * 8, (OTHER_PAGE + 0x1000) | bits);
    machine.map(OTHER_PAGE, OTHER_PAGE | bits);
    machine.put_word(OTHER_PAGE, 1);
    machine.put_word(OTHER_PAGE + 0x1000, 2);
    (machine, pml4 | 2)
}

/// Loads CR3.
fn switch(asm: &mut CodeAssembler, to: u64) {
    asm.mov(rcx, to).unwrap();
    asm.mov(cr3, rcx).unwrap();
}

fn look(asm: &mut CodeAssembler) {
    asm.mov(eax, dword_ptr(OTHER_PAGE)).unwrap();
    say(asm);
}

const NO_FLUSH: u64 = 1 << 63;

#[test]
fn each_identifier_has_its_own_entries() {
    let (mut machine, second) = two_spaces(false);
    machine.code(|asm| {
        look(asm);
        switch(asm, second);
        look(asm);
        switch(asm, TABLES | NO_FLUSH);
        look(asm);
        switch(asm, second | NO_FLUSH);
        look(asm);
        asm.mov(rax, cr3).unwrap();
        say(asm);
        stop(asm);
    });
    assert_eq!(says(&mut machine), [1, 2, 1, 2, second as u32]);
}

#[test]
fn a_switch_back_and_forth_walks_nothing_anew() {
    let (mut machine, second) = two_spaces(false);
    machine.code(|asm| {
        let mut again = asm.create_label();
        asm.mov(r8d, 1000).unwrap();
        asm.set_label(&mut again).unwrap();
        switch(asm, second | NO_FLUSH);
        asm.add(rbx, qword_ptr(OTHER_PAGE)).unwrap();
        switch(asm, TABLES | NO_FLUSH);
        asm.add(rbx, qword_ptr(OTHER_PAGE)).unwrap();
        asm.dec(r8d).unwrap();
        asm.jne(again).unwrap();
        stop(asm);
    });
    let state = machine.run_to_stop();
    assert_eq!(state.gpr[3], 3000);
    let stats = machine.vcpu.stats();
    assert_eq!(stats.space_switches, 2000);
    assert!(stats.walks < 200, "{stats:?}");
}

/// Changes the second space's page table behind the TLB's back while the first one
/// is current, does `flush`, and returns what the second one sees then.
fn after(flush: impl FnOnce(&mut CodeAssembler, u64)) -> u32 {
    let (mut machine, second) = two_spaces(false);
    let slot = DATA + 0x3000 + (OTHER_PAGE >> 12) * 8;
    machine.put_word(OTHER_PAGE + 0x2000, 3);
    machine.code(|asm| {
        switch(asm, second);
        look(asm);
        switch(asm, TABLES | NO_FLUSH);
        asm.mov(rax, (OTHER_PAGE + 0x2000) | 3).unwrap();
        asm.mov(qword_ptr(slot), rax).unwrap();
        flush(asm, second);
        look(asm);
        stop(asm);
    });
    let said = says(&mut machine);
    assert_eq!(said[0], 2);
    said[1]
}

fn invpcid(asm: &mut CodeAssembler, kind: u64, pcid: u64, va: u64) {
    asm.mov(rax, kind).unwrap();
    asm.mov(rdx, va).unwrap();
    asm.push(rdx).unwrap();
    asm.mov(rdx, pcid).unwrap();
    asm.push(rdx).unwrap();
    asm.invpcid(rax, xmmword_ptr(rsp)).unwrap();
    asm.add(rsp, 16).unwrap();
}

#[test]
fn what_must_empty_another_space_does() {
    let again = |asm: &mut CodeAssembler, second| switch(asm, second | NO_FLUSH);
    assert_eq!(after(switch), 3);
    for (kind, pcid) in [(0, 2), (1, 2), (2, 0), (3, 0)] {
        let seen = after(|asm, second| {
            invpcid(asm, kind, pcid, OTHER_PAGE);
            again(asm, second);
        });
        assert_eq!(seen, 3, "type {kind}");
    }
    let pge_off_and_on = after(|asm, second| {
        asm.mov(rax, cr4).unwrap();
        asm.btr(rax, 7).unwrap();
        asm.mov(cr4, rax).unwrap();
        asm.bts(rax, 7).unwrap();
        asm.mov(cr4, rax).unwrap();
        again(asm, second);
    });
    assert_eq!(pge_off_and_on, 3);
}

#[test]
fn other_spaces_keep_what_is_not_theirs() {
    // The old translation is what a CPU would use, too.
    for (kind, pcid) in [(0, 0), (1, 0), (0, 7), (1, 7)] {
        let seen = after(|asm, second| {
            invpcid(asm, kind, pcid, OTHER_PAGE);
            switch(asm, second | NO_FLUSH);
        });
        assert_eq!(seen, 2, "type {kind} of {pcid}");
    }
}

#[test]
fn global_entries_stay_until_something_takes_them_too() {
    let global = |flush: fn(&mut CodeAssembler)| {
        let (mut machine, second) = two_spaces(true);
        machine.code(|asm| {
            look(asm);
            switch(asm, second);
            flush(asm);
            look(asm);
            stop(asm);
        });
        says(&mut machine)[1]
    };
    assert_eq!(global(|_| {}), 1);
    assert_eq!(global(|asm| invpcid(asm, 3, 0, 0)), 1);
    assert_eq!(global(|asm| invpcid(asm, 1, 2, 0)), 1);
    assert_eq!(global(|asm| invpcid(asm, 2, 0, 0)), 2);
    assert_eq!(global(|asm| asm.invlpg(qword_ptr(OTHER_PAGE)).unwrap()), 2);
}

#[test]
fn code_of_another_space_is_not_run() {
    let (mut machine, second) = two_spaces(false);
    // mov eax, n; ret
    for (page, n) in [(OTHER_PAGE, 10_u8), (OTHER_PAGE + 0x1000, 20)] {
        machine.put(page, &[0xb8, n, 0, 0, 0, 0xc3]);
    }
    machine.code(|asm| {
        for to in [second, TABLES, second, TABLES] {
            switch(asm, to | NO_FLUSH);
            asm.mov(rbx, OTHER_PAGE).unwrap();
            asm.call(rbx).unwrap();
            say(asm);
        }
        // New code while the space waits.
        asm.mov(byte_ptr(OTHER_PAGE + 1), 11).unwrap();
        switch(asm, second | NO_FLUSH);
        asm.mov(rbx, OTHER_PAGE).unwrap();
        asm.call(rbx).unwrap();
        say(asm);
        switch(asm, TABLES | NO_FLUSH);
        asm.call(rbx).unwrap();
        say(asm);
        // Changed through another address, so that the block goes while it waits.
        asm.mov(byte_ptr(OTHER_PAGE + 0x1001), 21).unwrap();
        switch(asm, second | NO_FLUSH);
        asm.call(rbx).unwrap();
        say(asm);
        stop(asm);
    });
    assert_eq!(says(&mut machine), [20, 10, 20, 10, 20, 11, 21]);
}

#[test]
fn pcid_and_control_register_rules_are_enforced() {
    let gp = |features: u64, write: fn(&mut CodeAssembler)| {
        let mut machine = machine(features);
        machine.code(|asm| {
            write(asm);
            asm.ud2().unwrap();
        });
        let exception = machine.run_to_exception();
        match exception.vector {
            6 => false,
            13 => {
                assert_eq!(exception.code, Some(0));
                true
            }
            other => panic!("vector {other}"),
        }
    };
    fn set_cr4(asm: &mut CodeAssembler, bits: u64) {
        asm.mov(rax, cr4).unwrap();
        asm.mov(rcx, bits).unwrap();
        asm.or(rax, rcx).unwrap();
        asm.mov(cr4, rax).unwrap();
    }
    // An identifier must be 0 when CR4.PCIDE is set.
    assert!(gp(0, |asm| {
        switch(asm, TABLES | 1);
        set_cr4(asm, PCIDE);
    }));
    assert!(!gp(0, |asm| set_cr4(asm, PCIDE)));
    // CR3's bit 63 only with PCIDE; other high bits never.
    assert!(gp(0, |asm| switch(asm, TABLES | NO_FLUSH)));
    assert!(!gp(PCIDE, |asm| switch(asm, TABLES | NO_FLUSH)));
    assert!(gp(PCIDE, |asm| switch(asm, TABLES | 1 << 62)));
    assert!(gp(PCIDE, |asm| switch(asm, TABLES | 1 << 46)));
    // LA57, VMXE, SMXE, PKE, CET, reserved.
    for bits in [
        1 << 12,
        1 << 13,
        1 << 14,
        1 << 22,
        1 << 23,
        1 << 31,
        1 << 63,
    ] {
        let mut machine = machine(0);
        machine.code(|asm| {
            set_cr4(asm, bits);
            asm.ud2().unwrap();
        });
        assert_eq!(machine.run_to_exception().vector, 13, "{bits:#x}");
    }
    // PAE cannot go.
    assert!(gp(0, |asm| {
        asm.mov(rax, cr4).unwrap();
        asm.btr(rax, 5).unwrap();
        asm.mov(cr4, rax).unwrap();
    }));
    // INVPCID: an unknown type, an identifier too large, without PCIDE, not canonical.
    assert!(gp(PCIDE, |asm| invpcid(asm, 4, 0, 0)));
    assert!(gp(PCIDE, |asm| invpcid(asm, 3, 0x1000, 0)));
    assert!(gp(0, |asm| invpcid(asm, 1, 1, 0)));
    assert!(!gp(0, |asm| invpcid(asm, 2, 1, 0)));
    assert!(gp(PCIDE, |asm| invpcid(asm, 0, 0, 1 << 47)));
    assert!(!gp(PCIDE, |asm| invpcid(asm, 1, 0, 1 << 47)));
}

#[test]
fn an_interrupt_leaves_one_instruction_behind_sti_alone() {
    for shadowed in [false, true] {
        let mut machine = machine(0);
        // Vector 0x40 waits: a self-interrupt through x2APIC's SELF IPI.
        machine.code(|asm| {
            asm.cli().unwrap();
            asm.mov(ecx, 0x80f).unwrap();
            asm.mov(eax, 0x1ff).unwrap();
            asm.xor(edx, edx).unwrap();
            asm.wrmsr().unwrap();
            asm.mov(ecx, 0x83f).unwrap();
            asm.mov(eax, 0x40).unwrap();
            asm.wrmsr().unwrap();
            if shadowed {
                asm.sti().unwrap();
            } else {
                asm.push(0x202).unwrap();
                asm.popfq().unwrap();
            }
            asm.mov(ebx, 1).unwrap();
            asm.mov(ebx, 2).unwrap();
            asm.mov(ebx, 3).unwrap();
        });
        let state = machine.run_to_exception();
        assert_eq!(state.vector, 0x40);
        assert_eq!(state.state.gpr[3], u64::from(shadowed));
    }
}
