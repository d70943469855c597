//! `bench engine`: guest code against the host and against QEMU TCG, row by row, side by
//! side in one run.
//!
//! What is compared is CPU time: the host's own of the workload and its children, and the
//! whole monitor's (all threads, guest kernel included) between two lines that the guest
//! prints. A busy host stretches wall time, CPU time hardly.
//!
//! Left to others: what the rows do (`bench/guest/engine.c`) and must reach (`rows`).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::figures::median;
use crate::guests::call;
use crate::memory;
use crate::rivals::{self, Machine};
use crate::rows::{ROWS, Row};

/// The host's libc must not use what the guest's CPU does not have: that of model v2.
const SAME_MODEL: &str = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX2,-AVX,-BMI2,-BMI1,-LZCNT,-MOVBE,-ERMS,-FSRM";
/// As `SAME_MODEL`, for larger models.
const WITHOUT_AVX512: &str = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW";
const MEMORY_MIB: u32 = 640;

/// What the command line asks.
pub(crate) struct Asked {
    /// Names of rows; all when empty.
    only: Vec<String>,
    rounds: usize,
    qemu: bool,
    /// Another build of the monitor, to be measured in turn.
    other: Option<PathBuf>,
    vmm: Option<PathBuf>,
    /// CPU models of both, where the row needs none.
    model: Option<String>,
    other_model: Option<String>,
}

