//! What this host offers to machines, and which engine that means.
//!
//! Invariant: looking changes nothing on the host. The parts that decide are pure functions of what was read. Left to
//! others: showing it (`kombi doctor`).

use std::fs;
use std::io;
use std::path::Path;

use blueprint::{CpuModel, Engine};
use serde::Serialize;
use x86::features::Features;

use crate::Error;

/// The host's own virtualisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kvm {
    /// `/dev/kvm` with VMX or SVM below it.
    Real,
    /// `/dev/kvm` without VMX or SVM: some software plays it (we are in a machine ourselves).
    Software,
    /// `/dev/kvm` is there, but not for this user.
    NotPermitted,
    /// VMX or SVM, but no `/dev/kvm`: the kernel's module is missing.
    NotLoaded,
    /// Nothing.
    Absent,
}

/// A processor feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// As `/proc/cpuinfo` calls it.
    pub name: &'static str,
    /// Whether this processor has it.
    pub present: bool,
    /// Whether the software engine cannot run without.
    pub required: bool,
    /// What the software engine does with it.
    pub used_for: &'static str,
}

/// A CPU model, and whether this host can give it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Model {
    /// As in `--cpu-model`.
    pub name: &'static str,
    /// What the guest gets, as `/proc/cpuinfo` calls it; nothing when it cannot be.
    pub features: Vec<&'static str>,
    /// What the host lacks.
    pub missing: Vec<&'static str>,
}

/// What a host offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// The host's own virtualisation.
    pub kvm: Kvm,
    /// The processor, in its own words.
    pub cpu_model: String,
    /// Processors online.
    pub cpus: usize,
    /// What the software engine looks for.
    pub cpu_features: Vec<Feature>,
    /// The CPU models that guests may have.
    pub cpu_models: Vec<Model>,
    /// Memory of the host, in bytes.
    pub memory_total_bytes: u64,
    /// Memory that can be had without swapping, in bytes.
    pub memory_available_bytes: u64,
    /// Effective user id.
    pub uid: u32,
}

/// What the software engine looks for: a name, whether it must be, and why.
const FEATURES: [(&str, bool, &str); 9] = [
    ("bmi2", true, "address checks without touching flags (pext)"),
    ("cx16", true, "x86-64-v2 for the guest"),
    ("popcnt", true, "x86-64-v2 for the guest"),
    ("ssse3", true, "x86-64-v2 for the guest"),
    ("sse4_1", true, "x86-64-v2 for the guest"),
    ("sse4_2", true, "x86-64-v2 for the guest"),
    ("lahf_lm", true, "x86-64-v2 for the guest"),
    ("constant_tsc", false, "the guest's clock"),
    ("nonstop_tsc", false, "the guest's clock"),
];

impl Host {
    /// Looks at this host.
    #[must_use]
    pub fn look() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            kvm: kvm(&cpuinfo, open_kvm(Path::new("/dev/kvm"))),
            cpu_model: cpuinfo_field(&cpuinfo, "model name").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, Into::into),
            cpu_features: features(&cpuinfo),
            cpu_models: models(Features::of_host()),
            memory_total_bytes: meminfo_bytes(&meminfo, "MemTotal"),
            memory_available_bytes: meminfo_bytes(&meminfo, "MemAvailable"),
            uid: rustix::process::geteuid().as_raw(),
        }
    }

    /// The features that the software engine misses and cannot do without.
    #[must_use]
    pub fn missing_features(&self) -> Vec<&'static str> {
        let missing = self
            .cpu_features
            .iter()
            .filter(|f| f.required && !f.present);
        missing.map(|feature| feature.name).collect()
    }
}

/// The engine to ask the monitor for, where `asked` may leave it to us: `auto` where
/// the processor may run guests, and the monitor has a closer look.
///
/// # Errors
/// [`Error::Engine`] when it cannot do what is asked.
pub fn choose_engine(asked: Engine, vcpus: u8) -> Result<Engine, Error> {
    let found = kvm_of(
        Features::host_has_virtualisation(),
        open_kvm(Path::new("/dev/kvm")),
    );
    choose_engine_with(asked, vcpus, found)
}

