//! Counters and traces of an engine.

mod bare;

use std::io::Write;
use std::sync::{Arc, Mutex};

use bare::{CODE, Machine, STOP};
use hv_soft::{Counters, EngineTrace, SoftHypervisor};
use iced_x86::code_asm::*;

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn stores_into_code_and_pages_that_are_dropped_are_in_the_trace() {
    let written = Written::default();
    let trace = Arc::new(EngineTrace::new(written.clone()));
    let mut machine = Machine::on(SoftHypervisor::default().traced(trace));
    machine.put(CODE + 0x800, &[0xc3]);
    machine.code(|asm| {
        let mut again = asm.create_label();
        asm.call(CODE + 0x800).unwrap();
        // Into code, then next to it until the page is not worth it any more.
        asm.mov(byte_ptr(CODE + 0x800), 0xc3).unwrap();
        asm.mov(ecx, 1000).unwrap();
        asm.set_label(&mut again).unwrap();
        asm.mov(byte_ptr(CODE + 0xc00), cl).unwrap();
        asm.dec(ecx).unwrap();
        asm.jne(again).unwrap();
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    let stats = machine.vcpu.stats();
    assert!(stats.patched == 1 && stats.invalidations > 0, "{stats:?}");
    drop(machine);
    let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    let count = |part: &str| text.lines().filter(|line| line.contains(part)).count() as u64;
    assert_eq!(
        count(r#""event":"store","pa":"0x10800","bytes":1,"blocks":1"#),
        1,
        "{text}"
    );
    assert_eq!(
        count(r#""event":"drop","page":"0x10000""#),
        stats.invalidations
    );
    assert_eq!(count(r#""event":"block""#), stats.translations);
    assert!(
        text.contains(r#""event":"hot","exit":"access","rip":"0x100"#),
        "{text}"
    );
}

#[test]
fn counters_are_those_of_all_vcpus() {
    let counters = Arc::new(Counters::default());
    let mut machine = Machine::on(SoftHypervisor::default().counted(Arc::clone(&counters)));
    machine.code(|asm| asm.out(i32::from(STOP), al).unwrap());
    assert_eq!(counters.sum().pio, 0);
    machine.run_to_stop();
    assert_eq!(counters.sum(), machine.vcpu.stats());
    assert_eq!(counters.sum().pio, 1);
    let twice = counters.sum().plus(&counters.sum());
    assert_eq!(twice.since(&counters.sum()), counters.sum());
}
