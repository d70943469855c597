//! `kombi doctor`: what this host offers, what Kombi will use and why, and what would make it better.
//!
//! Invariant: the names of the JSON fields are documented in `docs/cli.md` and stay; nothing on the host is changed.
//! Left to others: looking at the host (`sandbox::host`), finding files (`sandbox::Search`).

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use image::Store;
use sandbox::host::{Feature, Host, Kvm, Model, choose_engine_with};
use sandbox::{Engine, MEMORY_MIB_LEAST, Search};
use serde::Serialize;
use translations::{FOLDER_BYTES_MAX, Folder, Place, Settings};

use crate::complaint::Complaint;
use crate::jail_probe::Jail;
use crate::quantity::human_bytes;

const AFTER_HELP: &str = "\
Exit code: 0 when a machine can run here, 1 when not.

Examples:
  kombi doctor
  kombi doctor --json | jq -r .engine.use";

/// Show what this host offers, what Kombi will use, and what would make it better.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct DoctorArgs {
    /// Show it as JSON.
    #[arg(long)]
    json: bool,
}

/// Everything, under the names of the JSON output.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether a machine can run here.
    ok: bool,
    version: &'static str,
    host: Host,
    engine: EngineReport,
    kernel: FileReport,
    initramfs: FileReport,
    vmm: FileReport,
    /// What shuts the monitor in.
    jail: Jail,
    store: StoreReport,
    translations: TranslationsReport,
    runtime_dir: PathBuf,
    /// What keeps a machine from running.
    problems: Vec<String>,
    /// What would make it better.
    advice: Vec<String>,
}

#[derive(Debug, Serialize)]
struct EngineReport {
    /// `soft` or `kvm`; absent when no engine can run.
    r#use: Option<String>,
    why: String,
}

#[derive(Debug, Serialize)]
struct FileReport {
    path: Option<PathBuf>,
    bytes: Option<u64>,
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct StoreReport {
    path: Option<PathBuf>,
    exists: bool,
    layers: u64,
    bytes: u64,
    free_bytes: u64,
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct TranslationsReport {
    /// Absent when none are kept.
    path: Option<PathBuf>,
    files_bytes: u64,
    bytes_max: u64,
    /// Of the file that this version uses.
    entries: u32,
    error: Option<String>,
}

/// Shows it; 0 when a machine can run here, 1 when not.
pub(crate) fn doctor(args: &DoctorArgs) -> Result<u8, Complaint> {
    let report = Report::make(
        Host::look(),
        &Search::from_env(),
        Store::default_root().ok(),
    );
    let text = if args.json {
        serde_json::to_string_pretty(&report)
            .map_err(|error| Complaint::caused(&error, None).about("report"))?
    } else {
        report.table()
    };
    let code = if report.ok { 0 } else { 1 };
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Complaint::caused(&error, None).about("failed to write the report"))
        }
        Ok(()) | Err(_) => Ok(code),
    }
}

impl Report {
    fn make(host: Host, search: &Search, store_root: Option<PathBuf>) -> Self {
        let kernel = FileReport::of(search.kernel());
        let initramfs = FileReport::of(search.initramfs());
        let vmm = FileReport::of(search.vmm());
        let store = StoreReport::of(store_root);
        let mut problems: Vec<String> = [&kernel, &initramfs, &vmm]
            .into_iter()
            .filter_map(|file| file.error.clone())
            .chain(store.error.clone())
            .collect();
        let missing = host.missing_features();
        let engine = if missing.is_empty() {
            engine(&host)
        } else {
            problems.push(format!(
                "the software engine needs a processor with {}",
                missing.join(", ")
            ));
            EngineReport {
                r#use: None,
                why: "the processor misses features that the software engine needs".to_owned(),
            }
        };
        let least = u64::from(MEMORY_MIB_LEAST) << 20;
        if host.memory_available_bytes < least {
            problems.push(format!(
                "{} of memory are free, a machine needs {} at least",
                human_bytes(host.memory_available_bytes),
                human_bytes(least)
            ));
        }
        let jail = Jail::ask(vmm.path.as_deref());
        let mut advice = advice(&host, &store);
        advice.extend(jail.advice());
        Self {
            translations: TranslationsReport::of(Place::choose(None)),
            ok: problems.is_empty(),
            version: env!("CARGO_PKG_VERSION"),
            advice,
            host,
            engine,
            kernel,
            initramfs,
            vmm,
            jail,
            store,
            runtime_dir: sandbox::runtime_parent(),
            problems,
        }
    }

