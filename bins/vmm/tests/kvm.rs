//! The KVM engine in the process: every end of a guest, and what is said where there is
//! no KVM to use. These tests use /dev/kvm if this user may.

mod host;

use host::bare_driver::{BUFFER, WRITE, request};
use host::*;

fn kvm_can_be_opened() -> bool {
    let options = std::fs::File::options().read(true).write(true).clone();
    options.open("/dev/kvm").is_ok()
}

#[test]
fn each_end_of_a_guest_is_the_same_on_kvm() {
    for (code, exit, outcome) in [
        (POWER_OFF, 0, "power-off"),
        (RESET, 0, "reset"),
        (TRIPLE_FAULT, 140, "triple-fault"),
    ] {
        let host = Host::new();
        let rest = serde_json::json!({"serial": {"serial_out_path": "DIR/log"}});
        let config = host.config(code, rest);
        let output = host.run(&config, &["--engine", "kvm", "--status-fd", "1"]);
        let errors = String::from_utf8_lossy(&output.stderr);
        if !kvm_can_be_opened() {
            assert!(
                errors.contains("/dev/kvm") && errors.contains("--engine soft"),
                "{errors}"
            );
            assert_eq!(output.status.code(), Some(152), "{output:?}");
            continue;
        }
        let events = host.anonymous(&output.stdout);
        assert!(
            events.contains(&format!("\"outcome\":\"{outcome}\"")),
            "{events} {errors}"
        );
        assert_eq!(output.status.code(), Some(exit), "{outcome}: {output:?}");
    }
}

#[test]
fn a_guest_on_kvm_speaks_on_the_console_from_a_confined_thread() {
    let output = Host::new().boot(&say("hello from kvm\n"), &["--engine", "kvm"]);
    if kvm_can_be_opened() {
        let console = String::from_utf8_lossy(&output.stdout);
        assert_eq!(console, "hello from kvm\n", "{output:?}");
        assert_eq!(output.status.code(), Some(0));
    } else {
        assert_eq!(output.status.code(), Some(152), "{output:?}");
    }
}

