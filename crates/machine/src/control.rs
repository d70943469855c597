//! How a machine comes to its end, whoever ends it: the guest, a vCPU, a
//! stop from outside.
//!
//! And how its vCPUs are held in between.
//!
//! ```text
//! vCPU:  run ──pause──▶ parked ──resume──▶ run       run ──HLT for good──▶ halted
//!                       parked: hands out its state when asked
//!        any of them ──end──▶ gone
//! ```
//!
//! Invariant: the first ending counts; from then on every vCPU is kicked out of
//! its guest and the event loop wakes. While [`Control::pause`] has returned and
//! nobody resumed, no vCPU runs guest code. While there is a [`Saving`], the guest's memory
//! stays as it is: nobody resumes, and the event loop serves nothing.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use blueprint::RateLimiter;
use chipset::NoKeyboard;
use hv::{Kick, VcpuState};
use ram::GuestRam;
use rustix::event::{EventfdFlags, eventfd};
use virtio::block::InHand;

use crate::Error;
use crate::handles::Handles;
use crate::io_space::lock;
use crate::memory_devices::limits;
use crate::saved::SavedMachine;

/// How a machine ended that did nothing wrong itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off, or halted every CPU for good.
    PowerOff,
    /// The guest asked to be reset.
    Reset,
    /// A fault while delivering a double fault.
    TripleFault,
    /// Somebody outside stopped it.
    Stopped,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Outcome::PowerOff => "power-off",
            Outcome::Reset => "reset",
            Outcome::TripleFault => "triple-fault",
            Outcome::Stopped => "stopped",
        })
    }
}

/// Stops a machine from any thread. Clones stop the same machine.
#[derive(Clone, Debug)]
pub struct StopHandle {
    control: Arc<Control>,
}

impl StopHandle {
    pub(crate) fn new(control: Arc<Control>) -> Self {
        Self { control }
    }

    /// Asks the machine to stop; its outcome is [`Outcome::Stopped`] unless it
    /// ended by itself before.
    pub fn stop(&self) {
        self.control.end(Ok(Outcome::Stopped));
    }
}

/// Changes a machine that runs, from any thread. Clones change the same machine.
#[derive(Clone, Debug)]
pub struct Controller {
    control: Arc<Control>,
    handles: Handles,
}

impl Controller {
    pub(crate) fn new(control: Arc<Control>, handles: Handles) -> Self {
        Self { control, handles }
    }

    /// The devices that can be asked and changed, also while the vCPUs are held.
    pub fn handles(&self) -> &Handles {
        &self.handles
    }

