//! Numbers and layouts of virtio 1.2 §5.5, and of Linux, include/uapi/linux/virtio_balloon.h.

/// VIRTIO_BALLOON_F_STATS_VQ: there is a queue of statistics.
pub(super) const F_STATS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest may take pages back unasked.
pub(super) const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_FREE_PAGE_HINT: there is a queue of hints at free pages.
pub(super) const F_HINTING: u64 = 1 << 3;
/// VIRTIO_BALLOON_F_PAGE_REPORTING: there is a queue of reports of free pages.
pub(super) const F_REPORTING: u64 = 1 << 5;

/// Bytes of a page of the balloon, whatever the guest's pages are.
pub(super) const PAGE: u64 = 4096;
/// Page frame numbers of one request; Linux sends no more
/// (VIRTIO_BALLOON_ARRAY_PFNS_MAX).
pub(super) const FRAMES_MAX: usize = 256;

/// Command identifiers of hinting (§5.5.6.5): what the host asks for, or the guest is at.
/// Others name a run.
pub(super) const HINTS_STOP: u32 = 0;
/// The hinted pages are the guest's again.
pub(super) const HINTS_DONE: u32 = 1;

/// Bytes of one statistic: tag and value.
pub(super) const STATISTIC_LEN: usize = 10;
/// Statistics of one request: Linux has 16.
pub(super) const STATISTICS_MAX: usize = 256;

/// Bytes of the configuration space.
pub(super) const CONFIG_LEN: usize = 12;
/// Where the driver says how many pages the balloon holds.
pub(super) const ACTUAL_AT: u64 = 4;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

/// The queues by number, with these features. Queues of features that were not accepted
/// do not count: so Linux numbers them, and so does Firecracker.
pub(super) fn queues(features: u64) -> impl Iterator<Item = Queue> {
    let optional = [
        (Queue::Statistics, F_STATS),
        (Queue::Hinting, F_HINTING),
        (Queue::Reporting, F_REPORTING),
    ];
    [Queue::Inflate, Queue::Deflate].into_iter().chain(
        optional
            .into_iter()
            .filter(move |(_, feature)| features & feature != 0)
            .map(|(queue, _)| queue),
    )
}
