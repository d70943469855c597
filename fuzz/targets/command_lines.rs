//! The command lines of kombi-vmm and kombi-jailer: understood and checked, or refused in
//! words. The first byte chooses the program; arguments end with a NUL byte.
//!
//! Programs are no libraries: their files are compiled into this one.
#![no_main]
#![allow(
    dead_code,
    reason = "of the programs, only what reads arguments is used"
)]

#[path = "../../bins/jailer/src/args.rs"]
mod args;
#[path = "../../bins/jailer/src/cgroups.rs"]
mod cgroups;
#[path = "../../bins/jailer/src/error.rs"]
mod error;
#[path = "../../bins/jailer/src/limits.rs"]
mod limits;
#[path = "../../bins/vmm/src/args.rs"]
mod monitor;
#[path = "../../bins/jailer/src/plan.rs"]
mod plan;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use clap::Parser;
use libfuzzer_sys::fuzz_target;

fn is_plain(id: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=64).contains(&id.len()) && id.bytes().all(plain)
}

fn climbs(path: &Path) -> bool {
    path.components().any(|part| part == Component::ParentDir)
}

/// The monitor's.
fn check_monitor<'a>(words: impl Iterator<Item = &'a OsStr>) {
    let program = OsStr::new("kombi-vmm");
    match monitor::Args::try_parse_from(std::iter::once(program).chain(words)) {
        Ok(args) => {
            assert!(args.jail_probe || is_plain(&args.id), "{:?}", args.id);
            assert!(!args.no_api || args.config_file.is_some());
            assert!(!args.jail || args.no_api);
            assert!(!args.no_seccomp || args.seccomp_filter.is_none());
            assert_eq!(
                args.start_up().is_some(),
                args.start_time_us.is_some() && args.start_time_cpu_us.is_some()
            );
            assert_eq!(args.logger().log_path, args.log_path);
        }
        Err(refusal) => assert!(!refusal.to_string().is_empty()),
    }
}

/// The jailer's.
fn check_jailer<'a>(words: impl Iterator<Item = &'a OsStr>) {
    let program = OsStr::new("kombi-jailer");
    let args = match args::Args::try_parse_from(std::iter::once(program).chain(words)) {
        Ok(args) => args,
        Err(refusal) => return assert!(!refusal.to_string().is_empty()),
    };
    match plan::Plan::check(args) {
        Ok(plan) => {
            assert!(is_plain(&plan.id), "{:?}", plan.id);
            assert!(
                plan.root.is_absolute() && !climbs(&plan.root),
                "{:?}",
                plan.root
            );
            assert!(plan.root.ends_with(Path::new(&plan.id).join("root")));
            assert_eq!(plan.inner_exec_file().components().count(), 2);
            assert_eq!(plan.inner_pid_file().components().count(), 2);
        }
        Err(refusal) => {
            let line = refusal.line();
            assert!(!line.is_empty() && !line.contains('\n'), "{line:?}");
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&program, rest)) = bytes.split_first() else {
        return;
    };
    let words = rest.split(|&byte| byte == 0).map(OsStr::from_bytes);
    match program & 1 {
        0 => check_monitor(words),
        _ => check_jailer(words),
    }
});
