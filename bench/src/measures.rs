//! The measures, one function each: what the issue tracker's targets ask.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::figures::{Pairs, geometric_mean, median, verdict};
use crate::guests::Guests;
use crate::rivals::{self, Machine};

/// What a guest is left to do until its translations are written.
const REST: Duration = Duration::from_secs(2);

/// VMM start to the guest's init.
pub(crate) fn boot(guests: &Guests) -> Result<bool> {
    println!("\nboot: VMM start until the guest's init runs (same kernel, same initramfs)");
    let ours = boot_of(guests, &guests.kernel, 11)?;
    boot_without_translations(guests)?;
    let reached = verdict("at most 0.15 of QEMU's time", ours.ratio() <= 0.15);
    println!("boot of Debian's cloud kernel, as it is");
    let debian = boot_of(guests, &guests.debian_kernel, 5)?;
    Ok(verdict("at most 0.35 of QEMU's time", debian.ratio() <= 0.35) && reached)
}

fn boot_machine<'a>(guests: &'a Guests, kernel: &'a Path) -> Machine<'a> {
    Machine {
        kernel,
        initramfs: &guests.ready,
        parameters: String::new(),
        memory_mib: rivals::MEMORY_MIB,
        cpu_model: None,
        translations_kept: true,
        disk: None,
        writable_disk: None,
        tap: None,
    }
}

fn boot_of(guests: &Guests, kernel: &Path, rounds: usize) -> Result<Pairs> {
    let machine = boot_machine(guests, kernel);
    // Translations are written when a guest first rests.
    let first = rivals::kombi_machine(&guests.vmm, &machine)?;
    rivals::time_to_and_then("INIT RUNS", Instant::now(), first, REST)?;
    let mut pairs = Pairs::default();
    for _ in 0..rounds {
        let started = Instant::now();
        let vmm = rivals::kombi_machine(&guests.vmm, &machine)?;
        let ours = rivals::time_to("INIT RUNS", started, vmm)?;
        let started = Instant::now();
        let theirs = rivals::time_to("INIT RUNS", started, rivals::qemu_machine(&machine)?)?;
        pairs.add(milliseconds(ours), milliseconds(theirs));
    }
    report(&pairs);
    Ok(pairs)
}

/// The same boot with what earlier boots translated, and without.
fn boot_without_translations(guests: &Guests) -> Result<()> {
    let mut machine = boot_machine(guests, &guests.kernel);
    let mut pairs = Pairs::default();
    for _ in 0..11 {
        let mut time = |kept| {
            machine.translations_kept = kept;
            let started = Instant::now();
            let vmm = rivals::kombi_machine(&guests.vmm, &machine)?;
            rivals::time_to("INIT RUNS", started, vmm)
        };
        pairs.add(milliseconds(time(true)?), milliseconds(time(false)?));
    }
    let (low, high) = pairs.spread();
    println!(
        "  with the translations of earlier boots {:.0} ms, without {:.0} ms; ratio {:.3} ({low:.3} to {high:.3})",
        pairs.ours(),
        pairs.theirs(),
        pairs.ratio(),
    );
    Ok(())
}

/// A cached image, start to exit of `true`.
pub(crate) fn run(guests: &Guests) -> Result<bool> {
    println!("\nrun: kombi run of a cached busybox image, start to exit of true");
    println!("  QEMU: the same root and kernel; its init only reboots");
    let layer = guests.only_layer(&guests.busybox)?;
    rivals::whole_run(&mut guests.kombi_run(&guests.busybox, &["true"]), 0)?;
    let mut pairs = Pairs::default();
    for _ in 0..11 {
        let (ours, _) = rivals::whole_run(&mut guests.kombi_run(&guests.busybox, &["true"]), 0)?;
        let mut qemu = rivals::qemu_root(guests, &layer, "/bin/busybox -- reboot -f");
        let (theirs, _) = rivals::whole_run(&mut qemu, 0)?;
        pairs.add(milliseconds(ours), milliseconds(theirs));
    }
    report(&pairs);
    let quick = verdict("at most 350 ms", pairs.ours() <= 350.0);
    Ok(verdict("at most 0.4 of QEMU's whole run", pairs.ratio() <= 0.4) && quick)
}

