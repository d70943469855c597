//! The state file of a snapshot: any bytes, or a good file in which bytes changed, with a
//! checksum that is made right or not; and devices that are to go on from what it says.
//!
//! The input: 0 for a file as it follows, 1 for a body as it follows, else changes of a
//! good body, each of two bytes that say where and one that says what.
#![no_main]

use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex};

use blueprint::Draft;
use bus::{IrqLine, PioDevice};
use chipset::{I8042, PowerEvents, Serial, VmClock, VmGenId};
use libfuzzer_sys::fuzz_target;
use machine::{SavedDevices, SavedGeneration, SavedMachine, SavedRegion};
use ram::{ByteSize, Gpa, GuestRam};
use serde::ser::{Serialize, SerializeTuple as _, Serializer};
use snapshot::NewFile;
use virtio::rate_limiter::Limits;
use virtio::rng::Rng;
use virtio::transport::MmioTransport;
use x86::state::VcpuState;

/// What the monitor keeps: the configuration as JSON, and the machine.
type State = (String, SavedMachine);

struct Ignored;

impl PowerEvents for Ignored {
    fn reset(&self) {}
    fn power_off(&self) {}
}

fn line() -> IrqLine {
    IrqLine::new(|_| {})
}

fn serial() -> Serial {
    Serial::new(line(), Box::new(std::io::sink()))
}

fn keyboard() -> I8042 {
    I8042::new(Arc::new(Ignored), line())
}

fn source(ram: &GuestRam) -> MmioTransport {
    let rng = Rng::new(Limits::default()).unwrap();
    MmioTransport::new(Arc::new(Mutex::new(rng)), ram, line())
}

/// A machine with little that is new.
fn good(ram: &GuestRam) -> State {
    let source = source(ram);
    let device = source.device();
    let generation = SavedGeneration {
        identifier: VmGenId::new(ram.memory(), Gpa(0x1000), line())
            .unwrap()
            .save(),
        clock: VmClock::new(ram.memory(), Gpa(0x2000), line())
            .unwrap()
            .save(),
    };
    let devices = SavedDevices {
        serial: serial().save(),
        keyboard: keyboard().save(),
        generation,
        virtio: vec![source.save(&mut *device.lock().unwrap()).unwrap()],
    };
    let memory = SavedRegion {
        start: 0,
        len: 1 << 20,
        is_file: false,
    };
    let draft = r#"{"boot-source": {"kernel_image_path": "k"}}"#;
    let machine = SavedMachine {
        memory: vec![memory],
        shared: Default::default(),
        vcpus: vec![VcpuState::after_reset()],
        devices,
    };
    (draft.to_owned(), machine)
}

/// Bytes that are a body as they are.
struct Raw<'a>(&'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut tuple = to.serialize_tuple(self.0.len())?;
        self.0
            .iter()
            .try_for_each(|byte| tuple.serialize_element(byte))?;
        tuple.end()
    }
}

fn write<T: Serialize>(path: &Path, body: &T) {
    let file = NewFile::create(path).unwrap();
    snapshot::write(&file, body).unwrap();
    file.finish().unwrap();
}

/// Devices go on from it, or say that they cannot.
fn restore(saved: &SavedDevices, ram: &GuestRam) {
    let mut serial = serial();
    if serial.restore(&saved.serial).is_ok() {
        serial.enqueue_input(b"hello");
        use_all(&mut serial);
    }
    let mut keyboard = keyboard();
    if keyboard.restore(&saved.keyboard).is_ok() {
        let _ = keyboard.press_ctrl_alt_del();
        use_all(&mut keyboard);
    }
    let generation = &saved.generation;
    let _ = VmGenId::restore(ram.memory(), line(), &generation.identifier).bump();
    let _ = VmClock::restore(ram.memory(), line(), &generation.clock).bump();
    for saved in &saved.virtio {
        let mut source = source(ram);
        if source.restore(saved).is_ok() {
            bus::Lifecycle::resume(&mut source);
        }
    }
}

/// Reads and writes every register of eight.
fn use_all(device: &mut impl PioDevice) {
    for offset in 0..8 {
        device.read(offset, &mut [0]);
        device.write(offset, &[0x5a]);
    }
}

fn check_refusal(refusal: &dyn Error) {
    let mut cause = Some(refusal);
    while let Some(error) = cause {
        assert!(!error.to_string().contains('\n'), "{error}");
        cause = error.source();
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&how, rest)) = bytes.split_first() else {
        return;
    };
    let ram = GuestRam::new(ByteSize::mib(1)).unwrap();
    let dir = tempfile::tempdir_in(fuzz::scratch()).unwrap();
    let path = dir.path().join("state");
    match how {
        0 => std::fs::write(&path, rest).unwrap(),
        1 => write(&path, &Raw(rest)),
        _ => {
            let mut body = postcard::to_stdvec(&good(&ram)).unwrap();
            for change in rest.chunks_exact(3) {
                let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
                let at = at % body.len();
                body[at] = change[2];
            }
            write(&path, &Raw(&body));
        }
    }
    let version = snapshot::version_of(&path);
    match snapshot::read::<State>(&path) {
        Ok(state) => {
            assert_eq!(version.unwrap().major, snapshot::VERSION.major);
            write(&path, &state);
            let again: State = snapshot::read(&path).unwrap();
            assert!(again == state, "written and read again it is another one");
            let _ = Draft::from_json(state.0.as_bytes()).and_then(Draft::check);
            restore(&state.1.devices, &ram);
        }
        Err(refusal) => check_refusal(&refusal),
    }
});
