//! Network interfaces, metadata service and socket device that were checked.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use crate::checked::{check_id, check_path};
use crate::draft::{MmdsConfigDraft, MmdsVersion, NetworkInterfaceDraft, RateLimiter, VsockDraft};
use crate::{DraftError, limits};

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkInterface {
    /// Its name.
    pub id: String,
    /// The TAP device on the host: 1 to 15 bytes, no slash, no white space.
    pub tap: String,
    /// The guest's address.
    pub mac: Option<[u8; 6]>,
    /// The largest packet that the guest is told of.
    pub mtu: Option<u16>,
    /// Limits of what the guest receives.
    pub rx_limiter: RateLimiter,
    /// Limits of what the guest sends.
    pub tx_limiter: RateLimiter,
    /// The metadata service answers behind it.
    pub mmds: bool,
}

/// The metadata service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmdsConfig {
    /// Whether requests need a token.
    pub version: MmdsVersion,
    /// Its address, a link-local one.
    pub address: Ipv4Addr,
    /// Answers are always plain text.
    pub imds_compat: bool,
}

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vsock {
    /// The guest's context id.
    pub guest_cid: u32,
    /// The Unix socket on the host.
    pub uds_path: PathBuf,
}

/// Interfaces, and the metadata service behind some of them.
pub(super) fn check_network(
    asked: Vec<NetworkInterfaceDraft>,
    mmds: Option<MmdsConfigDraft>,
) -> Result<(Vec<NetworkInterface>, Option<MmdsConfig>), DraftError> {
    let mut interfaces: Vec<NetworkInterface> = Vec::new();
    for draft in asked {
        let next = check_interface(draft)?;
        for other in &interfaces {
            if other.id == next.id {
                return Err(DraftError::IdTwice {
                    field: "iface_id",
                    id: next.id,
                });
            }
            if other.tap == next.tap {
                return Err(DraftError::TapTwice {
                    first: other.id.clone(),
                    second: next.id,
                    tap: next.tap,
                });
            }
            if next.mac.is_some() && other.mac == next.mac {
                return Err(DraftError::MacTwice {
                    first: other.id.clone(),
                    second: next.id,
                });
            }
        }
        interfaces.push(next);
    }
    let mmds = mmds
        .map(|mmds| check_mmds(mmds, &mut interfaces))
        .transpose()?;
    Ok((interfaces, mmds))
}

fn check_interface(asked: NetworkInterfaceDraft) -> Result<NetworkInterface, DraftError> {
    let id = check_id("iface_id", asked.iface_id)?;
    // netdevice(7): IFNAMSIZ counts the NUL; Linux, dev_valid_name().
    let tap = asked.host_dev_name;
    let fits = |byte: u8| byte > b' ' && byte != 0x7f && byte != b'/' && byte != b':';
    let named = !tap.is_empty() && tap.len() <= limits::TAP_NAME_BYTES_MAX;
    if !named || tap == "." || tap == ".." || !tap.bytes().all(fits) {
        return Err(DraftError::TapName { id, asked: tap });
    }
    let mac = match asked.guest_mac {
        None => None,
        Some(text) => match parse_mac(&text) {
            Some(mac) => Some(mac),
            None => return Err(DraftError::Mac { id, asked: text }),
        },
    };
    let mtu = match asked.mtu {
        None => None,
        Some(mtu) => match u16::try_from(mtu) {
            Ok(mtu) if mtu >= limits::MTU_MIN => Some(mtu),
            Ok(_) | Err(_) => return Err(DraftError::Mtu { id, asked: mtu }),
        },
    };
    Ok(NetworkInterface {
        id,
        tap,
        mac,
        mtu,
        rx_limiter: asked.rx_rate_limiter.unwrap_or_default(),
        tx_limiter: asked.tx_rate_limiter.unwrap_or_default(),
        mmds: false,
    })
}

/// Six pairs of hexadecimal digits with colons between them.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits)?;
    }
    parts.next().is_none().then_some(mac)
}

fn check_mmds(
    asked: MmdsConfigDraft,
    interfaces: &mut [NetworkInterface],
) -> Result<MmdsConfig, DraftError> {
    if asked.network_interfaces.is_empty() {
        return Err(DraftError::MmdsWithoutInterface);
    }
    let known: HashSet<String> = interfaces.iter().map(|one| one.id.clone()).collect();
    for id in asked.network_interfaces {
        if !known.contains(&id) {
            return Err(DraftError::MmdsInterface { id });
        }
        for interface in interfaces.iter_mut().filter(|one| one.id == id) {
            interface.mmds = true;
        }
    }
    let address = asked.ipv4_address.unwrap_or(limits::MMDS_ADDRESS_DEFAULT);
    // RFC 3927 §2.1: the first and the last 256 addresses are reserved.
    let third = address.octets()[2];
    if !address.is_link_local() || third == 0 || third == 255 {
        return Err(DraftError::MmdsAddress { asked: address });
    }
    Ok(MmdsConfig {
        version: asked.version,
        address,
        imds_compat: asked.imds_compat,
    })
}

pub(super) fn check_vsock(asked: VsockDraft) -> Result<Vsock, DraftError> {
    // u32::MAX is VMADDR_CID_ANY.
    let guest_cid = u32::try_from(asked.guest_cid)
        .ok()
        .filter(|cid| (limits::GUEST_CID_MIN..u32::MAX).contains(cid))
        .ok_or(DraftError::GuestCid {
            asked: asked.guest_cid,
        })?;
    let uds_path = check_path("uds_path", asked.uds_path)?;
    if uds_path.as_os_str().len() > limits::SOCKET_PATH_BYTES_MAX {
        return Err(DraftError::SocketPathLength { path: uds_path });
    }
    Ok(Vsock {
        guest_cid,
        uds_path,
    })
}
