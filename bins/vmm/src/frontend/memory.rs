//! What clients ask of pluggable and persistent memory while the machine runs.

use std::sync::{Arc, Mutex, PoisonError};

use api::{Answer, PmemPatch, Refusal};
use machine::{Handles, device_limits};
use serde_json::json;
use virtio::mem::Mem;

use crate::frontend::refuse;

pub(super) fn status(handles: &Handles) -> Result<Answer, Refusal> {
    let status = locked(handles, |mem| mem.status())?;
    Ok(Answer::Body(json!({
        "total_size_mib": status.total_mib,
        "slot_size_mib": status.slot_mib,
        "block_size_mib": status.block_mib,
        "plugged_size_mib": status.plugged_mib,
        "requested_size_mib": status.requested_mib,
    })))
}

pub(super) fn request(handles: &Handles, mib: u32) -> Result<Answer, Refusal> {
    match locked(handles, |mem| mem.request(mib))? {
        Ok(()) => Ok(Answer::Done),
        Err(error) => Err(refuse(&error.to_string())),
    }
}

pub(super) fn limit(handles: &Handles, asked: &PmemPatch) -> Result<Answer, Refusal> {
    let Some((_, pmem)) = handles.pmem.iter().find(|(id, _)| *id == asked.id) else {
        return Err(refuse(&format!("there is no pmem device {:?}", asked.id)));
    };
    if let Some(limits) = &asked.rate_limiter {
        let mut pmem = pmem.lock().unwrap_or_else(PoisonError::into_inner);
        pmem.update_limits(device_limits(limits));
    }
    Ok(Answer::Done)
}

fn locked<T>(handles: &Handles, work: impl FnOnce(&mut Mem) -> T) -> Result<T, Refusal> {
    let Some(mem): Option<&Arc<Mutex<Mem>>> = handles.mem.as_ref() else {
        return Err(refuse(
            "there is no pluggable memory: configure it before the machine starts",
        ));
    };
    let mut mem = mem.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(work(&mut mem))
}
