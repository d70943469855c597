//! Limits, the file's shape, and that no JSON makes the parser panic.

use proptest::prelude::*;

use crate::{Blueprint, CacheType, Draft, DraftError, Engine, Store};

const FULL: &str = r#"{
    "boot-source": {
        "kernel_image_path": "/k/vmlinux",
        "initrd_path": "/k/initrd",
        "boot_args": "console=ttyS0"
    },
    "machine-config": {"vcpu_count": 1, "mem_size_mib": 256, "smt": false, "engine": "soft"},
    "drives": [
        {"drive_id": "data", "path_on_host": "/d/data", "is_root_device": false},
        {"drive_id": "rootfs", "path_on_host": "/d/root", "is_root_device": true, "is_read_only": true}
    ],
    "vsock": {"guest_cid": 3, "uds_path": "/run/v.sock"},
    "entropy": {},
    "serial": {"serial_out_path": "/log"}
}"#;

fn check(json: &str) -> Result<Blueprint, DraftError> {
    Draft::from_json(json.as_bytes())?.check()
}

/// A draft of the least that is needed, with `rest` as further members.
fn with(rest: &str) -> Result<Blueprint, DraftError> {
    check(&format!(
        r#"{{"boot-source": {{"kernel_image_path": "/k"}}{rest}}}"#
    ))
}

fn refusal(rest: &str) -> String {
    with(rest).unwrap_err().to_string()
}

#[test]
fn a_full_file_is_understood() {
    let blueprint = check(FULL).unwrap();
    assert_eq!(blueprint.kernel().to_str(), Some("/k/vmlinux"));
    assert_eq!(blueprint.initrd().unwrap().to_str(), Some("/k/initrd"));
    assert_eq!(
        (blueprint.vcpus(), blueprint.memory_bytes()),
        (1, 256 << 20)
    );
    assert_eq!(blueprint.engine(), Engine::Soft);
    assert_eq!(blueprint.vsock().unwrap().guest_cid, 3);
    assert!(blueprint.entropy().is_some());
    assert_eq!(blueprint.serial_out().unwrap().to_str(), Some("/log"));
}

#[test]
fn the_root_device_comes_first_and_the_kernel_is_told() {
    let blueprint = check(FULL).unwrap();
    let ids: Vec<_> = blueprint
        .drives()
        .iter()
        .map(|drive| drive.id.as_str())
        .collect();
    assert_eq!(ids, ["rootfs", "data"]);
    assert_eq!(blueprint.cmdline(), "console=ttyS0 root=/dev/vda ro");
}

#[test]
fn what_is_not_said_has_firecrackers_defaults() {
    let blueprint = with("").unwrap();
    assert_eq!((blueprint.vcpus(), blueprint.memory_mib()), (1, 128));
    assert_eq!(blueprint.engine(), Engine::Auto);
    assert!(blueprint.cmdline().starts_with("reboot=k panic=1"));
    assert!(blueprint.entropy().is_none());
    assert_eq!((blueprint.drives(), blueprint.vsock()), (&[][..], None));
}

#[test]
fn drafts_survive_being_written_and_read() {
    let draft = Draft::from_json(FULL.as_bytes()).unwrap();
    let text = serde_json::to_vec(&draft).unwrap();
    assert_eq!(Draft::from_json(&text).unwrap(), draft);
}

