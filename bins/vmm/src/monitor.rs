//! The process's life: surroundings, what was asked, the machine, its end.
//!
//! ```text
//! --config-file ───────────────▶ build, start ──▶ wait ──▶ exit code
//! client: PUT … InstanceStart ──▶     ▲   └── refused: the client may try again
//!                                SIGTERM at any time ──────▶
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use api::{Answering, Limits, Serve, Server};
use blueprint::{Blueprint, CpuConfigDraft, Draft, MetricsDraft};
use hv::Hypervisor;
use machine::{
    BackEnds, Ended, Handles, Machine, MetadataService, Moment, Network, Outcome, Outside, Running,
    Stdio, StopHandle, Tap,
};
use serde_json::{Value, json};
use translations::Translations;
use virtio::Counted;

use crate::args::Args;
use crate::engine::{self, Chosen, Watching};
use crate::failure::{Failure, exit};
use crate::filter::{self, Choice, Filter};
use crate::frontend::{Frontend, Loaded, ToMain, metadata};
use crate::jail::{self, Visible};
use crate::log::Log;
use crate::metrics::Metrics;
use crate::status::Status;
use crate::surroundings;

/// How long an answer may keep the process from its end.
const ANSWER_PATIENCE: Duration = Duration::from_millis(500);
/// Bytes of a configuration file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What stops the process: a signal, and the machine that it shall end.
#[derive(Clone, Default)]
struct Stopping {
    signal: Arc<AtomicI32>,
    machine: Arc<OnceLock<StopHandle>>,
}

/// Returns the exit code of a machine that ended without a failure of ours.
pub(crate) fn run(args: &Args, status: &mut Status) -> Result<u8, Failure> {
    let host = |doing| move |source| Failure::Host { doing, source };
    if args.die_with_parent {
        surroundings::die_with_parent().map_err(host("tie this process to its parent"))?;
    }
    if let Some(number) = args.status_fd {
        let fd = surroundings::inherited(number)
            .map_err(|source| Failure::StatusFd { number, source })?;
        // A parent that ended before we were tied to it sent no signal.
        if args.die_with_parent && surroundings::nobody_reads(&fd) {
            let source = std::io::ErrorKind::BrokenPipe.into();
            return Err(host("outlive the parent")(source));
        }
        *status = Status::to(fd);
    }
    surroundings::raise_descriptor_limit().map_err(host("raise the limit of descriptors"))?;
    surroundings::block_stop_signals().map_err(host("block signals"))?;
    let log = Log::start(&args.id);
    log.configure(&args.logger())
        .map_err(|source| Failure::OpenLog {
            path: args.log_path.clone().unwrap_or_default(),
            source,
        })?;
    tracing::info!("kombi-vmm {}", env!("CARGO_PKG_VERSION"));
    if let Some((wall_us, cpu_us)) = args.start_up() {
        tracing::info!(wall_us, cpu_us, "time since the jailer started");
    }
    let metrics = Arc::new(Metrics::default());
    let of_log = log.clone();
    metrics.add(move || {
        let (missed, suppressed) = of_log.lost();
        let counts = json!({"missed_log_count": missed, "rate_limited_log_count": suppressed});
        [("logger".to_owned(), counts)].into()
    });

    let read = || {
        let path = args.config_file.as_deref();
        path.map(|path| read_draft(args, path)).transpose()
    };
    // A process of one thread can be jailed, and nothing of the machine was opened yet.
    let (mut taps, mut back_ends) = (HashMap::new(), BackEnds::new());
    let jailed = args.jail.then(read).transpose()?.flatten();
    if let Some(draft) = &jailed {
        let path = args.config_file.clone().unwrap_or_default();
        let refused = |source| Failure::Config { path, source };
        let blueprint = draft.clone().check().map_err(refused)?;
        taps = machine::open_taps(&blueprint).map_err(|source| Failure::Build { source })?;
        let reached = machine::connect_back_ends(&blueprint);
        back_ends = reached.map_err(|source| Failure::Build { source })?;
        jail::enter(&Visible::of(args, draft, &blueprint)?)?.log();
    }
    let filters = Choice::new(args.no_seccomp, args.seccomp_filter.as_deref())?;
    let (to_main, from_others) = channel();
    let stopping = Stopping::default();
    let confine = filters.of(filter::SIGNALS, Filter::for_signals)?;
    stop_on_signals(&stopping, to_main.clone(), confine).map_err(host("take signals"))?;
    let draft = match jailed {
        Some(draft) => Some(draft),
        None => read()?,
    };
    let metadata = metadata::make(args)?;
    let service = MetadataService {
        metadata: metadata.clone(),
        counters: Arc::default(),
    };
    let counters = service.counters.clone();
    metrics.add(move || [("mmds".to_owned(), counts(counters.all()))].into());
    let frontend = Arc::new(Frontend::new(
        &args.id,
        to_main,
        log.clone(),
        metrics.clone(),
        metadata.clone(),
    ));
    // Its socket goes with it, however this function is left.
    let mut api = if args.no_api {
        None
    } else {
        Some(Api::bind(args, &metrics)?)
    };

    let life = Life {
        args,
        metrics: &metrics,
        stopping: &stopping,
        filters: &filters,
        metadata: &service,
    };
    let started = match draft {
        Some(draft) => {
            if let Some(asked) = &draft.logger {
                log.configure(asked).map_err(|source| Failure::OpenLog {
                    path: asked.log_path.clone().unwrap_or_default(),
                    source,
                })?;
            }
            if let Some(asked) = &draft.mmds_config {
                metadata::configure(&metadata, asked);
            }
            let path = args.config_file.clone().unwrap_or_default();
            let blueprint = draft
                .clone()
                .check()
                .map_err(|source| Failure::Config { path, source })?;
            let origin = Origin::Boot { taps, back_ends };
            let built = life.start(&blueprint, draft.metrics.as_ref(), origin)?;
            frontend.started(draft, built.running.controller());
            // Not before: a client must not prepare another machine meanwhile.
            serve(&mut api, &frontend, &filters)?;
            Some(built)
        }
        None => {
            life.open_metrics(None)?;
            serve(&mut api, &frontend, &filters)?;
            life.await_start(&from_others)?
        }
    };
    let signal = || stopping.signal.load(Ordering::SeqCst);
    let Some(started) = started else {
        metrics.end();
        return Ok(stopped_by(signal()));
    };
    status.started();
    tracing::info!(id = args.id, "started");
    if let Some(filter) = filters.of(filter::VMM, Filter::for_event_loop)? {
        let confined = filter.confine_this_thread();
        confined.map_err(host("confine the event loop's thread"))?;
    }
    let ended = started.running.wait();
    metrics.end();
    let code = finish(ended, signal(), status);
    if let Some(kept) = started.kept {
        engine::save(&kept);
    }
    code
}

