//! Custom CPU templates: changes to what CPUID says and to what MSRs hold at the start,
//! in Firecracker's JSON.
//!
//! A bitmap is `0b` and one character for each bit from the highest on: 0 clears, 1 sets,
//! x leaves it. Fewer characters than bits mean the low ones; underscores mean nothing.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::cpuid::{self, Leaf};
use crate::features::{AVX_STATE, Feature, Features};

/// A template. The empty one changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuTemplate {
    /// Capabilities that KVM must have (`"121"`), or need not have (`"!121"`) though a
    /// monitor would otherwise ask for them.
    #[serde(default)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes to CPUID.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes to MSRs.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// Changes to one leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// EAX.
    #[serde(with = "number")]
    pub leaf: u32,
    /// ECX.
    #[serde(with = "number")]
    pub subleaf: u32,
    /// KVM's flags of the leaf (`struct kvm_cpuid_entry2`): bit 0, ECX matters.
    pub flags: u32,
    /// What changes.
    pub modifiers: Vec<RegisterModifier>,
}

/// Changes to one register of a leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which one.
    pub register: CpuidRegister,
    /// Which bits.
    pub bitmap: Bits<u32>,
}

/// One of the four registers that CPUID fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the registers' names")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Changes to one MSR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number.
    #[serde(with = "number")]
    pub addr: u32,
    /// Which bits.
    pub bitmap: Bits<u64>,
}

/// Bits to clear and to set. Invariant: `value` has no bit that `filter` has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits<T> {
    filter: T,
    value: T,
}

macro_rules! bits {
    ($type:ty) => {
        impl Bits<$type> {
            /// `before` with the changes.
            #[must_use]
            pub fn apply(self, before: $type) -> $type {
                before & !self.filter | self.value
            }

            /// The bits that are set whatever was there before.
            #[must_use]
            pub fn sets(self) -> $type {
                self.value
            }
        }

        impl Serialize for Bits<$type> {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                let mut text = "0b".to_owned();
                for bit in (0..<$type>::BITS).rev() {
                    text.push(match (self.filter >> bit & 1, self.value >> bit & 1) {
                        (0, _) => 'x',
                        (_, 0) => '0',
                        (_, _) => '1',
                    });
                }
                to.serialize_str(&text)
            }
        }

        impl<'de> Deserialize<'de> for Bits<$type> {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = String::deserialize(from)?;
                let wrong = |why: &str| D::Error::custom(format!("bitmap {text:?} {why}"));
                let digits = text
                    .strip_prefix("0b")
                    .ok_or_else(|| wrong("does not begin with 0b"))?;
                let mut bits = Self {
                    filter: 0,
                    value: 0,
                };
                let mut count = 0;
                for digit in digits.chars().filter(|&digit| digit != '_') {
                    let (filter, value) = match digit {
                        'x' => (0, 0),
                        '0' => (1, 0),
                        '1' => (1, 1),
                        _ => return Err(wrong("holds something else than 0, 1, x and _")),
                    };
                    bits.filter = bits.filter << 1 | filter;
                    bits.value = bits.value << 1 | value;
                    count += 1;
                    if count > <$type>::BITS {
                        return Err(wrong("has more bits than the register"));
                    }
                }
                Ok(bits)
            }
        }
    };
}
bits!(u32);
bits!(u64);

/// A capability of KVM by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// KVM must have it.
    Needed(u32),
    /// KVM need not have it.
    NotNeeded(u32),
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&match self {
            Self::Needed(number) => number.to_string(),
            Self::NotNeeded(number) => format!("!{number}"),
        })
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let parse = |number: &str| {
            number.parse().map_err(|_| {
                D::Error::custom(format!(
                    "capability {text:?} is not a number such as 121 or !121"
                ))
            })
        };
        match text.strip_prefix('!') {
            Some(number) => parse(number).map(Self::NotNeeded),
            None => parse(&text).map(Self::Needed),
        }
    }
}

