//! Drives that other processes serve (vhost-user).
//!
//! Left to others: what is said to such a process, and the disk that the guest sees (`virtio::block::vhost_user`).

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use blueprint::{Blueprint, Drive, Store};
use hv::Interrupts;
use ram::GuestRam;
use virtio::block::Cache;
use virtio::block::vhost_user::{Connection, VhostUserBlock};

use crate::Error;
use crate::devices::Devices;

/// Back ends that were reached, by drive.
pub type BackEnds = HashMap<String, Connection>;

/// Connects to the back ends of `blueprint`.
///
/// # Errors
/// [`Error::Drive`]: none is held then.
pub fn connect_back_ends(blueprint: &Blueprint) -> Result<BackEnds, Error> {
    let drives = blueprint.drives().iter();
    let sockets = drives.filter_map(|drive| match &drive.store {
        Store::BackEnd { socket } => Some((&drive.id, socket)),
        Store::File { .. } => None,
    });
    sockets
        .map(|(id, socket)| Ok((id.clone(), connect_back_end(id, socket)?)))
        .collect()
}

/// Connects to the back end of the drive `id`; never waits.
///
/// # Errors
/// [`Error::Drive`].
pub fn connect_back_end(id: &str, socket: &Path) -> Result<Connection, Error> {
    Connection::open(socket).map_err(|source| Error::Drive {
        id: id.to_owned(),
        source,
    })
}

impl Devices {
    /// Adds `drive`, which the process behind `socket` serves.
    pub(crate) fn add_back_end(
        &mut self,
        drive: &Drive,
        socket: &Path,
        cache: Cache,
        reached: &mut BackEnds,
        ram: &GuestRam,
        interrupts: &Arc<dyn Interrupts>,
    ) -> Result<(), Error> {
        let reached = reached.remove(&drive.id);
        let connection = match reached.filter(|one| one.path() == socket) {
            Some(connection) => connection,
            // A start before this one failed, or nobody connected.
            None => connect_back_end(&drive.id, socket)?,
        };
        let failed = |source| Error::Drive {
            id: drive.id.clone(),
            source,
        };
        let block = VhostUserBlock::new(connection, cache).map_err(failed)?;
        let group = format!("vhost_user_block_{}", drive.id);
        self.handles.count(&group, block.counters());
        let block = Arc::new(Mutex::new(block));
        let handle = (drive.id.clone(), block.clone());
        self.handles.back_ends.push(handle);
        self.sources.push(block.clone());
        self.add_virtio(block, ram, interrupts)
    }
}
