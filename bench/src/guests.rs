//! What the measured machines boot: programs compiled here, packed as initramfs,
//! and the demo's images in a store of the benchmark's own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Paths of everything that the measures start.
pub(crate) struct Guests {
    /// `target/bench`.
    pub(crate) work: PathBuf,
    /// The guest kernel.
    pub(crate) kernel: PathBuf,
    /// Debian's cloud kernel.
    pub(crate) debian_kernel: PathBuf,
    /// Initramfs whose init says that it runs.
    pub(crate) ready: PathBuf,
    /// Initramfs whose init switches off.
    pub(crate) off: PathBuf,
    /// Initramfs whose init is the CPU benchmark.
    pub(crate) cpu: PathBuf,
    /// The CPU benchmark for the host.
    pub(crate) cpu_native: PathBuf,
    /// `kombi`.
    pub(crate) kombi: PathBuf,
    /// `kombi-vmm`.
    pub(crate) vmm: PathBuf,
    /// The busybox image's layout.
    pub(crate) busybox: PathBuf,
    /// The Debian image's layout.
    pub(crate) debian: PathBuf,
}

impl Guests {
    /// Compiles and packs what is missing.
    pub(crate) fn prepare() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("the crate has no parent folder")?;
        let target = root.join("target");
        let work = target.join("bench");
        std::fs::create_dir_all(&work)?;
        let guests = Self {
            kernel: target.join("guest/vmlinux"),
            debian_kernel: target.join("guest/debian-cloud.bzImage"),
            ready: work.join("ready.cpio"),
            off: work.join("off.cpio"),
            cpu: work.join("cpu.cpio"),
            cpu_native: work.join("cpu"),
            kombi: target.join("release/kombi"),
            vmm: target.join("release/kombi-vmm"),
            busybox: target.join("demo/busybox"),
            debian: target.join("demo/debian"),
            work,
        };
        for path in [
            &guests.kernel,
            &guests.debian_kernel,
            &guests.kombi,
            &guests.vmm,
            &guests.busybox,
            &guests.debian,
        ] {
            ensure!(
                path.exists(),
                "{} is missing; run make build debian-kernels images",
                path.display()
            );
        }
        for name in ["ready", "off", "cpu"] {
            let source = root.join(format!("bench/guest/{name}.c"));
            let program = guests.work.join(name);
            call(
                Command::new("gcc")
                    .args(["-O2", "-static", "-o"])
                    .arg(&program)
                    .arg(&source),
            )?;
            let archive = guests.work.join(format!("{name}.cpio"));
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            call(
                Command::new(cargo)
                    .args(["xtask", "initramfs"])
                    .args([&program, &archive])
                    .current_dir(root),
            )?;
        }
        Ok(guests)
    }

    /// A `kombi run` with the benchmark's own store.
    pub(crate) fn kombi_run(&self, image: &Path, command: &[&str]) -> Command {
        let mut run = Command::new(&self.kombi);
        run.env("KOMBI_HOME", self.store()).args(["run", "--quiet"]);
        run.arg(format!("oci:{}", image.display())).args(command);
        run
    }

    /// The EROFS layers of `image`, lowest first, made by running it once.
    pub(crate) fn only_layer(&self, image: &Path) -> Result<PathBuf> {
        let home = self
            .work
            .join("layer-of")
            .join(image.file_name().context("an image without a name")?);
        let mut run = Command::new(&self.kombi);
        run.env("KOMBI_HOME", &home)
            .args(["run", "--quiet"])
            .arg(format!("oci:{}", image.display()))
            .arg("true");
        call(&mut run)?;
        let mut layers = Vec::new();
        for entry in std::fs::read_dir(home.join("layers"))? {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "erofs")
            {
                layers.push(path);
            }
        }
        match layers.as_slice() {
            [layer] => Ok(layer.clone()),
            _ => bail!(
                "{} has {} layers, one is needed",
                image.display(),
                layers.len()
            ),
        }
    }

    fn store(&self) -> PathBuf {
        self.work.join("store")
    }
}

/// Runs a command to its end; anything but success is an error.
pub(crate) fn call(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("failed to start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
