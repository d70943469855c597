//! What templates can call: Go's own functions, and docker's (`cli/templates`).
//!
//! Invariant: a wrong argument is an error that names the function; nothing grows beyond its arguments but by a width
//! of [`WIDTH_MAX`]. Left to others: syntax (`template.rs`).

use std::cmp::Ordering;

use serde_json::Value;

use super::template::Reason;

/// Of a number in `printf`, and of `pad`.
const WIDTH_MAX: usize = 1000;

const NAMES: [&str; 23] = [
    "and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge", "len", "index", "slice", "print",
    "printf", "println", "json", "upper", "lower", "title", "join", "split", "truncate", "pad",
];

pub(super) fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

/// As Go prints it.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "<no value>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::Array(values) => {
            let texts: Vec<String> = values.iter().map(shown).collect();
            format!("[{}]", texts.join(" "))
        }
        Value::Object(fields) => {
            let fields = fields
                .iter()
                .map(|(name, value)| format!("{name}:{}", shown(value)));
            format!("map[{}]", fields.collect::<Vec<_>>().join(" "))
        }
    }
}

/// What `if` takes for true: all but the empty value of its kind.
pub(super) fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(values) => !values.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

pub(super) fn call(name: &str, args: &[Value]) -> Result<Value, Reason> {
    use Value::{Array, Object, String as Text};
    let wants = |what: &str| Err(format!("{name} wants {what}"));
    let text = |text: String| Ok(Value::from(text));
    match (name, args) {
        ("and", [_, ..]) => Ok(chosen(args, |value| !is_true(value))),
        ("or", [_, ..]) => Ok(chosen(args, is_true)),
        ("not", [value]) => Ok(Value::Bool(!is_true(value))),
        ("eq", [first, others @ ..]) if !others.is_empty() => {
            Ok(Value::Bool(others.iter().any(|other| same(first, other))))
        }
        ("ne", [one, other]) => Ok(Value::Bool(!same(one, other))),
        ("lt" | "le" | "gt" | "ge", [one, other]) => match order(one, other) {
            Some(order) => Ok(Value::Bool(match name {
                "lt" => order.is_lt(),
                "le" => order.is_le(),
                "gt" => order.is_gt(),
                _ => order.is_ge(),
            })),
            None => wants("two numbers or two texts"),
        },
        ("len", [Text(text)]) => Ok(Value::from(text.len())),
        ("len", [Array(values)]) => Ok(Value::from(values.len())),
        ("len", [Object(fields)]) => Ok(Value::from(fields.len())),
        ("len", [Value::Null]) => Ok(Value::from(0)),
        ("index", [of, at @ ..]) => at.iter().try_fold(of.clone(), |of, at| index(&of, at)),
        ("slice", [of, bounds @ ..]) => slice(of, bounds),
        ("print", args) => text(args.iter().map(shown).collect()),
        ("println", args) => {
            let texts: Vec<String> = args.iter().map(shown).collect();
            text(texts.join(" ") + "\n")
        }
        ("printf", [Text(format), args @ ..]) => text(printf(format, args)?),
        ("json", [value]) => text(value.to_string()),
        ("upper", [Text(given)]) => text(given.to_uppercase()),
        ("lower", [Text(given)]) => text(given.to_lowercase()),
        ("title", [Text(given)]) => text(title(given)),
        ("join", [Array(values), Text(between)]) => {
            let texts: Vec<String> = values.iter().map(shown).collect();
            text(texts.join(between))
        }
        ("join", [Value::Null, Text(_)]) => text(String::new()),
        ("split", [Text(given), Text(at)]) => {
            Ok(given.split(at.as_str()).map(Value::from).collect())
        }
        ("truncate", [Text(given), most]) => match size(most) {
            Some(most) => text(given.chars().take(most).collect()),
            None => wants("a text and a length"),
        },
        ("pad", [Text(given), before, after]) => match (size(before), size(after)) {
            _ if given.is_empty() => text(String::new()),
            (Some(before), Some(after)) => {
                let blanks = |count: usize| " ".repeat(count.min(WIDTH_MAX));
                text(format!("{}{given}{}", blanks(before), blanks(after)))
            }
            _ => wants("a text and two lengths"),
        },
        _ => wants("other arguments"),
    }
}

