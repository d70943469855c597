//! The API's side of the monitor: what a client asks for becomes a configuration, and
//! then changes of the machine that runs.
//!
//! ```text
//! API threads ──Serve::act──▶ Frontend ──ToMain──▶ main thread: builds and starts
//!                                │  ◀── Controller ──┘
//!                                └── pause, resume, device changes: on the API's thread
//! ```
//!
//! Invariant: a request that is refused changed nothing; one that only asks never waits
//! for one that works.

mod balloon;
mod latencies;
mod memory;
pub(crate) mod metadata;
mod preparing;
mod running;
mod snapshots;

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use api::{Action, Answer, Refusal, Serve, SnapshotLoad, Stage};
use blueprint::{Blueprint, Draft};
use machine::{BackEnds, Controller};
use mmds::Metadata;
use serde_json::{Value, json};

use crate::frontend::latencies::Latencies;
use crate::frontend::preparing::Preparing;
use crate::frontend::running::Running;
pub(crate) use crate::frontend::snapshots::Loaded;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::open_metrics;

/// The version of Firecracker whose API this is.
pub(crate) const API_VERSION: &str = "1.17.0";

/// What the main thread is asked.
pub(crate) enum ToMain {
    /// Build this machine and start it; say on `reply` how that went.
    Start {
        blueprint: Box<Blueprint>,
        back_ends: BackEnds,
        reply: Sender<Result<Controller, String>>,
    },
    /// Put this machine together and let it go on; say on `reply` how that went. If it
    /// fails, the process is of no use any more.
    Load {
        loaded: Box<Loaded>,
        reply: Sender<Result<Controller, String>>,
    },
    /// End with this line: a snapshot could not be read.
    Unusable(String),
    /// A signal said to end.
    Stop,
}

/// Serves the API.
pub(crate) struct Frontend {
    id: String,
    main: Sender<ToMain>,
    log: Log,
    metrics: Arc<Metrics>,
    metadata: Arc<Mutex<Metadata>>,
    latencies: Arc<Latencies>,
    state: Mutex<State>,
    /// Set once, when the machine runs.
    controller: OnceLock<Controller>,
}

enum State {
    Preparing(Box<Preparing>),
    Running(Arc<Running>),
}

impl Frontend {
    /// Serves a machine named `id` that is not there yet.
    pub(crate) fn new(
        id: &str,
        main: Sender<ToMain>,
        log: Log,
        metrics: Arc<Metrics>,
        metadata: Arc<Mutex<Metadata>>,
    ) -> Self {
        let latencies = Arc::<Latencies>::default();
        let told = latencies.clone();
        metrics.add(move || told.groups());
        Self {
            id: id.to_owned(),
            latencies,
            main,
            log,
            metrics,
            metadata,
            state: Mutex::new(State::Preparing(Box::default())),
            controller: OnceLock::new(),
        }
    }

    /// The machine that `draft` describes runs, and no client asked for it.
    pub(crate) fn started(&self, draft: Draft, controller: Controller) {
        self.run(&mut lock(&self.state), draft, controller);
    }

    fn run(&self, state: &mut State, draft: Draft, controller: Controller) {
        *state = State::Running(Arc::new(Running::new(draft, controller.clone())));
        // It is the first: only one start succeeds.
        let _ = self.controller.set(controller);
    }

    fn instance(&self) -> Value {
        let state = match self.controller.get() {
            None => "Not started",
            Some(controller) if controller.is_paused() => "Paused",
            Some(_) => "Running",
        };
        // Tools look at the name, and at the version for what they may ask.
        json!({
            "app_name": "Firecracker",
            "id": self.id,
            "state": state,
            "vmm_version": API_VERSION,
        })
    }

    /// Builds and starts what was prepared.
    fn start(&self, state: &mut State) -> Result<Answer, Refusal> {
        let State::Preparing(preparing) = state else {
            return Err(too_late());
        };
        let draft = preparing.draft().clone();
        let blueprint = Box::new(preparing.blueprint()?);
        let back_ends = preparing.take_back_ends();
        let (reply, started) = channel();
        let gone = |_| refuse("the monitor is ending");
        self.main
            .send(ToMain::Start {
                blueprint,
                back_ends,
                reply,
            })
            .map_err(|_| refuse("the monitor is ending"))?;
        let controller = started
            .recv()
            .map_err(gone)?
            .map_err(|line| refuse(&line))?;
        self.run(state, draft, controller);
        Ok(Answer::Done)
    }
}

