//! `kombi ps`.

use chrono::{DateTime, Utc};
use containers::{Container, Phase};
use serde_json::{Value, json};

use super::{EXIT_FAILED, all, complaint, failed};
use crate::complaint::Complaint;
use crate::format::{self, Column, Rows};
use crate::human;

/// Characters of a command that people see.
const COMMAND_CHARS: usize = 20;

const AFTER_HELP: &str = "\
Fields of templates: .ID .Image .Command .CreatedAt .RunningFor .State .Status .Names .Labels
Containers that were not started with -d are not here.

Examples:
  kombi ps -a --filter status=exited
  kombi ps --format '{{.Names}}: {{.Status}}'";

const COLUMNS: [Column; 10] = [
    column("ID", "CONTAINER ID"),
    column("Image", "IMAGE"),
    column("Command", "COMMAND"),
    column("CreatedAt", "CREATED AT"),
    column("RunningFor", "CREATED"),
    column("State", "STATE"),
    column("Status", "STATUS"),
    column("Ports", "PORTS"),
    column("Names", "NAMES"),
    column("Labels", "LABELS"),
];

const fn column(field: &'static str, heading: &'static str) -> Column {
    Column { field, heading }
}

/// List containers.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct ListArgs {
    /// Show those that do not run as well.
    #[arg(short, long)]
    all: bool,

    /// Print identifiers only.
    #[arg(short, long, conflicts_with_all = ["format", "json"])]
    quiet: bool,

    /// Show the newest N, those that do not run included.
    #[arg(short = 'n', long, value_name = "N")]
    last: Option<usize>,

    /// Show the newest, even if it does not run.
    #[arg(short, long, conflicts_with = "last")]
    latest: bool,

    /// Do not shorten identifiers and commands.
    #[arg(long)]
    no_trunc: bool,

    /// Show those for which all of these hold: status=created|running|exited, exited=CODE, name=TEXT, id=DIGITS,
    /// ancestor=IMAGE, label=NAME[=VALUE]; of several with one name, any.
    #[arg(short, long, value_name = "NAME=VALUE")]
    filter: Vec<String>,

    /// Show each by a Go template; table TEMPLATE adds headings, json shows objects.
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,

    /// Show JSON, one object a line.
    #[arg(long, conflicts_with = "format")]
    json: bool,
}

/// Lists them.
pub(crate) fn list(args: &ListArgs) -> Result<u8, Complaint> {
    let filters = args
        .filter
        .iter()
        .map(|text| Filter::of(text))
        .collect::<Result<Vec<_>, _>>()?;
    // Who asks for a state means it.
    let every = args.all
        || args.latest
        || args.last.is_some()
        || filters
            .iter()
            .any(|it| matches!(it, Filter::Status(_) | Filter::Exited(_)));
    let most = if args.latest { Some(1) } else { args.last };
    let mut here = Vec::new();
    for container in all()?.all().map_err(|error| failed(&error))? {
        match container {
            Ok(container) => here.push(container),
            // The others are of use all the same.
            Err(error) => complaint(&error).print(),
        }
    }
    let now = Utc::now();
    let rows: Vec<Value> = here
        .iter()
        .filter(|container| every || container.is_running())
        .filter(|container| Filter::all_hold(&filters, container))
        .take(most.unwrap_or(usize::MAX))
        .map(|container| row(container, args.no_trunc, now))
        .collect();
    if args.quiet {
        let ids = rows.iter().filter_map(|row| row["ID"].as_str());
        format::print(&ids.map(|id| format!("{id}\n")).collect::<String>());
        return Ok(0);
    }
    let usual = [
        "ID",
        "Image",
        "Command",
        "RunningFor",
        "Status",
        "Ports",
        "Names",
    ];
    let shown = Rows::chosen(args.format.as_deref(), args.json, &usual);
    let text = shown.of(&COLUMNS, &rows);
    format::print(&text.map_err(|it| it.with_exit_code(EXIT_FAILED))?);
    Ok(0)
}

