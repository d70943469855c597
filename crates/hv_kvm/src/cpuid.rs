//! What the guest's CPUID gives: what it gives on every engine ([`x86::guest_cpuid`]), cut
//! to what this KVM has.
//!
//! On top of that come the switches of mitigations for the host's processor, which the
//! software engine has no use for: guests protect themselves with them.

use hv::Error;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};
use x86::cpu_template::CpuTemplate;
use x86::cpuid::{self, Leaf, leaf1_ecx, leaf1_edx};
use x86::features::{AVX_STATE, CpuModel, Feature, Features};
use x86::guest_cpuid::{self, Place, Shown};
use x86::xsave;

use crate::{NAME, failed};

/// Leaf 7, EDX: MD_CLEAR, SPEC_CTRL, STIBP, L1D_FLUSH, SSBD.
const MITIGATIONS_LEAF7_EDX: u32 = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 31;
/// Leaf 8000_0008, EBX: IBPB, IBRS, STIBP, those preferred, SSBD.
const MITIGATIONS_AMD_EBX: u32 = 1 << 12 | 1 << 14 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 24;
/// Subleaves of leaf 4 that are looked at.
const CACHES_MAX: u32 = 8;

/// What KVM can give, and what a model makes of it.
#[derive(Clone, Debug)]
pub(crate) struct Supported {
    entries: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl Supported {
    /// Asks the kernel.
    pub(crate) fn ask(kvm: &Kvm) -> Result<Self, Error> {
        let entries = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("ask KVM for its CPUID"))?;
        Ok(Self {
            entries: entries.as_slice().to_vec(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }

    fn leaf(&self, leaf: u32, sub: u32) -> Leaf {
        let found = self.entries.iter().find(|entry| {
            let any = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0;
            entry.function == leaf && (any || entry.index == sub)
        });
        found.map_or([0; 4], registers)
    }

    /// The features that guests may have.
    pub(crate) fn features(&self) -> Features {
        let [components, ..] = self.leaf(cpuid::EXTENDED_STATE, 0);
        let avx = u64::from(components) & xsave::AVX != 0;
        Features::of_cpu(|leaf, sub| self.leaf(leaf, sub), avx)
    }

    /// The features of a model. `host` is whatever there is, also where that is less
    /// than the software engine always has.
    pub(crate) fn model(&self, model: CpuModel) -> Result<Features, Error> {
        let all = self.features();
        if model == CpuModel::Host {
            let usable = if all.has(Feature::Xsave) {
                all
            } else {
                all.without(AVX_STATE)
            };
            return Ok(usable.with_combinations());
        }
        model.on(all).map_err(|missing| Error::HostLacks {
            engine: NAME,
            lacks: format!(
                "CPU model {} needs {}, which this KVM does not give; use --cpu-model host",
                model.name(),
                missing.names()
            ),
        })
    }

    /// Bits of a physical address.
    fn physical_bits(&self) -> u32 {
        let [a, ..] = self.leaf(cpuid::ADDRESS_WIDTHS, 0);
        // 36 is what a processor without the leaf has (SDM vol. 3, §4.1.4).
        if a == 0 { 36 } else { a & 0xff }
    }

    /// The table for a vCPU.
    pub(crate) fn table(
        &self,
        model: CpuModel,
        features: Features,
        place: Place,
        tsc_khz: u64,
        template: &CpuTemplate,
    ) -> Result<CpuId, Error> {
        let shown = Shown {
            place,
            tsc_khz,
            cpu_model: model,
            features,
            // As the software engine, whose guests have as much; KVM follows CR4 and
            // XCR0 by itself.
            physical_bits: self.physical_bits().min(46),
            cr4: 0,
            xcr0: xsave::X87 | xsave::SSE | xsave::AVX,
        };
        let mut entries = Vec::new();
        for (leaf, sub) in leaves() {
            let values = self.cut(leaf, sub, guest_cpuid::guest(leaf, sub, &shown), model);
            if values == [0; 4] && sub != 0 {
                continue;
            }
            let flags = if guest_cpuid::has_subleaves(leaf) {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            };
            entries.push(entry(leaf, sub, flags, values));
        }
        self.change(&mut entries, template)?;
        // More entries than KVM takes is our mistake, not the host's.
        CpuId::from_entries(&entries).map_err(|_| Error::State {
            engine: NAME,
            why: "its CPUID is too long".to_owned(),
        })
    }

    /// The template's changes. A leaf that KVM has and guests are not shown is empty before.
    fn change(
        &self,
        entries: &mut Vec<kvm_cpuid_entry2>,
        template: &CpuTemplate,
    ) -> Result<(), Error> {
        for modifier in &template.cpuid_modifiers {
            let (leaf, sub) = (modifier.leaf, modifier.subleaf);
            let is_it = |one: &kvm_cpuid_entry2| one.function == leaf && one.index == sub;
            let found = entries.iter_mut().find(|one| is_it(one));
            let before = found.as_ref().map_or([0; 4], |one| registers(one));
            // More than one modifier may be of a leaf: what all of them change is the same
            // however often it is changed.
            let values = keep_place(leaf, before, template.change(leaf, sub, before));
            let after = entry(leaf, sub, modifier.flags, values);
            match found {
                Some(one) => *one = after,
                None if self.entries.iter().any(is_it) => entries.push(after),
                None => {
                    return Err(Error::HostLacks {
                        engine: NAME,
                        lacks: format!(
                            "its KVM has no CPUID leaf {leaf:#x}, subleaf {sub:#x}, which \
                             cpu-config changes; leave it out of cpuid_modifiers"
                        ),
                    });
                }
            }
        }
        Ok(())
    }

    /// A leaf without the features that KVM lacks.
    fn cut(&self, leaf: u32, sub: u32, wanted: Leaf, model: CpuModel) -> Leaf {
        let has = self.leaf(leaf, sub);
        let [a, b, c, d] = wanted;
        let mitigations = |all| if model == CpuModel::Baseline { 0 } else { all };
        match (leaf, sub) {
            (cpuid::FEATURES, _) => {
                // The kernel says of the deadline timer elsewhere, and makes these itself.
                let deadline = if self.tsc_deadline {
                    leaf1_ecx::TSC_DEADLINE
                } else {
                    0
                };
                let own = leaf1_ecx::HYPERVISOR | leaf1_ecx::X2APIC | deadline;
                [a, b, c & (has[2] | own), d & (has[3] | leaf1_edx::HTT)]
            }
            (cpuid::EXTENDED_FEATURES, _) => {
                let d = (d | mitigations(MITIGATIONS_LEAF7_EDX)) & has[3];
                [a, b & has[1], c & has[2], d]
            }
            (cpuid::EXTENDED_STATE, 1) => [a & has[0], 0, 0, 0],
            (cpuid::KVM_FEATURES, _) => [a & has[0], 0, 0, 0],
            (cpuid::EXTENDED_AMD_FEATURES, _) => [a, b, c & has[2], d & has[3]],
            (cpuid::ADDRESS_WIDTHS, _) => [a, has[1] & mitigations(MITIGATIONS_AMD_EBX), c, d],
            _ => wanted,
        }
    }
}

fn entry(leaf: u32, sub: u32, flags: u32, [eax, ebx, ecx, edx]: Leaf) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf,
        index: sub,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn registers(entry: &kvm_cpuid_entry2) -> Leaf {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// Where a vCPU is among the others, and that it is one, is no template's to say: Firecracker
/// writes that after the template.
fn keep_place(leaf: u32, before: Leaf, [a, b, c, d]: Leaf) -> Leaf {
    match leaf {
        cpuid::FEATURES => [
            a,
            before[1],
            c | before[2] & (leaf1_ecx::TSC_DEADLINE | leaf1_ecx::HYPERVISOR),
            d & !leaf1_edx::HTT | before[3] & leaf1_edx::HTT,
        ],
        // Bits 14 to 31 of EAX: how many share the cache, and how many cores there are.
        cpuid::CACHES => [a & 0x3fff | before[0] & !0x3fff, b, c, d],
        cpuid::TOPOLOGY => before,
        _ => [a, b, c, d],
    }
}

/// All that a guest is shown.
fn leaves() -> impl Iterator<Item = (u32, u32)> {
    let plain = [
        cpuid::VENDOR,
        cpuid::FEATURES,
        cpuid::THERMAL_AND_POWER,
        cpuid::EXTENDED_FEATURES,
        cpuid::TSC,
        cpuid::FREQUENCY,
        cpuid::HYPERVISOR,
        cpuid::KVM_FEATURES,
        cpuid::EXTENDED_AMD_FEATURES,
        cpuid::L2_CACHE,
        cpuid::POWER,
        cpuid::ADDRESS_WIDTHS,
        cpuid::EXTENDED,
    ];
    let plain = plain.into_iter().map(|leaf| (leaf, 0));
    let brand = (cpuid::BRAND_FIRST..=cpuid::BRAND_LAST).map(|leaf| (leaf, 0));
    let caches = (0..CACHES_MAX).map(|sub| (cpuid::CACHES, sub));
    let topology = (0..3).map(|sub| (cpuid::TOPOLOGY, sub));
    let state = (0..3).map(|sub| (cpuid::EXTENDED_STATE, sub));
    plain
        .chain(brand)
        .chain(caches)
        .chain(topology)
        .chain(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported(tsc_deadline: bool) -> Supported {
        let everything = kvm_cpuid_entry2 {
            function: 1,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        let leaf7 = kvm_cpuid_entry2 {
            function: 7,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            edx: 1 << 26,
            ..Default::default()
        };
        let last = kvm_cpuid_entry2 {
            eax: 7,
            ..Default::default()
        };
        Supported {
            entries: vec![everything, leaf7, last],
            tsc_deadline,
        }
    }

    #[test]
    fn what_kvm_lacks_is_not_shown_and_mitigations_are() {
        let wanted = [0, 1 << 5, 0, 1 << 29];
        let cut = supported(true).cut(7, 0, wanted, CpuModel::Host);
        assert_eq!(cut, [0, 0, 0, 1 << 26]);
        let baseline = supported(true).cut(7, 0, wanted, CpuModel::Baseline);
        assert_eq!(baseline, [0; 4]);
    }

    #[test]
    fn the_deadline_timer_is_shown_where_the_kernel_says_so() {
        let mut none = supported(false);
        none.entries[0].ecx = 0;
        let wanted = [0, 0, leaf1_ecx::TSC_DEADLINE | leaf1_ecx::HYPERVISOR, 0];
        let cut = none.cut(1, 0, wanted, CpuModel::Host);
        assert_eq!(cut[2], leaf1_ecx::HYPERVISOR);
        none.tsc_deadline = true;
        assert_eq!(none.cut(1, 0, wanted, CpuModel::Host)[2], wanted[2]);
    }

    #[test]
    fn a_model_beyond_kvm_is_refused_and_host_is_what_there_is() {
        let some = supported(true);
        let refused = some.model(CpuModel::Baseline).unwrap_err();
        assert!(
            refused.to_string().contains("--cpu-model host"),
            "{refused}"
        );
        assert!(some.model(CpuModel::Host).unwrap().has(Feature::Sse42));
    }

    fn given(template: serde_json::Value) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        let template: CpuTemplate = serde_json::from_value(template).unwrap();
        let some = supported(true);
        let features = some.model(CpuModel::Host).unwrap();
        let place = Place {
            id: 1,
            count: 2,
            smt: false,
        };
        let table = some.table(CpuModel::Host, features, place, 2_000_000, &template)?;
        Ok(table.as_slice().to_vec())
    }

    #[test]
    fn a_template_changes_what_kvm_is_told() {
        let plain = given(serde_json::json!({})).unwrap();
        let changed = given(serde_json::json!({"cpuid_modifiers": [
            // SSE4.2 goes; leaf 0x8000_0008 becomes one with subleaves; of leaf 1 a second
            // time. The flag of several threads is not the template's.
            {"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
                {"register": "ecx", "bitmap": "0b0xxxxxxxxxxxxxxxxxxxx"}]},
            {"leaf": "0x80000008", "subleaf": "0x0", "flags": 1, "modifiers": [
                {"register": "ebx", "bitmap": "0b11"}]},
            {"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
                {"register": "edx", "bitmap": "0b00000000000000000000000000000001"}]},
        ]}))
        .unwrap();
        for (before, after) in plain.iter().zip(&changed) {
            match after.function {
                1 => {
                    assert_eq!(after.ecx, before.ecx & !(1 << 20));
                    assert_ne!(after.ecx, before.ecx);
                    assert_eq!(after.edx, 1 | leaf1_edx::HTT);
                }
                cpuid::ADDRESS_WIDTHS => assert_eq!((after.flags, after.ebx & 3), (1, 3)),
                _ => assert_eq!(after, before),
            }
        }
        assert_eq!(plain.len(), changed.len());
    }

    #[test]
    fn how_many_vcpus_share_what_is_no_templates_to_say() {
        let (before, wanted) = ([0x5555_5555; 4], [0xaaaa_aaaa; 4]);
        assert_eq!(keep_place(cpuid::TOPOLOGY, before, wanted), before);
        let caches = keep_place(cpuid::CACHES, before, wanted);
        assert_eq!(caches, [0x5555_6aaa, wanted[1], wanted[2], wanted[3]]);
        let features = keep_place(cpuid::FEATURES, before, wanted);
        assert_eq!((features[0], features[1]), (wanted[0], before[1]));
        assert_eq!(keep_place(cpuid::EXTENDED_FEATURES, before, wanted), wanted);
    }

    #[test]
    fn a_leaf_that_is_shown_to_nobody_is_empty_before_and_one_that_is_nowhere_is_refused() {
        let modify = |leaf: &str| {
            given(serde_json::json!({"cpuid_modifiers": [
                {"leaf": leaf, "subleaf": "0x0", "flags": 0, "modifiers": [
                    {"register": "eax", "bitmap": "0b1x1"}]},
            ]}))
        };
        // Leaf 0 of `supported`: what it shows is known, so it is one of the guest's.
        assert!(modify("0x0").is_ok());
        let refused = modify("0x1f").unwrap_err().to_string();
        assert!(refused.contains("leaf 0x1f, subleaf 0x0"), "{refused}");
        let mut some = supported(true);
        some.entries.push(entry(0x1f, 0, 0, [!0; 4]));
        let template: CpuTemplate = serde_json::from_value(serde_json::json!({"cpuid_modifiers": [
            {"leaf": "0x1f", "subleaf": "0x0", "flags": 1, "modifiers": [
                {"register": "eax", "bitmap": "0b1x1"}]},
        ]}))
        .unwrap();
        let mut entries = Vec::new();
        some.change(&mut entries, &template).unwrap();
        assert_eq!(entries, [entry(0x1f, 0, 1, [5, 0, 0, 0])]);
    }
}
