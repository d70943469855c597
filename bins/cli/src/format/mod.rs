//! `--format`: Go templates, as docker's verbs take them, and tables.
//!
//! Invariant: a template that makes no sense is an error before anything is printed. Left to others: what there is to
//! show.

mod functions;
mod template;

use std::io::Write;

use serde_json::Value;

use crate::complaint::Complaint;
use template::Template;

/// Spaces between columns, as docker's.
const GAP: usize = 3;

/// A column of a verb that lists something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    /// What templates call it.
    pub(crate) field: &'static str,
    /// Its heading.
    pub(crate) heading: &'static str,
}

/// How rows are shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// One JSON object a line.
    Json,
    /// Whatever the template makes of each.
    Template(String),
    /// The same in columns, with headings.
    Table(String),
}

impl Rows {
    /// What `--format TEMPLATE` or `--json` asks for; `default` are the fields of the usual table.
    pub(crate) fn chosen(format: Option<&str>, json: bool, default: &[&str]) -> Self {
        let usual = || {
            let fields: Vec<String> = default
                .iter()
                .map(|field| format!("{{{{.{field}}}}}"))
                .collect();
            Rows::Table(fields.join("\t"))
        };
        match format {
            _ if json => Rows::Json,
            None | Some("" | "table") => usual(),
            Some("json") => Rows::Json,
            Some(format) => match format.strip_prefix("table ") {
                Some(rest) => Rows::Table(unescaped(rest.trim_start())),
                None => Rows::Template(unescaped(format)),
            },
        }
    }

    /// All of `rows` as text.
    pub(crate) fn of(&self, columns: &[Column], rows: &[Value]) -> Result<String, Complaint> {
        match self {
            Rows::Json => Ok(rows.iter().map(|row| format!("{row}\n")).collect()),
            Rows::Template(template) => {
                let filled = rows.iter().map(|row| fill(template, row));
                filled.map(|line| Ok(line? + "\n")).collect()
            }
            Rows::Table(template) => {
                let heading =
                    |column: &Column| (column.field.to_owned(), Value::from(column.heading));
                let headings: Value = columns.iter().map(heading).collect();
                let lines = [&headings]
                    .into_iter()
                    .chain(rows)
                    .map(|row| fill(template, row));
                Ok(aligned(&lines.collect::<Result<Vec<_>, _>>()?))
            }
        }
    }
}

