//! Tests in a network of their own: a namespace with one TAP device, which goes with the
//! last process in it, so that nothing is left behind however the test ends.

use std::process::Command;

/// The TAP device.
pub const TAP: &str = "tap0";
/// Its address on the host's side, in a network of 24 bits.
pub const HOST: &str = "172.16.0.1";
/// One for the guest.
pub const GUEST: &str = "172.16.0.2";

const MARK: &str = "KOMBI_TEST_PRIVATE_NETWORK";

/// Where a test is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a network of its own: it is to do its work.
    Inside,
    /// Outside, and its work was done well inside.
    Done,
    /// Outside, and this host lets this user have no such network.
    Impossible,
}

/// Runs the test `name` of this program again, in a network of its own. Called first by
/// that test; panics if it failed there.
pub fn enter(name: &str) -> Place {
    if std::env::var_os(MARK).is_some() {
        return Place::Inside;
    }
    let make = format!("ip tuntap add dev {TAP} mode tap");
    let apart = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "sh", "-c", script]);
        command
    };
    let possible = apart(&make).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        return Place::Impossible;
    }
    let script = format!(
        "set -e; {make}; ip address add {HOST}/24 dev {TAP}; ip link set dev {TAP} up
         ip link set dev lo up; exec \"$@\""
    );
    let program = std::env::current_exe().expect("this program has a path");
    let status = apart(&script)
        .arg("sh")
        .arg(program)
        .args([name, "--exact", "--nocapture"])
        .env(MARK, "1")
        .status()
        .expect("unshare was there before");
    assert!(status.success(), "{name} in a network of its own: {status}");
    Place::Done
}
