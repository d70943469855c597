//! The same guest in Kombi's monitor and in QEMU's microvm machine under TCG.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::guests::Guests;

/// Kernel parameters of both; each adds the quickest `reboot=` of its machine.
const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 mitigations=off";
/// Without ACPI, as QEMU's ACPI machine has no clock that this kernel could
/// calibrate the TSC with under TCG.
const QEMU_MACHINE: &str =
    "microvm,accel=tcg,acpi=off,pit=on,pic=on,auto-kernel-cmdline=off,memory-backend=ram";
/// Where that machine has its devices, in the order in which they are named; it would
/// append this behind the arguments of init, where the kernel does not look.
const QEMU_DEVICES: [&str; 3] = [
    "virtio_mmio.device=512@0xfeb00e00:12",
    "virtio_mmio.device=512@0xfeb00c00:11",
    "virtio_mmio.device=512@0xfeb00a00:10",
];
pub(crate) const MEMORY_MIB: u32 = 256;

/// What a machine of either kind boots.
pub(crate) struct Machine<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    /// More of the kernel's command line.
    pub(crate) parameters: String,
    pub(crate) memory_mib: u32,
    /// Kombi's `--cpu-model`, where it is not to choose.
    pub(crate) cpu_model: Option<&'a str>,
    /// Kombi may use translations of earlier boots.
    pub(crate) translations_kept: bool,
    /// Its first disk, read-only.
    pub(crate) disk: Option<&'a Path>,
    /// Its second one.
    pub(crate) writable_disk: Option<&'a Path>,
    /// The TAP device of its network.
    pub(crate) tap: Option<&'a str>,
}

/// `kombi-vmm` with an initramfs, serial console on standard output.
pub(crate) fn kombi_vmm(guests: &Guests, initramfs: &Path) -> Result<Child> {
    let machine = Machine {
        kernel: &guests.kernel,
        initramfs,
        parameters: String::new(),
        memory_mib: MEMORY_MIB,
        cpu_model: None,
        translations_kept: true,
        disk: None,
        writable_disk: None,
        tap: None,
    };
    kombi_machine(&guests.vmm, &machine)
}

/// The monitor `vmm` with `machine`, serial console on standard output.
pub(crate) fn kombi_machine(vmm: &Path, machine: &Machine<'_>) -> Result<Child> {
    let mut config = json!({
        "boot-source": {
            "kernel_image_path": machine.kernel,
            "initrd_path": machine.initramfs,
            "boot_args": format!("{PARAMETERS} reboot=k {}", machine.parameters),
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": machine.memory_mib },
    });
    if let Some(model) = machine.cpu_model {
        config["machine-config"]["cpu_model"] = json!(model);
    }
    let disks = [
        ("disk", machine.disk, true),
        ("data", machine.writable_disk, false),
    ];
    let drives: Vec<_> = disks
        .iter()
        .filter_map(|(id, path, read_only)| {
            Some(json!({
                "drive_id": id,
                "path_on_host": (*path)?,
                "is_root_device": false,
                "is_read_only": read_only,
            }))
        })
        .collect();
    config["drives"] = json!(drives);
    if let Some(tap) = machine.tap {
        config["network-interfaces"] = json!([{"iface_id": "net", "host_dev_name": tap}]);
    }
    let cache: &[&str] = if machine.translations_kept {
        &[]
    } else {
        &["--translation-cache", "off"]
    };
    let mut child = Command::new(vmm)
        .args(["--no-api", "--die-with-parent", "--config-file", "-"])
        .args(cache)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("failed to start kombi-vmm")?;
    let mut input = child.stdin.take().context("no standard input")?;
    input.write_all(config.to_string().as_bytes())?;
    Ok(child)
}

/// QEMU with `machine`, serial console on standard output.
pub(crate) fn qemu_machine(machine: &Machine<'_>) -> Result<Child> {
    let devices = [
        machine.disk.is_some(),
        machine.writable_disk.is_some(),
        machine.tap.is_some(),
    ];
    let count = devices.iter().filter(|there| **there).count();
    let places = QEMU_DEVICES.iter().take(count).copied();
    let parameters = places
        .chain([machine.parameters.as_str()])
        .collect::<Vec<_>>()
        .join(" ");
    let mut qemu = qemu_base(machine.kernel, machine.memory_mib, &parameters);
    qemu.arg("-initrd").arg(machine.initramfs);
    if let Some(disk) = machine.disk {
        qemu_disk(&mut qemu, disk);
    }
    if let Some(disk) = machine.writable_disk {
        qemu.args(["-device", "virtio-blk-device,drive=data", "-drive"])
            .arg(format!(
                "id=data,if=none,format=raw,file={}",
                disk.display()
            ));
    }
    if let Some(tap) = machine.tap {
        qemu.args(["-device", "virtio-net-device,netdev=net", "-netdev"])
            .arg(format!("tap,id=net,ifname={tap},script=no,downscript=no"));
    }
    qemu.spawn().context("failed to start qemu-system-x86_64")
}

/// QEMU without devices: more are added by the caller.
fn qemu_base(kernel: &Path, memory_mib: u32, more_parameters: &str) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-M",
        QEMU_MACHINE,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ])
    .args([
        "-object",
        &format!("memory-backend-memfd,id=ram,size={memory_mib}M"),
    ])
    .args([
        "-m",
        &memory_mib.to_string(),
        "-smp",
        "1",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-kernel",
    ])
    .arg(kernel)
    .args([
        "-append",
        &format!("{PARAMETERS} reboot=t {more_parameters}"),
    ])
    .stdin(Stdio::null())
    .stdout(Stdio::piped())
    .stderr(Stdio::null());
    qemu
}

