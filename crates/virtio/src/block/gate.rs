//! A disk that is as slow as a test wants.

use std::sync::{Arc, Condvar, Mutex};

use super::disk::{Disk, Patience, TakesTime};

/// Nothing passes until it is opened.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Who waits, and whether it is open.
    state: Mutex<(u32, bool)>,
    changed: Condvar,
}

impl Gate {
    pub(crate) fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }

    pub(crate) fn close(&self) {
        self.state.lock().unwrap().1 = false;
    }

    /// Returns once somebody waits in front of it.
    pub(crate) fn wait_for_somebody(&self) {
        let state = self.state.lock().unwrap();
        drop(
            self.changed
                .wait_while(state, |state| state.0 == 0)
                .unwrap(),
        );
    }

    pub(super) fn is_open(&self) -> bool {
        self.state.lock().unwrap().1
    }

    pub(super) fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        let mut state = self.changed.wait_while(state, |state| !state.1).unwrap();
        state.0 -= 1;
    }
}

impl Disk {
    /// Nothing can be done at once behind a gate.
    pub(super) fn pass_gate(&self, patience: Patience) -> Result<(), TakesTime> {
        let Some(gate) = self.gate.lock().unwrap().clone() else {
            return Ok(());
        };
        match patience {
            Patience::None | Patience::Little => Err(TakesTime),
            Patience::Endless => {
                gate.pass();
                Ok(())
            }
        }
    }

    pub(super) fn put_behind(&self, gate: &Arc<Gate>) {
        *self.gate.lock().unwrap() = Some(gate.clone());
    }
}
