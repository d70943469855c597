//! Translations that are kept from one boot to the next change how fast a guest
//! starts, and nothing else.

mod boot;

use std::path::Path;
use std::sync::Arc;

use boot::Boot;
use hv_soft::{Options, SoftHypervisor};
use machine::Outcome;
use translations::{Counts, Translations};

const SCRIPT: &str =
    "echo from init: $(uname -sm); for i in 1 2 3; do echo $i | sha256sum; done; poweroff -f";

fn boot(folder: &Path) -> (String, Counts) {
    let options = Options::default();
    let (kept, refused) = Translations::open(options.translator(), folder).unwrap();
    assert!(refused.is_none(), "{refused:?}");
    let kept = Arc::new(kept);
    let machine = Boot {
        // The same addresses in every boot: what is asked is whether code is found.
        args: "console=ttyS0 quiet panic=-1 norandmaps printk.time=0",
        engine: SoftHypervisor::new(options).with_translations(Arc::clone(&kept)),
        ..Boot::new()
    };
    let (ended, text) = machine.run(SCRIPT);
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
    let counts = kept.counts();
    kept.save().unwrap();
    (text, counts)
}

#[test]
fn a_second_boot_says_the_same_and_translates_next_to_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (first, cold) = boot(folder.path());
    let (second, warm) = boot(folder.path());
    assert!(first.contains("from init: Linux x86_64\n"), "{first}");
    assert_eq!(first, second);
    assert!(cold.missed > 10_000, "{cold:?}");
    assert!(warm.missed * 20 < cold.missed, "{cold:?}, then {warm:?}");
}
