//! `kombi history`.

use chrono::Utc;
use serde_json::{Value, json};

use super::{EXIT_FAILED, failed, short, store};
use crate::complaint::Complaint;
use crate::format::{self, Column, Rows};
use crate::human;

/// Characters of a command that are shown.
const COMMAND_CHARS: usize = 45;

const AFTER_HELP: &str = "\
Newest step first. Fields of templates: .ID .CreatedSince .CreatedAt .CreatedBy .Size .Comment";

const COLUMNS: [Column; 6] = [
    column("ID", "IMAGE"),
    column("CreatedSince", "CREATED"),
    column("CreatedAt", "CREATED AT"),
    column("CreatedBy", "CREATED BY"),
    column("Size", "SIZE"),
    column("Comment", "COMMENT"),
];

const fn column(field: &'static str, heading: &'static str) -> Column {
    Column { field, heading }
}

/// Show how an image came about.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct HistoryArgs {
    /// Print identifiers only.
    #[arg(short, long, conflicts_with_all = ["format", "json"])]
    quiet: bool,

    /// Do not shorten anything.
    #[arg(long)]
    no_trunc: bool,

    /// Show each step by a Go template; table TEMPLATE adds headings, json shows objects.
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,

    /// Show JSON, one object a line.
    #[arg(long, conflicts_with = "format")]
    json: bool,

    /// Which image: a name, or the first digits of its identifier.
    #[arg(value_name = "IMAGE")]
    image: String,
}

/// Shows it.
pub(crate) fn history(args: &HistoryArgs) -> Result<u8, Complaint> {
    let store = store()?;
    let found = store.find(&args.image).map_err(|error| failed(&error))?;
    let target = &found.entry.target;
    let id = store.id(target).map_err(|error| failed(&error))?;
    let steps = store.history(target).map_err(|error| failed(&error))?;
    let now = Utc::now();
    let row = |(index, step): (usize, &image::Step)| -> Value {
        let created = step.created.as_deref();
        // Only the whole has an identifier.
        let id = match (index, args.no_trunc) {
            (0, true) => id.to_string(),
            (0, false) => short(&id),
            _ => "<missing>".to_owned(),
        };
        let mut by = step.created_by.clone().unwrap_or_default();
        by = by.replace(['\t', '\n'], " ");
        if !args.no_trunc && by.chars().count() > COMMAND_CHARS {
            by = by.chars().take(COMMAND_CHARS - 1).chain(['…']).collect();
        }
        json!({
            "ID": id,
            "CreatedSince": human::since(created, now),
            "CreatedAt": human::at(created),
            "CreatedBy": by,
            "Size": human::size(step.bytes),
            "Comment": step.comment.clone().unwrap_or_default(),
        })
    };
    let rows: Vec<Value> = steps.iter().rev().enumerate().map(row).collect();
    if args.quiet {
        let ids = rows.iter().filter_map(|row| row["ID"].as_str());
        format::print(&ids.map(|id| format!("{id}\n")).collect::<String>());
        return Ok(0);
    }
    let usual = ["ID", "CreatedSince", "CreatedBy", "Size", "Comment"];
    let shown = Rows::chosen(args.format.as_deref(), args.json, &usual);
    let text = shown.of(&COLUMNS, &rows);
    format::print(&text.map_err(|it| it.with_exit_code(EXIT_FAILED))?);
    Ok(0)
}