impl Asked {
    /// Arguments behind `engine`.
    pub(crate) fn parse(words: &[String]) -> Result<Self> {
        let mut asked = Self {
            only: Vec::new(),
            rounds: 3,
            qemu: true,
            other: None,
            vmm: None,
            model: None,
            other_model: None,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || {
                words
                    .next()
                    .with_context(|| format!("{word} wants a value"))
            };
            match word.as_str() {
                "--only" => asked.only.extend(value()?.split(',').map(str::to_owned)),
                "--rounds" => asked.rounds = value()?.parse().context("--rounds wants a number")?,
                "--no-qemu" => asked.qemu = false,
                "--other" => asked.other = Some(value()?.into()),
                "--vmm" => asked.vmm = Some(value()?.into()),
                "--cpu-model" => asked.model = Some(value()?.clone()),
                "--other-cpu-model" => asked.other_model = Some(value()?.clone()),
                _ => bail!(
                    "{word:?} is not known; known are --only NAME,…, --rounds N, --no-qemu, --vmm PATH, --other PATH, --cpu-model MODEL, --other-cpu-model MODEL"
                ),
            }
        }
        for name in &asked.only {
            ensure!(
                name == "memory" || ROWS.iter().any(|row| row.name == name),
                "no row {name:?}; rows are memory, {}",
                ROWS.map(|row| row.name).join(", ")
            );
        }
        Ok(asked)
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

/// What is booted.
pub(crate) struct Files {
    pub(crate) kernel: PathBuf,
    pub(crate) vmm: PathBuf,
    pub(crate) ready: PathBuf,
    other: Option<PathBuf>,
    initramfs: PathBuf,
    program: PathBuf,
    /// Where native rows write.
    scratch: PathBuf,
    /// The interpreters' root, as a folder and as a disk.
    root: Option<(PathBuf, PathBuf)>,
}

impl Files {
    fn prepare(asked: &Asked) -> Result<Self> {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("the crate has no parent folder")?;
        let target = repository.join("target");
        let work = target.join("bench");
        let rooms = work.join("engine");
        let packed = rooms.join("initramfs");
        let scratch = rooms.join("scratch");
        std::fs::create_dir_all(packed.join("bin"))?;
        std::fs::create_dir_all(packed.join("dev"))?;
        std::fs::create_dir_all(&scratch)?;
        let disk = work.join("debian/root.erofs");
        let files = Self {
            kernel: target.join("guest/vmlinux"),
            vmm: asked
                .vmm
                .clone()
                .unwrap_or_else(|| target.join("release/kombi-vmm")),
            ready: rooms.join("ready.cpio"),
            other: asked.other.clone(),
            initramfs: rooms.join("engine.cpio"),
            program: packed.join("init"),
            scratch,
            root: disk.exists().then(|| (work.join("debian/root"), disk)),
        };
        for path in [&files.kernel, &files.vmm] {
            ensure!(
                path.exists(),
                "{} is missing; run make build",
                path.display()
            );
        }
        compile(repository, "engine", &files.program)?;
        std::fs::copy("/bin/busybox", packed.join("bin/busybox"))
            .context("no static /bin/busybox; run setup/packages.sh bench")?;
        pack(&packed, &files.initramfs)?;
        let ready = rooms.join("ready");
        std::fs::create_dir_all(ready.join("dev"))?;
        compile(repository, "ready", &ready.join("init"))?;
        pack(&ready, &files.ready)?;
        Ok(files)
    }

    fn machine<'a>(&'a self, row: &Row, model: Option<&'a str>) -> Machine<'a> {
        Machine {
            kernel: &self.kernel,
            initramfs: &self.initramfs,
            parameters: format!("bench.row={}", row.name),
            memory_mib: MEMORY_MIB,
            cpu_model: row.model.or(model),
            translations_kept: true,
            disk: self
                .root
                .as_ref()
                .filter(|_| row.rooted)
                .map(|(_, disk)| disk.as_path()),
            writable_disk: None,
            tap: None,
        }
    }
}

fn compile(repository: &Path, name: &str, to: &Path) -> Result<()> {
    let source = repository.join(format!("bench/guest/{name}.c"));
    call(
        Command::new("gcc")
            .args(["-O2", "-static", "-o"])
            .args([to, &source]),
    )
}

fn pack(folder: &Path, archive: &Path) -> Result<()> {
    let to = std::fs::File::create(archive)?;
    let status = Command::new("sh")
        .args(["-c", "find . | cpio --quiet -o -H newc -R 0:0"])
        .current_dir(folder)
        .stdout(to)
        .status()
        .context("failed to start sh")?;
    ensure!(status.success(), "cpio ended with {status}");
    Ok(())
}

/// CPU milliseconds of one row, or why there are none.
enum Outcome {
    Took(f64),
    Skipped(String),
}

/// Measures all rows that are asked for, prints the table and the memory report.
pub(crate) fn run(asked: &Asked) -> Result<bool> {
    let files = Files::prepare(asked)?;
    println!(
        "engine: CPU time of user code and kernel, medians of {} rounds",
        asked.rounds
    );
    println!("  native: this host's kernel, libc held to the guest's instruction set");
    println!(
        "  {:13}{:>10} {:>10} {:>10}  {:>20} {:>20}{}",
        "",
        "Kombi ms",
        "native",
        "QEMU",
        "Kombi/native",
        "QEMU/Kombi",
        if asked.other.is_some() {
            "  this/other"
        } else {
            ""
        },
    );
    let mut all = true;
    for row in ROWS.iter().filter(|row| asked.wants(row.name)) {
        if row.rooted && files.root.is_none() {
            println!(
                "  {:13} skipped: no image; run bench/guest/image.sh target/bench/debian",
                row.name
            );
            continue;
        }
        all &= measure(row, &files, asked)?;
    }
    if asked.wants("memory") {
        memory::report(&files)?;
    }
    Ok(all)
}

#[derive(Default)]
struct Times {
    ours: Vec<f64>,
    native: Vec<f64>,
    qemu: Vec<f64>,
    other: Vec<f64>,
}

fn measure(row: &Row, files: &Files, asked: &Asked) -> Result<bool> {
    let mut times = Times::default();
    for _ in 0..asked.rounds {
        let machine = files.machine(row, asked.model.as_deref());
        let child = rivals::kombi_machine(&files.vmm, &machine)?;
        match guest_time(row.name, child)? {
            Outcome::Took(took) => times.ours.push(took),
            Outcome::Skipped(why) => {
                println!("  {:13} skipped: {why}", row.name);
                return Ok(true);
            }
        }
        if let Some(other) = &files.other {
            let machine = files.machine(row, asked.other_model.as_deref());
            let child = rivals::kombi_machine(other, &machine)?;
            if let Outcome::Took(took) = guest_time(row.name, child)? {
                times.other.push(took);
            }
        }
        match native_time(row, files, asked.model.as_deref())? {
            Outcome::Took(took) => times.native.push(took),
            Outcome::Skipped(why) => bail!("{} on the host: {why}", row.name),
        }
        if asked.qemu && row.qemu_times.is_some() {
            let child = rivals::qemu_machine(&machine)?;
            if let Outcome::Took(took) = guest_time(row.name, child)? {
                times.qemu.push(took);
            }
        }
    }
    Ok(times.print(row))
}

impl Times {
    fn print(&self, row: &Row) -> bool {
        let ratios = |above: &[f64], below: &[f64]| -> Vec<f64> {
            above.iter().zip(below).map(|(a, b)| a / b).collect()
        };
        let shown = |ratios: &[f64]| {
            let (low, high) = ratios
                .iter()
                .fold((f64::INFINITY, 0.0_f64), |(low, high), ratio| {
                    (ratio.min(low), ratio.max(high))
                });
            format!("{:6.2} ({low:5.2}–{high:5.2})", median(ratios))
        };
        let slower = ratios(&self.ours, &self.native);
        let mut line = format!(
            "  {:13}{:10.1} {:10.1} ",
            row.name,
            median(&self.ours),
            median(&self.native)
        );
        let mut reached = median(&slower) <= row.native_times;
        if self.qemu.is_empty() {
            let _ = write!(line, "{:>10}  {:>20} {:>20}", "–", shown(&slower), "–");
        } else {
            let faster = ratios(&self.qemu, &self.ours);
            reached &= row.qemu_times.is_none_or(|least| median(&faster) >= least);
            let _ = write!(
                line,
                "{:10.1}  {:>20} {:>20}",
                median(&self.qemu),
                shown(&slower),
                shown(&faster)
            );
        }
        if !self.other.is_empty() {
            let _ = write!(line, "  {:5.2}", median(&ratios(&self.ours, &self.other)));
        }
        if !reached {
            let _ = write!(line, "  MISSED (at most {}", row.native_times);
            if let Some(least) = row.qemu_times {
                let _ = write!(line, ", at least {least}");
            }
            line.push(')');
        }
        println!("{line}");
        reached
    }
}

/// The monitor's CPU time while the guest ran the row.
fn guest_time(name: &str, mut child: Child) -> Result<Outcome> {
    let pid = child.id();
    let mut begun = None;
    let mut outcome = None;
    let mut tail = String::new();
    for line in rivals::console(&mut child)? {
        let line = line?;
        let mut words = line
            .split_whitespace()
            .skip_while(|word| !["BEGIN", "END", "SKIP"].contains(word));
        let (what, whose) = (words.next(), words.next());
        if whose == Some(name) {
            match what {
                Some("BEGIN") => begun = Some(cpu_ms(pid)?),
                Some("END") => {
                    let now = cpu_ms(pid)?;
                    ensure!(
                        words.nth(2) == Some("0"),
                        "{name} failed in the guest: {line}"
                    );
                    let begun = begun.with_context(|| format!("{name} ended unbegun"))?;
                    outcome = Some(Outcome::Took(now - begun));
                    break;
                }
                _ => {
                    let why = words.collect::<Vec<_>>().join(" ");
                    outcome = Some(Outcome::Skipped(why));
                    break;
                }
            }
        }
        tail = line;
    }
    rivals::end(&mut child);
    outcome.with_context(|| format!("{name}: the machine ended early; its last line was {tail:?}"))
}

/// The same program here, in namespaces of its own.
fn native_time(row: &Row, files: &Files, model: Option<&str>) -> Result<Outcome> {
    let libc = match row.model.or(model) {
        Some("v3" | "host") => WITHOUT_AVX512,
        _ => SAME_MODEL,
    };
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "--mount", "--pid", "--fork"])
        .arg(&files.program)
        .arg(row.name)
        .current_dir(&files.scratch)
        .env("BENCH_NATIVE", "1")
        .env("GLIBC_TUNABLES", libc)
        .stdin(Stdio::null());
    if let Some((root, _)) = &files.root {
        command.env("BENCH_ROOT", root);
    }
    let output = command.output().context("failed to start unshare")?;
    let printed = String::from_utf8_lossy(&output.stdout);
    for line in printed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["END", _, _, cpu, "0"] => return Ok(Outcome::Took(cpu.parse()?)),
            ["SKIP", _, why @ ..] => return Ok(Outcome::Skipped(why.join(" "))),
            _ => {}
        }
    }
    bail!(
        "{} failed on the host: {printed}{}",
        row.name,
        String::from_utf8_lossy(&output.stderr)
    )
}

/// CPU time of a process's living threads, in milliseconds.
fn cpu_ms(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path().join("schedstat");
        // a thread may end between the two calls
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        let first = text.split_whitespace().next().unwrap_or("0");
        nanoseconds += first.parse::<f64>()?;
    }
    Ok(nanoseconds / 1e6)
}
