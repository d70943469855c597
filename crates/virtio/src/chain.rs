//! One request of the driver: the buffers to read and the buffers to fill.
//!
//! Invariant: every piece lies in guest memory that may be reached; what the driver may change while
//! a device looks is only the contents, never where they are.

use ram::GuestMemory;
use ram::volatile::Slice;
use smallvec::SmallVec;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemoryBackend};

use crate::QueueError;

/// A descriptor chain that was checked from end to end.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Its first descriptor: its name when it is given back.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers<'m>,
    /// What the device is to fill.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Walks `descriptors`.
    ///
    /// virtio 1.2 §2.7.4.2, §2.7.5: no loops, writable descriptors last, less than
    /// 2^32 bytes, one level of indirection.
    pub(crate) fn new(
        descriptors: DescriptorChain<&'m GuestMemory>,
        memory: &'m GuestMemory,
    ) -> Result<Self, QueueError> {
        let head = descriptors.head_index();
        let broken = |why| QueueError::Chain { head, why };
        let mut readable = Buffers::default();
        let mut writable = Buffers::default();
        let mut complete = false;
        for descriptor in descriptors {
            // The iterator ends without a word on loops, on indices out of range
            // and on bad indirect tables: only a last descriptor is a proper end.
            complete = !descriptor.has_next();
            let side = if descriptor.is_write_only() {
                &mut writable
            } else if writable.is_empty() {
                &mut readable
            } else {
                return Err(broken("a readable buffer follows a writable one"));
            };
            if descriptor.len() == 0 {
                continue;
            }
            for piece in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let piece = piece.map_err(|_| broken("a buffer lies outside of memory"))?;
                let write = descriptor.is_write_only();
                if !piece.bitmap().allows(piece.len(), write) {
                    return Err(broken("a buffer lies in memory that is not to be reached"));
                }
                side.push(piece);
            }
        }
        if !complete {
            return Err(broken("its descriptors do not come to an end"));
        }
        Ok(Self {
            head,
            readable,
            writable,
        })
    }
}

/// A sequence of bytes in guest memory, consumed from its front. Clones are the
/// same bytes, consumed apart.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    /// Most have one or two.
    pieces: SmallVec<[Slice<'m>; 2]>,
    /// How many of them are consumed.
    gone: usize,
    len: usize,
}

impl<'m> Buffers<'m> {
    fn push(&mut self, piece: Slice<'m>) {
        self.len += piece.len();
        self.pieces.push(piece);
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes left, piece by piece, for [`ram::volatile`].
    pub fn pieces(&self) -> &[Slice<'m>] {
        self.pieces.get(self.gone..).unwrap_or_default()
    }

    /// The first `n` bytes left, or all when there are fewer, piece by piece.
    pub(crate) fn front(&self, n: usize) -> impl Iterator<Item = Slice<'m>> {
        let mut left = n;
        self.pieces().iter().map_while(move |piece| {
            let here = left.min(piece.len());
            left -= here;
            (here > 0).then(|| piece.subslice(0, here).ok()).flatten()
        })
    }

    /// Consumes the first `n` bytes, or all when there are fewer; returns them.
    pub fn take(&mut self, n: usize) -> Buffers<'m> {
        let mut front = Buffers::default();
        while front.len < n {
            let Some(piece) = self.pieces.get_mut(self.gone) else {
                break;
            };
            let wanted = n - front.len;
            if piece.len() <= wanted {
                self.len -= piece.len();
                self.gone += 1;
                front.push(*piece);
                continue;
            }
            // Both halves exist: 0 < wanted < piece.len().
            if let (Ok(head), Ok(tail)) = (piece.subslice(0, wanted), piece.offset(wanted)) {
                *piece = tail;
                self.len -= wanted;
                front.push(head);
            }
        }
        front
    }

    /// Consumes `N` bytes and copies them out; none when there are fewer.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.read(&mut bytes) == N).then_some(bytes)
    }

    /// Consumes bytes into `to`, as many as there are and fit; returns how many.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.take(to.len()).pieces() {
            if let Some(rest) = to.get_mut(done..) {
                done += piece.read(rest, 0).unwrap_or(0);
            }
        }
        done
    }

    /// Consumes bytes by writing `from` into them, as much as fits; returns how
    /// many.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.take(from.len()).pieces() {
            if let Some(rest) = from.get(done..) {
                done += piece.write(rest, 0).unwrap_or(0);
            }
        }
        done
    }
}
