//! A machine on an engine that is a script: what a guest would do is done by
//! calls of [`hv::Io`].

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use hv::{Kick, SharedState, VcpuState};
use ram::Gpa;
use tempfile::TempDir;
use vm_memory::Bytes;

use super::*;

/// What the scripted guest does: it gets its ports, its memory and its kicker.
type Script = Box<dyn FnOnce(&Guest<'_>) -> Result<Exit, hv::Error> + Send>;

struct Guest<'a> {
    io: &'a dyn Io,
    ram: &'a GuestRam,
    state: &'a VcpuState,
    kicked: &'a Kicked,
    lines: &'a Lines,
}

impl Guest<'_> {
    fn out(&self, port: u16, byte: u8) {
        self.io.pio_write(port, &[byte]);
    }

    fn inb(&self, port: u16) -> u8 {
        let mut byte = [0];
        self.io.pio_read(port, &mut byte);
        byte[0]
    }

    fn say(&self, text: &str) {
        for byte in text.bytes() {
            self.out(0x3f8, byte);
        }
    }

    fn register(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.io.mmio_read(Gpa(at), &mut data);
        u32::from_le_bytes(data)
    }

    /// Runs "guest code" until kicked.
    fn spin(&self) -> Result<Exit, hv::Error> {
        self.kicked.wait();
        Ok(Exit::Kicked)
    }
}

#[derive(Default)]
struct Kicked(Mutex<bool>, Condvar);

impl Kicked {
    fn wait(&self) {
        let guard = self.0.lock().unwrap();
        drop(
            self.1
                .wait_while(guard, |kicked| !std::mem::take(kicked))
                .unwrap(),
        );
    }
}

impl Kick for Kicked {
    fn kick(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

/// Every change of an interrupt line.
#[derive(Default)]
struct Lines(Mutex<Vec<(u32, bool)>>);

impl Interrupts for Lines {
    fn set_line(&self, gsi: u32, high: bool) {
        self.0.lock().unwrap().push((gsi, high));
    }
}

/// A machine without anything that its vCPUs share.
struct NothingShared;

impl Shared for NothingShared {
    fn state(&self) -> Result<SharedState, hv::Error> {
        Ok(SharedState::default())
    }

    fn set_state(&self, _: &SharedState) -> Result<(), hv::Error> {
        Ok(())
    }

    fn log_writes(&self, _: bool) -> Result<(), hv::Error> {
        Ok(())
    }

    fn collect_writes(&self) -> Result<(), hv::Error> {
        Ok(())
    }
}

struct Scripted(Mutex<Option<Script>>, Sender<()>);

struct ScriptedPartition {
    ram: GuestRam,
    lines: Arc<Lines>,
    script: Option<Script>,
    gone: Sender<()>,
}

struct ScriptedVcpu {
    ram: GuestRam,
    lines: Arc<Lines>,
    script: Option<Script>,
    kicked: Arc<Kicked>,
    state: VcpuState,
    /// Dropped with the vCPU.
    _gone: Sender<()>,
}

impl Hypervisor for Scripted {
    type Partition = ScriptedPartition;

    fn name(&self) -> &'static str {
        "scripted"
    }

    fn create(&self, ram: GuestRam, vcpus: u8) -> Result<ScriptedPartition, hv::Error> {
        if vcpus > 1 {
            return Err(hv::Error::TooManyVcpus {
                engine: "scripted",
                asked: vcpus,
                most: 1,
            });
        }
        let script = self.0.lock().unwrap().take();
        Ok(ScriptedPartition {
            ram,
            lines: Arc::default(),
            script,
            gone: self.1.clone(),
        })
    }
}

impl Partition for ScriptedPartition {
    type Vcpu = ScriptedVcpu;

    fn vcpu(&mut self, index: u8) -> Result<ScriptedVcpu, hv::Error> {
        Ok(ScriptedVcpu {
            ram: self.ram.clone(),
            lines: self.lines.clone(),
            script: Some(self.script.take().ok_or(hv::Error::NoSuchVcpu { index })?),
            kicked: Arc::default(),
            state: VcpuState::after_reset(),
            _gone: self.gone.clone(),
        })
    }

    fn interrupts(&self) -> Arc<dyn Interrupts> {
        self.lines.clone()
    }

    fn shared(&self) -> Arc<dyn Shared> {
        Arc::new(NothingShared)
    }
}

impl Vcpu for ScriptedVcpu {
    fn state(&self) -> Result<VcpuState, hv::Error> {
        Ok(self.state.clone())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), hv::Error> {
        self.state = state.clone();
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicked.clone()
    }