    fn table(&self) -> String {
        let host = &self.host;
        let file = |file: &FileReport| match (&file.path, file.bytes) {
            (Some(path), Some(bytes)) => format!("{} ({})", path.display(), human_bytes(bytes)),
            (Some(path), None) => path.display().to_string(),
            (None, _) => "not found".to_owned(),
        };
        let features = host.missing_features();
        let store = match &self.store.path {
            Some(path) if self.store.exists => format!(
                "{} ({} layers, {}; {} free)",
                path.display(),
                self.store.layers,
                human_bytes(self.store.bytes),
                human_bytes(self.store.free_bytes)
            ),
            Some(path) => format!("{} (made when needed)", path.display()),
            None => "no place".to_owned(),
        };
        let user = match host.uid {
            0 => "root".to_owned(),
            uid => format!("uid {uid} (no privileges needed)"),
        };
        let rows = [
            ("KVM", kvm_words(host.kvm).to_owned()),
            ("processor", format!("{} × {}", host.cpus, host.cpu_model)),
            (
                "features",
                if features.is_empty() {
                    "all that the software engine needs".to_owned()
                } else {
                    format!("missing: {}", features.join(", "))
                },
            ),
            ("CPU models", models(host)),
            (
                "memory",
                format!(
                    "{} free of {}",
                    human_bytes(host.memory_available_bytes),
                    human_bytes(host.memory_total_bytes)
                ),
            ),
            ("user", user),
            ("kernel", file(&self.kernel)),
            ("guest init", file(&self.initramfs)),
            ("monitor", file(&self.vmm)),
            ("jail", self.jail.words()),
            ("image store", store),
            ("translations", self.translations.words()),
            ("runtime dir", self.runtime_dir.display().to_string()),
            (
                "engine",
                match &self.engine.r#use {
                    Some(name) => format!("{name}: {}", self.engine.why),
                    None => format!("none: {}", self.engine.why),
                },
            ),
        ];
        let mut lines: Vec<String> = rows
            .iter()
            .map(|(name, value)| format!("{name:<12} {value}"))
            .collect();
        let lists = [
            ("Problems", &self.problems),
            ("What would make it better", &self.advice),
        ];
        for (title, items) in lists {
            if !items.is_empty() {
                lines.push(format!("\n{title}:"));
                lines.extend(items.iter().map(|item| format!("- {item}")));
            }
        }
        lines.push(if self.ok {
            "\nMachines can run here.".to_owned()
        } else {
            "\nMachines cannot run here yet.".to_owned()
        });
        lines.join("\n")
    }
}

/// Those that can be, and what the others lack.
fn models(host: &Host) -> String {
    let one = |model: &Model| {
        if model.missing.is_empty() {
            model.name.to_owned()
        } else {
            format!("{} (lacks {})", model.name, model.missing.join(", "))
        }
    };
    let all: Vec<_> = host.cpu_models.iter().map(one).collect();
    all.join(", ")
}

fn engine(host: &Host) -> EngineReport {
    match choose_engine_with(Engine::Auto, 1, host.kvm) {
        Ok(engine) => EngineReport {
            // To leave it open is to take KVM, where the monitor finds nothing wrong with it.
            r#use: Some(if engine == Engine::Auto {
                Engine::Kvm.to_string()
            } else {
                engine.to_string()
            }),
            why: match host.kvm {
                Kvm::Real => {
                    "guests run on the processor, by way of KVM; the monitor tries it, and takes \
                     the software engine if it is not what it seems"
                }
                Kvm::Software => {
                    "the KVM here is played by software: it interprets a guest's kernel, more \
                     slowly than the software engine runs it, and stops at instructions that it \
                     lacks; --engine kvm takes it all the same"
                }
                Kvm::NotPermitted | Kvm::NotLoaded | Kvm::Absent => "it needs no KVM",
            }
            .to_owned(),
        },
        Err(error) => EngineReport {
            r#use: None,
            why: error.to_string(),
        },
    }
}

