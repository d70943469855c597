//! Paths and identifiers.

use super::*;

#[test]
fn a_host_that_connects_early_waits_for_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let vsock = Arc::new(Mutex::new(Vsock::new(CID, &path).unwrap()));
    let driver = FakeDriver::find(vsock.clone());
    let mut host = UnixStream::connect(&path).unwrap();
    host.write_all(b"CONNECT 80\n").unwrap();
    let mut rig = Rig {
        driver,
        vsock,
        dir,
        room: 64 << 10,
        consumed: 0,
    };
    assert!(
        !rig.turn(),
        "an event loop without a driver has nothing to do"
    );
    rig.driver.set_up(u64::MAX);
    rig.post(4);
    assert_eq!(rig.expect(Operation::Request).0.dst_port, 80);
}

#[test]
fn the_path_goes_with_the_device_and_a_stale_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind by a process that died");
    let vsock = Vsock::new(CID, &path).unwrap();
    assert!(path.exists());
    drop(vsock);
    assert!(!path.exists());
}

#[test]
fn a_path_that_somebody_else_took_over_is_left_to_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let vsock = Vsock::new(CID, &path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    drop(vsock);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn a_path_in_use_is_refused_and_stays_usable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let _first = Vsock::new(CID, &path).unwrap();
    let error = Vsock::new(4, &path).unwrap_err();
    assert!(matches!(&error, Error::VsockInUse { path: named } if *named == path));
    assert!(error.to_string().contains("in use"));
    UnixStream::connect(&path).unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let blocked = Vsock::new(4, &dir.path().join("file")).unwrap_err();
    assert!(matches!(blocked, Error::VsockBlocked { .. }));
    let nowhere = Vsock::new(4, &dir.path().join("no/such/dir")).unwrap_err();
    assert!(matches!(nowhere, Error::VsockListen { .. }));
}

#[test]
fn reserved_context_identifiers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u32::MAX] {
        let error = Vsock::new(cid, &dir.path().join("v")).unwrap_err();
        assert!(matches!(error, Error::ReservedCid { cid: named } if named == u64::from(cid)));
    }
}
