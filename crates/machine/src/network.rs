//! Network interfaces: TAP devices at the far end of their cables, and the metadata
//! service beside it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use blueprint::{Blueprint, NetworkInterface};
use hv::Interrupts;
use mmds::{Address, Endpoint, Metadata};
use ram::GuestRam;
use tap::{Tap, offload};
use virtio::net::{Link, Neighbour, Net, Offloads, Settings};

use crate::Error;
use crate::devices::Devices;
use crate::memory_devices::limits;

/// What interfaces lead to, besides what the blueprint says.
#[derive(Debug, Default)]
pub struct Network {
    /// TAP devices that are open already, by interface; others are opened by name.
    pub taps: HashMap<String, Tap>,
    /// Behind the interfaces that the blueprint names for it.
    pub metadata: Option<MetadataService>,
}

/// Metadata for the guest, and what happened to it.
#[derive(Clone, Debug)]
pub struct MetadataService {
    /// The data, and how guests are to ask.
    pub metadata: Arc<Mutex<Metadata>>,
    /// Of all endpoints together.
    pub counters: Arc<mmds::Counters>,
}

/// Opens the TAP devices of `blueprint`.
///
/// # Errors
/// [`Error::Tap`]: none is held then.
pub fn open_taps(blueprint: &Blueprint) -> Result<HashMap<String, Tap>, Error> {
    let interfaces = blueprint.network_interfaces().iter();
    interfaces
        .map(|one| Ok((one.id.clone(), open(one)?)))
        .collect()
}

/// Whether the TAP device `name` could be used now.
///
/// # Errors
/// Why not.
pub fn check_tap(name: &str) -> Result<(), tap::Error> {
    Tap::open(name).map(drop)
}

fn open(interface: &NetworkInterface) -> Result<Tap, Error> {
    Tap::open(&interface.tap).map_err(|source| Error::Tap {
        id: interface.id.clone(),
        source,
    })
}

impl Devices {
    /// Adds the interfaces that `blueprint` asks for.
    pub(crate) fn add_network(
        &mut self,
        blueprint: &Blueprint,
        mut network: Network,
        ram: &GuestRam,
        interrupts: &Arc<dyn Interrupts>,
    ) -> Result<(), Error> {
        for interface in blueprint.network_interfaces() {
            let tap = match network.taps.remove(&interface.id) {
                Some(tap) => tap,
                None => open(interface)?,
            };
            let metadata = network.metadata.as_ref().filter(|_| interface.mmds);
            let neighbour = metadata
                .zip(blueprint.mmds())
                .map(|(service, config)| endpoint(service, config.address))
                .transpose()?;
            let settings = Settings {
                mac: interface.mac,
                mtu: interface.mtu,
                rx_limits: limits(&interface.rx_limiter),
                tx_limits: limits(&interface.tx_limiter),
            };
            let net = Net::new(settings, Box::new(Cable(tap)), neighbour);
            let net = net.map_err(|source| Error::Interface {
                id: interface.id.clone(),
                source,
            })?;
            let net = Arc::new(Mutex::new(net));
            self.handles
                .interfaces
                .push((interface.id.clone(), net.clone()));
            self.sources.push(net.clone());
            self.add_virtio(net, ram, interrupts)?;
        }
        Ok(())
    }
}

fn endpoint(
    service: &MetadataService,
    address: std::net::Ipv4Addr,
) -> Result<Box<dyn Neighbour>, Error> {
    let MetadataService { metadata, counters } = service.clone();
    // A blueprint has no others.
    let address = Address::new(address).unwrap_or_default();
    let endpoint = Endpoint::new(address, metadata, counters, Instant::now());
    let endpoint = endpoint.map_err(|source| Error::Host {
        doing: "get random bytes",
        source,
    })?;
    Ok(Box::new(Service(endpoint)))
}

/// A TAP device as virtio sees it.
struct Cable(Tap);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let bits = [
            (offloads.checksum, offload::CHECKSUM),
            (offloads.tso4, offload::TSO4),
            (offloads.tso6, offload::TSO6),
            (offloads.ufo, offload::UFO),
        ];
        let asked = bits.into_iter().filter(|(asked, _)| *asked);
        self.0
            .set_offloads(asked.fold(0, |all, (_, bit)| all | bit))
    }
}

/// The metadata service as virtio sees it.
struct Service(Endpoint);

impl Neighbour for Service {
    fn is_for_me(&self, frame: &[u8]) -> bool {
        self.0.is_for_me(frame)
    }

    fn take(&mut self, frame: &[u8], now: Instant) {
        self.0.take(frame, now);
    }

    fn next_frame(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.0.next_frame(now)
    }

    fn poll_at(&mut self, now: Instant) -> Option<Instant> {
        self.0.poll_at(now)
    }
}
