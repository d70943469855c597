//! An error as the user sees it: one line, `kombi: OBJECT: CAUSE; WAY OUT`, and an exit code.
//!
//! Invariant: the line has no line breaks and no control characters, whatever an image or a guest said. Left to others:
//! knowing the way out (each error's own crate, as far as it can).

use std::error::Error as StdError;

use clap::error::{ContextKind, ContextValue};
use sandbox::EXIT_KOMBI;
use sandbox::console::printable;

/// What went wrong, ready to be told.
#[derive(Debug)]
pub(crate) struct Complaint {
    chain: Vec<String>,
    way_out: Option<String>,
    exit_code: u8,
    quiet: bool,
}

impl Complaint {
    /// An error without a type of its own.
    pub(crate) fn new(what: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self {
            chain: vec![what.into()],
            way_out: Some(way_out.into()),
            exit_code: EXIT_KOMBI,
            quiet: false,
        }
    }

    /// What another of our processes told the user itself.
    pub(crate) fn told_already(exit_code: u8) -> Self {
        Self {
            chain: Vec::new(),
            way_out: None,
            exit_code,
            quiet: true,
        }
    }

    /// An error with its causes.
    pub(crate) fn caused(error: &dyn StdError, way_out: Option<&str>) -> Self {
        let mut chain = vec![error.to_string()];
        let mut next = error.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            // Some errors repeat their cause in their own text.
            if !chain.last().is_some_and(|last| last.ends_with(&text)) {
                chain.push(text);
            }
            next = cause.source();
        }
        Self {
            chain,
            way_out: way_out.map(str::to_owned),
            exit_code: EXIT_KOMBI,
            quiet: false,
        }
    }

    /// A command line that makes no sense.
    pub(crate) fn usage(error: &clap::Error) -> Self {
        let text = error.render().to_string();
        let first = text.lines().map(str::trim).find(|line| !line.is_empty());
        let mut first = first.unwrap_or("unknown").to_owned();
        // Missing arguments stand on lines of their own.
        if first.ends_with(':') {
            let rest = text
                .lines()
                .skip(1)
                .take_while(|line| !line.trim().is_empty());
            for line in rest {
                first.push(' ');
                first.push_str(line.trim());
            }
        }
        let what = first.strip_prefix("error: ").unwrap_or(&first);
        match error.get(ContextKind::ValidValue) {
            Some(ContextValue::Strings(values)) if !values.is_empty() => {
                Self::new(what, format!("use one of {}", values.join(", ")))
            }
            _ => Self::new(what, "see kombi --help or kombi run --help"),
        }
    }

    /// The object, known only to the caller, in front.
    pub(crate) fn about(mut self, object: impl Into<String>) -> Self {
        self.chain.insert(0, object.into());
        self
    }

    /// Another exit code than 125.
    pub(crate) fn with_exit_code(mut self, exit_code: u8) -> Self {
        self.exit_code = exit_code;
        self
    }

    /// What to exit with.
    pub(crate) fn exit_code(&self) -> u8 {
        self.exit_code
    }

    /// The line.
    pub(crate) fn line(&self) -> String {
        let mut line = format!("kombi: {}", self.chain.join(": "));
        if let Some(way_out) = &self.way_out {
            line.push_str("; ");
            line.push_str(way_out);
        }
        // printable() shortens: give it the parts, not the whole.
        line.split('\n')
            .flat_map(|part| part.split(' '))
            .map(printable)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Tells it, unless it is what the user wanted.
    pub(crate) fn print(&self) {
        if !self.quiet {
            eprintln!("{}", self.line());
        }
    }
}

impl From<sandbox::Error> for Complaint {
    fn from(error: sandbox::Error) -> Self {
        Self {
            exit_code: error.exit_code(),
            quiet: error.is_quiet(),
            ..Self::caused(&error, error.way_out())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_cause_and_way_out_stand_in_one_line() {
        let source = std::io::Error::from_raw_os_error(2);
        let error = sandbox::Error::SpawnVmm {
            path: "/x/kombi-vmm".into(),
            source,
        };
        assert_eq!(
            Complaint::from(error).line(),
            "kombi: failed to start \"/x/kombi-vmm\": No such file or directory (os error 2); see kombi doctor"
        );
    }

    #[test]
    fn nothing_a_guest_says_breaks_the_line_or_reaches_the_terminal() {
        let complaint = Complaint::new("a\nb\x1b[2J", "c");
        assert_eq!(complaint.line(), "kombi: a b\\u{1b}[2J; c");
    }
}
