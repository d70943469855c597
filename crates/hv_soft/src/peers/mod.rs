//! What the vCPUs of one machine have to tell each other: requests with an answer,
//! and being alone for a moment.
//!
//! ```text
//!   asks: request into the other's mailbox ─ring─▶ the other, between blocks:
//!     │ meanwhile serves its own mailbox            serves its mailbox
//!     ◀──────────────── served, or quiet ────────────┘
//! ```
//!
//! Invariants. A vCPU is *quiet* while it neither runs translated code nor uses its
//! TLBs: asleep, in a device, out of `run`. What is in its mailbox when it stops
//! being quiet is served first; so a request to it is as good as done. Both sides
//! write and then read with sequential consistency: either the asker sees the other
//! quiet, or that one sees the request. Nobody waits without serving, so that no
//! circle of waiting vCPUs can last.
//!
//! Devices on other threads ask too, when they take memory away; they wait without
//! serving, and nobody waits for them.
//!
//! Whoever served may have lost write tags and blocks: it must not go on in the
//! middle of a block (see `dispatch`).

mod code_pages;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use code_pages::CodePages;
pub(crate) use code_pages::Mask;
use hv::Gpa;
use ram::AccessListener;

use crate::cpu::Cpu;
use crate::doorbell::{Doorbell, PEER};

/// Looks at the other's answer so often before it gives its time to other threads.
const SPINS: u32 = 2000;
/// Stores next to other vCPUs' code, until they are asked to drop it.
const STRAY_STORES_MAX: u8 = 64;

/// What one vCPU asks of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Have no write tag of the page: somebody is going to translate it.
    DropWriteTags(u64),
    /// Have no translation that overlaps these bytes: somebody is going to store.
    Kill { pa: u64, len: u64 },
    /// Have no translation of the page: a device wrote it.
    Invalidate(u64),
    /// Have no address in a TLB: some memory is not there any more.
    Forget,
}

struct Peer {
    /// Not quiet.
    active: AtomicBool,
    /// There is something in `mailbox`.
    mail: AtomicBool,
    mailbox: Mutex<Mailbox>,
    /// How many requests were served.
    served: AtomicU64,
    /// It will not run again unless another vCPU wakes it.
    dead: AtomicBool,
    bell: Arc<Doorbell>,
}

#[derive(Default)]
struct Mailbox {
    requests: Vec<Request>,
    posted: u64,
}

/// What the vCPUs of one machine share.
pub(crate) struct Peers {
    cpus: Box<[Peer]>,
    pages: CodePages,
    /// The vCPU that wants to be alone, plus one.
    alone: AtomicU32,
}

impl Peers {
    pub(crate) fn new(bells: &[Arc<Doorbell>], pages: usize) -> Self {
        let cpus = bells.iter().map(|bell| Peer {
            active: AtomicBool::new(false),
            mail: AtomicBool::new(false),
            mailbox: Mutex::default(),
            served: AtomicU64::new(0),
            dead: AtomicBool::new(false),
            bell: Arc::clone(bell),
        });
        Self {
            cpus: cpus.collect(),
            pages: CodePages::new(bells.len(), pages),
            alone: AtomicU32::new(0),
        }
    }

    /// How many vCPUs there are.
    pub(crate) fn count(&self) -> usize {
        self.cpus.len()
    }

    /// Puts a request into a mailbox. Gives what to wait for, unless the vCPU is
    /// quiet.
    fn post(&self, to: usize, request: Request) -> Option<u64> {
        let peer = self.cpus.get(to)?;
        let ticket = {
            let mut mailbox = peer.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody has tags or code that it did not have when it was first asked.
            if !mailbox.requests.contains(&request) {
                mailbox.requests.push(request);
                mailbox.posted += 1;
            }
            peer.mail.store(true, Ordering::SeqCst);
            mailbox.posted
        };
        if !peer.active.load(Ordering::SeqCst) {
            return None;
        }
        peer.bell.ring(PEER);
        Some(ticket)
    }

    fn answered(&self, by: usize, ticket: u64) -> bool {
        self.cpus.get(by).is_none_or(|peer| {
            peer.served.load(Ordering::SeqCst) >= ticket || !peer.active.load(Ordering::SeqCst)
        })
    }

    fn others_are_quiet(&self, me: usize) -> bool {
        let quiet = |peer: &Peer| !peer.active.load(Ordering::SeqCst);
        self.cpus
            .iter()
            .enumerate()
            .all(|(id, peer)| id == me || quiet(peer))
    }

    /// Whether every vCPU is dead.
    pub(crate) fn all_dead(&self) -> bool {
        self.cpus
            .iter()
            .all(|peer| peer.dead.load(Ordering::SeqCst))
    }

    pub(crate) fn set_dead(&self, id: usize, dead: bool) {
        if let Some(peer) = self.cpus.get(id) {
            peer.dead.store(dead, Ordering::SeqCst);
        }
    }

