//! Several vCPUs under our kernel.

mod boot;

use boot::Boot;
use machine::Outcome;

fn check_processors(vcpus: u8, args: &'static str) {
    let boot = Boot {
        vcpus,
        args,
        ..Boot::new()
    };
    let (ended, text) = boot.run(
        "echo processors: $(nproc)\n\
         for cpu in $(seq 0 $(($(nproc) - 1))); do taskset -c $cpu echo on $cpu; done\n\
         poweroff -f",
    );
    assert!(text.contains(&format!("processors: {vcpus}\n")), "{text}");
    for cpu in 0..vcpus {
        assert!(text.contains(&format!("on {cpu}\n")), "{text}");
    }
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}

#[test]
fn two_processors_start_and_run() {
    check_processors(2, "console=ttyS0 panic=-1");
}

#[test]
fn four_processors_start_and_run() {
    check_processors(4, "console=ttyS0 panic=-1");
}

#[test]
fn eight_processors_start_and_run() {
    check_processors(8, "console=ttyS0 panic=-1");
}
