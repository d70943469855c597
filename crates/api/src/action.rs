//! What a client can ask for, and when.

use blueprint::{
    BalloonDraft, BootSourceDraft, CpuTemplate, DriveDraft, EntropyDraft, LoggerDraft,
    MachineConfigDraft, MemoryHotplugDraft, MetricsDraft, MmdsConfigDraft, NetworkInterfaceDraft,
    PmemDraft, SerialDraft, VsockDraft,
};
use serde_json::Value;

use crate::bodies::{
    BalloonPatch, BalloonStatisticsPatch, DrivePatch, HintingStart, HotplugPatch,
    NetworkInterfacePatch, PmemPatch, SnapshotCreate, SnapshotLoad, VmState,
};

/// One request that was understood.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each is a method and a path, see `routes`")]
pub enum Action {
    GetInstance,
    GetVersion,
    GetVmConfig,
    PatchVm(VmState),
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
    GetMachineConfig,
    PutMachineConfig(MachineConfigDraft),
    PatchMachineConfig(MachineConfigDraft),
    PutBootSource(BootSourceDraft),
    PutCpuConfig(CpuTemplate),
    PutDrive(DriveDraft),
    PatchDrive(DrivePatch),
    DeleteDrive(String),
    PutNetworkInterface(NetworkInterfaceDraft),
    PatchNetworkInterface(NetworkInterfacePatch),
    DeleteNetworkInterface(String),
    PutPmem(PmemDraft),
    PatchPmem(PmemPatch),
    DeletePmem(String),
    PutVsock(VsockDraft),
    PutEntropy(EntropyDraft),
    PutSerial(SerialDraft),
    GetBalloon,
    PutBalloon(BalloonDraft),
    PatchBalloon(BalloonPatch),
    GetBalloonStatistics,
    PatchBalloonStatistics(BalloonStatisticsPatch),
    StartHinting(HintingStart),
    GetHinting,
    StopHinting,
    GetMemoryHotplug,
    PutMemoryHotplug(MemoryHotplugDraft),
    PatchMemoryHotplug(HotplugPatch),
    GetMmds,
    PutMmds(Value),
    PatchMmds(Value),
    PutMmdsConfig(MmdsConfigDraft),
    PutLogger(LoggerDraft),
    PutMetrics(MetricsDraft),
    GetMetrics,
    CreateSnapshot(SnapshotCreate),
    LoadSnapshot(SnapshotLoad),
}

/// When something may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Until the machine starts.
    BeforeStart,
    /// Once it has started.
    AfterStart,
    /// Always.
    Both,
}

impl Action {
    /// When it may be asked for.
    pub fn stage(&self) -> Stage {
        match self {
            Self::GetInstance
            | Self::GetVersion
            | Self::GetVmConfig
            | Self::GetMachineConfig
            | Self::GetBalloon
            | Self::GetMmds
            | Self::GetMetrics
            | Self::PutMmds(_)
            | Self::PatchMmds(_)
            | Self::PutDrive(_)
            | Self::PutNetworkInterface(_)
            | Self::PutPmem(_) => Stage::Both,
            Self::InstanceStart
            | Self::PutMachineConfig(_)
            | Self::PatchMachineConfig(_)
            | Self::PutBootSource(_)
            | Self::PutCpuConfig(_)
            | Self::PutVsock(_)
            | Self::PutEntropy(_)
            | Self::PutSerial(_)
            | Self::PutBalloon(_)
            | Self::PutMemoryHotplug(_)
            | Self::PutMmdsConfig(_)
            | Self::PutLogger(_)
            | Self::PutMetrics(_)
            | Self::LoadSnapshot(_) => Stage::BeforeStart,
            Self::PatchVm(_)
            | Self::FlushMetrics
            | Self::SendCtrlAltDel
            | Self::PatchDrive(_)
            | Self::DeleteDrive(_)
            | Self::PatchNetworkInterface(_)
            | Self::DeleteNetworkInterface(_)
            | Self::PatchPmem(_)
            | Self::DeletePmem(_)
            | Self::PatchBalloon(_)
            | Self::GetBalloonStatistics
            | Self::PatchBalloonStatistics(_)
            | Self::StartHinting(_)
            | Self::GetHinting
            | Self::StopHinting
            | Self::GetMemoryHotplug
            | Self::PatchMemoryHotplug(_)
            | Self::CreateSnapshot(_) => Stage::AfterStart,
        }
    }
}

/// What a client gets when it went well.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// 204.
    Done,
    /// 200 with this body.
    Body(Value),
    /// 200 with a text.
    Text {
        /// What kind of text.
        media_type: &'static str,
        /// The text.
        text: String,
    },
}

/// Why a client does not get what it asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// 400.
    #[error("{0}")]
    BadRequest(String),
    /// 413: the metadata store would be larger than it may be.
    #[error("{0}")]
    TooLarge(String),
}
