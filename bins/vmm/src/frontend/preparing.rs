//! Before the start: each request changes a draft, and is refused if the machine that
//! the draft would then describe could not be.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use api::{Action, Answer, Refusal};
use blueprint::{Blueprint, CpuConfigDraft, Draft, LoggerDraft, MachineConfigDraft, MetricsDraft};
use machine::BackEnds;
use serde_json::{Value, json};

use crate::frontend::refuse;

/// Stands for the kernel as long as none was named: everything else can be checked.
const NO_KERNEL_YET: &str = "/";

/// What was asked of a machine that does not run yet.
#[derive(Debug, Default)]
pub(crate) struct Preparing {
    draft: Draft,
    /// Those that drives name, connected to already.
    back_ends: BackEnds,
    /// Something that a snapshot brings along was configured.
    touched: bool,
}

impl Preparing {
    pub(super) fn draft(&self) -> &Draft {
        &self.draft
    }

    pub(super) fn logger(&mut self, asked: LoggerDraft) {
        self.draft.logger = Some(asked);
    }

    pub(super) fn metrics(&mut self, asked: MetricsDraft) {
        self.draft.metrics = Some(asked);
    }

    /// The machine, checked.
    pub(super) fn blueprint(&self) -> Result<Blueprint, Refusal> {
        if self
            .draft
            .boot_source
            .kernel_image_path
            .as_os_str()
            .is_empty()
        {
            return Err(refuse("there is no kernel: name one with PUT /boot-source"));
        }
        self.draft
            .clone()
            .check()
            .map_err(|error| refuse(&crate::failure::chain(&error)))
    }

    /// Connections to back ends, for one start; another one connects anew.
    pub(super) fn take_back_ends(&mut self) -> BackEnds {
        std::mem::take(&mut self.back_ends)
    }

    /// A snapshot can be loaded.
    pub(super) fn check_untouched(&self) -> Result<(), Refusal> {
        match self.touched {
            false => Ok(()),
            true => Err(refuse(
                "a snapshot brings its machine along: load it before anything else is configured",
            )),
        }
    }

    pub(super) fn act(&mut self, action: Action) -> Result<Answer, Refusal> {
        let mut next = self.draft.clone();
        let mut drive = None;
        match action {
            Action::GetVmConfig => return Ok(Answer::Body(vm_config(&self.draft))),
            Action::GetMachineConfig => {
                return Ok(Answer::Body(machine_config(&self.draft.machine_config)));
            }
            Action::GetBalloon => return balloon(&self.draft),
            Action::PutMachineConfig(asked) | Action::PatchMachineConfig(asked) => {
                next.machine_config.merge(asked);
            }
            Action::PutBootSource(asked) => {
                readable("kernel", &asked.kernel_image_path)?;
                if let Some(path) = &asked.initrd_path {
                    readable("initial RAM disk", path)?;
                }
                next.boot_source = asked;
            }
            Action::PutCpuConfig(asked) => {
                next.cpu_config = Some(CpuConfigDraft::Template(asked));
            }
            Action::PutDrive(asked) => {
                if let Some(path) = &asked.path_on_host {
                    disk(path, asked.is_read_only.unwrap_or_default())?;
                }
                drive = Some((asked.drive_id.clone(), asked.socket.clone()));
                put(&mut next.drives, asked, |drive| drive.drive_id.clone());
            }
            Action::PutPmem(asked) => {
                disk(&asked.path_on_host, asked.read_only)?;
                put(&mut next.pmem, asked, |device| device.id.clone());
            }
            Action::PutNetworkInterface(asked) => {
                if let Err(error) = machine::check_tap(&asked.host_dev_name) {
                    return Err(refuse(&crate::failure::chain(&error)));
                }
                put(&mut next.network_interfaces, asked, |one| {
                    one.iface_id.clone()
                });
            }
            Action::PutVsock(asked) => next.vsock = Some(asked),
            Action::PutEntropy(asked) => next.entropy = Some(asked),
            Action::PutSerial(asked) => next.serial = Some(asked),
            Action::PutBalloon(asked) => next.balloon = Some(asked),
            Action::PutMemoryHotplug(asked) => next.memory_hotplug = Some(asked),
            Action::PutMmdsConfig(asked) => next.mmds_config = Some(asked),
            _ => return Err(refuse("this cannot be asked for before the machine starts")),
        }
        // Checked as a whole: what one device may be depends on the others.
        let mut probe = next.clone();
        if probe.boot_source.kernel_image_path.as_os_str().is_empty() {
            probe.boot_source.kernel_image_path = NO_KERNEL_YET.into();
        }
        probe
            .check()
            .map_err(|error| refuse(&crate::failure::chain(&error)))?;
        if let Some((id, socket)) = drive {
            // Many a back end serves one at a time: the drive that was is let go before.
            self.back_ends.remove(&id);
            if let Some(socket) = socket {
                let connection = machine::connect_back_end(&id, &socket)
                    .map_err(|error| refuse(&crate::failure::chain(&error)))?;
                self.back_ends.insert(id, connection);
            }
        }
        self.draft = next;
        self.touched = true;
        Ok(Answer::Done)
    }
}

/// Replaces the one of the same name where it stands, or adds `asked`.
fn put<T>(list: &mut Vec<T>, asked: T, name: impl Fn(&T) -> String) {
    let id = name(&asked);
    match list.iter_mut().find(|one| name(one) == id) {
        Some(before) => *before = asked,
        None => list.push(asked),
    }
}

fn readable(what: &str, path: &Path) -> Result<(), Refusal> {
    let failed = |error| refuse(&format!("failed to open {what} {path:?}: {error}"));
    // Opening a FIFO would wait, and every other client with it.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(refuse(&format!("{what} {path:?} is not a file")));
    }
    File::open(path).map(drop).map_err(failed)
}

/// What a drive's or pmem device's file must be; it is opened again at the start.
fn disk(path: &Path, read_only: bool) -> Result<(), Refusal> {
    let kind = std::fs::metadata(path)
        .map_err(|error| refuse(&format!("failed to open {path:?}: {error}")))?
        .file_type();
    // Opening a FIFO would wait.
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refuse(&format!(
            "{path:?} is neither a file nor a block device"
        )));
    }
    File::options()
        .read(true)
        .write(!read_only)
        .open(path)
        .map(drop)
        .map_err(|error| refuse(&format!("failed to open {path:?}: {error}")))
}

pub(super) fn balloon(draft: &Draft) -> Result<Answer, Refusal> {
    match &draft.balloon {
        Some(balloon) => Ok(Answer::Body(json!(balloon))),
        None => Err(refuse(
            "there is no balloon: configure one before the start",
        )),
    }
}

/// `GET /machine-config`: with what was not said.
pub(super) fn machine_config(asked: &MachineConfigDraft) -> Value {
    let mut value = json!({
        "vcpu_count": 1,
        "mem_size_mib": blueprint::limits::MEMORY_MIB_DEFAULT,
        "smt": false,
        "track_dirty_pages": false,
        "huge_pages": "None",
    });
    if let (Some(all), Value::Object(said)) = (value.as_object_mut(), json!(asked)) {
        all.extend(said);
    }
    value
}

/// `GET /vm/config`: what a configuration file would say.
pub(super) fn vm_config(draft: &Draft) -> Value {
    let mut value = json!(draft);
    if let Some(members) = value.as_object_mut() {
        members.remove("serial");
        members.insert(
            "machine-config".to_owned(),
            machine_config(&draft.machine_config),
        );
    }
    value
}
