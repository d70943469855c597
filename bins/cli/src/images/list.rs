//! `kombi images`.

use chrono::Utc;
use glob::{MatchOptions, Pattern};
use image::{Entry, Store};
use serde_json::{Value, json};

use super::{EXIT_FAILED, failed, short, store};
use crate::complaint::Complaint;
use crate::format::{self, Column, Rows};
use crate::human;

const NONE: &str = "<none>";

const AFTER_HELP: &str = "\
Fields of templates: .Repository .Tag .Digest .ID .CreatedSince .CreatedAt .Size

Examples:
  kombi images --format '{{.Repository}}:{{.Tag}}'
  kombi images --filter reference='localhost:5000/*' --json";

const COLUMNS: [Column; 7] = [
    column("Repository", "REPOSITORY"),
    column("Tag", "TAG"),
    column("Digest", "DIGEST"),
    column("ID", "IMAGE ID"),
    column("CreatedSince", "CREATED"),
    column("CreatedAt", "CREATED AT"),
    column("Size", "SIZE"),
];

const fn column(field: &'static str, heading: &'static str) -> Column {
    Column { field, heading }
}

/// List images.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct ListArgs {
    /// Print identifiers only.
    #[arg(short, long, conflicts_with_all = ["format", "json"])]
    quiet: bool,

    /// Do not shorten identifiers.
    #[arg(long)]
    no_trunc: bool,

    /// Show digests.
    #[arg(long)]
    digests: bool,

    /// Show those for which all of these hold: dangling=true|false, label=NAME[=VALUE], reference=PATTERN.
    #[arg(short, long, value_name = "NAME=VALUE")]
    filter: Vec<String>,

    /// Show each by a Go template; table TEMPLATE adds headings, json shows objects.
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,

    /// Show JSON, one object a line.
    #[arg(long, conflicts_with = "format")]
    json: bool,

    /// Accepted for docker's sake: there are no images between the steps of a build.
    #[arg(short, long)]
    all: bool,

    /// Only of this repository, or only this image; * and ? stand for any characters but /.
    #[arg(value_name = "REPOSITORY[:TAG]")]
    repository: Option<String>,
}

/// Lists them.
pub(crate) fn list(args: &ListArgs) -> Result<u8, Complaint> {
    let mut filters = args
        .filter
        .iter()
        .map(|text| Filter::of(text))
        .collect::<Result<Vec<_>, _>>()?;
    if let Some(repository) = &args.repository {
        filters.push(Filter::reference(repository)?);
    }
    let store = store()?;
    let entries = store.entries().map_err(|error| failed(&error))?;
    let mut rows = Vec::new();
    for entry in entries {
        match row(&store, &entry, &filters, args.no_trunc) {
            Ok(row) => rows.extend(row),
            Err(error) => {
                // The others are of use all the same.
                let shown = entry.name.as_ref().map(image::Name::familiar);
                let shown = shown.unwrap_or_else(|| entry.target.to_string());
                super::complaint(&error)
                    .about(format!("image {shown}"))
                    .print();
            }
        }
    }
    if args.quiet {
        let mut ids: Vec<&str> = rows.iter().filter_map(|row| row["ID"].as_str()).collect();
        ids.dedup();
        format::print(&ids.iter().map(|id| format!("{id}\n")).collect::<String>());
        return Ok(0);
    }
    let usual: &[&str] = match args.digests {
        true => &["Repository", "Tag", "Digest", "ID", "CreatedSince", "Size"],
        false => &["Repository", "Tag", "ID", "CreatedSince", "Size"],
    };
    let shown = Rows::chosen(args.format.as_deref(), args.json, usual);
    let text = shown.of(&COLUMNS, &rows);
    format::print(&text.map_err(|it| it.with_exit_code(EXIT_FAILED))?);
    Ok(0)
}

/// One image; none where a filter leaves it out.
fn row(
    store: &Store,
    entry: &Entry,
    filters: &[Filter],
    no_trunc: bool,
) -> Result<Option<Value>, image::ImageError> {
    let details = store.details(&entry.target)?;
    if !filters.iter().all(|filter| filter.holds(entry, &details)) {
        return Ok(None);
    }
    let created = details.config.created().as_deref();
    let tag = entry.name.as_ref().and_then(image::Name::tag);
    Ok(Some(json!({
        "Repository": entry.name.as_ref().map_or(NONE.to_owned(), image::Name::familiar_repository),
        "Tag": tag.unwrap_or(NONE),
        "Digest": entry.target.to_string(),
        "ID": match no_trunc {
            true => details.id.to_string(),
            false => short(&details.id),
        },
        "CreatedSince": human::since(created, Utc::now()),
        "CreatedAt": human::at(created),
        "Size": human::size(details.stored_bytes.max(details.unpacked_bytes)),
    })))
}

/// Which images are shown.
enum Filter {
    Dangling(bool),
    Label(String, Option<String>),
    Reference(Pattern),
}

impl Filter {
    fn of(text: &str) -> Result<Self, Complaint> {
        let bad = || {
            let complaint = Complaint::new(
                format!("filter {text:?} is not known"),
                "use dangling=true|false, label=NAME[=VALUE] or reference=PATTERN",
            );
            complaint.with_exit_code(EXIT_FAILED)
        };
        match text.split_once('=').ok_or_else(bad)? {
            ("dangling", "true" | "1") => Ok(Filter::Dangling(true)),
            ("dangling", "false" | "0") => Ok(Filter::Dangling(false)),
            ("label", label) => Ok(match label.split_once('=') {
                Some((name, value)) => Filter::Label(name.to_owned(), Some(value.to_owned())),
                None => Filter::Label(label.to_owned(), None),
            }),
            ("reference", pattern) => Self::reference(pattern),
            _ => Err(bad()),
        }
    }

    fn reference(pattern: &str) -> Result<Self, Complaint> {
        Pattern::new(pattern)
            .map(Filter::Reference)
            .map_err(|error| {
                let complaint = Complaint::new(
                    format!("pattern {pattern:?} is not usable: {error}"),
                    "use * and ? for any characters, [abc] for one of some",
                );
                complaint.with_exit_code(EXIT_FAILED)
            })
    }

    fn holds(&self, entry: &Entry, details: &image::Details) -> bool {
        match self {
            Filter::Dangling(wanted) => entry.name.is_none() == *wanted,
            Filter::Label(name, value) => {
                let labels = details
                    .config
                    .config()
                    .as_ref()
                    .and_then(|config| config.labels().as_ref());
                let found = labels.and_then(|labels| labels.get(name));
                found.is_some_and(|found| value.as_ref().is_none_or(|value| value == found))
            }
            Filter::Reference(pattern) => entry.name.as_ref().is_some_and(|name| {
                // path.Match of Go, as docker has it.
                let options = MatchOptions {
                    require_literal_separator: true,
                    ..MatchOptions::default()
                };
                let matches = |text: &str| pattern.matches_with(text, options);
                let whole = name.to_string();
                let repository = whole.rsplit_once(':').map_or(whole.as_str(), |(it, _)| it);
                matches(&name.familiar())
                    || matches(&name.familiar_repository())
                    || matches(&whole)
                    || matches(repository)
            }),
        }
    }
}
