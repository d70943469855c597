//! Methods and paths, and how a body becomes an [`Action`].
//!
//! Invariant: [`ROUTES`] has each method of each path that `openapi.json` has, and no
//! other; a test says so.

use blueprint::{MachineConfigDraft, MmdsVersion};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::action::Action;
use crate::bodies::{HintingStart, VmPatch};

/// The methods that the API has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Asks.
    Get,
    /// Makes or replaces.
    Put,
    /// Changes.
    Patch,
    /// Removes.
    Delete,
}

impl Method {
    /// By the name that a request has.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "GET" => Self::Get,
            "PUT" => Self::Put,
            "PATCH" => Self::Patch,
            "DELETE" => Self::Delete,
            _ => return None,
        })
    }

    /// Its name in a request.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }
}

/// A request that was understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// What is asked for.
    pub action: Action,
    /// What of it is deprecated.
    pub deprecated: Option<&'static str>,
}

/// Why a request is not understood. Each is a 400.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// No such path, or not with this method.
    #[error("there is no {method} {path}: see the API's document for what there is")]
    NoSuchPath {
        /// The method.
        method: &'static str,
        /// The path.
        path: String,
    },
    /// A path that ends before the device's name.
    #[error("{path} names no device: put its id behind it")]
    NoId {
        /// The path.
        path: String,
    },
    /// A name that no device can have.
    #[error("id {id:?} is not letters, digits and underscores")]
    Id {
        /// The name.
        id: String,
    },
    /// Path and body name different devices.
    #[error("the path names {in_path:?}, the body {in_body:?}: they must be the same")]
    TwoIds {
        /// The path's.
        in_path: String,
        /// The body's.
        in_body: String,
    },
    /// A body where there must be none.
    #[error("{method} {path} takes no body")]
    Body {
        /// The method.
        method: &'static str,
        /// The path.
        path: String,
    },
    /// No body where there must be one.
    #[error("{method} {path} needs a body")]
    NoBody {
        /// The method.
        method: &'static str,
        /// The path.
        path: String,
    },
    /// A body that is not JSON, or not of this path's shape.
    #[error("the body of {method} {path} is not understood: {source}")]
    Json {
        /// The method.
        method: &'static str,
        /// The path.
        path: String,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A change that changes nothing.
    #[error("{method} {path} changes nothing: give at least one field")]
    Empty {
        /// The method.
        method: &'static str,
        /// The path.
        path: String,
    },
    /// Not one way to find the memory.
    #[error("give either mem_backend or mem_file_path, not {0}")]
    MemoryBackend(&'static str),
}

/// One method of one path.
pub(crate) struct Route {
    pub(crate) method: Method,
    /// As in the document; a name in braces is a device's.
    pub(crate) path: &'static str,
    /// Name in the metrics, behind the method's group.
    pub(crate) metric: &'static str,
    parse: fn(&Given) -> Result<Call, RequestError>,
}

/// What a route's parser gets.
struct Given<'a> {
    method: &'static str,
    path: &'a str,
    id: Option<&'a str>,
    body: Option<&'a [u8]>,
}

macro_rules! routes {
    ($($method:ident $path:literal $metric:literal $parse:expr;)*) => {
        /// Every request that there is.
        pub(crate) const ROUTES: &[Route] = &[$(Route {
            method: Method::$method,
            path: $path,
            metric: $metric,
            parse: $parse,
        }),*];
    };
}

