//! Limits, the file's shape, and that no JSON makes the parser panic.

use proptest::prelude::*;

use crate::{Blueprint, Draft, DraftError, Engine};

const FULL: &str = r#"{
    "boot-source": {
        "kernel_image_path": "/k/vmlinux",
        "initrd_path": "/k/initrd",
        "boot_args": "console=ttyS0"
    },
    "machine-config": {"vcpu_count": 1, "mem_size_mib": 256, "smt": false, "engine": "soft"},
    "drives": [
        {"drive_id": "data", "path_on_host": "/d/data"},
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
    assert!(blueprint.entropy());
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
    assert!(!blueprint.entropy());
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
    let drive = |id: &str| format!(r#"{{"drive_id": "{id}", "path_on_host": "/d"}}"#);
    for id in ["", "a-b", "a/b", "ä", &"x".repeat(65)] {
        let got = with(&format!(r#", "drives": [{}]"#, drive(id)));
        assert!(matches!(got, Err(DraftError::Id { .. })), "{id:?}");
    }
    let got = with(&format!(r#", "drives": [{0}, {0}]"#, drive("a_1")));
    assert!(matches!(got, Err(DraftError::IdTwice { id }) if id == "a_1"));
}

#[test]
fn a_second_root_device_is_refused() {
    let root =
        |id| format!(r#"{{"drive_id": "{id}", "path_on_host": "/d", "is_root_device": true}}"#);
    let rest = format!(r#", "drives": [{}, {}]"#, root("a"), root("b"));
    assert_eq!(
        refusal(&rest),
        r#"drives "a" and "b" both claim to be the root device"#
    );
}

#[test]
fn seventeen_virtio_devices_fit_and_eighteen_do_not() {
    let drives = |count: usize| {
        let list: Vec<_> = (0..count)
            .map(|i| format!(r#"{{"drive_id": "d{i}", "path_on_host": "/d"}}"#))
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
            .map(|i| format!(r#"{{"drive_id": "d{i}", "path_on_host": "/d"}}"#))
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