    /// Holds every vCPU; returns once none runs guest code any more. Pausing twice is
    /// pausing once.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn pause(&self) -> Result<(), Gone> {
        self.control.pause().then_some(()).ok_or(Gone)
    }

    /// Lets the vCPUs go on, once a snapshot that is being written is.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn resume(&self) -> Result<(), Gone> {
        self.control.resume().then_some(()).ok_or(Gone)
    }

    /// Whether vCPUs are held.
    pub fn is_paused(&self) -> bool {
        self.control.is_paused()
    }

    /// Has `write` take what the machine is, and its memory, which nobody writes to until it
    /// returns. Devices can be asked and changed meanwhile; what they do for it, they do
    /// afterwards.
    ///
    /// # Errors
    /// [`Error::BackEndsInSnapshot`], [`Error::NotPaused`], [`Error::Saving`], [`Error::SaveDevice`], [`Error::Engine`],
    /// [`Error::Gone`].
    pub fn snapshot<T>(
        &self,
        write: impl FnOnce(SavedMachine, &GuestRam) -> T,
    ) -> Result<T, Error> {
        let back_ends = &self.handles.back_ends;
        if !back_ends.is_empty() {
            let ids: Vec<_> = back_ends.iter().map(|(id, _)| format!("{id:?}")).collect();
            return Err(Error::BackEndsInSnapshot {
                ids: ids.join(", "),
            });
        }
        let whole = self.handles.whole.as_ref().ok_or(Error::Gone)?;
        let _saving = self.control.begin_saving()?;
        let _drives = HeldDrives::new(&self.handles);
        let saved = whole.save(&self.handles, || self.control.vcpu_states())?;
        Ok(write(saved, &whole.ram))
    }

    /// Asks the process that serves the drive `id` how its disk is now; tells the guest. The device is not locked
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::NoBackEnd`], [`Error::NoDrive`], [`Error::ChangeDrive`].
    pub fn reread_drive(&self, id: &str) -> Result<(), Error> {
        let mut back_ends = self.handles.back_ends.iter();
        let Some((_, drive)) = back_ends.find(|(drive, _)| drive == id) else {
            let id = id.to_owned();
            let mut files = self.handles.drives.iter();
            return Err(match files.any(|(drive, _)| *drive == id) {
                true => Error::NoBackEnd { id },
                false => Error::NoDrive { id },
            });
        };
        let since = Instant::now();
        let session = lock(drive).session();
        let said = session.config();
        let changed = lock(drive).update(said, since);
        changed.map_err(|source| Error::ChangeDrive {
            id: id.to_owned(),
            source,
        })
    }

    /// Puts the file at `path` behind a drive, or another one of the same name, and
    /// replaces the limits that `limiter` names. Returns what is still being done to the file
    /// before: whoever changed a drive may take that away once it is waited for.
    ///
    /// # Errors
    /// [`Error::NoDrive`], [`Error::NoFile`], [`Error::ChangeDrive`]: nothing has changed then.
    pub fn update_drive(
        &self,
        id: &str,
        path: Option<&Path>,
        limiter: Option<&RateLimiter>,
    ) -> Result<Option<InHand>, Error> {
        let drives = &self.handles.drives;
        let Some((_, drive)) = drives.iter().find(|(drive, _)| drive == id) else {
            let mut back_ends = self.handles.back_ends.iter();
            let id = id.to_owned();
            return Err(match (back_ends.any(|(drive, _)| *drive == id), path) {
                (true, Some(_)) => Error::NoFile {
                    id,
                    field: "path_on_host",
                },
                (true, None) => Error::NoFile {
                    id,
                    field: "rate_limiter",
                },
                (false, _) => Error::NoDrive { id },
            });
        };
        let mut drive = lock(drive);
        if let Some(path) = path {
            let changed = drive.update_path(path);
            changed.map_err(|source| Error::ChangeDrive {
                id: id.into(),
                source,
            })?;
        }
        if let Some(limiter) = limiter {
            drive.update_limiter(limits(limiter));
        }
        Ok(path.and_then(|_| drive.in_hand()))
    }

    /// Replaces the limits that `rx`, of what the guest receives, and `tx`, of what it
    /// sends, name.
    ///
    /// # Errors
    /// [`Error::NoInterface`].
    pub fn update_interface(
        &self,
        id: &str,
        rx: Option<&RateLimiter>,
        tx: Option<&RateLimiter>,
    ) -> Result<(), Error> {
        let interfaces = &self.handles.interfaces;
        let Some((_, net)) = interfaces.iter().find(|(interface, _)| interface == id) else {
            return Err(Error::NoInterface { id: id.into() });
        };
        let named = |limiter: Option<&RateLimiter>| limiter.map(limits).unwrap_or_default();
        lock(net).update_limits(named(rx), named(tx));
        Ok(())
    }

    /// Presses Ctrl-Alt-Del on the guest's keyboard.
    ///
    /// # Errors
    /// [`NoKeyboard`]: the guest would not notice.
    pub fn press_ctrl_alt_del(&self) -> Result<(), NoKeyboard> {
        match &self.handles.keyboard {
            Some(keyboard) => lock(keyboard).press_ctrl_alt_del(),
            None => Err(NoKeyboard::Off),
        }
    }
}

/// Drives whose threads are kept from the guest's memory.
struct HeldDrives<'a>(&'a Handles);

impl<'a> HeldDrives<'a> {
    fn new(handles: &'a Handles) -> Self {
        handles
            .drives
            .iter()
            .for_each(|(_, one)| lock(one).hold(true));
        Self(handles)
    }
}

impl Drop for HeldDrives<'_> {
    fn drop(&mut self) {
        let drives = self.0.drives.iter();
        drives.for_each(|(_, one)| lock(one).hold(false));
    }
}

/// The machine has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine has ended")]
pub struct Gone;

/// Shared by the vCPU threads, the event loop and the power devices.
pub(crate) struct Control {
    ending: AtomicBool,
    pausing: AtomicBool,
    wake: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
    /// Locked by the event loop while it serves, and by who takes a snapshot.
    serving: Mutex<()>,
}

/// A snapshot is being taken.
pub(crate) struct Saving<'a> {
    control: &'a Control,
    _serving: MutexGuard<'a, ()>,
}

impl Drop for Saving<'_> {
    fn drop(&mut self) {
        self.control.lock().saving = false;
        self.control.changed.notify_all();
    }
}

#[derive(Default)]
struct State {
    ended: Option<Result<Outcome, Error>>,
    kickers: Vec<Arc<dyn Kick>>,
    /// What those were that run no more, by index.
    halted: BTreeMap<u8, StateOfVcpu>,
    parked: usize,
    saving: bool,
    /// What the parked ones are, once somebody wants to know.
    wanted: Option<BTreeMap<u8, StateOfVcpu>>,
}

impl State {
    fn all_stand_still(&self) -> bool {
        self.parked + self.halted.len() >= self.kickers.len()
    }
}

type StateOfVcpu = Result<VcpuState, Arc<hv::Error>>;

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("ending", &self.is_ending())
            .finish_non_exhaustive()
    }
}

impl Control {
    pub(crate) fn new() -> Result<Self, Error> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| {
            Error::Host {
                doing: "make an eventfd",
                source: errno.into(),
            }
        })?;
        Ok(Self {
            ending: AtomicBool::new(false),
            pausing: AtomicBool::new(false),
            wake,
            state: Mutex::default(),
            changed: Condvar::new(),
            serving: Mutex::default(),
        })
    }

    /// Makes `kicker`'s vCPU one that an ending kicks.
    pub(crate) fn add(&self, kicker: Arc<dyn Kick>) {
        self.lock().kickers.push(kicker);
    }

    /// Ends the machine, unless it is ending already.
    pub(crate) fn end(&self, how: Result<Outcome, Error>) {
        let mut state = self.lock();
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(how);
        self.ending.store(true, Ordering::SeqCst);
        for kicker in &state.kickers {
            kicker.kick();
        }
        drop(state);
        self.changed.notify_all();
        // It only fails when 2^64 - 1 writes were never read: it is readable then.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// vCPU `index` will never run again; when none will, the machine is off. It was like
    /// `last` when it halted.
    pub(crate) fn halted(&self, index: u8, last: Result<VcpuState, hv::Error>) {
        let mut state = self.lock();
        state.halted.insert(index, last.map_err(Arc::new));
        let all = state.halted.len() >= state.kickers.len();
        drop(state);
        self.changed.notify_all();
        if all {
            self.end(Ok(Outcome::PowerOff));
        }
    }

    /// Holds every vCPU; returns when none runs guest code any more, or with `false`
    /// when the machine ended before.
    pub(crate) fn pause(&self) -> bool {
        let mut state = self.lock();
        self.pausing.store(true, Ordering::SeqCst);
        for kicker in &state.kickers {
            kicker.kick();
        }
        while state.ended.is_none() && !state.all_stand_still() {
            state = self.wait(state);
        }
        state.ended.is_none()
    }

    /// Keeps vCPUs held and the event loop from serving until what is returned is dropped.
    pub(crate) fn begin_saving(&self) -> Result<Saving<'_>, Error> {
        let mut state = self.lock();
        loop {
            if state.ended.is_some() {
                return Err(Error::Gone);
            }
            if !self.is_paused() {
                return Err(Error::NotPaused);
            }
            if state.saving {
                return Err(Error::Saving);
            }
            // Somebody else's pause may not be done.
            if state.all_stand_still() {
                break;
            }
            state = self.wait(state);
        }
        state.saving = true;
        drop(state);
        Ok(Saving {
            control: self,
            _serving: self.serve(),
        })
    }

    /// Held by the event loop while it serves.
    pub(crate) fn serve(&self) -> MutexGuard<'_, ()> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets every vCPU go on, once no snapshot is being taken; `false` when the machine
    /// ended before.
    pub(crate) fn resume(&self) -> bool {
        let mut state = self.lock();
        while state.saving && state.ended.is_none() {
            state = self.wait(state);
        }
        self.pausing.store(false, Ordering::SeqCst);
        self.changed.notify_all();
        state.ended.is_none()
    }

    /// Whether vCPUs are held.
    pub(crate) fn is_paused(&self) -> bool {
        self.pausing.load(Ordering::SeqCst)
    }

    /// Has vCPUs held from their start.
    pub(crate) fn hold(&self) {
        self.pausing.store(true, Ordering::SeqCst);
    }

    /// On the thread of vCPU `index`, between runs: waits as long as vCPUs are held, and
    /// hands out what `now` says that it is.
    pub(crate) fn park_while_paused(
        &self,
        index: u8,
        now: impl Fn() -> Result<VcpuState, hv::Error>,
    ) {
        if !self.is_paused() {
            return;
        }
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        while self.is_paused() && state.ended.is_none() {
            if let Some(wanted) = &mut state.wanted
                && !wanted.contains_key(&index)
            {
                wanted.insert(index, now().map_err(Arc::new));
                self.changed.notify_all();
            }
            state = self.wait(state);
        }
        state.parked -= 1;
    }

    /// The states of all vCPUs, which are held.
    pub(crate) fn vcpu_states(&self) -> Result<Vec<VcpuState>, Error> {
        let mut state = self.lock();
        state.wanted = Some(state.halted.clone());
        self.changed.notify_all();
        let states = loop {
            if state.ended.is_some() {
                return Err(Error::Gone);
            }
            if !self.is_paused() {
                return Err(Error::NotPaused);
            }
            let all = state.kickers.len();
            if let Some(states) = state.wanted.take_if(|states| states.len() >= all) {
                break states;
            }
            state = self.wait(state);
        };
        drop(state);
        let failed = |source| Error::VcpuState { source };
        states
            .into_values()
            .map(|state| state.map_err(failed))
            .collect()
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the machine is ending.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Readable once the machine is ending.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Takes how it ended; [`Outcome::Stopped`] when nothing ended it.
    pub(crate) fn take(&self) -> Result<Outcome, Error> {
        self.lock().ended.take().unwrap_or(Ok(Outcome::Stopped))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl chipset::PowerEvents for Control {
    fn reset(&self) {
        self.end(Ok(Outcome::Reset));
    }

    fn power_off(&self) {
        self.end(Ok(Outcome::PowerOff));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    use super::*;

    /// A vCPU that counts until it is kicked.
    #[derive(Default)]
    struct Counter {
        kicked: AtomicBool,
        count: AtomicU64,
    }

    impl Kick for Counter {
        fn kick(&self) {
            self.kicked.store(true, Ordering::SeqCst);
        }
    }

    impl Counter {
        fn live(&self, control: &Control) {
            loop {
                control.park_while_paused(0, || Ok(VcpuState::after_reset()));
                if control.is_ending() {
                    return;
                }
                while !self.kicked.swap(false, Ordering::SeqCst) {
                    self.count.fetch_add(1, Ordering::SeqCst);
                }
            }
        }

        fn now(&self) -> u64 {
            self.count.load(Ordering::SeqCst)
        }
    }

    fn counters(control: &Arc<Control>, n: usize) -> Vec<Arc<Counter>> {
        let counters: Vec<Arc<Counter>> = (0..n).map(|_| Arc::default()).collect();
        for counter in &counters {
            control.add(counter.clone());
        }
        counters
    }

    #[test]
    fn no_vcpu_runs_between_pause_and_resume() {
        let control = Arc::new(Control::new().unwrap());
        let counters = counters(&control, 3);
        std::thread::scope(|scope| {
            for counter in &counters {
                scope.spawn(|| counter.live(&control));
            }
            let controller = Controller::new(control.clone(), Handles::default());
            for _ in 0..20 {
                controller.pause().unwrap();
                controller.pause().unwrap();
                assert!(controller.is_paused());
                let before: Vec<_> = counters.iter().map(|counter| counter.now()).collect();
                std::thread::sleep(Duration::from_millis(2));
                let after: Vec<_> = counters.iter().map(|counter| counter.now()).collect();
                assert_eq!(before, after);
                controller.resume().unwrap();
                for (counter, before) in counters.iter().zip(before) {
                    while counter.now() == before {
                        std::thread::yield_now();
                    }
                }
            }
            control.end(Ok(Outcome::Stopped));
        });
    }

    #[test]
    fn a_machine_paused_before_its_start_does_not_start_and_a_paused_one_can_end() {
        let control = Arc::new(Control::new().unwrap());
        let counters = counters(&control, 2);
        std::thread::scope(|scope| {
            let pausing = scope.spawn(|| control.pause());
            while !control.is_paused() {
                std::thread::yield_now();
            }
            for counter in &counters {
                scope.spawn(|| counter.live(&control));
            }
            assert!(pausing.join().unwrap());
            assert!(counters.iter().all(|counter| counter.now() == 0));
            control.end(Ok(Outcome::Stopped));
        });
        let controller = Controller::new(control, Handles::default());
        assert_eq!(
            (controller.pause(), controller.resume()),
            (Err(Gone), Err(Gone))
        );
    }

    #[test]
    fn while_a_snapshot_is_taken_nobody_resumes_serves_or_takes_another() {
        let control = Arc::new(Control::new().unwrap());
        let counters = counters(&control, 1);
        std::thread::scope(|scope| {
            scope.spawn(|| counters[0].live(&control));
            let running = control.begin_saving().map(drop);
            assert!(matches!(running, Err(Error::NotPaused)), "{running:?}");
            assert!(control.pause());
            let saving = control.begin_saving().unwrap();
            let second = control.begin_saving().map(drop);
            assert!(matches!(second, Err(Error::Saving)), "{second:?}");
            let resuming = scope.spawn(|| control.resume());
            let serving = scope.spawn(|| drop(control.serve()));
            let before = counters[0].now();
            std::thread::sleep(Duration::from_millis(10));
            assert!(!resuming.is_finished() && !serving.is_finished());
            assert!(control.is_paused());
            assert_eq!(counters[0].now(), before);
            drop(saving);
            assert!(resuming.join().unwrap());
            serving.join().unwrap();
            control.end(Ok(Outcome::Stopped));
            let ended = control.begin_saving().map(drop);
            assert!(matches!(ended, Err(Error::Gone)), "{ended:?}");
        });
    }

    #[test]
    fn a_snapshot_waits_for_a_pause_that_is_not_done() {
        let control = Arc::new(Control::new().unwrap());
        let counters = counters(&control, 2);
        std::thread::scope(|scope| {
            let pausing = scope.spawn(|| control.pause());
            while !control.is_paused() {
                std::thread::yield_now();
            }
            scope.spawn(|| counters[0].live(&control));
            let saving = scope.spawn(|| control.begin_saving().map(drop));
            std::thread::sleep(Duration::from_millis(10));
            assert!(!saving.is_finished());
            scope.spawn(|| counters[1].live(&control));
            assert!(saving.join().unwrap().is_ok());
            assert!(pausing.join().unwrap());
            control.end(Ok(Outcome::Stopped));
        });
    }

    #[test]
    fn a_vcpu_that_halted_for_good_is_not_waited_for() {
        let control = Arc::new(Control::new().unwrap());
        let counters = counters(&control, 2);
        control.halted(0, Ok(VcpuState::after_reset()));
        std::thread::scope(|scope| {
            scope.spawn(|| counters[0].live(&control));
            assert!(control.pause());
            control.end(Ok(Outcome::Stopped));
        });
    }
}
