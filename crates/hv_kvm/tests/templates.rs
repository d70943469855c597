//! CPU templates on KVM: what the guest itself reads by CPUID and RDMSR.

mod bare;

use bare::{Machine, on_kvm, stop};
use hv::{Error, GuestRam, Hypervisor, Vcpu};
use hv_kvm::{Kind, KvmHypervisor, KvmPartition, Options};
use iced_x86::code_asm::*;
use x86::cpu_template::CpuTemplate;

fn engine(template: serde_json::Value) -> Result<KvmHypervisor, Error> {
    let template: CpuTemplate = serde_json::from_value(template).unwrap();
    KvmHypervisor::open_with(Options::default(), template)
}

fn machine(template: serde_json::Value) -> Machine<KvmPartition> {
    Machine::new(&engine(template).unwrap())
}

/// EAX to EDX of a leaf.
fn cpuid(machine: &mut Machine<KvmPartition>, leaf: u32, sub: u32) -> [u32; 4] {
    machine.code(|asm| {
        asm.mov(eax, leaf).unwrap();
        asm.mov(ecx, sub).unwrap();
        asm.cpuid().unwrap();
        asm.mov(r8d, eax).unwrap();
        stop(asm);
    });
    machine.change(|state| state.rip = bare::CODE);
    let state = machine.run_to_stop();
    [state.gpr[8], state.gpr[3], state.gpr[1], state.gpr[2]].map(|value| value as u32)
}

fn msr(machine: &mut Machine<KvmPartition>, index: u32) -> u64 {
    machine.code(|asm| {
        asm.mov(ecx, index).unwrap();
        asm.rdmsr().unwrap();
        asm.mov(r8d, eax).unwrap();
        stop(asm);
    });
    machine.change(|state| state.rip = bare::CODE);
    let state = machine.run_to_stop();
    state.gpr[2] << 32 | state.gpr[8]
}

fn refusal(template: serde_json::Value) -> String {
    let create = |engine: KvmHypervisor| {
        let ram = GuestRam::new(ram::ByteSize::mib(1)).unwrap();
        engine.create(ram, 1).map(|_| ())
    };
    let named = template.to_string();
    let refused = engine(template).and_then(create).expect_err(&named);
    assert!(matches!(refused, Error::HostLacks { .. }), "{refused:?}");
    refused.to_string()
}

/// A bitmap of 32 bits that says something of some.
fn bits(some: &[(usize, u8)]) -> String {
    let mut digits = [b'x'; 32];
    for (bit, digit) in some {
        digits[31 - bit] = *digit;
    }
    format!("0b{}", String::from_utf8_lossy(&digits))
}

fn leaf(leaf: &str, subleaf: &str, flags: u32, register: &str, bitmap: &str) -> serde_json::Value {
    serde_json::json!({"leaf": leaf, "subleaf": subleaf, "flags": flags,
        "modifiers": [{"register": register, "bitmap": bitmap}]})
}

#[test]
fn a_template_clears_and_sets_what_cpuid_gives() {
    if on_kvm().is_none() {
        return;
    }
    let mut plain = machine(serde_json::json!({}));
    let mut changed = machine(serde_json::json!({"cpuid_modifiers": [
        // POPCNT goes, bit 2 (which no model shows) comes; the version and a part of the
        // brand are given.
        leaf("0x1", "0x0", 0, "ecx", &bits(&[(23, b'0'), (2, b'1')])),
        leaf("0x1", "0x0", 0, "eax", "0b00000000000000000000011011110010"),
        leaf("0x80000002", "0x0", 0, "ecx", &format!("0b{:032b}", 0x6162_6364)),
    ]}));
    let (before, after) = (cpuid(&mut plain, 1, 0), cpuid(&mut changed, 1, 0));
    assert_eq!(after[0], 0b0110_1111_0010);
    assert_eq!((after[1], after[3]), (before[1], before[3]));
    // A KVM played by software gives features of the processor back, whatever it was told:
    // it cannot keep them from user code, which runs there.
    let gone = match hv_kvm::probe().unwrap() {
        Kind::Hardware => 1 << 23,
        Kind::Software { .. } => 0,
    };
    assert_eq!(after[2], before[2] & !gone | 1 << 2);
    let (before, after) = (
        cpuid(&mut plain, 0x8000_0002, 0),
        cpuid(&mut changed, 0x8000_0002, 0),
    );
    assert_eq!(after, [before[0], before[1], 0x6162_6364, before[3]]);
    assert_eq!(cpuid(&mut plain, 0, 0), cpuid(&mut changed, 0, 0));
}

