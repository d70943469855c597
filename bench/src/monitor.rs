//! The monitor as tools see it: how soon its API answers, what it holds, how soon a guest
//! runs, and how long calls take while it does. Firecracker's figures to be reached are
//! those of its documentation and of runs on machines of this kind.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::figures::{median, verdict};
use crate::guests::Guests;
use crate::memory::Resident;

const STARTS: usize = 31;
const BOOTS: usize = 15;
const CALLS: usize = 300;
const SNAPSHOTS: usize = 5;

/// A monitor with an API.
struct Monitor {
    child: Child,
    socket: PathBuf,
}

impl Monitor {
    /// Starts one, and says when its first answer was there.
    fn start(guests: &Guests, more: &[&str]) -> Result<(Self, Duration)> {
        let socket = guests.work.join("api.sock");
        let _ = std::fs::remove_file(&socket);
        let started = Instant::now();
        let child = Command::new(&guests.vmm)
            .args(["--die-with-parent", "--level", "off", "--api-sock"])
            .arg(&socket)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("failed to start kombi-vmm")?;
        let monitor = Self { child, socket };
        while UnixStream::connect(&monitor.socket).is_err() {
            ensure!(started.elapsed() < Duration::from_secs(10), "no socket");
            std::thread::sleep(Duration::from_micros(20));
        }
        monitor.call("GET", "/", None)?;
        Ok((monitor, started.elapsed()))
    }

    fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<Duration> {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let started = Instant::now();
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.write_all(
            format!(
                "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let took = started.elapsed();
        ensure!(
            answer.starts_with("HTTP/1.1 20"),
            "{method} {path}: {answer}"
        );
        Ok(took)
    }

    /// Configures 1 vCPU and 128 MiB; Firecracker's arguments, without a console, if none
    /// are given.
    fn prepare(
        &self,
        guests: &Guests,
        initramfs: &std::path::Path,
        arguments: Option<&str>,
    ) -> Result<()> {
        let machine = json!({"vcpu_count": 1, "mem_size_mib": 128, "engine": "soft"});
        self.call("PUT", "/machine-config", Some(machine))?;
        let boot = json!({
            "kernel_image_path": guests.kernel, "initrd_path": initramfs, "boot_args": arguments,
        });
        self.call("PUT", "/boot-source", Some(boot))?;
        Ok(())
    }

    fn run(&self) -> Result<Duration> {
        self.call(
            "PUT",
            "/actions",
            Some(json!({"action_type": "InstanceStart"})),
        )
    }

    /// Processor time of all its threads.
    fn processor_ms(&self) -> Result<f64> {
        let mut sum = 0.0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            // A connection's thread may be gone already.
            let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else {
                continue;
            };
            let nanoseconds: f64 = text.split(' ').next().unwrap_or("0").parse()?;
            sum += nanoseconds / 1e6;
        }
        Ok(sum)
    }

    fn resident_mib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(kib.context("no VmRSS")?.parse::<f64>()? / 1024.0)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything above, row by row.
pub(crate) fn monitor(guests: &Guests) -> Result<bool> {
    println!("\nmonitor: process start until the first GET / is answered");
    let mut reached = starts(guests)?;
    println!(
        "monitor: InstanceStart until the guest's init has switched off (1 vCPU, 128 MiB, no console)"
    );
    reached &= boots(guests)?;
    println!("monitor: a machine of 1 vCPU and 128 MiB whose init rests");
    reached &= running(guests)?;
    Ok(reached)
}

fn starts(guests: &Guests) -> Result<bool> {
    let (mut wall, mut cpu, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let (monitor, took) = Monitor::start(guests, &[])?;
        wall.push(milliseconds(took));
        cpu.push(monitor.processor_ms()?);
        memory.push(monitor.resident_mib()?);
    }
    row("wall, ms", &wall);
    row("processor time, ms", &cpu);
    row("resident before a machine, MiB", &memory);
    let fast = verdict("at most 3 ms with filters", median(&wall) <= 3.0);
    Ok(verdict("at most 3.9 MiB", median(&memory) <= 3.9) && fast)
}

fn boots(guests: &Guests) -> Result<bool> {
    let mut wall = Vec::new();
    for round in 0..=BOOTS {
        let (mut monitor, _) = Monitor::start(guests, &[])?;
        monitor.prepare(guests, &guests.off, None)?;
        let started = Instant::now();
        monitor.run()?;
        let status = monitor.child.wait()?;
        ensure!(status.success(), "the guest did not switch off: {status}");
        // The first one may still translate.
        if round > 0 {
            wall.push(milliseconds(started.elapsed()));
        }
    }
    row("wall, ms", &wall);
    Ok(verdict("at most 125 ms", median(&wall) <= 125.0))
}

fn running(guests: &Guests) -> Result<bool> {
    let (monitor, _) = Monitor::start(guests, &[])?;
    // Its init says that it runs, and ends if nobody hears it.
    monitor.prepare(
        guests,
        &guests.ready,
        Some("console=ttyS0 reboot=k panic=1"),
    )?;
    let started = monitor.run()?;
    std::thread::sleep(Duration::from_secs(3));
    let held = Resident::of(monitor.child.id())?;
    println!("  InstanceStart itself: {:.1} ms", milliseconds(started));
    println!(
        "  the monitor's own memory at rest: {:.1} MiB (code {:.1}, tables {:.1}, program {:.1})",
        held.code + held.tables + held.program,
        held.code,
        held.tables,
        held.program
    );
    let mut reached = verdict(
        "at most 12 MiB",
        held.code + held.tables + held.program <= 12.0,
    );
    let mut slowest: f64 = 0.0;
    for (method, path, body) in [
        ("GET", "/", None),
        ("GET", "/vm/config", None),
        ("PATCH", "/vm", Some(json!({"state": "Paused"}))),
        ("PATCH", "/vm", Some(json!({"state": "Resumed"}))),
        ("PUT", "/mmds", Some(json!({"latest": {"meta-data": {}}}))),
    ] {
        let mut times = Vec::new();
        for _ in 0..CALLS {
            times.push(milliseconds(monitor.call(method, path, body.clone())?));
        }
        row(&format!("{method} {path}, ms"), &times);
        slowest = times.iter().fold(slowest, |most, &time| most.max(time));
    }
    reached &= verdict("every call under 5 ms", slowest < 5.0);
    reached &= beside_a_snapshot(guests, &monitor)?;
    Ok(reached)
}

/// Calls of one client while another one has the machine written to disk.
fn beside_a_snapshot(guests: &Guests, monitor: &Monitor) -> Result<bool> {
    let (mut beside, mut writing) = (Vec::new(), Vec::new());
    monitor.call("PATCH", "/vm", Some(json!({"state": "Paused"})))?;
    for _ in 0..SNAPSHOTS {
        let files = json!({
            "snapshot_path": guests.work.join("snapshot"),
            "mem_file_path": guests.work.join("memory"),
        });
        std::thread::scope(|scope| -> Result<()> {
            let create = || monitor.call("PUT", "/snapshot/create", Some(files));
            let creating = scope.spawn(create);
            while !creating.is_finished() {
                let paused = Some(json!({"state": "Paused"}));
                for (method, path, body) in [("GET", "/vm/config", None), ("PATCH", "/vm", paused)]
                {
                    beside.push(milliseconds(monitor.call(method, path, body)?));
                }
            }
            let took = creating.join().ok().context("a snapshot panicked")??;
            writing.push(milliseconds(took));
            Ok(())
        })?;
    }
    row("PUT /snapshot/create, ms", &writing);
    row("other calls meanwhile, ms", &beside);
    let longest = beside.iter().fold(0.0_f64, |most, &time| most.max(time));
    Ok(verdict("none waits 50 ms for another", longest < 50.0))
}

fn row(what: &str, values: &[f64]) {
    let (low, high) = values
        .iter()
        .fold((f64::INFINITY, 0.0_f64), |(low, high), &value| {
            (low.min(value), high.max(value))
        });
    println!("  {what:34} {:8.2} ({low:.2} to {high:.2})", median(values));
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
