//! 32-bit code in compatibility mode does not run here: every way to it is refused
//! with #GP at the instruction that tried, as for a descriptor that cannot be used.

mod bare;

use bare::{CODE, DATA, GDT, Machine, STACK, USER_DATA};

/// Selectors of 32-bit code: for the kernel, for users.
const KERNEL_32: u16 = 0x40;
const USER_32: u16 = 0x48 | 3;

/// Runs `bytes` in the kernel, `words` being what the stack and RSI lead to.
fn refusal(bytes: &[u8], words: &[u64], change: impl FnOnce(&mut hv::VcpuState)) -> (u8, u64, u64) {
    let mut machine = Machine::new();
    let own = u64::from(KERNEL_32);
    machine.put_word(GDT + own, 0x00cf_9b00_0000_ffff);
    machine.put_word(GDT + own + 8, 0x00cf_fb00_0000_ffff);
    machine.put(CODE, bytes);
    machine.map(CODE + 0x1000, (CODE + 0x1000) | 7);
    for (i, word) in words.iter().enumerate() {
        machine.put_word(STACK + 8 * i as u64, *word);
        machine.put_word(DATA + 8 * i as u64, *word);
    }
    machine.change(|state| {
        state.gdt.limit = KERNEL_32 + 15;
        state.gpr[6] = DATA;
        change(state);
    });
    let exception = machine.run_to_exception();
    (exception.vector, exception.code.unwrap(), exception.rip)
}

#[test]
fn iret_to_32_bit_user_code_is_refused() {
    let frame = [CODE + 0x1000, USER_32.into(), 2, STACK, USER_DATA.into()];
    let got = refusal(&[0x48, 0xcf], &frame, |_| {});
    assert_eq!(got, (13, 0x48, CODE));
}

#[test]
fn far_returns_jumps_and_calls_to_32_bit_code_are_refused() {
    let outward = [CODE + 0x1000, USER_32.into(), STACK, USER_DATA.into()];
    let got = refusal(&[0x48, 0xcb], &outward, |_| {});
    assert_eq!(got, (13, 0x48, CODE), "retf to users");
    let inward = [CODE + 0x1000, KERNEL_32.into()];
    for (name, bytes) in [("jmp", [0x48, 0xff, 0x2e]), ("call", [0x48, 0xff, 0x1e])] {
        let got = refusal(&bytes, &inward, |_| {});
        assert_eq!(got, (13, 0x40, CODE), "{name}");
    }
}

#[test]
fn sysret_to_32_bit_code_is_refused() {
    let got = refusal(&[0x0f, 0x07], &[], |state| {
        state.efer |= 1;
        state.gpr[1] = CODE + 0x1000;
        state.gpr[11] = 2;
        state.msrs.retain(|(index, _)| *index != 0xc000_0081);
        state.msrs.push((0xc000_0081, 0x38 << 48));
    });
    assert_eq!(got, (13, 0, CODE));
}