/// QEMU with an initramfs, serial console on standard output.
pub(crate) fn qemu(guests: &Guests, initramfs: &Path) -> Result<Child> {
    qemu_machine(&Machine {
        kernel: &guests.kernel,
        initramfs,
        parameters: String::new(),
        memory_mib: MEMORY_MIB,
        cpu_model: None,
        translations_kept: true,
        disk: None,
        writable_disk: None,
        tap: None,
    })
}

/// QEMU with an EROFS root and `init` as PID 1.
pub(crate) fn qemu_root(guests: &Guests, layer: &Path, init: &str) -> Command {
    let mut qemu = qemu_base(
        &guests.kernel,
        MEMORY_MIB,
        &format!(
            "{} root=/dev/vda rootfstype=erofs ro init={init}",
            QEMU_DEVICES[0]
        ),
    );
    qemu_disk(&mut qemu, layer);
    qemu
}

fn qemu_disk(qemu: &mut Command, disk: &Path) {
    qemu.args(["-device", "virtio-blk-device,drive=disk", "-drive"])
        .arg(format!(
            "id=disk,if=none,format=raw,readonly=on,file={}",
            disk.display()
        ));
}

/// Time from now until `child`'s console shows `mark`; the child is then killed.
pub(crate) fn time_to(mark: &str, started: Instant, child: Child) -> Result<Duration> {
    time_to_and_then(mark, started, child, Duration::ZERO)
}

/// As [`time_to`], but the child goes on for `rest` before it is killed.
pub(crate) fn time_to_and_then(
    mark: &str,
    started: Instant,
    mut child: Child,
    rest: Duration,
) -> Result<Duration> {
    let lines = console(&mut child)?;
    let mut elapsed = None;
    for line in lines {
        if line?.contains(mark) {
            elapsed = Some(started.elapsed());
            break;
        }
    }
    std::thread::sleep(rest);
    end(&mut child);
    elapsed.with_context(|| format!("the machine ended without saying {mark:?}"))
}

/// The console's lines until the machine ends by itself.
pub(crate) fn to_the_end(mut child: Child) -> Result<Vec<String>> {
    let lines = console(&mut child)?.collect::<Result<Vec<_>, _>>();
    end(&mut child);
    Ok(lines?)
}

/// Wall time of a whole command that must succeed, and what it printed.
pub(crate) fn whole_run(command: &mut Command, wanted: i32) -> Result<(Duration, String)> {
    let started = Instant::now();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {command:?}"))?;
    let elapsed = started.elapsed();
    ensure!(
        output.status.code() == Some(wanted),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok((
        elapsed,
        String::from_utf8_lossy(&output.stdout).into_owned(),
    ))
}

/// Ends and reaps a machine.
pub(crate) fn end(child: &mut Child) {
    // it may have ended by itself: both calls then fail harmlessly
    let _ = child.kill();
    let _ = child.wait();
}

/// The lines that the machine prints.
pub(crate) fn console(
    child: &mut Child,
) -> Result<impl Iterator<Item = std::io::Result<String>> + use<>> {
    match child.stdout.take() {
        Some(output) => Ok(BufReader::new(output)
            .split(b'\n')
            .map(|line| line.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))),
        None => bail!("no console"),
    }
}
