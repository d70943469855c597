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
fn the_block_that_runs_most_leads_the_traces_profile() {
    let written = Written::default();
    let trace = Arc::new(EngineTrace::new(written.clone()));
    let mut machine = Machine::on(SoftHypervisor::default().traced(trace));
    machine.code(|asm| {
        let (mut cold, mut hot) = (asm.create_label(), asm.create_label());
        for (label, count) in [(&mut cold, 40_000_000), (&mut hot, 800_000_000)] {
            asm.mov(ecx, count).unwrap();
            asm.jmp(*label).unwrap();
            asm.set_label(label).unwrap();
            asm.dec(ecx).unwrap();
            asm.jne(*label).unwrap();
        }
        asm.out(i32::from(STOP), al).unwrap();
    });
    machine.run_to_stop();
    drop(machine);
    let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    let field = |line: &str, name: &str| -> f64 {
        let (_, rest) = line.split_once(&format!(r#""{name}":"#)).unwrap();
        rest.split([',', '}']).next().unwrap().parse().unwrap()
    };
    let of = |event: &str| -> Vec<&str> {
        let event = format!(r#""event":"{event}""#);
        text.lines().filter(|line| line.contains(&event)).collect()
    };
    let [all] = of("samples")[..] else {
        panic!("{text}");
    };
    let total = field(all, "translated") + field(all, "engine");
    let busy = of("busy");
    // mov ecx, N; jmp $+2; dec ecx; jne: eleven bytes, twice.
    assert!(
        busy[0].contains(r#""rip":"0x10012","mode":"kernel""#),
        "{busy:?}"
    );
    let share = field(busy[0], "share");
    assert!((0.75..=1.0).contains(&share), "{all} {busy:?}");
    assert!((field(busy[0], "samples") / total - share).abs() < 0.001);
    // A loop that never leaves by itself is asked to before samples are lost.
    let found: f64 = busy.iter().map(|line| field(line, "samples")).sum();
    assert!(
        found > 30.0 && found + 3.0 >= field(all, "translated"),
        "{all} {busy:?}"
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