routes! {
    Get "/" "instance_info" |it| it.bare(Action::GetInstance);
    Get "/version" "vmm_version" |it| it.bare(Action::GetVersion);
    Get "/vm/config" "vm_config" |it| it.bare(Action::GetVmConfig);
    Patch "/vm" "vm" |it| it.json(|body: VmPatch| Action::PatchVm(body.state));
    Put "/actions" "actions" |it| it.json(ActionBody::action);
    Get "/machine-config" "machine_cfg" |it| it.bare(Action::GetMachineConfig);
    Put "/machine-config" "machine_cfg" put_machine_config;
    Patch "/machine-config" "machine_cfg" patch_machine_config;
    Put "/boot-source" "boot_source" |it| it.json(Action::PutBootSource);
    Put "/cpu-config" "cpu_cfg" |it| it.json(Action::PutCpuConfig);
    Put "/drives/{drive_id}" "drive" |it| it.named(Action::PutDrive, |body| &body.drive_id);
    Patch "/drives/{drive_id}" "drive" |it| it.named(Action::PatchDrive, |body| &body.drive_id);
    Delete "/drives/{drive_id}" "drive" |it| it.gone(Action::DeleteDrive);
    Put "/network-interfaces/{iface_id}" "network" |it| {
        it.named(Action::PutNetworkInterface, |body| &body.iface_id)
    };
    Patch "/network-interfaces/{iface_id}" "network" |it| {
        it.named(Action::PatchNetworkInterface, |body| &body.iface_id)
    };
    Delete "/network-interfaces/{iface_id}" "network" |it| it.gone(Action::DeleteNetworkInterface);
    Put "/pmem/{id}" "pmem" |it| it.named(Action::PutPmem, |body| &body.id);
    Patch "/pmem/{id}" "pmem" |it| it.named(Action::PatchPmem, |body| &body.id);
    Delete "/pmem/{id}" "pmem" |it| it.gone(Action::DeletePmem);
    Put "/vsock" "vsock" put_vsock;
    Put "/entropy" "entropy" |it| it.json(Action::PutEntropy);
    Put "/serial" "serial" |it| it.json(Action::PutSerial);
    Get "/balloon" "balloon" |it| it.bare(Action::GetBalloon);
    Put "/balloon" "balloon" |it| it.json(Action::PutBalloon);
    Patch "/balloon" "balloon" |it| it.json(Action::PatchBalloon);
    Get "/balloon/statistics" "balloon" |it| it.bare(Action::GetBalloonStatistics);
    Patch "/balloon/statistics" "balloon" |it| it.json(Action::PatchBalloonStatistics);
    Patch "/balloon/hinting/start" "balloon" start_hinting;
    Get "/balloon/hinting/status" "balloon" |it| it.bare(Action::GetHinting);
    Patch "/balloon/hinting/stop" "balloon" |it| it.call(Action::StopHinting);
    Get "/hotplug/memory" "hotplug_memory" |it| it.bare(Action::GetMemoryHotplug);
    Put "/hotplug/memory" "hotplug_memory" |it| it.json(Action::PutMemoryHotplug);
    Patch "/hotplug/memory" "hotplug_memory" |it| it.json(Action::PatchMemoryHotplug);
    Get "/mmds" "mmds" |it| it.bare(Action::GetMmds);
    Put "/mmds" "mmds" |it| it.json(Action::PutMmds);
    Patch "/mmds" "mmds" |it| it.json(Action::PatchMmds);
    Put "/mmds/config" "mmds" put_mmds_config;
    Put "/logger" "logger" |it| it.json(Action::PutLogger);
    Put "/metrics" "metrics" |it| it.json(Action::PutMetrics);
    Get "/metrics" "metrics" |it| it.bare(Action::GetMetrics);
    Put "/snapshot/create" "snapshot" |it| it.json(Action::CreateSnapshot);
    Put "/snapshot/load" "snapshot" load_snapshot;
}

/// Understands one request. `path` may have a query, which means nothing. The route's
/// place in the table comes along, for the metrics.
///
/// # Errors
/// [`RequestError`] says what is wrong in one line.
pub fn parse(
    method: Method,
    path: &str,
    body: Option<&[u8]>,
) -> (Option<usize>, Result<Call, RequestError>) {
    let path = path.split('?').next().unwrap_or_default();
    let wanted = path.strip_suffix('/').unwrap_or(path);
    let mut given = Given {
        method: method.name(),
        path,
        id: None,
        body: body.filter(|body| !body.is_empty()),
    };
    for (index, route) in ROUTES.iter().enumerate() {
        if route.method != method {
            continue;
        }
        let found = match route.path.split_once("/{") {
            None => wanted == route.path.trim_end_matches('/'),
            Some((start, _)) => match wanted.strip_prefix(start) {
                Some("") => true,
                Some(rest) => {
                    given.id = rest.strip_prefix('/').filter(|id| !id.contains('/'));
                    given.id.is_some()
                }
                None => false,
            },
        };
        if found {
            return (Some(index), (route.parse)(&given));
        }
    }
    let refusal = RequestError::NoSuchPath {
        method: method.name(),
        path: path.to_owned(),
    };
    (None, Err(refusal))
}

