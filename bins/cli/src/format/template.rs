//! Go's text templates, as far as `--format` needs them (pkg.go.dev/text/template): fields, variables, pipelines, `if`,
//! `with`, `range`, trimming, comments.
//!
//! Invariant: parsing and filling end, whatever the template is; nesting is bounded. A field that is not there is
//! `<no value>`, as in a map of Go's. Left to others: what functions do (`functions.rs`). Absent: definitions of further
//! templates, `break`, `continue`.

use serde_json::Value;

use super::functions::{self, is_true, shown};

/// Blocks and parentheses inside of each other.
const DEPTH_MAX: usize = 64;

/// A template that was understood.
#[derive(Debug)]
pub(super) struct Template(Vec<Node>);

#[derive(Debug)]
enum Node {
    Text(String),
    Show(Pipeline),
    /// `$name := ...`, or `=`.
    Set(String, Pipeline),
    If(Pipeline, Vec<Node>, Vec<Node>),
    With(Pipeline, Vec<Node>, Vec<Node>),
    Range(Range),
}

#[derive(Debug)]
struct Range {
    /// Of the place, and of what is there.
    variables: (Option<String>, Option<String>),
    over: Pipeline,
    each: Vec<Node>,
    otherwise: Vec<Node>,
}

/// Commands, each with the result of the one before as its last argument.
#[derive(Debug)]
struct Pipeline(Vec<Vec<Operand>>);

#[derive(Debug)]
enum Operand {
    Constant(Value),
    /// A variable, `$` for the whole or `.` for what is looked at, and fields of it.
    Path(String, Vec<String>),
    Function(String),
    Nested(Pipeline, Vec<String>),
}

/// Why there is no text.
pub(super) type Reason = String;

impl Template {
    pub(super) fn parse(text: &str) -> Result<Self, Reason> {
        let mut parser = Parser {
            pieces: pieces(text)?,
            at: 0,
        };
        let (nodes, end) = parser.nodes(0)?;
        match end {
            End::Text => Ok(Template(nodes)),
            End::Closed => Err("{{end}} without a beginning".to_owned()),
            End::Else(_) => Err("{{else}} without {{if}}".to_owned()),
        }
    }

    pub(super) fn fill(&self, value: &Value) -> Result<String, Reason> {
        let mut filling = Filling {
            text: String::new(),
            variables: vec![("$".to_owned(), value.clone())],
        };
        filling.nodes(&self.0, value)?;
        Ok(filling.text)
    }
}

/// Text, or what is between `{{` and `}}`.
#[derive(Debug)]
enum Piece {
    Text(String),
    Action(Vec<Token>),
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    /// `.a.b`, also alone: what stands before it, if anything, ends there.
    Fields(Vec<String>),
    Variable(String),
    Constant(Value),
    Bar,
    Open,
    Close,
    Comma,
    Declare,
    Assign,
    Space,
}

fn pieces(text: &str) -> Result<Vec<Piece>, Reason> {
    let mut pieces = Vec::new();
    let mut rest = text;
    let mut trim_next = false;
    loop {
        let (before, after) = match rest.split_once("{{") {
            Some((before, after)) => (before, Some(after)),
            None => (rest, None),
        };
        let mut shown = if trim_next {
            before.trim_start()
        } else {
            before
        };
        let Some(mut inside) = after else {
            pieces.push(Piece::Text(shown.to_owned()));
            return Ok(pieces);
        };
        if let Some(trimmed) = inside.strip_prefix('-')
            && trimmed.starts_with(char::is_whitespace)
        {
            shown = shown.trim_end();
            inside = trimmed;
        }
        pieces.push(Piece::Text(shown.to_owned()));
        let commented = inside.trim_start().strip_prefix("/*");
        let left = match commented {
            Some(comment) => {
                let (_, left) = comment.split_once("*/").ok_or("unclosed comment")?;
                left
            }
            None => {
                let mut lexer = Lexer { rest: inside };
                pieces.push(Piece::Action(lexer.tokens()?));
                lexer.rest
            }
        };
        let left = left.trim_start();
        (trim_next, rest) = match (left.strip_prefix("}}"), left.strip_prefix("-}}")) {
            (Some(rest), _) => (false, rest),
            (None, Some(rest)) => (true, rest),
            (None, None) => return Err("unclosed {{".to_owned()),
        };
    }
}