fn chosen(args: &[Value], this: impl Fn(&Value) -> bool) -> Value {
    let found = args.iter().find(|value| this(value)).or(args.last());
    found.cloned().unwrap_or_default()
}

fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(_), Value::Number(_)) => order(one, other) == Some(Ordering::Equal),
        _ => one == other,
    }
}

fn order(one: &Value, other: &Value) -> Option<Ordering> {
    match (one, other) {
        (Value::String(one), Value::String(other)) => Some(one.cmp(other)),
        (Value::Number(one), Value::Number(other)) => match (one.as_i64(), other.as_i64()) {
            (Some(one), Some(other)) => Some(one.cmp(&other)),
            _ => one.as_f64()?.partial_cmp(&other.as_f64()?),
        },
        _ => None,
    }
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|size| usize::try_from(size).ok())
}

fn index(of: &Value, at: &Value) -> Result<Value, Reason> {
    let found = match (of, at) {
        (Value::Array(values), at) => {
            let found = size(at).and_then(|at| values.get(at));
            return found
                .cloned()
                .ok_or_else(|| format!("index: there is no {}", shown(at)));
        }
        (Value::Object(fields), Value::String(name)) => fields.get(name),
        (Value::Null, _) => None,
        _ => return Err(format!("index: {} has no places", shown(of))),
    };
    Ok(found.cloned().unwrap_or_default())
}

fn slice(of: &Value, bounds: &[Value]) -> Result<Value, Reason> {
    let outside = || "slice: bounds are outside".to_owned();
    let (from, to) = match bounds {
        [] => (Some(0), None),
        [from] => (size(from), None),
        [from, to] => (size(from), Some(size(to).ok_or_else(outside)?)),
        _ => return Err("slice wants two bounds at most".to_owned()),
    };
    let from = from.ok_or_else(outside)?;
    match of {
        Value::String(text) => {
            let part = text.get(from..to.unwrap_or(text.len()));
            part.map(Value::from).ok_or_else(outside)
        }
        Value::Array(values) => {
            let part = values.get(from..to.unwrap_or(values.len()));
            part.map(|part| part.iter().cloned().collect())
                .ok_or_else(outside)
        }
        _ => Err("slice wants a text or a list".to_owned()),
    }
}

fn title(text: &str) -> String {
    let mut start = true;
    let each = |c: char| {
        let upper = std::mem::replace(&mut start, c.is_whitespace()) && c.is_alphabetic();
        match upper {
            true => c.to_uppercase().collect::<String>(),
            false => c.to_string(),
        }
    };
    text.chars().map(each).collect()
}

/// `%s`, `%d`, `%v`, `%q`, `%t`, `%%`, with a width.
fn printf(format: &str, args: &[Value]) -> Result<String, Reason> {
    let mut args = args.iter();
    let mut text = String::new();
    let mut rest = format;
    while let Some((before, after)) = rest.split_once('%') {
        text.push_str(before);
        let left = after.starts_with('-');
        let after = after.strip_prefix('-').unwrap_or(after);
        let digits = after
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(after.len());
        let (width, after) = after.split_at(digits);
        let width = width.parse().unwrap_or(0_usize).min(WIDTH_MAX);
        let mut chars = after.chars();
        let verb = chars.next().ok_or("printf: % at the end")?;
        rest = chars.as_str();
        if verb == '%' {
            text.push('%');
            continue;
        }
        let value = args
            .next()
            .ok_or_else(|| format!("printf: %{verb} without a value"))?;
        let filled = match (verb, value) {
            ('s' | 'v', value) => shown(value),
            ('d', Value::Number(_)) | ('t', Value::Bool(_)) => shown(value),
            ('q', Value::String(_)) => value.to_string(),
            _ => return Err(format!("printf: %{verb} is not for {}", shown(value))),
        };
        match left {
            true => text.push_str(&format!("{filled:<width$}")),
            false => text.push_str(&format!("{filled:>width$}")),
        }
    }
    text.push_str(rest);
    Ok(text)
}
