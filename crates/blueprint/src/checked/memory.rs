//! Balloon and memory hot-plug that were checked.

use crate::draft::{BalloonDraft, HugePages, MemoryHotplugDraft};
use crate::{DraftError, limits};

/// The balloon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balloon {
    /// MiB that the guest is asked to give up: at most what it has.
    pub amount_mib: u32,
    /// The guest takes memory back when it runs out of it.
    pub deflate_on_oom: bool,
    /// Seconds between two looks at the guest's statistics; none when 0.
    pub stats_polling_interval_s: u16,
    /// The guest can be asked once for all of its free pages.
    pub free_page_hinting: bool,
    /// The guest reports free pages as they become free.
    pub free_page_reporting: bool,
}

/// Memory that may be plugged into the running guest: `total` is a multiple of `slot`,
/// which is a multiple of `block`, which is a power of two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryHotplug {
    /// MiB at most.
    pub total_mib: u32,
    /// MiB of the smallest piece that the host makes accessible.
    pub slot_mib: u32,
    /// MiB of the smallest piece that the guest plugs.
    pub block_mib: u32,
}

pub(super) fn check_size(asked: u64, pages: HugePages) -> Result<u32, DraftError> {
    let whole = match pages {
        HugePages::None => 1,
        HugePages::Transparent | HugePages::Hugetlbfs2M => 2,
    };
    u32::try_from(asked)
        .ok()
        .filter(|mib| (limits::MEMORY_MIB_MIN..=limits::MEMORY_MIB_MAX).contains(mib))
        .ok_or(DraftError::MemorySize { asked })
        .and_then(|mib| match mib % whole {
            0 => Ok(mib),
            _ => Err(DraftError::OddMemorySize { asked }),
        })
}

pub(super) fn check_balloon(asked: &BalloonDraft, memory_mib: u32) -> Result<Balloon, DraftError> {
    let amount_mib = u32::try_from(asked.amount_mib)
        .ok()
        .filter(|&amount| amount <= memory_mib)
        .ok_or(DraftError::BalloonSize {
            asked: asked.amount_mib,
            memory_mib,
        })?;
    Ok(Balloon {
        amount_mib,
        deflate_on_oom: asked.deflate_on_oom,
        stats_polling_interval_s: asked.stats_polling_interval_s,
        free_page_hinting: asked.free_page_hinting,
        free_page_reporting: asked.free_page_reporting,
    })
}

pub(super) fn check_hotplug(asked: &MemoryHotplugDraft) -> Result<MemoryHotplug, DraftError> {
    let (total, slot, block) = (
        asked.total_size_mib,
        asked.slot_size_mib,
        asked.block_size_mib,
    );
    let wrong = |field, asked, what: String| Err(DraftError::Hotplug { field, asked, what });
    if block < limits::HOTPLUG_BLOCK_MIB_MIN || !block.is_power_of_two() {
        let what = format!("a power of two from {}", limits::HOTPLUG_BLOCK_MIB_MIN);
        return wrong("block_size_mib", block, what);
    }
    if slot < limits::HOTPLUG_SLOT_MIB_MIN || !slot.is_multiple_of(block) {
        let least = limits::HOTPLUG_SLOT_MIB_MIN;
        let what = format!("a multiple of block_size_mib ({block}) from {least}");
        return wrong("slot_size_mib", slot, what);
    }
    let most = limits::MEMORY_MIB_MAX;
    if total < slot || !total.is_multiple_of(slot) || total > most.into() {
        let what = format!("a multiple of slot_size_mib ({slot}) up to {most}");
        return wrong("total_size_mib", total, what);
    }
    // Each divides `total`, which fits.
    Ok(MemoryHotplug {
        total_mib: total as u32,
        slot_mib: slot as u32,
        block_mib: block as u32,
    })
}