    fn run(&mut self, io: &dyn Io) -> Result<Exit, hv::Error> {
        let guest = Guest {
            io,
            ram: &self.ram,
            state: &self.state,
            kicked: &self.kicked,
            lines: &self.lines,
        };
        match self.script.take() {
            Some(script) => script(&guest),
            None => guest.spin(),
        }
    }
}

/// A machine around a script, and the host's side of it.
struct Bench {
    dir: TempDir,
    console: UnixStream,
    /// Disconnected once engine and vCPU are gone.
    gone: Receiver<()>,
}

impl Bench {
    fn build(
        rest: serde_json::Value,
        script: impl FnOnce(&Guest<'_>) -> Result<Exit, hv::Error> + Send + 'static,
    ) -> (Self, Result<Machine<ScriptedPartition>, Error>) {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel");
        std::fs::write(&kernel, boot::tests::elf(16 << 20, b"code", 4096)).unwrap();
        std::fs::write(dir.path().join("disk"), [7; 4096]).unwrap();
        let mut draft = serde_json::json!({
            "boot-source": {"kernel_image_path": kernel, "boot_args": ""},
            "machine-config": {"mem_size_mib": 32},
        });
        let text = rest
            .to_string()
            .replace("DIR", dir.path().to_str().unwrap());
        let rest: serde_json::Map<_, _> = serde_json::from_str(&text).unwrap();
        draft.as_object_mut().unwrap().extend(rest);
        let draft = blueprint::Draft::from_json(draft.to_string().as_bytes()).unwrap();

        let (ours, theirs) = UnixStream::pair().unwrap();
        let (sender, gone) = channel();
        let engine = Scripted(Mutex::new(Some(Box::new(script))), sender);
        let stdio = Stdio {
            input: Some(ours.try_clone().unwrap().into()),
            output: ours.into(),
        };
        let machine = Machine::build(&draft.check().unwrap(), &engine, stdio);
        (
            Self {
                dir,
                console: theirs,
                gone,
            },
            machine,
        )
    }

    fn run(
        rest: serde_json::Value,
        script: impl FnOnce(&Guest<'_>) -> Result<Exit, hv::Error> + Send + 'static,
    ) -> (Ended, String) {
        let (mut bench, machine) = Self::build(rest, script);
        let ended = machine.unwrap().run().unwrap();
        let mut text = String::new();
        bench.console.read_to_string(&mut text).unwrap();
        (ended, text)
    }

    fn assert_gone(&self) {
        let left = self.gone.recv_timeout(Duration::from_secs(10));
        assert_eq!(left, Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
    }
}

fn nothing() -> serde_json::Value {
    serde_json::json!({})
}

#[test]
fn the_boot_cpu_starts_with_the_kernels_state() {
    let (ended, _) = Bench::run(nothing(), |guest| {
        assert_eq!(guest.state.rip, 16 << 20);
        let code: [u8; 4] = guest.ram.memory().read_obj(Gpa(16 << 20)).unwrap();
        assert_eq!(&code, b"code");
        Ok(Exit::Halted)
    });
    assert_eq!(ended.result.unwrap(), Outcome::PowerOff);
}

#[test]
fn the_boot_timer_answers_only_where_it_was_asked_for() {
    let read = |guest: &Guest<'_>| {
        let mut byte = [0x55];
        guest.io.mmio_read(Gpa(0xc000_0000), &mut byte);
        guest.io.mmio_write(Gpa(0xc000_0000), &[123]);
        guest.say(&byte[0].to_string());
        Ok(Exit::Halted)
    };
    let (_, text) = Bench::run(nothing(), read);
    assert_eq!(text, "255");
    let (mut bench, machine) = Bench::build(nothing(), read);
    let mut machine = machine.unwrap();
    machine.time_boot(crate::Moment::now()).unwrap();
    assert!(matches!(
        machine.time_boot(crate::Moment::now()),
        Err(Error::Place { .. })
    ));
    machine.run().unwrap();
    let mut text = String::new();
    bench.console.read_to_string(&mut text).unwrap();
    assert_eq!(text, "0");
}

#[test]
fn serial_output_reaches_the_console_and_the_report() {
    let (ended, text) = Bench::run(nothing(), |guest| {
        guest.say("hello\nprompt> ");
        Ok(Exit::Halted)
    });
    assert_eq!(text, "hello\nprompt> ");
    assert_eq!(ended.console_tail, b"hello\nprompt> ");
    assert_eq!(ended.kernel_panic(), None);
}

#[test]
fn serial_output_goes_to_a_file_when_asked() {
    let rest = serde_json::json!({"serial": {"serial_out_path": "DIR/log"}});
    let (bench, machine) = Bench::build(rest, |guest| {
        guest.say("hello\n");
        Ok(Exit::Halted)
    });
    machine.unwrap().run().unwrap();
    assert_eq!(
        std::fs::read(bench.dir.path().join("log")).unwrap(),
        b"hello\n"
    );
}

#[test]
fn console_input_reaches_the_serial_port() {
    let (mut bench, machine) = Bench::build(nothing(), |guest| {
        let mut line = String::new();
        while !line.ends_with('\n') {
            if guest.inb(0x3fd) & 1 != 0 {
                line.push(guest.inb(0x3f8).into());
            }
        }
        guest.say(&format!("got {line}"));
        Ok(Exit::Halted)
    });
    bench.console.write_all(b"typed\n").unwrap();
    machine.unwrap().run().unwrap();
    let mut text = String::new();
    bench.console.read_to_string(&mut text).unwrap();
    assert_eq!(text, "got typed\n");
}

#[test]
fn each_way_to_ask_for_reset_or_power_off_ends_the_machine_at_once() {
    for (port, value, outcome) in [
        (0x64, 0xfe, Outcome::Reset),
        (0x602, 1, Outcome::Reset),
        (0x600, 5 << 2 | 1 << 5, Outcome::PowerOff),
    ] {
        let (ended, _) = Bench::run(nothing(), move |guest| {
            guest.out(port, value);
            guest.spin()
        });
        assert_eq!(ended.result.unwrap(), outcome, "{port:#x}");
    }
}

#[test]
fn a_triple_fault_is_an_outcome_and_an_engine_failure_an_error() {
    let (ended, _) = Bench::run(nothing(), |_| Ok(Exit::TripleFault));
    assert_eq!(ended.result.unwrap(), Outcome::TripleFault);
    let (ended, _) = Bench::run(nothing(), |_| {
        Err(hv::Error::Engine {
            engine: "scripted",
            rip: 0x10,
            why: "no reason".into(),
        })
    });
    assert!(
        matches!(ended.result, Err(Error::Engine { .. })),
        "{:?}",
        ended.result
    );
}

#[test]
fn a_panic_of_a_vcpu_thread_is_an_error_and_not_a_hang() {
    let (ended, _) = Bench::run(nothing(), |_| panic!("on purpose"));
    assert!(
        matches!(ended.result, Err(Error::VcpuPanicked { index: 0 })),
        "{:?}",
        ended.result
    );
}

#[test]
fn the_kernels_last_line_is_in_the_report() {
    let (ended, _) = Bench::run(nothing(), |guest| {
        guest.say(
            "[    0.1] Kernel panic - not syncing: VFS: \u{7}no root\r\n[   0.2] Rebooting\r\n",
        );
        guest.out(0x64, 0xfe);
        guest.spin()
    });
    let panic = ended.kernel_panic().unwrap();
    assert_eq!(panic, "Kernel panic - not syncing: VFS: no root");
}

#[test]
fn a_stop_from_outside_ends_a_guest_that_spins() {
    let (bench, machine) = Bench::build(nothing(), |guest| guest.spin());
    let running = machine.unwrap().start().unwrap();
    let stop = running.stop_handle();
    let waiting = std::thread::spawn(move || running.wait());
    stop.stop();
    assert_eq!(waiting.join().unwrap().result.unwrap(), Outcome::Stopped);
    bench.assert_gone();
}

#[test]
fn a_stop_before_the_start_is_not_lost() {
    let (_bench, machine) = Bench::build(nothing(), |guest| guest.spin());
    let machine = machine.unwrap();
    machine.stop_handle().stop();
    assert_eq!(machine.run().unwrap().result.unwrap(), Outcome::Stopped);
}

#[test]
fn dropping_a_running_machine_ends_its_threads() {
    let (bench, machine) = Bench::build(nothing(), |guest| guest.spin());
    drop(machine.unwrap().start().unwrap());
    bench.assert_gone();
}

#[test]
fn virtio_devices_sit_in_their_slots_and_nothing_beyond() {
    let rest = serde_json::json!({
        "drives": [{"drive_id": "a", "path_on_host": "DIR/disk", "is_root_device": false, "is_read_only": true}],
        "entropy": {},
    });
    let (ended, _) = Bench::run(rest, |guest| {
        let slots: Vec<_> = (0..3)
            .map(|slot| 0xd000_0000 + slot * 0x1000)
            .map(|at| (guest.register(at), guest.register(at + 8)))
            .collect();
        let magic = u32::from_le_bytes(*b"virt");
        assert_eq!(slots, [(magic, 2), (magic, 4), (u32::MAX, u32::MAX)]);
        // 8 sectors
        assert_eq!(guest.register(0xd000_0100), 8);
        Ok(Exit::Halted)
    });
    assert_eq!(ended.result.unwrap(), Outcome::PowerOff);
}

#[test]
fn the_vsock_path_exists_while_the_machine_does() {
    let rest = serde_json::json!({"vsock": {"guest_cid": 3, "uds_path": "DIR/v.sock"}});
    let (bench, machine) = Bench::build(rest.clone(), |guest| {
        assert_eq!(guest.register(0xd000_0008), 19);
        Ok(Exit::Halted)
    });
    let path = bench.dir.path().join("v.sock");
    assert!(path.exists());
    let ended = machine.unwrap().run().unwrap();
    assert_eq!(ended.result.unwrap(), Outcome::PowerOff);
    assert!(!path.exists());

    let (bench, machine) = Bench::build(rest, |guest| guest.spin());
    drop(machine.unwrap());
    assert!(!bench.dir.path().join("v.sock").exists());
}

#[test]
fn a_devices_interrupt_is_its_slots_line() {
    let (ended, _) = Bench::run(serde_json::json!({"entropy": {}}), |guest| {
        let write = |offset: u64, value: u32| {
            guest
                .io
                .mmio_write(Gpa(0xd000_0000 + offset), &value.to_le_bytes());
        };
        // Driver ready with queues that are not: the device asks for a reset.
        for status in [1, 3] {
            write(0x70, status);
        }
        write(0x24, 1);
        write(0x20, 1);
        for status in [11, 15] {
            write(0x70, status);
        }
        assert_eq!(*guest.lines.0.lock().unwrap(), [(5, true)]);
        write(0x64, guest.register(0xd000_0060));
        assert_eq!(*guest.lines.0.lock().unwrap(), [(5, true), (5, false)]);
        Ok(Exit::Halted)
    });
    assert_eq!(ended.result.unwrap(), Outcome::PowerOff);
}

#[test]
fn the_serial_ports_interrupt_is_line_4() {
    let (ended, _) = Bench::run(nothing(), |guest| {
        guest.out(0x3f9, 2); // transmitter empty
        assert_eq!(*guest.lines.0.lock().unwrap(), [(4, true), (4, false)]);
        Ok(Exit::Halted)
    });
    assert_eq!(ended.result.unwrap(), Outcome::PowerOff);
}

#[test]
fn accesses_that_nobody_answers_are_all_ones_and_lost() {
    let (ended, _) = Bench::run(nothing(), |guest| {
        assert_eq!(
            (guest.inb(0x80), guest.register(0xd000_0000)),
            (0xff, u32::MAX)
        );
        guest.out(0x80, 1);
        guest.io.mmio_write(Gpa(u64::MAX), &[0; 8]);
        guest.io.mmio_read(Gpa(u64::MAX), &mut [0; 8]);
        Ok(Exit::Halted)
    });
    assert_eq!(ended.result.unwrap(), Outcome::PowerOff);
}

#[test]
fn what_cannot_be_opened_is_named_and_nothing_runs() {
    for (rest, wanted) in [
        (
            serde_json::json!({"drives": [{"drive_id": "a", "path_on_host": "DIR/none", "is_root_device": false}]}),
            "failed to make drive \"a\"",
        ),
        (
            serde_json::json!({"serial": {"serial_out_path": "DIR/no/log"}}),
            "failed to open \"DIR/no/log\" for the serial console",
        ),
        (
            serde_json::json!({"machine-config": {"vcpu_count": 2}}),
            "the engine failed",
        ),
    ] {
        let (bench, machine) = Bench::build(rest, |guest| guest.spin());
        let error = machine.err().unwrap().to_string();
        assert_eq!(
            error.replace(bench.dir.path().to_str().unwrap(), "DIR"),
            wanted
        );
        bench.assert_gone();
    }
}
