//! Snapshots that somebody tampered with: whatever their state says, a machine is refused or
//! made, and ends as a machine ends.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use hv_soft::SoftHypervisor;
use machine::{Error, Machine, SavedMachine, Stdio};
use proptest::prelude::*;

/// `inc rax; push rax; pop rbx; jmp` back, with a stack at 8 MiB: `mov esp, 0x800000`.
const CODE: &[u8] = b"\xbc\0\0\x80\0\x48\xff\xc0\x50\x5b\xeb\xf9";
const START: u64 = 16 << 20;

fn elf() -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [START, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    image.extend((1_u64 | 5 << 32).to_le_bytes());
    for word in [120, START, START, CODE.len() as u64, 4096, 4096] {
        image.extend(word.to_le_bytes());
    }
    image.extend(CODE);
    image
}

fn stdio() -> Stdio {
    Stdio {
        input: None,
        output: OwnedFd::from(File::options().write(true).open("/dev/null").unwrap()),
    }
}

struct Saved {
    blueprint: blueprint::Blueprint,
    bytes: Vec<u8>,
    image: File,
    engine: SoftHypervisor,
}

fn saved() -> Saved {
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(&elf()).unwrap();
    let draft = serde_json::json!({
        "boot-source": {"kernel_image_path": kernel.path(), "boot_args": ""},
        "machine-config": {"mem_size_mib": 32, "vcpu_count": 2, "engine": "soft"},
        "entropy": {},
    });
    let draft = blueprint::Draft::from_json(draft.to_string().as_bytes()).unwrap();
    let blueprint = draft.check().unwrap();
    let engine = SoftHypervisor::default();
    let running = Machine::build(&blueprint, &engine, stdio())
        .unwrap()
        .start()
        .unwrap();
    let controller = running.controller();
    controller.pause().unwrap();
    let image = tempfile::tempfile().unwrap();
    let state = controller.snapshot(|state, ram| {
        ram.write_image(&image).unwrap();
        state
    });
    let bytes = postcard::to_stdvec(&state.unwrap()).unwrap();
    Saved {
        blueprint,
        bytes,
        image,
        engine,
    }
}

impl Saved {
    /// Goes on from `bytes`, for a moment.
    fn go_on(&self, bytes: &[u8]) -> Result<(), Error> {
        let Ok(state) = postcard::from_bytes::<SavedMachine>(bytes) else {
            return Ok(());
        };
        let image = self.image.try_clone().unwrap();
        let machine = Machine::restore(&self.blueprint, &state, image, &self.engine, stdio())?;
        let stop = machine.stop_handle();
        let running = machine.start()?;
        std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(3));
            stop.stop();
        });
        running.wait().result.map(drop)
    }
}

fn check(saved: &Saved, bytes: &[u8]) -> Result<(), TestCaseError> {
    let ended = saved.go_on(bytes);
    let panicked = matches!(ended, Err(Error::VcpuPanicked { .. }));
    prop_assert!(!panicked, "{ended:?}");
    Ok(())
}

#[test]
fn no_state_of_a_snapshot_upsets_the_engine() {
    let saved = saved();
    saved.go_on(&saved.bytes).unwrap();
    let flips = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6);
    let config = ProptestConfig {
        cases: ProptestConfig::default().cases.max(300),
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest::test_runner::TestRunner::new(config)
        .run(&flips, |flips| {
            let mut bytes = saved.bytes.clone();
            for (at, byte) in flips {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            check(&saved, &bytes)
        })
        .unwrap();
}
