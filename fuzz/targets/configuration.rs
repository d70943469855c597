//! A configuration file, and a CPU template for itself: read and checked, or refused in
//! one line.
#![no_main]

use std::error::Error;

use blueprint::{Blueprint, CpuTemplate, Draft, limits};
use libfuzzer_sys::fuzz_target;

/// What everybody counts on who has a [`Blueprint`].
fn check_limits(machine: &Blueprint) {
    assert!((1..=limits::VCPU_COUNT_MAX).contains(&machine.vcpus()));
    let memory = limits::MEMORY_MIB_MIN..=limits::MEMORY_MIB_MAX;
    assert!(memory.contains(&machine.memory_mib()));
    let line = machine.cmdline();
    assert!(line.len() < limits::CMDLINE_BYTES_MAX && !line.contains(char::is_control));
    let ids = |kind: &[&String]| {
        let mut ids = kind.to_vec();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), kind.len(), "two devices of one name");
        for id in ids {
            assert!((1..=limits::ID_BYTES_MAX).contains(&id.len()) && !id.contains('/'));
        }
        kind.len()
    };
    let devices = ids(&machine
        .drives()
        .iter()
        .map(|one| &one.id)
        .collect::<Vec<_>>())
        + ids(&machine.pmem().iter().map(|one| &one.id).collect::<Vec<_>>())
        + ids(&machine
            .network_interfaces()
            .iter()
            .map(|one| &one.id)
            .collect::<Vec<_>>());
    assert!(devices <= limits::VIRTIO_DEVICES_MAX);
    let roots = machine
        .drives()
        .iter()
        .filter(|drive| drive.is_root)
        .count()
        + machine
            .pmem()
            .iter()
            .filter(|device| device.is_root)
            .count();
    assert!(roots <= 1);
    if let Some(balloon) = machine.balloon() {
        assert!(balloon.amount_mib <= machine.memory_mib());
    }
    if let Some(plug) = machine.memory_hotplug() {
        assert!(plug.block_mib.is_power_of_two());
        assert!(plug.slot_mib % plug.block_mib == 0 && plug.total_mib % plug.slot_mib == 0);
    }
    if let Some(vsock) = machine.vsock() {
        assert!((limits::GUEST_CID_MIN..u32::MAX).contains(&vsock.guest_cid));
    }
}

/// A template changes the bits that it names, and twice is as good as once.
fn check_template(template: &CpuTemplate) {
    let before = [0x5555_5555, 0xffff_0000, 0, u32::MAX];
    for modifier in &template.cpuid_modifiers {
        let once = template.apply(modifier.leaf, modifier.subleaf, before);
        assert_eq!(template.apply(modifier.leaf, modifier.subleaf, once), once);
    }
    for modifier in &template.msr_modifiers {
        let once = template.msr(modifier.addr, 0x5555_aaaa_ffff_0000);
        assert_eq!(template.msr(modifier.addr, once), once);
    }
}

/// An error and what it comes from, each in one line.
fn check_refusal(refusal: &dyn Error) {
    let mut cause = Some(refusal);
    while let Some(error) = cause {
        assert!(!error.to_string().contains('\n'), "{error}");
        cause = error.source();
    }
}

fuzz_target!(|bytes: &[u8]| {
    match Draft::from_json(bytes) {
        Ok(draft) => {
            let printed = serde_json::to_vec(&draft).expect("a draft can be printed");
            assert_eq!(Draft::from_json(&printed).expect("and read again"), draft);
            match draft.check() {
                Ok(machine) => {
                    check_limits(&machine);
                    check_template(machine.cpu_template());
                }
                Err(refusal) => check_refusal(&refusal),
            }
        }
        Err(refusal) => check_refusal(&refusal),
    }
    match blueprint::from_json::<CpuTemplate>(bytes) {
        Ok(template) => {
            let printed = serde_json::to_vec(&template).expect("a template can be printed");
            let again: CpuTemplate = serde_json::from_slice(&printed).expect("and read again");
            assert_eq!(again, template);
            check_template(&template);
        }
        Err(refusal) => check_refusal(&refusal),
    }
});