/// A machine that runs, and what the engine keeps.
struct Started {
    running: Running,
    kept: Option<Arc<Translations>>,
}

/// Where a machine begins.
enum Origin {
    /// At its kernel; these TAP devices are open and these back ends connected to already.
    Boot {
        taps: HashMap<String, Tap>,
        back_ends: BackEnds,
    },
    /// Where it was when it was saved.
    Snapshot(Box<Loaded>),
}

/// What it takes to start a machine.
struct Life<'a> {
    args: &'a Args,
    metrics: &'a Metrics,
    stopping: &'a Stopping,
    filters: &'a Choice,
    metadata: &'a MetadataService,
}

impl Life<'_> {
    /// Starts what the API is asked for, until one start succeeds. `None` when a signal
    /// came first; an error when a snapshot could not be loaded.
    fn await_start(&self, from_others: &Receiver<ToMain>) -> Result<Option<Started>, Failure> {
        for asked in from_others {
            let (started, reply, is_load) = match asked {
                ToMain::Stop => return Ok(None),
                ToMain::Unusable(why) => return Err(Failure::Load { why }),
                ToMain::Start {
                    blueprint,
                    back_ends,
                    reply,
                } => {
                    let boot = Origin::Boot {
                        taps: HashMap::new(),
                        back_ends,
                    };
                    (self.start(&blueprint, None, boot), reply, false)
                }
                ToMain::Load { loaded, reply } => {
                    let blueprint = loaded.blueprint.clone();
                    let started = self.start(&blueprint, None, Origin::Snapshot(loaded));
                    (started, reply, true)
                }
            };
            match started {
                // Nobody waits for the answer only if a signal ended the API's thread.
                Ok(started) => {
                    let _ = reply.send(Ok(started.running.controller()));
                    return Ok(Some(started));
                }
                Err(failure) => {
                    let _ = reply.send(Err(failure.line()));
                    if is_load {
                        return Err(failure);
                    }
                }
            }
        }
        Ok(None)
    }

    fn start(
        &self,
        blueprint: &Blueprint,
        metrics: Option<&MetricsDraft>,
        origin: Origin,
    ) -> Result<Started, Failure> {
        let moment = Moment::now();
        let args = self.args;
        let host = |doing| move |source| Failure::Host { doing, source };
        let watching = Watching {
            counters: Arc::default(),
            trace: output(args.engine_trace.as_deref(), "the engine's trace", |path| {
                File::create(path)
            })?,
            failing: args.fail_engine.map(Into::into),
            of_saver: self.filters.of(filter::RECORDS, Filter::for_records)?,
        };
        let counters = Arc::clone(&watching.counters);
        let chosen = engine::choose(blueprint, args.translation_cache.as_deref(), watching)?;
        let kept = match &chosen {
            Chosen::Soft(_, kept) => kept.clone(),
            Chosen::Kvm(_) => None,
        };
        self.metrics.watch(counters, kept.clone());
        if args.config_file.is_some() {
            self.open_metrics(metrics)?;
        }
        let stdio = Stdio {
            // Standard input that held the configuration is at its end.
            input: if reads_stdin(args) {
                None
            } else {
                std::io::stdin().as_fd().try_clone_to_owned().ok()
            },
            output: std::io::stdout()
                .as_fd()
                .try_clone_to_owned()
                .map_err(host("duplicate standard output"))?,
        };
        let outside = Outside {
            stdio,
            network: Network {
                taps: HashMap::new(),
                metadata: Some(self.metadata.clone()),
            },
            back_ends: BackEnds::new(),
        };
        let running = match chosen {
            Chosen::Soft(engine, _) => {
                let filter = Filter::for_translated_code;
                self.launch(blueprint, origin, &engine, outside, moment, filter)?
            }
            Chosen::Kvm(engine) => {
                let filter = Filter::for_kvm;
                self.launch(blueprint, origin, &engine, outside, moment, filter)?
            }
        };
        self.count_devices(running.controller().handles());
        let stop = running.stop_handle();
        // It is the first: only one start succeeds.
        let _ = self.stopping.machine.set(stop.clone());
        if self.stopping.signal.load(Ordering::SeqCst) != 0 {
            stop.stop();
        }
        Ok(Started { running, kept })
    }

    /// Starts the machine on an engine, its vCPUs behind `filter`.
    fn launch<H: Hypervisor>(
        &self,
        blueprint: &Blueprint,
        origin: Origin,
        engine: &H,
        mut outside: Outside,
        moment: Moment,
        filter: fn() -> std::io::Result<Filter>,
    ) -> Result<Running, Failure> {
        let (machine, paused) = match origin {
            Origin::Boot { taps, back_ends } => {
                outside.network.taps = taps;
                outside.back_ends = back_ends;
                (Machine::build(blueprint, engine, outside), false)
            }
            Origin::Snapshot(loaded) => {
                let Loaded {
                    machine,
                    image,
                    resume,
                    ..
                } = *loaded;
                let restored = Machine::restore(blueprint, &machine, image, engine, outside);
                (restored, !resume)
            }
        };
        let mut machine = machine.map_err(|source| Failure::Build { source })?;
        if self.args.boot_timer {
            machine
                .time_boot(moment)
                .map_err(|source| Failure::Build { source })?;
        }
        if let Some(filter) = self.filters.of(filter::VCPU, filter)? {
            machine.confine_vcpus(Arc::new(move || filter.confine_this_thread()));
        }
        if let Some(filter) = self.filters.of(filter::DISK, Filter::for_disks)? {
            let confine: machine::Confine = Arc::new(move || filter.confine_this_thread());
            let confined = machine.confine_disks(&confine);
            confined.map_err(|source| Failure::Run { source })?;
        }
        let running = if paused {
            machine.start_paused()
        } else {
            machine.start()
        };
        running.map_err(|source| Failure::Run { source })
    }

    /// Has the metrics tell what devices count: each kind together, then each one.
    fn count_devices(&self, handles: &Handles) {
        let drives: Vec<_> = handles
            .drives
            .iter()
            .map(|(id, drive)| {
                let drive = drive.lock().unwrap_or_else(PoisonError::into_inner);
                (format!("block_{id}"), drive.metrics())
            })
            .collect();
        self.metrics.add(move || {
            let told = |metrics: &virtio::block::Metrics| {
                let mut told = counts(metrics.counters.all());
                told["read_agg"] = counts(metrics.read_agg.all().into_iter());
                told["write_agg"] = counts(metrics.write_agg.all().into_iter());
                told
            };
            let each = drives
                .iter()
                .map(|(name, metrics)| (name.clone(), told(metrics)));
            let mut groups: BTreeMap<_, _> = each.collect();
            let all = groups.values().fold(told(&Default::default()), together);
            groups.insert("block".to_owned(), all);
            groups
        });
        let interfaces: Vec<_> = handles
            .interfaces
            .iter()
            .map(|(id, net)| {
                let net = net.lock().unwrap_or_else(PoisonError::into_inner);
                (format!("net_{id}"), net.counters() as Arc<dyn Counted>)
            })
            .collect();
        let counted = [interfaces, handles.counted.clone()].concat();
        self.metrics.add(move || {
            let each = counted.iter();
            let mut groups: BTreeMap<_, _> = each
                .map(|(name, counted)| (name.clone(), counts(counted.counts().into_iter())))
                .collect();
            for (all, prefix) in [("net", "net_"), ("pmem", "pmem_")] {
                let each = groups.iter().filter(|(name, _)| name.starts_with(prefix));
                let sum = each.map(|(_, group)| group.clone());
                let sum = sum.reduce(|sum, group| together(sum, &group));
                // Readers look for it in machines without, too.
                groups.insert(all.to_owned(), sum.unwrap_or_else(|| json!({})));
            }
            groups
        });
    }

    /// Opens the metrics that command line or configuration file name.
    fn open_metrics(&self, asked: Option<&MetricsDraft>) -> Result<(), Failure> {
        let by_argument = self.args.metrics_path.as_ref().map(|path| MetricsDraft {
            metrics_path: path.clone(),
            ..MetricsDraft::default()
        });
        let Some(asked) = by_argument.as_ref().or(asked) else {
            return Ok(());
        };
        let filter = self.filters.of(filter::RECORDS, Filter::for_records)?;
        let configured = self.metrics.configure(&self.args.id, asked, filter);
        configured.map_err(|why| Failure::Metrics { why })
    }
}