/// The same on a host with what was found.
///
/// # Errors
/// As above.
pub fn choose_engine_with(asked: Engine, vcpus: u8, found: Kvm) -> Result<Engine, Error> {
    let refused = |engine, cause: &str, way_out| {
        Err(Error::Engine {
            engine,
            cause: cause.to_owned(),
            way_out,
        })
    };
    if vcpus == 0 {
        let engine = if asked == Engine::Kvm { "kvm" } else { "soft" };
        return refused(engine, "a machine needs a processor", "use --cpus 1");
    }
    match (asked, found) {
        (Engine::Kvm, Kvm::NotPermitted) => refused(
            "kvm",
            "/dev/kvm is not for this user",
            "join the group that it belongs to, or use --engine soft",
        ),
        (Engine::Kvm, Kvm::NotLoaded | Kvm::Absent) => refused(
            "kvm",
            "there is no /dev/kvm that can be opened",
            "use --engine soft, or leave it out",
        ),
        (Engine::Kvm, Kvm::Real | Kvm::Software) => Ok(Engine::Kvm),
        (Engine::Auto, Kvm::Real) => Ok(Engine::Auto),
        (Engine::Auto | Engine::Soft, _) if vcpus > blueprint::limits::SOFT_VCPU_COUNT_MAX => {
            Err(Error::Engine {
                engine: "soft",
                cause: format!(
                    "{vcpus} processors were asked for, the software engine runs at most {}",
                    blueprint::limits::SOFT_VCPU_COUNT_MAX
                ),
                way_out: "use --cpus 8, or fewer",
            })
        }
        (Engine::Auto | Engine::Soft, _) => Ok(Engine::Soft),
    }
}

/// Whether this host can give a CPU model.
///
/// # Errors
/// [`Error::Engine`] names what is missing.
pub fn check_cpu_model(model: CpuModel) -> Result<(), Error> {
    let refused = |missing: Features| Error::Engine {
        engine: "soft",
        cause: format!(
            "CPU model {} needs {}, which this processor lacks",
            model.name(),
            missing.names()
        ),
        way_out: "use --cpu-model v2, or a host that has it",
    };
    model.on(Features::of_host()).map(drop).map_err(refused)
}

fn models(host: Features) -> Vec<Model> {
    let names = |features: Features| -> Vec<_> {
        let of_cpuid = features.iter().filter(|feature| feature.place().is_some());
        of_cpuid.map(x86::features::Feature::name).collect()
    };
    let one = |model: CpuModel| match model.on(host) {
        Ok(features) => Model {
            name: model.name(),
            features: names(features),
            missing: Vec::new(),
        },
        Err(missing) => Model {
            name: model.name(),
            features: Vec::new(),
            missing: names(missing),
        },
    };
    CpuModel::ALL.map(one).into()
}

fn open_kvm(path: &Path) -> io::Result<()> {
    fs::OpenOptions::new().read(true).write(true).open(path)?;
    Ok(())
}

fn kvm(cpuinfo: &str, opened: io::Result<()>) -> Kvm {
    let hardware = ["vmx", "svm"].iter().any(|name| has_flag(cpuinfo, name));
    kvm_of(hardware, opened)
}

fn kvm_of(hardware: bool, opened: io::Result<()>) -> Kvm {
    match opened {
        Ok(()) if hardware => Kvm::Real,
        Ok(()) => Kvm::Software,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Kvm::NotPermitted,
        Err(_) if hardware => Kvm::NotLoaded,
        Err(_) => Kvm::Absent,
    }
}

fn features(cpuinfo: &str) -> Vec<Feature> {
    let one = |(name, required, used_for)| Feature {
        name,
        present: has_flag(cpuinfo, name),
        required,
        used_for,
    };
    FEATURES.into_iter().map(one).collect()
}

fn has_flag(cpuinfo: &str, name: &str) -> bool {
    let mut flags = cpuinfo_field(cpuinfo, "flags").split_whitespace();
    flags.any(|flag| flag == name)
}