/// Registers whose bits say what a CPU can do (SDM vol. 2A, CPUID): leaf, subleaf, EAX to
/// EDX.
const ABILITIES: [(u32, u32, Leaf); 5] = [
    (cpuid::FEATURES, 0, [0, 0, !0, !0]),
    (cpuid::EXTENDED_FEATURES, 0, [0, !0, !0, !0]),
    (cpuid::EXTENDED_STATE, 0, [!0, 0, 0, !0]),
    (cpuid::EXTENDED_STATE, 1, [!0, 0, !0, !0]),
    (cpuid::EXTENDED_AMD_FEATURES, 0, [0, 0, !0, !0]),
];

impl CpuTemplate {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// A leaf with the template's changes: of features, those that take away. What a CPU cannot do, no template adds.
    #[must_use]
    pub fn apply(&self, leaf: u32, subleaf: u32, before: Leaf) -> Leaf {
        let after = self.change(leaf, subleaf, before);
        let found = ABILITIES
            .iter()
            .find(|(one, sub, _)| (*one, *sub) == (leaf, subleaf));
        let abilities = found.map_or([0; 4], |(.., registers)| *registers);
        std::array::from_fn(|i| after[i] & (before[i] | !abilities[i]))
    }

    /// Leaves of which it asks for more than a CPU can do that shows `shown`.
    #[must_use]
    pub fn beyond(&self, shown: impl Fn(u32, u32) -> Leaf) -> Vec<(u32, u32)> {
        let mut list = Vec::new();
        for one in &self.cpuid_modifiers {
            let (leaf, sub) = (one.leaf, one.subleaf);
            let before = shown(leaf, sub);
            if self.change(leaf, sub, before) != self.apply(leaf, sub, before) {
                list.push((leaf, sub));
            }
        }
        list
    }

    /// What is left of `features`.
    #[must_use]
    pub fn left_of(&self, features: Features) -> Features {
        let gone = |feature: &Feature| {
            feature.place().is_some_and(|place| {
                let before = features.leaf(place.leaf, place.sub);
                let after = self.apply(place.leaf, place.sub, before);
                let bit = |leaf: Leaf| leaf.get(place.register).map_or(0, |r| r >> place.bit & 1);
                bit(before) != bit(after)
            })
        };
        let gone: Vec<_> = features.iter().filter(gone).collect();
        let mut left = features.without(Features::of(&gone));
        // YMM registers are kept by XSAVE.
        if !left.has(Feature::Avx) || !left.has(Feature::Xsave) {
            left = left.without(AVX_STATE);
        }
        left.with_combinations()
    }

    /// An MSR with the template's changes.
    #[must_use]
    pub fn msr(&self, index: u32, before: u64) -> u64 {
        self.msr_modifiers
            .iter()
            .filter(|one| one.addr == index)
            .fold(before, |value, one| one.bitmap.apply(value))
    }

    /// A leaf with all of the template's changes, also to what a CPU can do: for an engine
    /// whose guests run on a processor that does what it does, whatever CPUID says.
    #[must_use]
    pub fn change(&self, leaf: u32, subleaf: u32, before: Leaf) -> Leaf {
        let mut after = before;
        let wanted = |one: &&CpuidModifier| one.leaf == leaf && one.subleaf == subleaf;
        for change in self
            .cpuid_modifiers
            .iter()
            .filter(wanted)
            .flat_map(|one| &one.modifiers)
        {
            let [eax, ebx, ecx, edx] = &mut after;
            let register = match change.register {
                CpuidRegister::Eax => eax,
                CpuidRegister::Ebx => ebx,
                CpuidRegister::Ecx => ecx,
                CpuidRegister::Edx => edx,
            };
            *register = change.bitmap.apply(*register);
        }
        after
    }
}

/// Numbers as text with 0x or 0b in front.
mod number {
    use super::{Deserialize, Deserializer, Serializer};
    use serde::de::Error as _;