/// The API's socket, which nobody finds any more when the process ends. Clients that come
/// before [`serve`] wait.
struct Api {
    path: PathBuf,
    /// Until a thread has it.
    server: Option<Server>,
    answering: Answering,
}

impl Api {
    fn bind(args: &Args, metrics: &Metrics) -> Result<Self, Failure> {
        let path = &args.api_sock;
        let limits = Limits {
            body_bytes: args.http_api_max_payload_size,
            ..Limits::default()
        };
        let server = Server::bind(path, limits).map_err(|source| Failure::ApiSocket {
            path: path.clone(),
            source,
        })?;
        let counters = server.counters();
        let startup = startup_time(args);
        metrics.add(move || {
            let mut groups: BTreeMap<String, Value> = counters
                .totals()
                .into_iter()
                .map(|(name, counts)| (name.to_owned(), json!(counts)))
                .collect();
            groups.insert("api_server".to_owned(), startup.clone());
            groups
        });
        Ok(Self {
            path: path.clone(),
            answering: server.answering(),
            server: Some(server),
        })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        // A guest may end before the client knows that it was started.
        self.answering.wait(ANSWER_PATIENCE);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Serves the API, if there is one, on a thread that lives as long as the process.
fn serve(api: &mut Option<Api>, frontend: &Arc<Frontend>, filters: &Choice) -> Result<(), Failure> {
    let Some((path, server)) = api
        .as_mut()
        .and_then(|api| Some((&api.path, api.server.take()?)))
    else {
        return Ok(());
    };
    let serve: Arc<dyn Serve> = frontend.clone();
    let filter = filters.of(filter::API, Filter::for_api)?;
    std::thread::Builder::new()
        .name("api".to_owned())
        .spawn(move || {
            let confined = filter.map_or(Ok(()), |filter| filter.confine_this_thread());
            let error = match confined {
                Ok(()) => match server.run(&serve) {
                    Err(error) => error,
                },
                Err(error) => error,
            };
            tracing::error!("the API's socket failed: {error}");
        })
        .map(drop)
        .map_err(|source| Failure::ApiSocket {
            path: path.clone(),
            source,
        })
}

fn counts(of: impl Iterator<Item = (&'static str, u64)>) -> Value {
    Value::Object(of.map(|(name, n)| (name.to_owned(), n.into())).collect())
}

/// What two devices counted, of the same kind: sums, but the shortest and the longest of
/// latencies; zero is none.
fn together(one: Value, other: &Value) -> Value {
    let Value::Object(mut members) = one else {
        return one;
    };
    for (name, value) in &mut members {
        let other = &other[name];
        let least_most = value.as_u64().zip(other.as_u64());
        *value = match (name.as_str(), least_most) {
            ("min_us", Some((a, b))) if a == 0 || b == 0 => a.max(b).into(),
            ("min_us", Some((a, b))) => a.min(b).into(),
            ("max_us", Some((a, b))) => a.max(b).into(),
            (_, Some((a, b))) => a.saturating_add(b).into(),
            (_, None) => together(value.take(), other),
        };
    }
    Value::Object(members)
}

/// Time from the jailer's start, in Firecracker's words.
fn startup_time(args: &Args) -> Value {
    let (wall_us, cpu_us) = args.start_up().unwrap_or_default();
    json!({
        "process_startup_time_us": wall_us,
        "process_startup_time_cpu_us": cpu_us,
    })
}

fn stop_on_signals(
    stopping: &Stopping,
    to_main: Sender<ToMain>,
    filter: Option<Filter>,
) -> std::io::Result<()> {
    let stopping = stopping.clone();
    let confine = move || filter.map_or(Ok(()), |filter| filter.confine_this_thread());
    surroundings::stop_on_signals(confine, move |signal| {
        stopping.signal.store(signal, Ordering::SeqCst);
        match stopping.machine.get() {
            Some(machine) => machine.stop(),
            // Nobody listens any more if a machine is being started: it looks itself.
            None => drop(to_main.send(ToMain::Stop)),
        }
    })
}

fn stopped_by(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(exit::ERROR)
}

fn finish(ended: Ended, signal: i32, status: &mut Status) -> Result<u8, Failure> {
    let panic = ended.kernel_panic();
    let outcome = ended.result.map_err(|source| Failure::Run { source })?;
    tracing::info!(%outcome, "stopped");
    let (code, message) = match outcome {
        Outcome::PowerOff | Outcome::Reset => (0, panic),
        Outcome::TripleFault => {
            let message = "the guest triple-faulted".to_owned();
            eprintln!("kombi-vmm: error: {message}; look at its console output");
            (exit::TRIPLE_FAULT, Some(message))
        }
        // Only signals stop a machine.
        Outcome::Stopped => (stopped_by(signal), None),
    };
    status.stopped(&outcome.to_string(), message.as_deref());
    Ok(code)
}

/// Opens a file that an option names.
fn output<T>(
    path: Option<&Path>,
    what: &'static str,
    open: impl FnOnce(&Path) -> std::io::Result<T>,
) -> Result<Option<T>, Failure> {
    let Some(path) = path else {
        return Ok(None);
    };
    match open(path) {
        Ok(file) => Ok(Some(file)),
        Err(source) => Err(Failure::OpenOutput {
            what,
            path: path.to_path_buf(),
            source,
        }),
    }
}

fn reads_stdin(args: &Args) -> bool {
    args.config_file.as_deref() == Some(Path::new("-"))
}

fn read_draft(args: &Args, path: &Path) -> Result<Draft, Failure> {
    let text = read_file(path, reads_stdin(args))?;
    let mut draft = Draft::from_json(&text).map_err(|source| Failure::Config {
        path: path.to_path_buf(),
        source,
    })?;
    if let Some(CpuConfigDraft::Path(path)) = &draft.cpu_config {
        let text = read_file(path, false)?;
        let template = blueprint::from_json(&text)
            .map_err(|source| blueprint::DraftError::Json { source })
            .map_err(|source| Failure::Config {
                path: path.clone(),
                source,
            })?;
        draft.cpu_config = Some(CpuConfigDraft::Template(template));
    }
    if let Some(engine) = args.engine {
        draft.machine_config.engine = Some(engine);
    }
    if let Some(model) = args.cpu_model {
        draft.machine_config.cpu_model = Some(model);
    }
    Ok(draft)
}

fn read_file(path: &Path, stdin: bool) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    let source: Result<Box<dyn Read>, _> = if stdin {
        Ok(Box::new(std::io::stdin()))
    } else {
        File::open(path).map(|file| Box::new(file) as Box<dyn Read>)
    };
    source
        .and_then(|source| source.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut text))
        .map_err(|source| Failure::ReadConfig {
            path: path.to_path_buf(),
            source,
        })?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(Failure::LongConfig {
            path: path.to_path_buf(),
            most: CONFIG_BYTES_MAX,
        });
    }
    Ok(text)
}