fn cpuinfo_field<'a>(cpuinfo: &'a str, name: &str) -> &'a str {
    let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    fields
        .find(|(key, _)| key.trim() == name)
        .map_or("", |(_, value)| value.trim())
}

fn meminfo_bytes(meminfo: &str, name: &str) -> u64 {
    let mut fields = meminfo.lines().filter_map(|line| line.split_once(':'));
    fields
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &str =
        "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu vmx bmi2 cx16 popcnt\n";
    const GUEST: &str = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu bmi2 hypervisor\n";

    fn failed(kind: io::ErrorKind) -> io::Result<()> {
        Err(kind.into())
    }

    #[test]
    fn kvm_is_real_only_above_hardware() {
        assert_eq!(kvm(INTEL, Ok(())), Kvm::Real);
        assert_eq!(kvm(GUEST, Ok(())), Kvm::Software);
        assert_eq!(
            kvm(INTEL, failed(io::ErrorKind::PermissionDenied)),
            Kvm::NotPermitted
        );
        assert_eq!(kvm(INTEL, failed(io::ErrorKind::NotFound)), Kvm::NotLoaded);
        assert_eq!(kvm(GUEST, failed(io::ErrorKind::NotFound)), Kvm::Absent);
    }

    #[test]
    fn a_flag_is_a_whole_word() {
        assert!(has_flag(INTEL, "vmx"));
        assert!(!has_flag(INTEL, "vm"));
        assert!(!has_flag("", "vmx"));
    }

    #[test]
    fn missing_features_are_those_the_engine_needs() {
        let mut host = Host::look();
        host.cpu_features = features(INTEL);
        assert_eq!(
            host.missing_features(),
            ["ssse3", "sse4_1", "sse4_2", "lahf_lm"]
        );
    }

    #[test]
    fn a_model_that_cannot_be_says_what_is_missing() {
        use x86::features::Feature;
        let host = Features::EVERYTHING.without(Features::of(&[Feature::Avx2]));
        let models = models(host);
        let of = |name| models.iter().find(|model| model.name == name).unwrap();
        assert_eq!(of("v3").missing, ["avx2"]);
        assert!(of("v2").missing.is_empty() && of("v2").features.contains(&"sse4_2"));
        assert!(of("host").features.contains(&"avx"));
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let meminfo = "MemTotal:       1024 kB\nMemAvailable:    512 kB\n";
        assert_eq!(meminfo_bytes(meminfo, "MemTotal"), 1 << 20);
        assert_eq!(meminfo_bytes(meminfo, "MemAvailable"), 512 << 10);
        assert_eq!(meminfo_bytes(meminfo, "SwapTotal"), 0);
    }

    #[test]
    fn this_host_has_memory_and_processors() {
        let host = Host::look();
        assert!(host.memory_total_bytes > 0 && host.cpus > 0);
    }

    #[test]
    fn an_engine_that_cannot_do_it_says_so_with_the_way_out() {
        for vcpus in [1, 8] {
            let chosen = |asked, found| choose_engine_with(asked, vcpus, found).expect("fine");
            assert_eq!(chosen(Engine::Auto, Kvm::Software), Engine::Soft);
            assert_eq!(chosen(Engine::Auto, Kvm::Absent), Engine::Soft);
            assert_eq!(chosen(Engine::Auto, Kvm::Real), Engine::Auto);
            assert_eq!(chosen(Engine::Kvm, Kvm::Software), Engine::Kvm);
        }
        for (engine, vcpus, found) in [
            (Engine::Kvm, 1, Kvm::NotPermitted),
            (Engine::Kvm, 1, Kvm::NotLoaded),
            (Engine::Kvm, 1, Kvm::Absent),
            (Engine::Kvm, 0, Kvm::Real),
            (Engine::Soft, 9, Kvm::Real),
            (Engine::Auto, 9, Kvm::Software),
            (Engine::Soft, 0, Kvm::Absent),
        ] {
            let error = choose_engine_with(engine, vcpus, found).expect_err("refused");
            let way_out = error.way_out().unwrap_or_default();
            assert!(way_out.contains("use --"), "{error}");
        }
    }
}