fn kvm_words(kvm: Kvm) -> &'static str {
    match kvm {
        Kvm::Real => "real: /dev/kvm above VMX or SVM",
        Kvm::Software => "software: /dev/kvm is there, but the processor shows neither VMX nor SVM",
        Kvm::NotPermitted => "not for this user: /dev/kvm cannot be opened",
        Kvm::NotLoaded => "not loaded: the processor has VMX or SVM, but there is no /dev/kvm",
        Kvm::Absent => "absent: no /dev/kvm, and the processor shows neither VMX nor SVM",
    }
}

fn advice(host: &Host, store: &StoreReport) -> Vec<String> {
    /// Below this, an image of ordinary size may not fit.
    const FREE_BYTES_FEW: u64 = 2 << 30;
    let mut advice = Vec::new();
    match host.kvm {
        Kvm::Real => {}
        Kvm::Software | Kvm::Absent => advice.push(
            "a host with VMX or SVM (bare metal, or nested virtualisation switched on) runs guests faster, with the \
             KVM engine"
                .to_owned(),
        ),
        Kvm::NotPermitted => advice.push(
            "join the group that may use /dev/kvm (usermod -aG kvm USER), for the KVM engine".to_owned(),
        ),
        Kvm::NotLoaded => advice.push(
            "load the kernel's module (modprobe kvm_intel or kvm_amd), for the KVM engine".to_owned(),
        ),
    }
    let clock_missing = |feature: &&Feature| !feature.required && !feature.present;
    let slow_clock: Vec<&str> = host
        .cpu_features
        .iter()
        .filter(clock_missing)
        .map(|feature| feature.name)
        .collect();
    if !slow_clock.is_empty() {
        advice.push(format!(
            "the guest's clock is exact only on a processor with {}",
            slow_clock.join(" and ")
        ));
    }
    if store.error.is_none() && store.free_bytes < FREE_BYTES_FEW {
        advice.push(format!(
            "{} are free for images: make room, or set KOMBI_HOME to a larger disk",
            human_bytes(store.free_bytes)
        ));
    }
    advice
}

impl FileReport {
    fn of(found: Result<PathBuf, sandbox::Error>) -> Self {
        match found {
            Ok(path) => Self {
                bytes: fs::metadata(&path).ok().map(|meta| meta.len()),
                path: Some(path),
                error: None,
            },
            Err(error) => Self {
                path: None,
                bytes: None,
                error: Some(match error.way_out() {
                    Some(way_out) => format!("{error}; {way_out}"),
                    None => error.to_string(),
                }),
            },
        }
    }
}

impl StoreReport {
    fn of(root: Option<PathBuf>) -> Self {
        let Some(root) = root else {
            return Self {
                path: None,
                exists: false,
                layers: 0,
                bytes: 0,
                free_bytes: 0,
                error: Some(
                    "no place for images; set KOMBI_HOME, XDG_DATA_HOME or HOME".to_owned(),
                ),
            };
        };
        let (mut layers, mut bytes) = (0_u64, 0_u64);
        for folder in ["layers", "rootfs"] {
            let files = fs::read_dir(root.join(folder)).into_iter().flatten();
            for meta in files.filter_map(|file| file.ok()?.metadata().ok()) {
                layers = layers.saturating_add(1);
                bytes = bytes.saturating_add(meta.len());
            }
        }
        let there = root.ancestors().find(|dir| dir.is_dir());
        Self {
            exists: root.is_dir(),
            layers,
            bytes,
            free_bytes: free_bytes(there.unwrap_or(Path::new("/"))),
            path: Some(root),
            error: None,
        }
    }
}