struct Lexer<'t> {
    rest: &'t str,
}

impl Lexer<'_> {
    /// All up to the end of the action, which stays.
    fn tokens(&mut self) -> Result<Vec<Token>, Reason> {
        let mut tokens = Vec::new();
        loop {
            let trimmed = self.rest.trim_start();
            let spaced = trimmed.len() < self.rest.len();
            if trimmed.starts_with("}}") || (spaced && trimmed.starts_with("-}}")) {
                return Ok(tokens);
            }
            if spaced && !tokens.is_empty() {
                tokens.push(Token::Space);
            }
            self.rest = trimmed;
            tokens.push(self.token()?);
        }
    }

    fn token(&mut self) -> Result<Token, Reason> {
        const SIGNS: [(&str, Token); 6] = [
            (":=", Token::Declare),
            ("=", Token::Assign),
            ("|", Token::Bar),
            ("(", Token::Open),
            (")", Token::Close),
            (",", Token::Comma),
        ];
        for (sign, token) in SIGNS {
            if let Some(rest) = self.rest.strip_prefix(sign) {
                self.rest = rest;
                return Ok(token);
            }
        }
        let first = self.rest.chars().next().ok_or("unclosed {{")?;
        match first {
            '"' => self.quoted(),
            '`' => {
                let inside = self.rest.get(1..).unwrap_or_default();
                let (text, rest) = inside.split_once('`').ok_or("unclosed `")?;
                self.rest = rest;
                Ok(Token::Constant(Value::from(text)))
            }
            '.' => self.fields(),
            '$' => {
                self.rest = self.rest.get(1..).unwrap_or_default();
                let name = self.word();
                Ok(Token::Variable(format!("${name}")))
            }
            '+' | '-' | '0'..='9' => self.number(),
            letter if is_letter(letter) => Ok(match self.word() {
                "true" => Token::Constant(Value::Bool(true)),
                "false" => Token::Constant(Value::Bool(false)),
                "nil" => Token::Constant(Value::Null),
                word => Token::Word(word.to_owned()),
            }),
            other => Err(format!("unexpected {other:?}")),
        }
    }

    fn take(&mut self, while_it: impl Fn(char) -> bool) -> &str {
        let end = self.rest.find(|c| !while_it(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn word(&mut self) -> &str {
        self.take(|c| is_letter(c) || c.is_numeric())
    }

    fn fields(&mut self) -> Result<Token, Reason> {
        let mut fields = Vec::new();
        while let Some(rest) = self.rest.strip_prefix('.') {
            self.rest = rest;
            let name = self.word().to_owned();
            if name.is_empty() {
                if fields.is_empty() && !self.rest.starts_with('.') {
                    break;
                }
                return Err("a field without a name".to_owned());
            }
            fields.push(name);
        }
        Ok(Token::Fields(fields))
    }

    fn quoted(&mut self) -> Result<Token, Reason> {
        let mut escaped = false;
        let mut end = None;
        for (index, c) in self.rest.char_indices().skip(1) {
            match c {
                '"' if !escaped => {
                    end = Some(index + 1);
                    break;
                }
                _ => escaped = c == '\\' && !escaped,
            }
        }
        let (text, rest) = end
            .and_then(|end| self.rest.split_at_checked(end))
            .ok_or("unclosed \"")?;
        self.rest = rest;
        // Go's and JSON's escapes are the same where they are used.
        let text = text.replace('\t', "\\t").replace('\n', "\\n");
        let parsed: Result<String, _> = serde_json::from_str(&text);
        let text = parsed.map_err(|_| format!("{text} has an unknown escape"))?;
        Ok(Token::Constant(Value::from(text)))
    }

    fn number(&mut self) -> Result<Token, Reason> {
        let text = self.take(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-' | '_'));
        let plain = text.strip_prefix('+').unwrap_or(text);
        let number = match (plain.parse::<i64>(), plain.parse::<f64>()) {
            (Ok(number), _) => Value::from(number),
            (_, Ok(number)) if number.is_finite() => Value::from(number),
            _ => return Err(format!("{text:?} is no number")),
        };
        Ok(Token::Constant(number))
    }
}

fn is_letter(c: char) -> bool {
    c.is_alphabetic() || c == '_'
}

/// What ended a list of nodes.
enum End {
    Text,
    Closed,
    /// With what follows the word.
    Else(Vec<Token>),
}

struct Parser {
    pieces: Vec<Piece>,
    at: usize,
}

impl Parser {
    fn nodes(&mut self, depth: usize) -> Result<(Vec<Node>, End), Reason> {
        if depth > DEPTH_MAX {
            return Err(format!("blocks are nested more than {DEPTH_MAX} deep"));
        }
        let mut nodes = Vec::new();
        while let Some(piece) = self.pieces.get_mut(self.at) {
            self.at += 1;
            let tokens = match piece {
                Piece::Text(text) => {
                    nodes.push(Node::Text(std::mem::take(text)));
                    continue;
                }
                Piece::Action(tokens) => std::mem::take(tokens),
            };
            let word = match tokens.first() {
                Some(Token::Word(word)) => word.as_str(),
                _ => "",
            };
            let behind = || tokens.iter().skip(1).cloned().collect::<Vec<_>>();
            match word {
                "end" => return Ok((nodes, End::Closed)),
                "else" => return Ok((nodes, End::Else(behind()))),
                "if" | "with" => nodes.push(self.choice(word, &behind(), depth)?),
                "range" => nodes.push(self.range(&behind(), depth)?),
                "define" | "template" | "block" | "break" | "continue" => {
                    return Err(format!("{word} is not known here"));
                }
                _ => nodes.push(statement(&tokens)?),
            }
        }
        Ok((nodes, End::Text))
    }

    /// `if` or `with`, behind the word.
    fn choice(&mut self, word: &str, tokens: &[Token], depth: usize) -> Result<Node, Reason> {
        let pipeline = pipeline(tokens)?;
        let (then, otherwise) = self.branches(depth)?;
        Ok(match word {
            "with" => Node::With(pipeline, then, otherwise),
            _ => Node::If(pipeline, then, otherwise),
        })
    }

    fn branches(&mut self, depth: usize) -> Result<(Vec<Node>, Vec<Node>), Reason> {
        let (then, end) = self.nodes(depth + 1)?;
        let otherwise = match end {
            End::Text => return Err("a block without {{end}}".to_owned()),
            End::Closed => Vec::new(),
            End::Else(tokens) => self.otherwise(&tokens, depth + 1)?,
        };
        Ok((then, otherwise))
    }

    fn otherwise(&mut self, tokens: &[Token], depth: usize) -> Result<Vec<Node>, Reason> {
        match tokens {
            [] => match self.nodes(depth)? {
                (nodes, End::Closed) => Ok(nodes),
                (_, End::Text) => Err("a block without {{end}}".to_owned()),
                (_, End::Else(_)) => Err("a second {{else}}".to_owned()),
            },
            [Token::Space, Token::Word(word), rest @ ..] if word == "if" || word == "with" => {
                Ok(vec![self.choice(word, rest, depth)?])
            }
            _ => Err("{{else}} with something behind it".to_owned()),
        }
    }

    fn range(&mut self, tokens: &[Token], depth: usize) -> Result<Node, Reason> {
        let declared = tokens.iter().position(|token| *token == Token::Declare);
        let (variables, over) = match declared {
            None => ((None, None), tokens),
            Some(at) => {
                let (names, over) = tokens.split_at(at);
                let names: Vec<&Token> = names
                    .iter()
                    .filter(|token| **token != Token::Space)
                    .collect();
                let variables = match names.as_slice() {
                    [Token::Variable(each)] => (None, Some(each.clone())),
                    [Token::Variable(place), Token::Comma, Token::Variable(each)] => {
                        (Some(place.clone()), Some(each.clone()))
                    }
                    _ => return Err("range declares one or two variables".to_owned()),
                };
                (variables, over.get(1..).unwrap_or_default())
            }
        };
        let over = pipeline(over)?;
        let (each, otherwise) = self.branches(depth)?;
        Ok(Node::Range(Range {
            variables,
            over,
            each,
            otherwise,
        }))
    }
}

/// An action that is no block.
fn statement(tokens: &[Token]) -> Result<Node, Reason> {
    let meant: Vec<&Token> = tokens
        .iter()
        .filter(|token| **token != Token::Space)
        .take(2)
        .collect();
    if let [Token::Variable(name), Token::Declare | Token::Assign] = meant.as_slice() {
        let at = tokens
            .iter()
            .position(|token| matches!(token, Token::Declare | Token::Assign));
        let value = tokens.get(at.unwrap_or(0).saturating_add(1)..);
        return Ok(Node::Set(
            name.clone(),
            pipeline(value.unwrap_or_default())?,
        ));
    }
    Ok(Node::Show(pipeline(tokens)?))
}

fn pipeline(tokens: &[Token]) -> Result<Pipeline, Reason> {
    let mut rest = tokens;
    let pipeline = commands(&mut rest, 0)?;
    match rest {
        [] => Ok(pipeline),
        _ => Err("unexpected )".to_owned()),
    }
}

/// Up to the end or a closing parenthesis, which stays.
fn commands(rest: &mut &[Token], depth: usize) -> Result<Pipeline, Reason> {
    if depth > DEPTH_MAX {
        return Err(format!("parentheses are nested more than {DEPTH_MAX} deep"));
    }
    let mut commands = Vec::new();
    loop {
        let mut operands = Vec::new();
        let mut spaced = true;
        while let Some((token, behind)) = rest.split_first() {
            if matches!(token, Token::Bar | Token::Close) {
                break;
            }
            *rest = behind;
            if *token == Token::Space {
                spaced = true;
                continue;
            }
            // `$x.a` and `(...).a` are one operand each.
            let joined = match (spaced, token, operands.last_mut()) {
                (
                    false,
                    Token::Fields(fields),
                    Some(Operand::Path(_, path) | Operand::Nested(_, path)),
                ) => {
                    path.extend(fields.iter().cloned());
                    true
                }
                (false, _, Some(_)) => {
                    return Err("two values without a space between them".to_owned());
                }
                _ => false,
            };
            if !joined {
                operands.push(operand(token, rest, depth)?);
            }
            spaced = false;
        }
        if operands.is_empty() {
            return Err("a value is missing".to_owned());
        }
        // Only a function takes arguments.
        let takes = matches!(operands.first(), Some(Operand::Function(_)));
        if !takes && operands.len() > 1 {
            return Err("arguments for what is no function".to_owned());
        }
        if !takes && !commands.is_empty() {
            return Err("| into what is no function".to_owned());
        }
        commands.push(operands);
        match rest.split_first() {
            Some((Token::Bar, behind)) => *rest = behind,
            _ => return Ok(Pipeline(commands)),
        }
    }
}

fn operand(token: &Token, rest: &mut &[Token], depth: usize) -> Result<Operand, Reason> {
    Ok(match token {
        Token::Constant(value) => Operand::Constant(value.clone()),
        Token::Fields(fields) => Operand::Path(".".to_owned(), fields.clone()),
        Token::Variable(name) => Operand::Path(name.clone(), Vec::new()),
        Token::Word(word) if functions::is_known(word) => Operand::Function(word.clone()),
        Token::Word(word) => return Err(format!("function {word:?} is not known")),
        Token::Open => {
            let nested = commands(rest, depth + 1)?;
            match rest.split_first() {
                Some((Token::Close, behind)) => *rest = behind,
                _ => return Err("unclosed (".to_owned()),
            }
            Operand::Nested(nested, Vec::new())
        }
        Token::Comma | Token::Declare | Token::Assign => {
            return Err("unexpected , or =".to_owned());
        }
        // The caller has taken these.
        Token::Bar | Token::Close | Token::Space => return Err("a value is missing".to_owned()),
    })
}

struct Filling {
    text: String,
    variables: Vec<(String, Value)>,
}

impl Filling {
    fn nodes(&mut self, nodes: &[Node], dot: &Value) -> Result<(), Reason> {
        let known = self.variables.len();
        for node in nodes {
            self.node(node, dot)?;
        }
        self.variables.truncate(known);
        Ok(())
    }

    fn node(&mut self, node: &Node, dot: &Value) -> Result<(), Reason> {
        match node {
            Node::Text(text) => self.text.push_str(text),
            Node::Show(pipeline) => {
                let value = self.pipeline(pipeline, dot)?;
                self.text.push_str(&shown(&value));
            }
            Node::Set(name, pipeline) => {
                let value = self.pipeline(pipeline, dot)?;
                let known = self
                    .variables
                    .iter_mut()
                    .rev()
                    .find(|(other, _)| other == name);
                match known {
                    Some((_, old)) if name != "$" => *old = value,
                    _ => self.variables.push((name.clone(), value)),
                }
            }
            Node::If(pipeline, then, otherwise) => {
                let value = self.pipeline(pipeline, dot)?;
                let chosen = if is_true(&value) { then } else { otherwise };
                self.nodes(chosen, dot)?;
            }
            Node::With(pipeline, then, otherwise) => {
                let value = self.pipeline(pipeline, dot)?;
                match is_true(&value) {
                    true => self.nodes(then, &value)?,
                    false => self.nodes(otherwise, dot)?,
                }
            }
            Node::Range(range) => self.range(range, dot)?,
        }
        Ok(())
    }

    fn range(&mut self, range: &Range, dot: &Value) -> Result<(), Reason> {
        let over = self.pipeline(&range.over, dot)?;
        let items: Vec<(Value, Value)> = match over {
            Value::Array(values) => (0_u64..).map(Value::from).zip(values).collect(),
            Value::Object(fields) => {
                let named = fields.into_iter();
                named
                    .map(|(name, value)| (Value::from(name), value))
                    .collect()
            }
            Value::Null => Vec::new(),
            other => return Err(format!("range over {}, which is no list", shown(&other))),
        };
        if items.is_empty() {
            return self.nodes(&range.otherwise, dot);
        }
        let known = self.variables.len();
        for (place, value) in items {
            let (first, second) = &range.variables;
            for (name, value) in [(first, &place), (second, &value)] {
                if let Some(name) = name {
                    self.variables.push((name.clone(), value.clone()));
                }
            }
            self.nodes(&range.each, &value)?;
            self.variables.truncate(known);
        }
        Ok(())
    }

    fn pipeline(&self, pipeline: &Pipeline, dot: &Value) -> Result<Value, Reason> {
        let mut last = None;
        for command in &pipeline.0 {
            let mut operands = command.iter();
            let value = match operands.next() {
                Some(Operand::Function(name)) => {
                    let arguments = operands.map(|operand| self.operand(operand, dot));
                    let mut arguments = arguments.collect::<Result<Vec<_>, _>>()?;
                    arguments.extend(last.take());
                    functions::call(name, &arguments)?
                }
                Some(operand) => self.operand(operand, dot)?,
                None => Value::Null,
            };
            last = Some(value);
        }
        Ok(last.unwrap_or_default())
    }

    fn operand(&self, operand: &Operand, dot: &Value) -> Result<Value, Reason> {
        match operand {
            Operand::Constant(value) => Ok(value.clone()),
            Operand::Path(of, fields) if of == "." => field(dot, fields),
            Operand::Path(of, fields) => {
                let known = self.variables.iter().rev().find(|(name, _)| name == of);
                let (_, value) = known.ok_or_else(|| format!("variable {of} is not known"))?;
                field(value, fields)
            }
            Operand::Function(name) => functions::call(name, &[]),
            Operand::Nested(pipeline, fields) => field(&self.pipeline(pipeline, dot)?, fields),
        }
    }
}

fn field(of: &Value, fields: &[String]) -> Result<Value, Reason> {
    let mut at = of;
    for name in fields {
        at = match at {
            Value::Object(of) => of.get(name).unwrap_or(&Value::Null),
            Value::Null => &Value::Null,
            other => return Err(format!("{} has no field {name}", shown(other))),
        };
    }
    Ok(at.clone())
}