/// CPU-bound user code.
pub(crate) fn cpu(guests: &Guests) -> Result<bool> {
    println!("\ncpu: guest user code, times taken inside the guest");
    let mut ours: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut theirs: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut native: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..5 {
        collect(
            &mut ours,
            &rivals::to_the_end(rivals::kombi_vmm(guests, &guests.cpu)?)?,
        )?;
        collect(
            &mut theirs,
            &rivals::to_the_end(rivals::qemu(guests, &guests.cpu)?)?,
        )?;
        let host = Command::new(&guests.cpu_native)
            .stdout(Stdio::piped())
            .spawn()?;
        collect(&mut native, &rivals::to_the_end(host)?)?;
    }
    println!(
        "  {:8} {:>9} {:>9} {:>9}   {:>12} {:>12}",
        "", "Kombi ms", "QEMU ms", "native", "QEMU/Kombi", "Kombi/native"
    );
    let mut faster = Vec::new();
    for (name, times) in &ours {
        let (Some(rival), Some(host)) = (theirs.get(name), native.get(name)) else {
            continue;
        };
        let ratios: Vec<f64> = rival
            .iter()
            .zip(times)
            .map(|(rival, ours)| rival / ours)
            .collect();
        let low = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let high = ratios.iter().copied().fold(0.0, f64::max);
        println!(
            "  {name:8} {:9.1} {:9.1} {:9.1}   {:5.2} ({low:.2} to {high:.2}) {:6.2}",
            median(times),
            median(rival),
            median(host),
            median(&ratios),
            median(times) / median(host),
        );
        faster.push(median(&ratios));
    }
    ensure!(
        faster.len() == 6,
        "only {} of 6 workloads came back",
        faster.len()
    );
    let mean = geometric_mean(&faster);
    Ok(verdict(
        &format!("geometric mean {mean:.2} times QEMU's speed, at least 3.5"),
        mean >= 3.5,
    ))
}

/// The monitor's own memory at rest.
pub(crate) fn memory(guests: &Guests) -> Result<bool> {
    println!("\nmemory: the VMM's RSS less guest memory, 256 MiB guest at rest");
    let mut run = guests.kombi_run(&guests.busybox, &["sleep", "60"]);
    let mut kombi = run.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    std::thread::sleep(Duration::from_secs(3));
    let ours = child_of(kombi.id()).and_then(own_memory);
    let qemu_guest = rivals::qemu(guests, &guests.ready);
    std::thread::sleep(Duration::from_secs(3));
    let theirs = qemu_guest.and_then(|mut child| {
        let memory = own_memory(child.id());
        rivals::end(&mut child);
        memory
    });
    rivals::end(&mut kombi);
    let (ours, theirs) = (ours?, theirs?);
    println!("  Kombi {ours:.1} MiB, QEMU {theirs:.1} MiB");
    Ok(verdict("at most 24 MiB", ours <= 24.0))
}

/// Python in the Debian image.
pub(crate) fn python(guests: &Guests) -> Result<bool> {
    const PROGRAM: &str = "print(sum(range(10**7)))";
    println!("\npython: python3 -c '{PROGRAM}' in the Debian image, whole runs");
    println!("  QEMU: the same root and kernel, python3 as PID 1");
    let layer = guests.only_layer(&guests.debian)?;
    let mut pairs = Pairs::default();
    for _ in 0..5 {
        let mut kombi = guests.kombi_run(&guests.debian, &["python3", "-c", PROGRAM]);
        let (ours, printed) = rivals::whole_run(&mut kombi, 0)?;
        ensure!(
            printed.trim() == "49999995000000",
            "Kombi printed {printed:?}"
        );
        let init = format!("/usr/bin/python3 -- -c {PROGRAM}");
        let (theirs, printed) =
            rivals::whole_run(&mut rivals::qemu_root(guests, &layer, &init), 0)?;
        ensure!(
            printed.contains("49999995000000"),
            "QEMU printed {printed:?}"
        );
        pairs.add(milliseconds(ours), milliseconds(theirs));
    }
    report(&pairs);
    Ok(verdict(
        "right answer, faster than QEMU",
        pairs.ratio() < 1.0,
    ))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn report(pairs: &Pairs) {
    let (low, high) = pairs.spread();
    println!(
        "  Kombi {:.0} ms, QEMU {:.0} ms (medians); Kombi/QEMU {:.3} ({low:.3} to {high:.3})",
        pairs.ours(),
        pairs.theirs(),
        pairs.ratio()
    );
}

/// Adds the BENCH lines of one run.
fn collect(into: &mut BTreeMap<String, Vec<f64>>, lines: &[String]) -> Result<()> {
    for line in lines {
        let mut words = line
            .split_whitespace()
            .skip_while(|word| !word.ends_with("BENCH"))
            .skip(1);
        if let (Some(name), Some(time)) = (words.next(), words.next()) {
            into.entry(name.to_owned())
                .or_default()
                .push(time.parse().with_context(|| line.clone())?);
        }
    }
    Ok(())
}

/// The monitor below a `kombi run`.
fn child_of(parent: u32) -> Result<u32> {
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        let above = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(1));
        if stat.contains("(kombi-vmm)") && above == Some(&parent.to_string()) {
            return Ok(pid);
        }
    }
    anyhow::bail!("kombi run has no kombi-vmm")
}

/// Resident MiB of a process outside the guest's memory, which is a memfd.
fn own_memory(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let maps = std::fs::read_to_string(Path::new(&path))
        .with_context(|| format!("failed to read {path}"))?;
    let mut guest = false;
    let mut resident_kib = 0.0;
    for line in maps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            guest =
                line.contains("memfd:kombi-guest") || line.contains("memfd:memory-backend-memfd");
        } else if first == "Rss:" && !guest {
            let value = line.split_whitespace().nth(1).unwrap_or("0");
            resident_kib += value.parse::<f64>()?;
        }
    }
    Ok(resident_kib / 1024.0)
}