impl TranslationsReport {
    fn of(place: Place) -> Self {
        let mut report = Self {
            path: None,
            files_bytes: 0,
            bytes_max: FOLDER_BYTES_MAX as u64,
            entries: 0,
            error: None,
        };
        let Place::Folder(path) = place else {
            return report;
        };
        if path.exists() {
            let settings = Settings::default();
            let found = Folder::open_existing(&path).and_then(|folder| {
                report.files_bytes = folder.bytes();
                folder.file(settings)
            });
            match found {
                Ok(file) => report.entries = file.map_or(0, |file| file.entries()),
                Err(error) => report.error = Some(chain(&error)),
            }
        }
        report.path = Some(path);
        report
    }

    fn words(&self) -> String {
        match (&self.path, &self.error) {
            (None, _) => "off".to_owned(),
            (Some(_), Some(error)) => error.clone(),
            (Some(path), None) => format!(
                "{}: {} of {}, {} usable blocks",
                path.display(),
                human_bytes(self.files_bytes),
                human_bytes(self.bytes_max),
                self.entries
            ),
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}

fn free_bytes(dir: &Path) -> u64 {
    rustix::fs::statvfs(dir).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(kvm: Kvm, search: &Search) -> Report {
        let host = Host {
            kvm,
            cpu_model: "Test".to_owned(),
            cpus: 2,
            cpu_features: Vec::new(),
            cpu_models: Vec::new(),
            memory_total_bytes: 8 << 30,
            memory_available_bytes: 4 << 30,
            uid: 1000,
        };
        Report::make(host, search, Some("/".into()))
    }

    #[test]
    fn what_is_missing_is_a_problem_with_a_way_out() {
        let search = Search {
            assets: Some("/nowhere".into()),
            vmm: Some("/nowhere/kombi-vmm".into()),
            ..Search::default()
        };
        let report = report(Kvm::Absent, &search);
        assert!(!report.ok);
        assert_eq!(report.problems.len(), 3, "{:?}", report.problems);
        assert!(report.problems.iter().all(|problem| problem.contains("; ")));
        assert!(report.table().contains("Machines cannot run here yet"));
    }

    #[test]
    fn every_kind_of_kvm_but_the_real_one_earns_advice() {
        for kvm in [
            Kvm::Software,
            Kvm::NotPermitted,
            Kvm::NotLoaded,
            Kvm::Absent,
        ] {
            let report = report(kvm, &Search::default());
            assert!(
                report.advice.iter().any(|line| line.contains("KVM engine")),
                "{kvm:?}"
            );
        }
        let report = report(Kvm::Real, &Search::default());
        assert!(!report.advice.iter().any(|line| line.contains("KVM engine")));
        assert_eq!(report.engine.r#use.as_deref(), Some("kvm"));
    }

    #[test]
    fn the_json_has_its_documented_names() {
        let report = report(Kvm::Software, &Search::default());
        let json = serde_json::to_value(&report).expect("serialises");
        for pointer in [
            "/ok",
            "/version",
            "/host/kvm",
            "/host/cpu_model",
            "/host/cpus",
            "/host/cpu_features",
            "/host/cpu_models",
            "/host/memory_total_bytes",
            "/host/memory_available_bytes",
            "/host/uid",
            "/engine/use",
            "/engine/why",
            "/kernel/path",
            "/kernel/bytes",
            "/kernel/error",
            "/initramfs/path",
            "/vmm/path",
            "/jail",
            "/store/path",
            "/store/exists",
            "/store/layers",
            "/store/bytes",
            "/store/free_bytes",
            "/store/error",
            "/translations/path",
            "/translations/files_bytes",
            "/translations/bytes_max",
            "/translations/entries",
            "/translations/error",
            "/runtime_dir",
            "/problems",
            "/advice",
        ] {
            assert!(json.pointer(pointer).is_some(), "{pointer}");
        }
        assert_eq!(json.pointer("/host/kvm"), Some(&"software".into()));
    }
}