impl Given<'_> {
    fn call(&self, action: Action) -> Result<Call, RequestError> {
        Ok(Call {
            action,
            deprecated: None,
        })
    }

    /// Without a body.
    fn bare(&self, action: Action) -> Result<Call, RequestError> {
        match self.body {
            None => self.call(action),
            Some(_) => Err(RequestError::Body {
                method: self.method,
                path: self.path.to_owned(),
            }),
        }
    }

    fn body<T: DeserializeOwned>(&self) -> Result<T, RequestError> {
        let Some(body) = self.body else {
            return Err(RequestError::NoBody {
                method: self.method,
                path: self.path.to_owned(),
            });
        };
        blueprint::from_json(body).map_err(|source| RequestError::Json {
            method: self.method,
            path: self.path.to_owned(),
            source,
        })
    }

    fn json<T: DeserializeOwned>(
        &self,
        action: impl FnOnce(T) -> Action,
    ) -> Result<Call, RequestError> {
        self.body().and_then(|body| self.call(action(body)))
    }

    fn id(&self) -> Result<&str, RequestError> {
        let id = self.id.ok_or_else(|| RequestError::NoId {
            path: self.path.to_owned(),
        })?;
        let named = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if id.bytes().all(named) {
            Ok(id)
        } else {
            Err(RequestError::Id { id: id.to_owned() })
        }
    }

    /// A body that names the device that the path names.
    fn named<T: DeserializeOwned>(
        &self,
        action: impl FnOnce(T) -> Action,
        name: impl FnOnce(&T) -> &String,
    ) -> Result<Call, RequestError> {
        let id = self.id()?;
        let body: T = self.body()?;
        let in_body = name(&body);
        if in_body != id {
            return Err(RequestError::TwoIds {
                in_path: id.to_owned(),
                in_body: in_body.clone(),
            });
        }
        self.call(action(body))
    }

    fn gone(&self, action: impl FnOnce(String) -> Action) -> Result<Call, RequestError> {
        let id = self.id()?.to_owned();
        self.bare(action(id))
    }
}

/// `PUT /actions`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action_type: ActionType,
}

#[derive(Debug, Serialize, Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

impl ActionBody {
    fn action(self) -> Action {
        match self.action_type {
            ActionType::FlushMetrics => Action::FlushMetrics,
            ActionType::InstanceStart => Action::InstanceStart,
            ActionType::SendCtrlAltDel => Action::SendCtrlAltDel,
        }
    }
}

fn put_machine_config(given: &Given) -> Result<Call, RequestError> {
    let body: MachineConfigDraft = given.body()?;
    let missing = match (body.vcpu_count, body.mem_size_mib) {
        (None, _) => Some("vcpu_count"),
        (_, None) => Some("mem_size_mib"),
        (Some(_), Some(_)) => None,
    };
    if let Some(field) = missing {
        return Err(RequestError::Json {
            method: given.method,
            path: given.path.to_owned(),
            source: serde::de::Error::missing_field(field),
        });
    }
    let deprecated = body.cpu_template.map(|_| "cpu_template");
    Ok(Call {
        action: Action::PutMachineConfig(body),
        deprecated,
    })
}

fn patch_machine_config(given: &Given) -> Result<Call, RequestError> {
    let body: MachineConfigDraft = given.body()?;
    if body == MachineConfigDraft::default() {
        return Err(RequestError::Empty {
            method: given.method,
            path: given.path.to_owned(),
        });
    }
    let deprecated = body.cpu_template.map(|_| "cpu_template");
    Ok(Call {
        action: Action::PatchMachineConfig(body),
        deprecated,
    })
}

fn put_vsock(given: &Given) -> Result<Call, RequestError> {
    let body: blueprint::VsockDraft = given.body()?;
    let deprecated = body.vsock_id.as_ref().map(|_| "vsock_id");
    Ok(Call {
        action: Action::PutVsock(body),
        deprecated,
    })
}

fn put_mmds_config(given: &Given) -> Result<Call, RequestError> {
    let body: blueprint::MmdsConfigDraft = given.body()?;
    let deprecated = match body.version {
        MmdsVersion::V1 => Some("version V1"),
        MmdsVersion::V2 => None,
    };
    Ok(Call {
        action: Action::PutMmdsConfig(body),
        deprecated,
    })
}

fn start_hinting(given: &Given) -> Result<Call, RequestError> {
    match given.body {
        None => given.call(Action::StartHinting(HintingStart::default())),
        Some(_) => given.json(Action::StartHinting),
    }
}

fn load_snapshot(given: &Given) -> Result<Call, RequestError> {
    let body: crate::SnapshotLoad = given.body()?;
    match (&body.mem_backend, &body.mem_file_path) {
        (Some(_), Some(_)) => return Err(RequestError::MemoryBackend("both")),
        (None, None) => return Err(RequestError::MemoryBackend("neither")),
        (Some(_), None) | (None, Some(_)) => {}
    }
    let deprecated = (body.mem_file_path.is_some() || body.enable_diff_snapshots)
        .then_some("mem_file_path and enable_diff_snapshots");
    Ok(Call {
        action: Action::LoadSnapshot(body),
        deprecated,
    })
}