    /// Has every other vCPU look around.
    pub(crate) fn ring_others(&self, me: usize) {
        for (id, peer) in self.cpus.iter().enumerate() {
            if id != me {
                peer.bell.ring(PEER);
            }
        }
    }
}

impl AccessListener for Peers {
    /// What was not there is in no TLB.
    fn granted(&self, _at: Gpa, _len: u64) {}

    /// Of its code, vCPUs learn by the page epochs, as when a device writes it.
    fn withdrawn(&self, _at: Gpa, _len: u64) {
        let post = |id| Some((id, self.post(id, Request::Forget)?));
        let tickets: Vec<_> = (0..self.count()).filter_map(post).collect();
        let mut patience = Patience(0);
        for (id, ticket) in tickets {
            while !self.answered(id, ticket) {
                patience.wait();
            }
        }
    }
}

/// Waits a little, longer after many turns.
struct Patience(u32);

impl Patience {
    fn wait(&mut self) {
        self.0 = self.0.saturating_add(1);
        if self.0 < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// Makes its vCPU quiet at last, also when its thread unwinds.
pub(crate) struct Awake {
    peers: Arc<Peers>,
    id: usize,
}

impl Drop for Awake {
    fn drop(&mut self) {
        if let Some(peer) = self.peers.cpus.get(self.id) {
            peer.active.store(false, Ordering::SeqCst);
        }
    }
}

impl Cpu {
    /// [`Cpu::waken`], until the result is dropped.
    pub(crate) fn awake(&mut self) -> Awake {
        self.waken();
        Awake {
            peers: Arc::clone(&self.peers),
            id: self.me(),
        }
    }

    fn me(&self) -> usize {
        self.id as usize
    }

    fn others(&self) -> Mask {
        !(1 << self.id)
    }

    /// Becomes quiet.
    pub(crate) fn quieten(&self) {
        if let Some(peer) = self.peers.cpus.get(self.me()) {
            peer.active.store(false, Ordering::SeqCst);
        }
    }

    /// Stops being quiet: first serves what came, and lets who wants to be alone.
    pub(crate) fn waken(&mut self) {
        let peers = Arc::clone(&self.peers);
        let Some(peer) = peers.cpus.get(self.me()) else {
            return;
        };
        let mut patience = Patience(0);
        loop {
            peer.active.store(true, Ordering::SeqCst);
            let alone = peers.alone.load(Ordering::SeqCst);
            if alone == 0 || alone == self.id + 1 {
                break;
            }
            peer.active.store(false, Ordering::SeqCst);
            patience.wait();
        }
        self.serve_mail();
    }

    /// Whether another vCPU wants something. Two loads.
    #[inline]
    pub(crate) fn is_wanted(&self) -> bool {
        let alone = self.peers.alone.load(Ordering::Relaxed);
        let mail = |peer: &Peer| peer.mail.load(Ordering::Acquire);
        (alone != 0 && alone != self.id + 1) || self.peers.cpus.get(self.me()).is_some_and(mail)
    }

    /// Does what other vCPUs want.
    pub(crate) fn serve(&mut self) {
        if self.peers.alone.load(Ordering::SeqCst) != 0 {
            self.quieten();
            self.waken();
            self.serves += 1;
        } else {
            self.serve_mail();
        }
    }

    fn serve_mail(&mut self) {
        let peers = Arc::clone(&self.peers);
        let Some(peer) = peers.cpus.get(self.me()) else {
            return;
        };
        if !peer.mail.load(Ordering::SeqCst) {
            return;
        }
        let (requests, posted) = {
            let mut mailbox = peer.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
            peer.mail.store(false, Ordering::SeqCst);
            (std::mem::take(&mut mailbox.requests), mailbox.posted)
        };
        self.serves += 1;
        self.stats.requests += requests.len() as u64;
        for request in requests {
            match request {
                Request::DropWriteTags(page) => self.drop_write_tags(page),
                Request::Kill { pa, len } => {
                    let hit = self.blocks.hit(pa, len);
                    self.drop_blocks(hit);
                }
                Request::Invalidate(page) => {
                    if self.blocks.holds_code(page) {
                        self.invalidate(page as u32);
                    }
                }
                Request::Forget => self.flush_all(),
            }
        }
        peer.served.store(posted, Ordering::SeqCst);
    }

    /// Asks the vCPUs of `mask`, and waits until they have done it.
    fn ask(&mut self, mask: Mask, request: Request) {
        let peers = Arc::clone(&self.peers);
        let mut tickets = [None; 8];
        for (id, ticket) in tickets.iter_mut().enumerate() {
            if mask >> id & 1 != 0 && id != self.me() {
                *ticket = peers.post(id, request);
            }
        }
        let mut patience = Patience(0);
        for (id, ticket) in tickets.into_iter().enumerate() {
            let Some(ticket) = ticket else { continue };
            self.stats.asked += 1;
            while !peers.answered(id, ticket) {
                if self.is_wanted() {
                    self.serve();
                }
                patience.wait();
            }
        }
    }

    /// Waits until no other vCPU runs, for a locked access that the host cannot do
    /// as one; [`Cpu::end_alone`] must follow. No translation in between: it may wait
    /// for others.
    pub(crate) fn begin_alone(&mut self) {
        if self.peers.count() == 1 {
            return;
        }
        let peers = Arc::clone(&self.peers);
        self.stats.alone += 1;
        while peers
            .alone
            .compare_exchange(0, self.id + 1, Ordering::SeqCst, Ordering::SeqCst)
            .is_err()
        {
            self.serve();
        }
        peers.ring_others(self.me());
        let mut patience = Patience(0);
        while !peers.others_are_quiet(self.me()) {
            patience.wait();
        }
        // What they asked before; they count it as done once this is over.
        self.serve_mail();
    }

    pub(crate) fn end_alone(&mut self) {
        if self.peers.count() > 1 {
            self.peers.alone.store(0, Ordering::SeqCst);
        }
    }

    /// Whether a write tag of the page may be had.
    pub(crate) fn may_write(&self, page: u64) -> bool {
        self.peers.pages.may_write(page, self.me())
    }

    /// After [`Cpu::drop_write_tags`].
    pub(crate) fn dropped_tags(&self, page: u64) {
        self.peers.pages.dropped_tags(page, self.me());
    }

    /// Before code of the page is read: from now on every store into it is seen.
    pub(crate) fn claim(&mut self, page: u32) {
        let (page, new) = (u64::from(page), self.blocks.mark_code(page));
        if !new {
            return;
        }
        let peers = Arc::clone(&self.peers);
        let epochs = Arc::clone(self.ram.guest_ram().epochs());
        let writers = peers.pages.enter(page, self.me(), &epochs);
        self.drop_write_tags(page);
        if writers & self.others() != 0 {
            self.ask(writers, Request::DropWriteTags(page));
        }
    }

    /// The page holds no translation of this vCPU any more.
    pub(crate) fn disclaim(&self, page: u64) {
        let epochs = self.ram.guest_ram().epochs();
        self.peers.pages.leave(page, self.me(), epochs);
    }

    /// Before a translation of these bytes (in one page each) is used: nobody is
    /// storing into them, and who will, asks first. The bytes may have changed since
    /// they were translated.
    pub(crate) fn cover(&mut self, pieces: &[(u64, u64)]) {
        if self.peers.count() == 1 {
            for (pa, _) in pieces {
                self.claim((pa >> 12) as u32);
            }
            return;
        }
        let peers = Arc::clone(&self.peers);
        let mut patience = Patience(0);
        loop {
            let serves = self.serves;
            for &(pa, len) in pieces {
                self.claim((pa >> 12) as u32);
                peers.pages.cover(self.me(), pa, len);
            }
            let stored = |(pa, _): &(u64, u64)| peers.pages.stored_into(self.me(), pa >> 12);
            if pieces.iter().any(stored) {
                patience.wait();
                if self.is_wanted() {
                    self.serve();
                }
            } else if self.serves == serves {
                return;
            }
        }
    }

    /// Before a store into a page of code: no other vCPU has a translation of these
    /// bytes, nor gets one until [`Cpu::end_code_store`].
    pub(crate) fn begin_code_store(&mut self, pa: u64, len: u64) {
        if self.peers.count() == 1 {
            return;
        }
        let peers = Arc::clone(&self.peers);
        peers.pages.set_storing(self.me(), Some(pa >> 12));
        let mask = peers.pages.covered(self.me(), pa, len);
        if mask != 0 {
            self.ask(mask, Request::Kill { pa, len });
        }
    }

    /// After it: drops this vCPU's own translations.
    pub(crate) fn end_code_store(&mut self, pa: u64, len: u64) {
        let page = pa >> 12;
        if self.peers.count() > 1 {
            let peers = Arc::clone(&self.peers);
            peers.pages.set_storing(self.me(), None);
            let others = peers.pages.coders(page) & self.others();
            if others != 0 && self.blocks.stray_store(page as u32, STRAY_STORES_MAX) {
                self.ask(others, Request::Invalidate(page));
            }
        }
        if self.blocks.holds_code(page) {
            self.stored_into_code(pa, len);
        }
    }

    /// Has every vCPU drop its translations of what devices wrote.
    #[cold]
    pub(crate) fn invalidate_device_writes(&mut self) {
        let peers = Arc::clone(&self.peers);
        let epochs = Arc::clone(self.ram.guest_ram().epochs());
        let me = self.me();
        let mut own = Vec::new();
        // Others wait for the last page before they find nothing pending, and look
        // into their mailboxes after that.
        epochs.deliver_watched_writes(|page| {
            let page = page.0 >> 12;
            let coders = peers.pages.coders(page);
            for id in (0..peers.count()).filter(|id| coders >> id & 1 != 0) {
                if id == me {
                    own.push(page);
                } else {
                    peers.post(id, Request::Invalidate(page));
                }
            }
        });
        for page in own {
            if self.blocks.holds_code(page) {
                self.invalidate(page as u32);
            }
        }
    }
}