    pub(super) fn serialize<S: Serializer>(number: &u32, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{number:#x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
        let text = String::deserialize(from)?;
        let parsed = if let Some(digits) = text.strip_prefix("0x") {
            u32::from_str_radix(digits, 16)
        } else if let Some(digits) = text.strip_prefix("0b") {
            u32::from_str_radix(digits, 2)
        } else {
            text.parse()
        };
        parsed.map_err(|_| {
            D::Error::custom(format!(
                "{text:?} is not a number of 32 bits such as 0x1 or 0b1"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: &str = r#"{
        "kvm_capabilities": ["121", "!56"],
        "cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0b0", "flags": 1, "modifiers": [
            {"register": "ebx", "bitmap": "0bxxxx_0001"}, {"register": "edx", "bitmap": "0b1x"}
        ]}],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1"}]
    }"#;

    #[test]
    fn a_template_changes_what_it_names_and_nothing_else() {
        let template: CpuTemplate = serde_json::from_str(T).unwrap();
        let before = [u32::MAX; 4];
        assert_eq!(template.apply(1, 0, before), before);
        assert_eq!(template.apply(7, 1, before), before);
        let after = template.apply(7, 0, [0, 0b1111_1111, 5, 3]);
        assert_eq!(after, [0, 0b1111_0001, 5, 3]);
        assert_eq!(template.msr(0x10a, 6), 7);
        assert_eq!(template.msr(0x10b, 6), 6);
        assert_eq!(
            template.kvm_capabilities,
            [KvmCapability::Needed(121), KvmCapability::NotNeeded(56)]
        );
        assert_eq!(template.msr_modifiers[0].bitmap.apply(6), 7);
    }

    #[test]
    fn a_template_adds_nothing_that_the_cpu_cannot_do() {
        let template: CpuTemplate = serde_json::from_str(T).unwrap();
        assert_eq!(template.apply(7, 0, [0; 4]), [0; 4]);
        assert_eq!(template.beyond(|_, _| [0; 4]), [(7, 0)]);
        assert_eq!(template.beyond(|_, _| [!0; 4]), []);
    }

    #[test]
    fn features_that_a_template_hides_are_gone_with_what_needs_them() {
        let without_avx = r#"{"cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
            "modifiers": [{"register": "ecx", "bitmap": "0bxxx0xxxxxxxxxxxxxxxxxxxxxxxxxxxx"}]}]}"#;
        let template: CpuTemplate = serde_json::from_str(without_avx).unwrap();
        let left = template.left_of(Features::EVERYTHING);
        for gone in [Feature::Avx, Feature::Avx2, Feature::Fma, Feature::VexAes] {
            assert!(!left.has(gone), "{}", gone.name());
        }
        assert!(left.has(Feature::Aes) && left.has(Feature::Bmi2) && left.has(Feature::Xsave));
        assert_eq!(
            CpuTemplate::default().left_of(Features::EVERYTHING),
            Features::EVERYTHING
        );
    }

    #[test]
    fn templates_survive_being_written_and_read() {
        let template: CpuTemplate = serde_json::from_str(T).unwrap();
        let text = serde_json::to_string(&template).unwrap();
        assert_eq!(
            serde_json::from_str::<CpuTemplate>(&text).unwrap(),
            template
        );
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for (from, to) in [
            ("\"0x7\"", "\"7x\""),
            ("\"0x7\"", "\"0x1_0000_0000\""),
            ("\"ebx\"", "\"EBX\""),
            ("0bxxxx_0001", "xxxx"),
            ("0bxxxx_0001", "0b2"),
            ("0b1x", "0bxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
            ("\"121\"", "\"a\""),
            ("\"!56\"", "\"!\""),
            ("kvm_capabilities", "reg_modifiers"),
        ] {
            assert!(
                serde_json::from_str::<CpuTemplate>(&T.replace(from, to)).is_err(),
                "{to}"
            );
        }
    }
}
