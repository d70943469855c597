//! Numbers and layouts of virtio 1.2 §5.15.

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: what is not plugged must not be touched.
pub(super) const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of a request.
pub(super) const REQUEST_LEN: usize = 24;
/// Bytes of a response.
pub(super) const RESPONSE_LEN: usize = 10;

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug {
        at: u64,
        blocks: u16,
    },
    Unplug {
        at: u64,
        blocks: u16,
    },
    UnplugAll,
    State {
        at: u64,
        blocks: u16,
    },
    /// Anything that we do not know.
    Other,
}

impl Request {
    /// §5.15.6.1, struct virtio_mem_req.
    pub(super) fn parse(bytes: [u8; REQUEST_LEN]) -> Self {
        let [t0, t1, _, _, _, _, _, _, at @ .., n0, n1, _, _, _, _, _, _] = bytes;
        let at = u64::from_le_bytes(at);
        let blocks = u16::from_le_bytes([n0, n1]);
        match u16::from_le_bytes([t0, t1]) {
            0 => Self::Plug { at, blocks },
            1 => Self::Unplug { at, blocks },
            2 => Self::UnplugAll,
            3 => Self::State { at, blocks },
            _ => Self::Other,
        }
    }
}

/// What blocks are, of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Blocks {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// What the guest is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    Done,
    State(Blocks),
    /// More than was requested.
    Refused,
    /// No request that makes sense now.
    Error,
}

impl Response {
    /// §5.15.6.1, struct virtio_mem_resp.
    pub(super) fn bytes(self) -> [u8; RESPONSE_LEN] {
        let (kind, state): (u16, u16) = match self {
            Self::Done => (0, 0),
            Self::State(blocks) => (0, blocks as u16),
            Self::Refused => (1, 0),
            Self::Error => (3, 0),
        };
        let ([k0, k1], [s0, s1]) = (kind.to_le_bytes(), state.to_le_bytes());
        [k0, k1, 0, 0, 0, 0, 0, 0, s0, s1]
    }
}

/// What the configuration space says, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    pub(super) block: u64,
    pub(super) at: u64,
    pub(super) size: u64,
    pub(super) usable: u64,
    pub(super) plugged: u64,
    pub(super) requested: u64,
}

impl Config {
    /// §5.15.4, struct virtio_mem_config; no NUMA node.
    pub(super) fn bytes(&self) -> [u8; 56] {
        let fields = [
            self.block,
            0,
            self.at,
            self.size,
            self.usable,
            self.plugged,
            self.requested,
        ];
        let mut bytes = [0; 56];
        for (to, field) in bytes.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}
