//! The devices that bring memory and take it: persistent memory, balloon, pluggable
//! memory.

use std::sync::{Arc, Mutex};

use blueprint::{Blueprint, RateLimiter, TokenBucket};
use hv::Interrupts;
use virtio::balloon::{Balloon, Settings};
use virtio::mem::Mem;
use virtio::pmem::Pmem;
use virtio::rate_limiter::{Limit, Limits};

use crate::Error;
use crate::devices::Devices;
use crate::io_space::lock;
use crate::memory::{MappedFile, Memory};

impl Devices {
    /// Adds those that `blueprint` asks for; `memory` was made for it.
    pub(crate) fn add_memory_devices(
        &mut self,
        blueprint: &Blueprint,
        memory: Memory,
        interrupts: &Arc<dyn Interrupts>,
    ) -> Result<(), Error> {
        let Memory {
            ram,
            files,
            pluggable,
        } = memory;
        for (MappedFile { id, file, region }, asked) in files.into_iter().zip(blueprint.pmem()) {
            let pmem = Pmem::new(file, region, limits(&asked.limiter))
                .map_err(|source| Error::Limiter { source })?;
            let pmem = Arc::new(Mutex::new(pmem));
            self.sources.push(pmem.clone());
            let counters = lock(&pmem).counters();
            self.handles.count(&format!("pmem_{id}"), counters);
            self.handles.pmem.push((id, pmem.clone()));
            self.add_virtio(pmem, &ram, interrupts)?;
        }
        if let Some(balloon) = blueprint.balloon() {
            let settings = Settings {
                amount_mib: balloon.amount_mib,
                deflate_on_oom: balloon.deflate_on_oom,
                statistics_interval_s: balloon.stats_polling_interval_s,
                hinting: balloon.free_page_hinting,
                reporting: balloon.free_page_reporting,
            };
            let balloon =
                Balloon::new(settings, &ram).map_err(|source| Error::Balloon { source })?;
            let balloon = Arc::new(Mutex::new(balloon));
            self.handles.count("balloon", balloon.clone());
            self.handles.balloon = Some(balloon.clone());
            self.sources.push(balloon.clone());
            self.add_virtio(balloon, &ram, interrupts)?;
        }
        if let (Some(hotplug), Some(region)) = (blueprint.memory_hotplug(), pluggable)
            && let Some(mem) = Mem::new(&ram, region, u64::from(hotplug.slot_mib) << 20)
        {
            self.handles.count("memory_hotplug", mem.counters());
            let mem = Arc::new(Mutex::new(mem));
            self.handles.mem = Some(mem.clone());
            self.add_virtio(mem, &ram, interrupts)?;
        }
        Ok(())
    }
}

/// A device's limits as it takes them.
pub fn limits(asked: &RateLimiter) -> Limits {
    Limits {
        bandwidth: asked.bandwidth.map(limit),
        ops: asked.ops.map(limit),
    }
}

/// One bucket of them.
pub(crate) fn limit(bucket: TokenBucket) -> Limit {
    Limit {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_ms: bucket.refill_time,
    }
}
