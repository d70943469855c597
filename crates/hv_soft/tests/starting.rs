//! What a vCPU does between its start-up interrupt and 64-bit mode, in real mode.

mod bare;
mod several;

use bare::{Machine, SAY, STOP, Said};
use hv::{Error, Exit};
use several::*;

/// Where vCPU 1 starts.
const PAGE: u64 = 0x70;

/// vCPU 0 starts vCPU 1 in real mode at `code` and waits for it; how both ended.
fn start(code: &[u8]) -> (Machine, Vec<Result<Exit, Error>>) {
    let mut machine = Machine::with_vcpus(hv_soft::Options::default(), 2);
    machine.put(PAGE << 12, code);
    machine.code_at(code_of(0), |asm| {
        let mut again = asm.create_label();
        enable_apic(asm);
        msr(asm, 0x830, 1 << 32 | 0x4500);
        msr(asm, 0x830, 1 << 32 | 0x4600 | PAGE);
        asm.set_label(&mut again).unwrap();
        asm.pause().unwrap();
        asm.jmp(again).unwrap();
    });
    // A machine ends all its vCPUs with one; here somebody has to.
    let kicks = machine.kicks();
    let watch = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(500));
        kicks.iter().for_each(|kick| kick.kick());
    });
    let ended = run(&mut machine);
    watch.join().unwrap();
    (machine, ended)
}

fn said(machine: &Machine) -> Vec<u32> {
    let port = |said: &Said| match said {
        Said::Port(value) => Some(*value),
        Said::Load(..) | Said::Store(..) => None,
    };
    machine.said().iter().filter_map(port).collect()
}

/// `out SAY, eax` in 16-bit code.
const SAY_EAX: [u8; 3] = [0x66, 0xe7, SAY];
/// `out STOP, al; cli; hlt`
const END: [u8; 4] = [0xe6, STOP, 0xfa, 0xf4];

#[test]
fn ports_are_open_in_real_mode() {
    let code = [
        &[0x66, 0xb8, 0x78, 0x56, 0x34, 0x12][..], // mov eax, 0x12345678
        &SAY_EAX,
        &[0xba, SAY, 0, 0xef], // mov dx, SAY; out dx, ax
        &[0xe4, 0x80],         // in al, 0x80
        &SAY_EAX,
        &END,
    ]
    .concat();
    let (machine, ended) = start(&code);
    assert_eq!(ended[1].as_ref().unwrap(), &Exit::Kicked);
    assert_eq!(said(&machine), [0x1234_5678, 0x5678, 0x1234_56ff]);
}

#[test]
fn divisions_give_quotient_and_remainder() {
    let code = [
        &[0xb8, 0x07, 0x00][..], // mov ax, 7
        &[0xb3, 0xfe],           // mov bl, -2
        &[0xf6, 0xfb],           // idiv bl
        &SAY_EAX,
        &[0xba, 1, 0, 0xb8, 2, 0, 0xbb, 3, 0], // mov dx, 1; mov ax, 2; mov bx, 3
        &[0xf7, 0xf3],                         // div bx
        &SAY_EAX,
        &END,
    ]
    .concat();
    let (machine, ended) = start(&code);
    assert_eq!(ended[1].as_ref().unwrap(), &Exit::Kicked);
    // 7 / -2 = -3, 1 left; 0x10002 / 3.
    assert_eq!(said(&machine), [0x01fd, 0x5556]);
}

#[test]
fn faults_without_a_handler_are_triple_faults() {
    let cases: [(&str, &[u8]); 3] = [
        ("ud2", &[0x0f, 0x0b]),
        ("div by zero", &[0x31, 0xdb, 0xf7, 0xf3]),
        (
            "idiv that does not fit",
            &[0xb8, 0, 0x80, 0xb3, 1, 0xf6, 0xfb],
        ),
    ];
    for (name, code) in cases {
        let (_, ended) = start(code);
        assert_eq!(ended[1].as_ref().unwrap(), &Exit::TripleFault, "{name}");
    }
}

#[test]
fn what_is_not_executed_on_the_way_is_named() {
    let (_, ended) = start(&[0xd9, 0xe8]); // fld1
    let error = ended[1].as_ref().unwrap_err().to_string();
    assert!(
        error.contains("`fld1` is not executed before 64-bit mode"),
        "{error}"
    );
}
