//! Network interfaces, the metadata service behind them, and the socket device.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::draft::RateLimiter;

/// One network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceDraft {
    /// Name, unique among the interfaces.
    pub iface_id: String,
    /// The TAP device on the host.
    pub host_dev_name: String,
    /// The guest's address, as in `06:00:ac:10:00:02`; the guest chooses one when absent.
    #[serde(default)]
    pub guest_mac: Option<String>,
    /// The largest packet that the guest is told of, 68 to 65535.
    #[serde(default)]
    pub mtu: Option<u64>,
    /// Limits of what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// The metadata service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfigDraft {
    /// Whether requests need a token.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The interfaces behind which it answers.
    pub network_interfaces: Vec<String>,
    /// Its address; 169.254.169.254 when absent.
    #[serde(default)]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answers are always plain text, as EC2's are.
    #[serde(default)]
    pub imds_compat: bool,
}

/// How the metadata service is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Without a token; deprecated.
    #[default]
    V1,
    /// With a token.
    V2,
}

/// The socket device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockDraft {
    /// Deprecated; means nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's context id.
    pub guest_cid: u64,
    /// The Unix socket on the host through which the guest is reached.
    pub uds_path: PathBuf,
}