impl Frontend {
    /// Goes on with a machine that was saved.
    fn load(&self, state: &mut State, asked: &SnapshotLoad) -> Result<Answer, Refusal> {
        let State::Preparing(preparing) = &*state else {
            return Err(too_late());
        };
        preparing.check_untouched()?;
        snapshots::check(asked)?;
        let gone = || refuse("the monitor is ending");
        let loaded = match snapshots::read(asked) {
            Ok(loaded) => loaded,
            Err(line) => {
                let _ = self.main.send(ToMain::Unusable(line.clone()));
                return Err(refuse(&line));
            }
        };
        let (logger, metrics) = (&preparing.draft().logger, &preparing.draft().metrics);
        let draft = Draft {
            logger: logger.clone(),
            metrics: metrics.clone(),
            ..loaded.draft.clone()
        };
        if let Some(asked) = &draft.mmds_config {
            metadata::configure(&self.metadata, asked);
        }
        let loaded = Box::new(loaded);
        let (reply, started) = channel();
        let sent = self.main.send(ToMain::Load { loaded, reply });
        sent.map_err(|_| gone())?;
        let started = started.recv().map_err(|_| gone())?;
        self.run(state, draft, started.map_err(|line| refuse(&line))?);
        Ok(Answer::Done)
    }
}

impl Serve for Frontend {
    fn act(&self, action: Action) -> Result<Answer, Refusal> {
        let since = Instant::now();
        let latency = self.latencies.of(&action);
        let answer = self.answer(action)?;
        latency
            .into_iter()
            .for_each(|latency| latencies::done(latency, since));
        Ok(answer)
    }
}

impl Frontend {
    fn answer(&self, action: Action) -> Result<Answer, Refusal> {
        // What needs nothing that somebody may be working with.
        match &action {
            Action::GetInstance => return Ok(Answer::Body(self.instance())),
            Action::GetVersion => {
                return Ok(Answer::Body(json!({ "firecracker_version": API_VERSION })));
            }
            _ => {}
        }
        match (action.stage(), self.controller.get().is_some()) {
            (Stage::BeforeStart, true) => return Err(too_late()),
            (Stage::AfterStart, false) => return Err(too_early()),
            (Stage::Both, _) | (Stage::BeforeStart, false) | (Stage::AfterStart, true) => {}
        }
        if action == Action::GetMetrics {
            return Ok(Answer::Text {
                media_type: open_metrics::MEDIA_TYPE,
                text: open_metrics::text(self.metrics.totals()),
            });
        }
        if action == Action::FlushMetrics {
            return match self.metrics.flush() {
                Ok(()) => Ok(Answer::Done),
                Err(error) => Err(refuse(&format!("metrics are not taken: {error}"))),
            };
        }
        match action {
            Action::GetMmds => return Ok(metadata::get(&self.metadata)),
            Action::PutMmds(value) => return metadata::put(&self.metadata, value),
            Action::PatchMmds(value) => return metadata::patch(&self.metadata, value),
            _ => {}
        }
        let mut state = lock(&self.state);
        match action {
            Action::InstanceStart => self.start(&mut state),
            Action::LoadSnapshot(asked) => self.load(&mut state, &asked),
            Action::PutLogger(asked) => match &mut *state {
                State::Running(_) => Err(too_late()),
                State::Preparing(preparing) => match self.log.configure(&asked) {
                    Ok(()) => {
                        preparing.logger(asked);
                        Ok(Answer::Done)
                    }
                    Err(error) => {
                        let path = asked.log_path.unwrap_or_default();
                        Err(refuse(&format!("failed to open log {path:?}: {error}")))
                    }
                },
            },
            Action::PutMetrics(asked) => match &mut *state {
                State::Running(_) => Err(too_late()),
                // A thread started here has this one's filter.
                State::Preparing(preparing) => match self.metrics.configure(&self.id, &asked, None)
                {
                    Ok(()) => {
                        preparing.metrics(asked);
                        Ok(Answer::Done)
                    }
                    Err(error) => Err(refuse(&error)),
                },
            },
            Action::PutMmdsConfig(asked) => match &mut *state {
                State::Running(_) => Err(too_late()),
                State::Preparing(preparing) => {
                    let answer = preparing.act(Action::PutMmdsConfig(asked.clone()))?;
                    metadata::configure(&self.metadata, &asked);
                    Ok(answer)
                }
            },
            other => {
                let running = match &mut *state {
                    State::Preparing(preparing) => return preparing.act(other),
                    State::Running(running) => running.clone(),
                };
                // What one asks of the machine keeps nobody else from asking.
                drop(state);
                running.act(other)
            }
        }
    }
}

/// What was locked when something panicked is as good as it was.
fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refuse(message: &str) -> Refusal {
    Refusal::BadRequest(message.to_owned())
}

fn too_late() -> Refusal {
    refuse("the machine has started already: this can only be asked for before")
}

fn too_early() -> Refusal {
    refuse("the machine has not started: this can only be asked for once it runs")
}
