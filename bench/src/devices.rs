//! `bench block` and `bench net`: what a guest gets out of its disk and its network, with
//! fio and iperf3 in it, beside QEMU's virtio devices on the same file and TAP device.
//!
//! Left to others: what the rows do (`bench/guest/devices.init`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::figures::{Pairs, verdict};
use crate::guests::{Guests, call};
use crate::rivals::{self, Machine};

const ROUNDS: usize = 3;
const MEMORY_MIB: u32 = 512;
const TAP: &str = "tap0";
/// This process is in a network of its own.
pub(crate) const MARK: &str = "KOMBI_BENCH_NETWORK";

/// A row: its name in the guest, what it is, and how a value is to be read.
struct Row {
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    /// Value of the guest to `unit`.
    scale: f64,
    less_is_better: bool,
    /// Among the targets.
    counts: bool,
}

const fn row(name: &'static str, what: &'static str, unit: &'static str, scale: f64) -> Row {
    Row {
        name,
        what,
        unit,
        scale,
        less_is_better: false,
        counts: true,
    }
}

const BLOCK: [Row; 5] = [
    row("randread-1", "4 KiB random read, one at a time", "/s", 1.0),
    row("randread-32", "4 KiB random read, 32 at a time", "/s", 1.0),
    Row {
        counts: false,
        ..row(
            "randwrite-1",
            "4 KiB random write, one at a time",
            "/s",
            1.0,
        )
    },
    row("read-1m", "1 MiB sequential read", "MiB/s", 1.0 / 1024.0),
    Row {
        counts: false,
        ..row("write-1m", "1 MiB sequential write", "MiB/s", 1.0 / 1024.0)
    },
];

const NET: [Row; 3] = [
    row("to-host", "TCP from the guest to the host", "Mbit/s", 1e-3),
    row("to-guest", "TCP from the host to the guest", "Mbit/s", 1e-3),
    Row {
        less_is_better: true,
        ..row("ping", "ping", "us", 1e3)
    },
];

/// fio through virtio-blk.
pub(crate) fn block(guests: &Guests) -> Result<bool> {
    println!("\nblock: fio in the guest on a file of 512 MiB in the host's cache");
    let files = Files::prepare(guests)?;
    // In the host's cache, as a file that was just written is.
    std::fs::read(&files.data).context("failed to read the data")?;
    let names: Vec<&str> = BLOCK.iter().map(|row| row.name).collect();
    compare(guests, &files, &names.join(","), &BLOCK, false)
}

/// iperf3 and ping through virtio-net and a TAP device.
pub(crate) fn net(guests: &Guests) -> Result<bool> {
    if std::env::var_os(MARK).is_none() {
        // From there no package can be fetched.
        Files::prepare(guests)?;
        return in_a_network_of_its_own();
    }
    println!("\nnet: iperf3 and ping between guest and host, over a TAP device");
    let files = Files::prepare(guests)?;
    let names: Vec<&str> = NET.iter().map(|row| row.name).collect();
    let rows = format!("net-up,{}", names.join(","));
    compare(guests, &files, &rows, &NET, true)
}

fn in_a_network_of_its_own() -> Result<bool> {
    let script = format!(
        "set -e; ip tuntap add dev {TAP} mode tap; ip address add 172.16.0.1/24 dev {TAP}
         ip link set dev lo up; ip link set dev {TAP} up; exec \"$0\" net"
    );
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c", &script])
        .arg(std::env::current_exe()?)
        .env(MARK, "1")
        .status()
        .context("failed to start unshare")?;
    match status.code() {
        Some(0) => Ok(true),
        Some(code) if code == i32::from(crate::MISSED) => Ok(false),
        _ => bail!("the measurement in a network of its own failed: {status}"),
    }
}

struct Files {
    root: PathBuf,
    initramfs: PathBuf,
    data: PathBuf,
}

impl Files {
    fn prepare(guests: &Guests) -> Result<Self> {
        let folder = guests.work.join("devices");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/devices.sh");
        call(Command::new(script).arg(&folder))?;
        Ok(Self {
            root: folder.join("root.erofs"),
            initramfs: folder.join("devices.cpio"),
            data: folder.join("data"),
        })
    }
}

/// The host's end of iperf3; it ends with this value.
struct Server(Child);

impl Server {
    fn start() -> Result<Self> {
        let server = Command::new("iperf3")
            .args(["-s", "-B", "172.16.0.1"])
            .stdout(Stdio::null())
            .spawn()
            .context("failed to start iperf3; run setup/packages.sh bench-devices")?;
        Ok(Self(server))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        rivals::end(&mut self.0);
    }
}

/// Boots both in turn and prints row by row.
fn compare(guests: &Guests, files: &Files, rows: &str, table: &[Row], tap: bool) -> Result<bool> {
    let machine = Machine {
        kernel: &guests.kernel,
        initramfs: &files.initramfs,
        parameters: format!("bench.rows={rows}"),
        memory_mib: MEMORY_MIB,
        cpu_model: None,
        translations_kept: true,
        disk: Some(&files.root),
        writable_disk: Some(&files.data).filter(|_| !tap).map(PathBuf::as_path),
        tap: tap.then_some(TAP),
    };
    let _server = tap.then(Server::start).transpose()?;
    let mut pairs: BTreeMap<&str, Pairs> = BTreeMap::new();
    for _ in 0..ROUNDS {
        let ours = results(rivals::kombi_machine(&guests.vmm, &machine)?)?;
        let theirs = results(rivals::qemu_machine(&machine)?)?;
        for row in table {
            let value = |of: &BTreeMap<String, f64>, who| {
                let value = of.get(row.name).copied();
                value.with_context(|| format!("{who} has no result of {}", row.name))
            };
            let (ours, theirs) = (value(&ours, "Kombi")?, value(&theirs, "QEMU")?);
            let pair = pairs.entry(row.name).or_default();
            pair.add(ours * row.scale, theirs * row.scale);
        }
    }
    let mut reached = true;
    for row in table {
        let pairs = &pairs[row.name];
        let (low, high) = pairs.spread();
        println!(
            "  {:<36} {:>9.0} {:<6} QEMU {:>9.0}   ratio {:.2} ({low:.2} to {high:.2})",
            row.what,
            pairs.ours(),
            row.unit,
            pairs.theirs(),
            pairs.ratio(),
        );
        if row.counts && row.less_is_better {
            reached &= verdict("at most a third of QEMU's", pairs.ratio() <= 1.0 / 3.0);
        } else if row.counts {
            reached &= verdict("at least three times QEMU's", pairs.ratio() >= 3.0);
        }
    }
    Ok(reached)
}

/// What the guest says, by row.
fn results(machine: Child) -> Result<BTreeMap<String, f64>> {
    let lines = rivals::to_the_end(machine)?;
    let mut results = BTreeMap::new();
    for line in &lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["RESULT", row, value] = words[..] {
            let value = value
                .parse()
                .with_context(|| format!("the guest said {line:?}"))?;
            results.insert(row.to_owned(), value);
        }
    }
    ensure!(
        lines.iter().any(|line| line.trim() == "DONE"),
        "the guest did not come to its end: {}",
        lines.join("\n")
    );
    Ok(results)
}
