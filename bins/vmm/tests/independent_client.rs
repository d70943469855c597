//! Somebody else's client for Firecracker drives `kombi-vmm` as it comes: the crate
//! `firecracker-rs-sdk` starts the program that it takes for Firecracker, speaks
//! HTTP/1.0 on one connection, and refuses whatever Firecracker would not have said.

mod host;

use std::time::{Duration, Instant};

use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::models::*;
use host::*;

/// Writes `a` to the console again and again: `mov dx, 0x3f8; mov al, 0x61; out dx, al;
/// jmp` back to the OUT.
const CHATTER: &[u8] = b"\x66\xba\xf8\x03\xb0\x61\xee\xeb\xfd";

/// A monitor that its client started under Firecracker's name, its console in `console`.
fn started(host: &Host) -> Instance {
    let firecracker = host.path("firecracker");
    std::os::unix::fs::symlink(VMM, &firecracker).unwrap();
    let mut instance = FirecrackerOption::new(&firecracker)
        .api_sock(host.path("api.sock"))
        .id("independent")
        .level("Warning")
        .show_level()
        .show_log_origin()
        .log_path(Some(host.path("log")))
        .stdin("/dev/null")
        .stdout(host.path("console"))
        .stderr(host.path("stderr"))
        .build()
        .unwrap();
    instance.start_vmm().unwrap();
    instance
}

fn machine() -> MachineConfiguration {
    MachineConfiguration {
        cpu_template: None,
        smt: Some(false),
        mem_size_mib: 32,
        track_dirty_pages: Some(false),
        vcpu_count: 1,
        huge_pages: Some(HugePageOption::None),
    }
}

fn boot_source(host: &Host, code: &[u8]) -> BootSource {
    std::fs::write(host.path("kernel"), elf(code)).unwrap();
    BootSource {
        boot_args: Some("console=ttyS0 reboot=k panic=1 pci=off".into()),
        initrd_path: None,
        kernel_image_path: host.path("kernel"),
    }
}

fn len(host: &Host) -> u64 {
    std::fs::metadata(host.path("console")).map_or(0, |file| file.len())
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let late = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < late, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_client_written_for_firecracker_drives_a_machine_through_its_whole_life() {
    let host = Host::new();
    let mut vm = started(&host);
    assert_eq!(
        vm.get_firecracker_version().unwrap().firecracker_version,
        "1.17.0"
    );
    let info = vm.describe_instance().unwrap();
    assert_eq!(info.id, "independent");
    assert_eq!(info.state, InstanceState::NotStarted);

    let metrics = host.path("metrics");
    std::fs::write(&metrics, "").unwrap();
    vm.put_metrics(&Metrics {
        metrics_path: metrics.clone(),
    })
    .unwrap();
    vm.put_machine_configuration(&machine()).unwrap();
    let got = vm.get_machine_configuration().unwrap();
    assert_eq!((got.vcpu_count, got.mem_size_mib), (1, 32));
    vm.put_guest_boot_source(&boot_source(&host, CHATTER))
        .unwrap();
    let disk = host.path("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    vm.put_guest_drive_by_id(&Drive {
        drive_id: "rootfs".into(),
        partuuid: None,
        is_root_device: true,
        cache_type: Some(CacheType::Unsafe),
        is_read_only: false,
        path_on_host: disk,
        rate_limiter: None,
        io_engine: Some(IoEngine::Sync),
        socket: None,
    })
    .unwrap();
    vm.put_guest_vsock(&Vsock {
        guest_cid: 3,
        uds_path: host.path("v.sock"),
        vsock_id: None,
    })
    .unwrap();
    vm.put_entropy_device(&EntropyDevice { rate_limiter: None })
        .unwrap();
    vm.put_balloon(&Balloon {
        amount_mib: 0,
        deflate_on_oom: true,
        stats_polling_interval_s: Some(1),
    })
    .unwrap();
    assert!(vm.describe_balloon_config().unwrap().deflate_on_oom);

    vm.start().unwrap();
    assert_eq!(
        vm.describe_instance().unwrap().state,
        InstanceState::Running
    );
    until("the guest never spoke", || len(&host) > 100);
    vm.pause().unwrap();
    assert_eq!(vm.describe_instance().unwrap().state, InstanceState::Paused);
    // What the guest wrote before is still on its way.
    let mut before = len(&host);
    until("a paused guest writes", || {
        std::thread::sleep(Duration::from_millis(50));
        let now = len(&host);
        std::mem::replace(&mut before, now) == now
    });
    vm.resume().unwrap();
    until("the guest is silent after its pause", || {
        len(&host) > before + 100
    });
    vm.create_sync_action(ActionType::FlushMetrics).unwrap();
    until("no metrics came", || {
        std::fs::read_to_string(&metrics)
            .unwrap()
            .contains("utc_timestamp_ms")
    });

    // Too late for this: the client sees an error, and the machine lives on.
    assert!(vm.put_machine_configuration(&machine()).is_err());
    assert_eq!(
        vm.describe_instance().unwrap().state,
        InstanceState::Running
    );

    // Dropping it, the client ends the monitor with SIGTERM.
    let pid = vm.firecracker_pid().unwrap();
    drop(vm);
    // Nobody waits for the child: what has ended stays as a zombie.
    until("the monitor never ended", || {
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .map_or(true, |stat| stat.contains(") Z "))
    });
}