#[test]
fn auto_says_which_engine_it_takes_and_why() {
    let output = Host::new().boot(RESET, &["--engine", "auto", "--level", "info"]);
    let log = String::from_utf8_lossy(&output.stderr);
    let says = log.lines().find(|line| line.contains("engine "));
    let says = says.unwrap_or_else(|| panic!("{log}"));
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let hardware = cpuinfo
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    if !kvm_can_be_opened() {
        assert!(
            says.contains("engine soft") && says.contains("/dev/kvm"),
            "{says}"
        );
    } else if !hardware {
        assert!(
            says.contains("engine soft") && says.contains("neither VMX nor SVM"),
            "{says}"
        );
    }
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_machine_on_kvm_stops_when_it_is_told_to() {
    if !kvm_can_be_opened() {
        let output = Host::new().boot(SPIN, &["--engine", "kvm"]);
        assert_eq!(output.status.code(), Some(152), "{output:?}");
        return;
    }
    // One that spins, and one that waits in HLT for what never comes.
    for code in [SPIN, HALT] {
        let host = Host::new();
        let rest = serde_json::json!({"serial": {"serial_out_path": "DIR/log"}});
        let config = host.config(code, rest);
        let mut child = host.start(&config, &["--engine", "kvm", "--status-fd", "1"]);
        let events = wait_for_started(&mut child);
        rustix::process::kill_process(pid(&child), rustix::process::Signal::TERM).unwrap();
        let output = finish(child);
        drop(events);
        assert_eq!(output.status.code(), Some(143), "{output:?}");
    }
}

#[test]
fn a_kick_reaches_its_device_on_both_engines() {
    for engine in ["soft", "kvm"] {
        if engine == "kvm" && !kvm_can_be_opened() {
            continue;
        }
        let host = Host::new();
        let config = host.config(
            &request(&[(BUFFER, 8, WRITE)], 0, "served\n"),
            serde_json::json!({"entropy": {}}),
        );
        let output = host.run(&config, &["--engine", engine]);
        let console = String::from_utf8_lossy(&output.stdout);
        assert_eq!(console, "served\n", "{engine}: {output:?}");
        assert_eq!(output.status.code(), Some(0), "{engine}: {output:?}");
    }
}

/// Where KVM is played by software it may lack this instruction, which is then completed by
/// the software engine: on the vCPU's thread, inside of its filter.
#[test]
fn sixteen_bytes_are_exchanged_also_where_kvm_knows_no_such_instruction() {
    // mov esi, 24 MiB; xor eax, eax; xor edx, edx; lock cmpxchg16b [rsi]; jnz itself
    let mut code = b"\xbe\x00\x00\x80\x01\x31\xc0\x31\xd2\xf0\x48\x0f\xc7\x0e\x75\xfe".to_vec();
    code.extend(say("exchanged\n"));
    let output = Host::new().boot(&code, &["--engine", "kvm"]);
    if kvm_can_be_opened() {
        let console = String::from_utf8_lossy(&output.stdout);
        assert_eq!(console, "exchanged\n", "{output:?}");
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    } else {
        assert_eq!(output.status.code(), Some(152), "{output:?}");
    }
}

/// The guest looks at CPUID itself; a register that KVM lacks ends the start, by its name.
#[test]
fn a_cpu_template_is_what_the_guest_sees_on_kvm() {
    // mov eax, 1; cpuid; cmp eax, 0x6f2; jnz itself
    let mut code = b"\xb8\x01\x00\x00\x00\x0f\xa2\x3d\xf2\x06\x00\x00\x75\xfe".to_vec();
    code.extend(say("as the template has it\n"));
    let template = |msr: &str| {
        serde_json::json!({"cpu-config": {
            "kvm_capabilities": ["55", "!56"],
            "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
                {"register": "eax", "bitmap": "0b00000000000000000000011011110010"}
            ]}],
            "msr_modifiers": [{"addr": msr, "bitmap": "0b1xxx"}],
        }})
    };
    let host = Host::new();
    let output = host.run(&host.config(&code, template("0x1a0")), &["--engine", "kvm"]);
    if !kvm_can_be_opened() {
        assert_eq!(output.status.code(), Some(152), "{output:?}");
        return;
    }
    let console = String::from_utf8_lossy(&output.stdout);
    assert_eq!(console, "as the template has it\n", "{output:?}");
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    let host = Host::new();
    let output = host.run(
        &host.config(&code, template("0x12345678")),
        &["--engine", "kvm"],
    );
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("MSR 0x12345678"), "{errors}");
    assert_eq!(output.status.code(), Some(152), "{output:?}");
}

/// Where KVM is played by software it begins a hypercall again and again, until the vCPU's
/// thread, inside of its filter, has it completed; from then on it watches page faults too.
#[test]
fn a_hypercall_of_the_guests_kernel_is_answered_also_where_kvm_never_ends_it() {
    // mov ecx, LSTAR; mov eax, 0x1000; xor edx, edx; wrmsr
    let mut code = b"\xb9\x82\x00\x00\xc0\xb8\x00\x10\x00\x00\x31\xd2\x0f\x30".to_vec();
    // A gate for page faults: mov dword ptr [0xe0], 0x101234
    code.extend(b"\xc7\x04\x25\xe0\x00\x00\x00\x34\x12\x10\x00");
    // mov eax, 99; vmcall; cmp eax, -1000; jnz itself; twice
    for _ in 0..2 {
        code.extend(b"\xb8\x63\x00\x00\x00\x0f\x01\xc1\x3d\x18\xfc\xff\xff\x75\xfe");
    }
    code.extend(say("answered\n"));
    let output = Host::new().boot(&code, &["--engine", "kvm"]);
    if kvm_can_be_opened() {
        let console = String::from_utf8_lossy(&output.stdout);
        assert_eq!(console, "answered\n", "{output:?}");
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    } else {
        assert_eq!(output.status.code(), Some(152), "{output:?}");
    }
}
