//! What shells and `man` know of `kombi`, made of the command line's own definition.
//!
//! Invariant: nothing here repeats an option. Left to others: where a system keeps these files.

use std::io::Write;
use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::Cli;
use crate::complaint::Complaint;

const AFTER_HELP: &str = "\
Examples:
  kombi completion bash > /etc/bash_completion.d/kombi
  kombi completion zsh > \"${fpath[1]}/_kombi\"
  kombi completion fish > ~/.config/fish/completions/kombi.fish";

/// Print the completion script of a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct CompletionArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints it.
pub(crate) fn completion(args: &CompletionArgs) -> Result<u8, Complaint> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "kombi", &mut script);
    // Nobody reads it: so be it.
    let _ = std::io::stdout().lock().write_all(&script);
    Ok(0)
}

const MAN_AFTER_HELP: &str = "\
Examples:
  kombi man /usr/local/share/man/man1";

/// Write the manual pages, one for each verb.
#[derive(Debug, clap::Args)]
#[command(after_help = MAN_AFTER_HELP)]
pub(crate) struct ManArgs {
    /// The folder, which is there.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

/// Writes them.
pub(crate) fn man(args: &ManArgs) -> Result<u8, Complaint> {
    clap_mangen::generate_to(Cli::command(), &args.folder).map_err(|error| {
        Complaint::caused(
            &error,
            Some("give a folder that is there and may be written"),
        )
        .about(format!("failed to write manual pages to {:?}", args.folder))
        .with_exit_code(1)
    })?;
    Ok(0)
}