/// Prints to standard output; nobody there to read is no failure.
pub(crate) fn print(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

/// `\t` and `\n` as people type them in a shell's single quotes.
fn unescaped(template: &str) -> String {
    template.replace("\\t", "\t").replace("\\n", "\n")
}

/// One object by a template.
pub(crate) fn fill(template: &str, value: &Value) -> Result<String, Complaint> {
    let bad = |error: String| {
        Complaint::new(
            format!("template {template:?} is not usable: {error}"),
            "write Go's templates, such as '{{.ID}}' or '{{json .}}'",
        )
    };
    let parsed = Template::parse(&unescaped(template)).map_err(bad)?;
    parsed.fill(value).map_err(bad)
}

/// Lines with tabs as columns.
fn aligned(lines: &[String]) -> String {
    let rows: Vec<Vec<&str>> = lines
        .iter()
        .map(|line| line.split('\t').collect())
        .collect();
    let mut widths: Vec<usize> = Vec::new();
    for row in &rows {
        for (index, cell) in row.iter().enumerate() {
            let width = cell.chars().count();
            match widths.get_mut(index) {
                Some(known) => *known = width.max(*known),
                None => widths.push(width),
            }
        }
    }
    let mut text = String::new();
    for row in rows {
        let last = row.len().saturating_sub(1);
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            match index == last {
                true => text.push_str(cell),
                false => text.push_str(&format!("{cell:<width$}", width = width + GAP)),
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const COLUMNS: [Column; 2] = [
        Column {
            field: "Name",
            heading: "NAME",
        },
        Column {
            field: "Bytes",
            heading: "SIZE",
        },
    ];

    fn rows() -> Vec<Value> {
        vec![
            json!({"Name": "a", "Bytes": 1}),
            json!({"Name": "longer", "Bytes": 23}),
        ]
    }

    #[test]
    fn rows_are_tables_templates_or_json() {
        let shown = |format: Option<&str>, json: bool| {
            let rows_of = Rows::chosen(format, json, &["Name", "Bytes"]);
            rows_of.of(&COLUMNS, &rows()).expect("shown")
        };
        assert_eq!(
            shown(None, false),
            "NAME     SIZE\na        1\nlonger   23\n"
        );
        assert_eq!(
            shown(Some("{{.Name}}:{{.Bytes}}"), false),
            "a:1\nlonger:23\n"
        );
        assert_eq!(
            shown(Some(r"table {{.Bytes}}\t{{.Name}}"), false),
            "SIZE   NAME\n1      a\n23     longer\n"
        );
        let objects = "{\"Bytes\":1,\"Name\":\"a\"}\n{\"Bytes\":23,\"Name\":\"longer\"}\n";
        assert_eq!(shown(Some("json"), false), objects);
        assert_eq!(shown(None, true), objects);
        assert_eq!(shown(Some("{{json .}}"), false), objects);
    }

    #[test]
    fn what_scripts_write_for_docker_works() {
        let value = json!({
            "Config": {"Env": ["A=1", "B=2"], "Cmd": null, "Labels": {"k": "v"}},
            "RepoTags": ["busybox:latest"],
            "Size": 4_261_550_u64,
        });
        for (template, text) in [
            ("{{.Size}}", "4261550"),
            ("{{index .RepoTags 0}}", "busybox:latest"),
            ("{{json .Config.Env}}", r#"["A=1","B=2"]"#),
            ("{{range .Config.Env}}{{println .}}{{end}}", "A=1\nB=2\n"),
            (
                "{{range $i, $e := .Config.Env}}{{$i}}{{$e}} {{end}}",
                "0A=1 1B=2 ",
            ),
            ("{{if .Config.Cmd}}yes{{else}}no{{end}}", "no"),
            ("{{index .Config.Labels \"k\"}}", "v"),
            ("{{.Config.Labels.k | upper}}", "V"),
            ("{{join .Config.Env \",\"}}", "A=1,B=2"),
            ("{{index (split \"a/b\" \"/\") 1}}", "b"),
            (
                "{{truncate \"abcdef\" 3}}{{title \"x\"}}{{lower \"Y\"}}",
                "abcXy",
            ),
            ("{{len .Config.Env}}", "2"),
            (
                "{{.Config.Env}} {{.Config.Labels}} {{.Nope}} {{.Nope.More}}",
                "[A=1 B=2] map[k:v] <no value> <no value>",
            ),
            (
                "{{with .Config.Cmd}}{{.}}{{else with .Size}}{{.}}{{end}}",
                "4261550",
            ),
            ("{{if eq .Size 1 4261550}}a{{else if true}}b{{end}}", "a"),
            ("{{if and .Size (gt .Size 5) (not .Nope)}}a{{end}}", "a"),
            (
                "{{range $k, $v := .Config.Labels}}{{$k}}={{$v}}={{$.Size}}{{else}}none{{end}}",
                "k=v=4261550",
            ),
            ("{{range .Nope}}x{{else}}none{{end}}", "none"),
            ("a {{- /* said */ -}} b{{- \" c\" -}} d", "ab cd"),
            ("{{$x := .Size}}{{if $x}}{{$x = 2}}{{end}}{{$x}}", "2"),
            (
                "{{printf \"%-3s|%3s|%q|%d%%\" `x` \"y\" \"z\" 7}}",
                "x  |  y|\"z\"|7%",
            ),
            (
                "{{index .Config.Env 1 | printf \"%s!\"}}{{(index .RepoTags 0)}}",
                "B=2!busybox:latest",
            ),
            (
                "{{slice .Config.Env 1}}{{slice \"abc\" 1 2}}{{pad \"x\" 1 1}}",
                "[B=2]b x ",
            ),
        ] {
            assert_eq!(fill(template, &value).expect(template), text, "{template}");
        }
    }

    #[test]
    fn a_template_that_makes_no_sense_is_named() {
        for template in [
            "{{",
            "{{.A",
            "{{Name",
            "{{nope .}}",
            "{{join 1}}",
            "{{end}}",
            "{{else}}",
            "{{if .A}}",
            "{{}}",
            "{{..A}}",
            "{{(.A}}",
            "{{.A)}}",
            "{{.A | .B}}",
            "{{.A .B}}",
            "{{\"a}}",
            "{{`a}}",
            "{{/* a}}",
            "{{define \"x\"}}",
            "{{$x}}",
            "{{index . 1 2}}",
            "{{printf \"%d\" \"a\"}}",
            "{{1x}}",
            "{{.A.B}}\u{0}{{'a'}}",
            "{{range 3}}{{end}}",
            "{{if 1}}{{else}}{{else}}{{end}}",
        ] {
            let line = fill(template, &json!({})).expect_err(template).line();
            assert!(line.contains("is not usable"), "{line}");
        }
    }

    proptest! {
        #[test]
        fn no_template_panics(
            parts in prop::collection::vec(
                prop::sample::select(vec![
                    "{{", "}}", ".", "Name", "json ", "range ", "end", "if ", "else", "$x", ":=", " ", "|", "(", ")",
                    "index ", "0", "-1", "\"", "`", "x", "with ", "len ", "slice ", "printf ", "%s", "define ",
                    "template ", "block ", "{{- ", " -}}", "/*", "*/", "é", "1e9", "'a'", "not ", "eq ",
                ]),
                0..24,
            )
        ) {
            let _ = fill(&parts.concat(), &json!({"Name": "a", "List": [1, "b"]}));
        }
    }
}
