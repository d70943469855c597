//! `kombi wait`.

use super::{EXIT_FAILED, all, failed};
use crate::complaint::Complaint;

/// Wait until containers end, and print their exit codes.
#[derive(Debug, clap::Args)]
pub(crate) struct WaitArgs {
    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Waits for one after the other.
pub(crate) fn wait(args: &WaitArgs) -> Result<u8, Complaint> {
    let all = all()?;
    let mut code = 0;
    for given in &args.containers {
        let found = all.find(given);
        match found.and_then(|container| container.wait(None)) {
            Ok(exit_code) => println!("{}", exit_code.unwrap_or_default()),
            Err(error) => {
                failed(&error).print();
                code = EXIT_FAILED;
            }
        }
    }
    Ok(code)
}