fn row(container: &Container, no_trunc: bool, now: DateTime<Utc>) -> Value {
    let record = container.record();
    let mut command = record.command.join(" ");
    if !no_trunc && command.chars().count() > COMMAND_CHARS {
        command = command.chars().take(COMMAND_CHARS - 1).collect();
        command.push('…');
    }
    let labels = record
        .labels
        .iter()
        .map(|(name, value)| format!("{name}={value}"));
    json!({
        "ID": if no_trunc { record.id.as_str() } else { record.id.short() },
        "Image": record.image,
        // Nothing in it reaches a terminal.
        "Command": format!("{:?}", command),
        "CreatedAt": human::at(Some(&record.created)),
        "RunningFor": human::since(Some(&record.created), now),
        "State": container.state().phase.as_str(),
        "Status": status(container, now),
        "Ports": "",
        "Names": record.name,
        "Labels": labels.collect::<Vec<_>>().join(","),
    })
}

/// As docker puts it: `Up 3 minutes`, `Exited (0) 2 hours ago`.
fn status(container: &Container, now: DateTime<Utc>) -> String {
    let state = container.state();
    match state.phase {
        Phase::Created => "Created".to_owned(),
        Phase::Running => {
            let since = human::since(state.started.as_deref(), now);
            format!("Up {}", since.strip_suffix(" ago").unwrap_or(&since))
        }
        Phase::Exited => {
            let code = state.exit_code.unwrap_or_default();
            match state.finished.as_deref() {
                Some(finished) => format!("Exited ({code}) {}", human::since(Some(finished), now)),
                None => format!("Exited ({code}): its supervisor was killed"),
            }
        }
    }
}

/// Which containers are shown.
enum Filter {
    Status(String),
    Exited(u8),
    Name(String),
    Id(String),
    Ancestor(String),
    Label(String, Option<String>),
}

impl Filter {
    fn of(text: &str) -> Result<Self, Complaint> {
        let bad = || {
            let way_out = "use status=, exited=, name=, id=, ancestor= or label=";
            let complaint = Complaint::new(format!("filter {text:?} is not known"), way_out);
            complaint.with_exit_code(EXIT_FAILED)
        };
        let (name, value) = text.split_once('=').ok_or_else(bad)?;
        Ok(match name {
            "status" if ["created", "running", "exited"].contains(&value) => {
                Filter::Status(value.to_owned())
            }
            "exited" => Filter::Exited(value.parse().map_err(|_| bad())?),
            "name" => Filter::Name(value.to_owned()),
            "id" => Filter::Id(value.to_owned()),
            "ancestor" => Filter::Ancestor(value.to_owned()),
            "label" => match value.split_once('=') {
                Some((name, value)) => Filter::Label(name.to_owned(), Some(value.to_owned())),
                None => Filter::Label(value.to_owned(), None),
            },
            _ => return Err(bad()),
        })
    }

    /// Of filters of one kind any has to hold, but of labels all.
    fn all_hold(filters: &[Filter], container: &Container) -> bool {
        let kind = std::mem::discriminant::<Filter>;
        filters.iter().all(|filter| match filter {
            Filter::Label(..) => filter.holds(container),
            _ => {
                let alike = filters.iter().filter(|other| kind(other) == kind(filter));
                alike.into_iter().any(|other| other.holds(container))
            }
        })
    }

    fn holds(&self, container: &Container) -> bool {
        let (record, state) = (container.record(), container.state());
        match self {
            Filter::Status(status) => state.phase.as_str() == status,
            Filter::Exited(code) => state.phase == Phase::Exited && state.exit_code == Some(*code),
            Filter::Name(text) => record.name.contains(text),
            Filter::Id(digits) => record.id.as_str().starts_with(digits),
            Filter::Ancestor(image) => record.image == *image || record.image_digest == *image,
            Filter::Label(name, value) => {
                let found = record.labels.get(name);
                found.is_some_and(|found| value.as_ref().is_none_or(|value| value == found))
            }
        }
    }
}
