//! What was asked of a machine ([`Draft`]) and what was checked ([`Blueprint`]).
//!
//! Invariant: a [`Blueprint`] can only come out of [`Draft::check`], so every
//! limit in [`limits`] holds for it. Nothing here touches the host: whether a
//! path exists is found out by whoever opens it (`machine`).
#![forbid(unsafe_code)]

mod checked;
mod draft;
mod error;
mod json;
pub mod limits;

pub use checked::{
    Balloon, Blueprint, Drive, MemoryHotplug, MmdsConfig, NetworkInterface, Pmem, Store, Vsock,
};
pub use draft::{
    BalloonDraft, BootSourceDraft, CacheType, CpuConfigDraft, Draft, DriveDraft, Engine,
    EntropyDraft, HugePages, IoEngine, LogLevel, LoggerDraft, MachineConfigDraft,
    MemoryHotplugDraft, MetricsDraft, MmdsConfigDraft, MmdsVersion, NetworkInterfaceDraft,
    PmemDraft, RateLimiter, SerialDraft, StaticCpuTemplate, TokenBucket, VsockDraft,
};
pub use error::DraftError;
pub use json::from_json;
pub use x86::cpu_template::CpuTemplate;
pub use x86::features::CpuModel;

#[cfg(test)]
mod tests;