#[test]
fn where_a_vcpu_is_among_others_is_no_templates_to_say() {
    if on_kvm().is_none() {
        return;
    }
    let mut plain = machine(serde_json::json!({}));
    let ones = format!("0b{}", "1".repeat(32));
    let zeros = bits(&[(31, b'0'), (24, b'0')]);
    let mut changed = machine(serde_json::json!({"cpuid_modifiers": [
        leaf("0x1", "0x0", 0, "ebx", &ones),
        leaf("0x1", "0x0", 0, "ecx", &zeros),
        leaf("0xb", "0x0", 1, "edx", &ones),
    ]}));
    let (before, after) = (cpuid(&mut plain, 1, 0), cpuid(&mut changed, 1, 0));
    assert_eq!(after[1], before[1]);
    // That it is a virtual CPU, and that its APIC has deadlines.
    assert_eq!(after[2], before[2]);
    assert_eq!(cpuid(&mut plain, 0xb, 0), cpuid(&mut changed, 0xb, 0));
}

#[test]
fn a_template_changes_what_an_msr_starts_with() {
    if on_kvm().is_none() {
        return;
    }
    // IA32_MISC_ENABLE, of which firmware sets bit 0; IA32_PAT.
    let template = serde_json::json!({"msr_modifiers": [
        {"addr": "0x1a0", "bitmap": "0b1xxxxxxxxxxx0"},
        {"addr": "0x277", "bitmap": "0b00000110"},
    ]});
    let before = msr(&mut machine(serde_json::json!({})), 0x277);
    let mut changed = machine(template);
    assert_eq!(msr(&mut changed, 0x277), before & !0xff | 6);
    assert_eq!(msr(&mut changed, 0x1a0) & 0x1001, 0x1000);
    // They are state like any other.
    let saved = changed.vcpu.state().unwrap();
    let mut next = machine(serde_json::json!({}));
    next.vcpu.set_state(&saved).unwrap();
    assert_eq!(msr(&mut next, 0x277), before & !0xff | 6);
}

#[test]
fn what_kvm_lacks_is_refused_by_name() {
    if on_kvm().is_none() {
        return;
    }
    let words = refusal(serde_json::json!({"msr_modifiers": [
        {"addr": "0x12345678", "bitmap": "0b1"}
    ]}));
    assert!(
        words.contains("MSR 0x12345678") && words.contains("msr_modifiers"),
        "{words}"
    );
    // Reserved bits of the APIC's base.
    let words = refusal(serde_json::json!({"msr_modifiers": [
        {"addr": "0x1b", "bitmap": format!("0b{}", "1".repeat(64))}
    ]}));
    assert!(
        words.contains("refuses") && words.contains("0x1b"),
        "{words}"
    );
    let words = refusal(serde_json::json!({"cpuid_modifiers": [
        leaf("0x1234", "0x1", 0, "eax", "0b1")
    ]}));
    assert!(
        words.contains("leaf 0x1234, subleaf 0x1") && words.contains("cpuid_modifiers"),
        "{words}"
    );
}

#[test]
fn capabilities_are_looked_for_and_let_off() {
    if on_kvm().is_none() {
        return;
    }
    // KVM_CAP_XSAVE there is, the last number there is not.
    assert!(engine(serde_json::json!({"kvm_capabilities": ["55", "!56"]})).is_ok());
    let words = refusal(serde_json::json!({"kvm_capabilities": ["55", "65535"]}));
    assert!(
        words.contains("capability 65535") && words.contains("kvm_capabilities"),
        "{words}"
    );
}