#[test]
fn unknown_fields_are_refused_by_name() {
    let error = with(r#", "frobs": 1"#).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("unknown field `frobs`"), "{cause}");
}

#[test]
fn numbers_out_of_bounds_are_refused_with_the_bounds() {
    for (rest, wanted) in [
        (
            r#", "machine-config": {"vcpu_count": 0}"#,
            "vcpu_count 0 is not between 1 and 32",
        ),
        (
            r#", "machine-config": {"vcpu_count": 33}"#,
            "vcpu_count 33 is not between 1 and 32",
        ),
        (
            r#", "machine-config": {"vcpu_count": 9, "engine": "soft"}"#,
            "vcpu_count 9 is more than the software engine's 8",
        ),
        (
            r#", "machine-config": {"mem_size_mib": 31}"#,
            "mem_size_mib 31 is not between 32 and 1048576",
        ),
        (
            r#", "machine-config": {"mem_size_mib": 18446744073709551615}"#,
            "mem_size_mib 18446744073709551615 is not between 32 and 1048576",
        ),
        (
            r#", "vsock": {"guest_cid": 2, "uds_path": "/s"}"#,
            "guest_cid 2 is not between 3 and 4294967294",
        ),
        (
            r#", "vsock": {"guest_cid": 4294967295, "uds_path": "/s"}"#,
            "guest_cid 4294967295 is not between 3 and 4294967294",
        ),
    ] {
        assert_eq!(refusal(rest), wanted);
    }
    assert_eq!(
        with(r#", "machine-config": {"vcpu_count": 32}"#)
            .unwrap()
            .vcpus(),
        32
    );
}

#[test]
fn ids_are_letters_digits_and_underscores_and_unique() {
    let drive = |id: &str| {
        format!(r#"{{"drive_id": "{id}", "path_on_host": "/d", "is_root_device": false}}"#)
    };
    for id in ["", "a-b", "a/b", "ä", &"x".repeat(65)] {
        let got = with(&format!(r#", "drives": [{}]"#, drive(id)));
        assert!(matches!(got, Err(DraftError::Id { .. })), "{id:?}");
    }
    let got = with(&format!(r#", "drives": [{0}, {0}]"#, drive("a_1")));
    assert!(matches!(got, Err(DraftError::IdTwice { id, .. }) if id == "a_1"));
}

#[test]
fn a_second_root_device_is_refused() {
    let root =
        |id| format!(r#"{{"drive_id": "{id}", "path_on_host": "/d", "is_root_device": true}}"#);
    let rest = format!(r#", "drives": [{}, {}]"#, root("a"), root("b"));
    assert_eq!(
        refusal(&rest),
        r#""a" and "b" both claim to be the root device"#
    );
}

#[test]
fn seventeen_virtio_devices_fit_and_eighteen_do_not() {
    let drives = |count: usize| {
        let list: Vec<_> = (0..count)
            .map(|i| {
                format!(r#"{{"drive_id": "d{i}", "path_on_host": "/d", "is_root_device": false}}"#)
            })
            .collect();
        format!(r#", "entropy": {{}}, "drives": [{}]"#, list.join(","))
    };
    assert_eq!(with(&drives(16)).unwrap().drives().len(), 16);
    assert!(matches!(
        with(&drives(17)),
        Err(DraftError::TooManyDevices { asked: 18 })
    ));
}

#[test]
fn the_command_line_is_bounded_and_printable() {
    let args = |line: &str| {
        let line = serde_json::to_string(line).unwrap();
        check(&format!(
            r#"{{"boot-source": {{"kernel_image_path": "/k", "boot_args": {line}}}}}"#
        ))
    };
    assert_eq!(args(&"x".repeat(2047)).unwrap().cmdline().len(), 2047);
    assert!(matches!(
        args(&"x".repeat(2048)),
        Err(DraftError::CommandLineLength { len: 2048 })
    ));
    assert!(matches!(
        args("a\nb"),
        Err(DraftError::CommandLineCharacter { byte: 10, at: 1 })
    ));
}

#[test]
fn paths_that_cannot_be_opened_are_refused_with_their_field() {
    let got = check(r#"{"boot-source": {"kernel_image_path": ""}}"#);
    assert!(matches!(
        got,
        Err(DraftError::Path {
            field: "kernel_image_path",
            ..
        })
    ));
    let long = "s".repeat(108);
    let got = with(&format!(
        r#", "vsock": {{"guest_cid": 3, "uds_path": "{long}"}}"#
    ));
    assert!(matches!(got, Err(DraftError::SocketPathLength { .. })));
}

/// One interface, with `rest` as further members.
fn interface(id: &str, rest: &str) -> String {
    format!(r#"{{"iface_id": "{id}", "host_dev_name": "tap_{id}"{rest}}}"#)
}

fn interfaces(list: &[String], rest: &str) -> Result<Blueprint, DraftError> {
    with(&format!(
        r#", "network-interfaces": [{}]{rest}"#,
        list.join(",")
    ))
}

#[test]
fn an_interface_has_its_address_its_limits_and_the_metadata_service() {
    let limiter = r#"{"bandwidth": {"size": 5, "refill_time": 7}}"#;
    let rest =
        format!(r#", "guest_mac": "06:00:AC:10:00:02", "mtu": 1500, "tx_rate_limiter": {limiter}"#);
    let list = [interface("eth0", &rest), interface("eth1", "")];
    let mmds = r#", "mmds-config": {"version": "V2", "network_interfaces": ["eth1"]}"#;
    let blueprint = interfaces(&list, mmds).unwrap();
    let [first, second] = blueprint.network_interfaces() else {
        panic!("two interfaces");
    };
    assert_eq!(first.mac, Some([6, 0, 0xac, 16, 0, 2]));
    assert_eq!((first.mtu, first.mmds), (Some(1500), false));
    let bandwidth = first.tx_limiter.bandwidth.unwrap();
    assert_eq!((bandwidth.size, bandwidth.refill_time), (5, 7));
    assert_eq!(first.rx_limiter, crate::RateLimiter::default());
    assert_eq!((second.tap.as_str(), second.mmds), ("tap_eth1", true));
    assert_eq!(
        blueprint.mmds().unwrap().address.to_string(),
        "169.254.169.254"
    );
}

#[test]
fn interfaces_that_cannot_be_are_refused() {
    for mac in [
        "",
        "06:00:ac:10:00",
        "06:00:ac:10:00:02:03",
        "+6:00:ac:10:00:02",
        "é6:00:ac:10:00:2",
    ] {
        let got = interfaces(&[interface("a", &format!(r#", "guest_mac": "{mac}""#))], "");
        assert!(matches!(got, Err(DraftError::Mac { .. })), "{mac}");
    }
    for mtu in [0, 67, 65536, u64::MAX] {
        let got = interfaces(&[interface("a", &format!(r#", "mtu": {mtu}"#))], "");
        assert!(matches!(got, Err(DraftError::Mtu { .. })), "{mtu}");
    }
    for tap in ["", "a/b", "a b", "..", "0123456789abcdef"] {
        let list = [format!(r#"{{"iface_id": "a", "host_dev_name": "{tap}"}}"#)];
        let got = interfaces(&list, "");
        assert!(matches!(got, Err(DraftError::TapName { .. })), "{tap}");
    }
    let mac = r#", "guest_mac": "06:00:ac:10:00:02""#;
    let got = interfaces(&[interface("a", mac), interface("b", mac)], "");
    assert!(matches!(got, Err(DraftError::MacTwice { .. })));
    let same_tap = interface("b", "").replace("tap_b", "tap_a");
    let got = interfaces(&[interface("a", ""), same_tap], "");
    assert!(matches!(got, Err(DraftError::TapTwice { .. })));
    let got = interfaces(&[interface("a", ""), interface("a", "")], "");
    assert!(matches!(got, Err(DraftError::IdTwice { .. })));
}

#[test]
fn a_metadata_service_needs_an_interface_and_a_link_local_address() {
    let mmds = |rest: &str| {
        let rest = format!(r#", "mmds-config": {{{rest}}}"#);
        interfaces(&[interface("a", "")], &rest)
    };
    let got = mmds(r#""network_interfaces": []"#);
    assert!(matches!(got, Err(DraftError::MmdsWithoutInterface)));
    let got = mmds(r#""network_interfaces": ["b"]"#);
    assert!(matches!(got, Err(DraftError::MmdsInterface { .. })));
    for address in ["169.254.0.1", "169.254.255.1", "10.0.0.1"] {
        let got = mmds(&format!(
            r#""network_interfaces": ["a"], "ipv4_address": "{address}""#
        ));
        assert!(
            matches!(got, Err(DraftError::MmdsAddress { .. })),
            "{address}"
        );
    }
}

#[test]
fn a_root_device_may_be_a_partition_or_persistent_memory() {
    let root = r#", "drives": [{"drive_id": "a", "path_on_host": "/d", "is_root_device": true, "partuuid": "0eaa91a0-01"}]"#;
    let cmdline = with(root).unwrap().cmdline().to_owned();
    assert!(
        cmdline.ends_with(" root=PARTUUID=0eaa91a0-01 rw"),
        "{cmdline}"
    );
    let pmem = r#", "pmem": [{"id": "a", "path_on_host": "/a"}, {"id": "b", "path_on_host": "/b", "root_device": true, "read_only": true}]"#;
    let cmdline = with(pmem).unwrap().cmdline().to_owned();
    assert!(cmdline.ends_with(" root=/dev/pmem1 ro"), "{cmdline}");
    let got = with(&format!("{root}{pmem}"));
    assert!(matches!(got, Err(DraftError::TwoRoots { .. })));
    let uuid = root.replace("0eaa91a0-01", "x init=/bin/sh");
    assert!(matches!(with(&uuid), Err(DraftError::Partuuid { .. })));
}

#[test]
fn balloon_and_hotplug_fit_the_machine_and_themselves() {
    let balloon = |mib: u64| {
        with(&format!(
            r#", "balloon": {{"amount_mib": {mib}, "deflate_on_oom": true}}"#
        ))
    };
    assert_eq!(balloon(128).unwrap().balloon().unwrap().amount_mib, 128);
    assert!(matches!(balloon(129), Err(DraftError::BalloonSize { .. })));
    let hotplug = |total: u64, slot: u64, block: u64| {
        with(&format!(
            r#", "memory-hotplug": {{"total_size_mib": {total}, "slot_size_mib": {slot}, "block_size_mib": {block}}}"#
        ))
    };
    assert!(hotplug(1024, 256, 4).is_ok());
    for (total, slot, block) in [
        (1024, 256, 1),
        (1024, 256, 3),
        (1024, 64, 2),
        (1024, 130, 4),
        (128, 256, 2),
        (300, 256, 2),
        (1 << 21, 128, 2),
        (u64::MAX, 128, 2),
    ] {
        let got = hotplug(total, slot, block);
        assert!(
            matches!(got, Err(DraftError::Hotplug { .. })),
            "{total} {slot} {block}"
        );
    }
}

#[test]
fn what_firecracker_deprecated_or_does_elsewhere_is_refused_with_the_way_out() {
    assert_eq!(
        refusal(r#", "machine-config": {"cpu_template": "T2"}"#),
        "cpu_template T2 is not supported: give a template of your own to cpu-config"
    );
    assert!(with(r#", "machine-config": {"cpu_template": "None"}"#).is_ok());
    assert_eq!(
        refusal(r#", "drives": [{"drive_id": "a", "is_root_device": false}]"#),
        "drive \"a\" has no path_on_host"
    );
    let odd = r#", "machine-config": {"vcpu_count": 3, "smt": true, "mem_size_mib": 128}"#;
    assert_eq!(
        refusal(odd),
        "vcpu_count 3 is odd, with smt it must be 1 or even"
    );
}

#[test]
fn a_drive_with_a_back_end_has_nothing_that_only_a_file_has() {
    let drive = |rest: &str| {
        let id = r#""drive_id": "a", "is_root_device": true, "socket": "/s""#;
        format!(r#", "drives": [{{{id}{rest}}}]"#)
    };
    let blueprint = with(&drive(r#", "cache_type": "Writeback", "partuuid": "1-2""#)).unwrap();
    let socket = Store::BackEnd {
        socket: "/s".into(),
    };
    let one = &blueprint.drives()[0];
    assert_eq!((&one.store, one.cache), (&socket, CacheType::Writeback));
    assert!(blueprint.cmdline().ends_with(" root=PARTUUID=1-2 rw"));
    for (field, value) in [
        ("path_on_host", "\"/d\""),
        ("is_read_only", "false"),
        ("rate_limiter", "{}"),
        ("io_engine", "\"Sync\""),
    ] {
        assert_eq!(
            refusal(&drive(&format!(r#", "{field}": {value}"#))),
            format!(
                "drive \"a\" has both socket and {field}: its back end decides, leave {field} out"
            )
        );
    }
    let empty = refusal(&drive("").replace("/s", ""));
    assert_eq!(empty, "socket \"\" is empty or holds a NUL byte");
    let long = refusal(&drive("").replace("/s", &"s".repeat(108)));
    assert!(long.ends_with("is longer than the 107 bytes of a socket address"));
}

/// JSON of any shape, with the names that mean something more often than not.
fn json() -> impl Strategy<Value = serde_json::Value> {
    let names = prop::sample::select(vec![
        "boot-source",
        "kernel_image_path",
        "initrd_path",
        "boot_args",
        "machine-config",
        "vcpu_count",
        "mem_size_mib",
        "engine",
        "drives",
        "drive_id",
        "path_on_host",
        "is_root_device",
        "is_read_only",
        "vsock",
        "guest_cid",
        "uds_path",
        "entropy",
        "serial",
        "serial_out_path",
        "smt",
        "balloon",
        "amount_mib",
        "deflate_on_oom",
        "network-interfaces",
        "iface_id",
        "host_dev_name",
        "guest_mac",
        "mtu",
        "mmds-config",
        "network_interfaces",
        "ipv4_address",
        "pmem",
        "id",
        "root_device",
        "memory-hotplug",
        "total_size_mib",
        "slot_size_mib",
        "block_size_mib",
        "logger",
        "metrics",
        "rate_limiter",
        "bandwidth",
        "size",
        "refill_time",
        "partuuid",
        "io_engine",
        "cache_type",
        "other",
    ]);
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        ".{0,80}".prop_map(Into::into),
        Just("soft".into()),
    ];
    leaf.prop_recursive(4, 64, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
            prop::collection::vec((names.clone(), inner), 0..8).prop_map(|members| {
                serde_json::Value::Object(
                    members
                        .into_iter()
                        .map(|(name, value)| (name.to_owned(), value))
                        .collect(),
                )
            }),
        ]
    })
}

proptest! {
    #[test]
    fn no_json_makes_it_panic(value in json()) {
        let blueprint = check(&value.to_string());
        prop_assert!(blueprint.is_ok() || !blueprint.unwrap_err().to_string().is_empty());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Draft::from_json(&bytes).and_then(Draft::check).is_err());
    }

    #[test]
    fn every_blueprint_keeps_the_limits(
        vcpus in 0_u64..40, mib in 0_u64..3000, cid in 0_u64..10, drives in 0_usize..20,
    ) {
        let list: Vec<_> = (0..drives)
            .map(|i| format!(r#"{{"drive_id": "d{i}", "path_on_host": "/d", "is_root_device": false}}"#))
            .collect();
        let got = with(&format!(
            r#", "machine-config": {{"vcpu_count": {vcpus}, "mem_size_mib": {mib}}},
               "vsock": {{"guest_cid": {cid}, "uds_path": "/s"}}, "drives": [{}]"#,
            list.join(",")
        ));
        let fits = (1..=32).contains(&vcpus) && mib >= 32 && cid >= 3 && drives <= 16;
        prop_assert_eq!(got.is_ok(), fits);
    }
}
