//! What a snapshot keeps of a balloon.

use ram::GuestRam;
use serde::{Deserialize, Serialize};

use super::device::{Balloon, Hinting, Live, Settings, State};
use super::spec::queues;
use crate::saved::SavedQueue;
use crate::{Error, Interrupt, VirtQueue};

/// A balloon in a snapshot. Statistics are not kept: the guest sends new ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBalloon {
    /// MiB that the guest is to give up.
    pub amount_mib: u32,
    /// VIRTIO_BALLOON_F_DEFLATE_ON_OOM is offered.
    pub deflate_on_oom: bool,
    /// Seconds between two looks at the statistics.
    pub statistics_interval_s: u16,
    /// Hinting is offered.
    pub hinting: bool,
    /// Reporting is offered.
    pub reporting: bool,
    /// Pages that the guest gave up.
    pub actual_pages: u32,
    /// The host's last hinting command.
    pub host_command: u32,
    /// The guest's.
    pub guest_command: Option<u32>,
    /// Number of the last run.
    pub last_run: u32,
    /// Whether runs are acknowledged.
    pub acknowledge: bool,
    /// What there is only while the driver works.
    pub live: Option<SavedLive>,
}

/// What there is only while the driver works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedLive {
    /// What was negotiated.
    pub features: u64,
    /// In the order that the features give.
    pub queues: Vec<SavedQueue>,
    /// The guest's buffer for statistics.
    pub statistics_head: Option<u16>,
}

impl SavedBalloon {
    pub(super) fn of(balloon: &Balloon) -> Self {
        let (settings, hinting) = (&balloon.settings, &balloon.hinting);
        Self {
            amount_mib: settings.amount_mib,
            deflate_on_oom: settings.deflate_on_oom,
            statistics_interval_s: settings.statistics_interval_s,
            hinting: settings.hinting,
            reporting: settings.reporting,
            actual_pages: balloon.actual_pages,
            host_command: hinting.host_command,
            guest_command: hinting.guest_command,
            last_run: hinting.last,
            acknowledge: hinting.acknowledge,
            live: match &balloon.state {
                State::Idle => None,
                State::Live(live) => Some(SavedLive {
                    features: live.features,
                    queues: live.queues.iter().map(|(_, queue)| queue.save()).collect(),
                    statistics_head: live.statistics_head,
                }),
            },
        }
    }

    pub(super) fn balloon(&self, ram: &GuestRam, interrupt: &Interrupt) -> Result<Balloon, Error> {
        let settings = Settings {
            amount_mib: self.amount_mib,
            deflate_on_oom: self.deflate_on_oom,
            statistics_interval_s: self.statistics_interval_s,
            hinting: self.hinting,
            reporting: self.reporting,
        };
        let mut balloon = Balloon::new(settings, ram)?;
        balloon.actual_pages = self.actual_pages;
        balloon.hinting = Hinting {
            host_command: self.host_command,
            guest_command: self.guest_command,
            last: self.last_run,
            acknowledge: self.acknowledge,
        };
        if let Some(live) = &self.live {
            balloon.state = State::Live(live.restored(ram, interrupt)?);
        }
        Ok(balloon)
    }
}

impl SavedLive {
    fn restored(&self, ram: &GuestRam, interrupt: &Interrupt) -> Result<Live, Error> {
        let bad = |_| Error::Saved { device: "balloon" };
        if queues(self.features).count() != self.queues.len() {
            return Err(Error::Saved { device: "balloon" });
        }
        let rings = self
            .queues
            .iter()
            .map(|saved| VirtQueue::restore(saved, interrupt.clone()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(bad)?;
        Ok(Live {
            memory: ram.memory().clone(),
            queues: queues(self.features).zip(rings).collect(),
            interrupt: interrupt.clone(),
            features: self.features,
            statistics_head: self.statistics_head,
        })
    }
}
