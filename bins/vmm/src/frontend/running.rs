//! Once the machine runs: each request changes it, and the draft that describes it.
//!
//! Invariant: no request waits for another, but who resumes a machine for its snapshot, and
//! who changes a drive's file for what the disk is doing, or has a
//! drive's back end asked.

use std::sync::Mutex;

use api::{Action, Answer, DrivePatch, NetworkInterfacePatch, Refusal, VmState};
use blueprint::{Draft, RateLimiter};
use machine::Controller;

use crate::frontend::{balloon, lock, memory, preparing, refuse, snapshots};

/// A machine that runs.
pub(super) struct Running {
    draft: Mutex<Draft>,
    /// Locked while device and draft are not of one mind.
    changing: Mutex<()>,
    controller: Controller,
}

impl Running {
    pub(super) fn new(draft: Draft, controller: Controller) -> Self {
        Self {
            draft: Mutex::new(draft),
            changing: Mutex::default(),
            controller,
        }
    }

    pub(super) fn act(&self, action: Action) -> Result<Answer, Refusal> {
        match action {
            Action::GetVmConfig => Ok(Answer::Body(preparing::vm_config(&lock(&self.draft)))),
            Action::GetMachineConfig => {
                let config = preparing::machine_config(&lock(&self.draft).machine_config);
                Ok(Answer::Body(config))
            }
            Action::GetBalloon
            | Action::GetBalloonStatistics
            | Action::GetHinting
            | Action::PatchBalloon(_)
            | Action::PatchBalloonStatistics(_)
            | Action::StartHinting(_)
            | Action::StopHinting => {
                balloon::act(self.controller.handles().balloon.as_ref(), action)
            }
            Action::GetMemoryHotplug => memory::status(self.controller.handles()),
            Action::PatchMemoryHotplug(asked) => {
                memory::request(self.controller.handles(), asked.requested_size_mib)
            }
            Action::PatchPmem(asked) => memory::limit(self.controller.handles(), &asked),
            Action::PatchDrive(asked) => self.patch_drive(asked),
            Action::PatchNetworkInterface(asked) => self.patch_interface(asked),
            Action::PatchVm(VmState::Paused) => done(self.controller.pause()),
            Action::PatchVm(VmState::Resumed) => done(self.controller.resume()),
            Action::SendCtrlAltDel => done(self.controller.press_ctrl_alt_del()),
            Action::PutDrive(_)
            | Action::PutNetworkInterface(_)
            | Action::PutPmem(_)
            | Action::DeleteDrive(_)
            | Action::DeleteNetworkInterface(_)
            | Action::DeletePmem(_) => Err(refuse(
                "devices can only be plugged on PCI, which this machine does not have",
            )),
            Action::CreateSnapshot(asked) => {
                snapshots::create(&self.controller, &asked, &self.changing, &self.draft)
            }
            _ => Err(refuse("the machine has no such device")),
        }
    }

    fn patch_drive(&self, asked: DrivePatch) -> Result<Answer, Refusal> {
        let DrivePatch {
            drive_id,
            path_on_host,
            rate_limiter,
        } = asked;
        let (path, limiter) = (path_on_host.as_deref(), rate_limiter.as_ref());
        if path.is_none() && limiter.is_none() {
            return done(self.controller.reread_drive(&drive_id));
        }
        let changing = lock(&self.changing);
        let changed = self.controller.update_drive(&drive_id, path, limiter);
        let in_hand = changed.map_err(|error| refuse(&crate::failure::chain(&error)))?;
        let mut draft = lock(&self.draft);
        let mut drives = draft.drives.iter_mut();
        if let Some(drive) = drives.find(|drive| drive.drive_id == drive_id) {
            if path_on_host.is_some() {
                drive.path_on_host = path_on_host;
            }
            merge(&mut drive.rate_limiter, rate_limiter);
        }
        drop((draft, changing));
        // A disk that is slow keeps this caller waiting, and nobody else.
        if let Some(in_hand) = in_hand {
            in_hand.wait();
        }
        Ok(Answer::Done)
    }

    fn patch_interface(&self, asked: NetworkInterfacePatch) -> Result<Answer, Refusal> {
        let NetworkInterfacePatch {
            iface_id,
            rx_rate_limiter,
            tx_rate_limiter,
        } = asked;
        let (rx, tx) = (rx_rate_limiter.as_ref(), tx_rate_limiter.as_ref());
        let _changing = lock(&self.changing);
        let answer = done(self.controller.update_interface(&iface_id, rx, tx))?;
        let mut draft = lock(&self.draft);
        let mut interfaces = draft.network_interfaces.iter_mut();
        if let Some(interface) = interfaces.find(|one| one.iface_id == iface_id) {
            merge(&mut interface.rx_rate_limiter, rx_rate_limiter);
            merge(&mut interface.tx_rate_limiter, tx_rate_limiter);
        }
        Ok(answer)
    }
}

/// Takes over what a change names; the rest stays.
fn merge(limiter: &mut Option<RateLimiter>, change: Option<RateLimiter>) {
    if let Some(new) = change {
        let limiter = limiter.get_or_insert_default();
        limiter.bandwidth = new.bandwidth.or(limiter.bandwidth);
        limiter.ops = new.ops.or(limiter.ops);
    }
}

fn done<E: std::error::Error>(result: Result<(), E>) -> Result<Answer, Refusal> {
    match result {
        Ok(()) => Ok(Answer::Done),
        Err(error) => Err(refuse(&crate::failure::chain(&error))),
    }
}
