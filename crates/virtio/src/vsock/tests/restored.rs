//! A device that goes on from a snapshot: connections are gone, and the guest is told.

use super::*;

const EVENTS: usize = 2;
const EVENT: u64 = BUFFERS + 0x800;

impl Rig {
    /// The device becomes another one, at another path.
    fn move_on(&mut self) {
        let dir = tempfile::tempdir().unwrap();
        self.vsock = Arc::new(Mutex::new(Vsock::new(CID, &dir.path().join("v")).unwrap()));
        self.driver.move_to(self.vsock.clone());
        self.dir = dir;
    }
}

#[test]
fn the_guest_learns_that_its_connections_broke_and_makes_new_ones() {
    let mut rig = rig();
    let (_, mut old) = rig.guest_connects(1000, 52);
    let ((_, port), _kept) = rig.host_connects(7);
    rig.driver.put(EVENT, &[0xff; 8]);
    let head = rig.driver.add(EVENTS, &[Buffer::In(EVENT, 8)]);
    rig.driver.kick(EVENTS);
    rig.driver.handle_interrupt();
    assert_eq!(rig.driver.used(EVENTS), None, "no event before");
    rig.move_on();
    assert_eq!(rig.driver.used(EVENTS), Some((head, 4)));
    assert_eq!(rig.driver.get(EVENT, 8), [0, 0, 0, 0, 255, 255, 255, 255]);
    assert_eq!(rig.driver.handle_interrupt(), 1);
    assert_eq!(rig.vsock.lock().unwrap().connection_count(), 0);
    let mut bytes = [0; 1];
    assert_eq!(old.read(&mut bytes).unwrap(), 0, "the old one is over");
    let (again, mut stream) = rig.host_connects(7);
    assert_ne!(again.1, port, "the guest may still remember that port");
    rig.send(Operation::Data, again, 0, b"hello");
    assert_eq!(super::read(&mut stream, 5), b"hello");
    rig.guest_connects(1000, 52);
}

#[test]
fn a_guest_without_room_for_the_event_gets_it_once_there_is_some() {
    let mut rig = rig();
    rig.move_on();
    assert_eq!(rig.driver.used(EVENTS), None);
    let head = rig.driver.add(EVENTS, &[Buffer::In(EVENT, 4)]);
    rig.driver.kick(EVENTS);
    assert_eq!(rig.driver.used(EVENTS), Some((head, 4)));
    rig.driver.add(EVENTS, &[Buffer::In(EVENT, 4)]);
    rig.driver.kick(EVENTS);
    assert_eq!(rig.driver.used(EVENTS), None, "once");
}

#[test]
fn the_device_of_another_guest_is_refused() {
    let mut rig = rig();
    let saved = rig.driver.save().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let other = Vsock::new(CID + 1, &dir.path().join("v")).unwrap();
    let refused = rig.driver.restore(&saved, Arc::new(Mutex::new(other)));
    assert!(matches!(refused, Err(Error::Saved { device: "vsock" })));
}
