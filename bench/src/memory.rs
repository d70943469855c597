//! The engine's memory: what the monitor holds beside the guest's, by what it is for,
//! when the guest's init runs and when the guest has rested.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::engine::Files;
use crate::rivals::{self, Machine};

/// Resident MiB of one process.
#[derive(Clone, Copy, Default)]
pub(crate) struct Resident {
    /// Translated code, as mapped for running.
    pub(crate) code: f64,
    /// TLBs, jump caches, block tables and everything else on no file.
    pub(crate) tables: f64,
    /// The program itself and its libraries.
    pub(crate) program: f64,
}

impl Resident {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let maps = std::fs::read_to_string(Path::new(&path))
            .with_context(|| format!("failed to read {path}"))?;
        let mut sum = Self::default();
        let mut ignored = 0.0;
        let mut name = String::new();
        let mut executable = false;
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if !first.ends_with(':') {
                executable = words.next().is_some_and(|rights| rights.contains('x'));
                name = words.nth(3).unwrap_or_default().to_owned();
            } else if first == "Rss:" {
                let mib: f64 = words.next().unwrap_or("0").parse::<f64>()? / 1024.0;
                *match name.as_str() {
                    n if n.contains("kombi-guest") => &mut ignored,
                    // mapped twice: writable and executable
                    n if n.contains("kombi-code") && !executable => &mut ignored,
                    n if n.contains("kombi-code") => &mut sum.code,
                    n if n.starts_with('/') => &mut sum.program,
                    _ => &mut sum.tables,
                } += mib;
            }
        }
        Ok(sum)
    }
}

/// Boots a guest that rests and prints what its monitor holds.
pub(crate) fn report(files: &Files) -> Result<()> {
    println!("\nmemory of the engine, beside the guest's own (MiB resident; one guest, one CPU)");
    let machine = Machine {
        kernel: &files.kernel,
        initramfs: &files.ready,
        parameters: String::new(),
        memory_mib: 256,
        cpu_model: None,
        translations_kept: true,
        disk: None,
        writable_disk: None,
        tap: None,
    };
    let mut child = rivals::kombi_machine(&files.vmm, &machine)?;
    let pid = child.id();
    let started = Instant::now();
    let mut booted = None;
    for line in rivals::console(&mut child)? {
        if line?.contains("INIT RUNS") {
            booted = Some((started.elapsed(), Resident::of(pid)?));
            break;
        }
    }
    std::thread::sleep(Duration::from_secs(3));
    let rested = Resident::of(pid);
    rivals::end(&mut child);
    let (elapsed, booted) = booted.context("the guest's init did not run")?;
    let rested = rested?;
    println!(
        "  {:26}{:>10} {:>26} {:>10}",
        "", "code", "TLBs, caches, tables, heap", "program"
    );
    for (when, r) in [
        (format!("init runs ({} ms)", elapsed.as_millis()), booted),
        ("at rest, 3 s later".to_owned(), rested),
    ] {
        println!(
            "  {when:26}{:10.1} {:26.1} {:10.1}",
            r.code, r.tables, r.program
        );
    }
    Ok(())
}
