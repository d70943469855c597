//! Chores of the house: `cargo xtask tidy` and `cargo xtask initramfs`.
//!
//! Left to others: building and testing (the Makefile calls cargo for that).
#![forbid(unsafe_code)]

mod initramfs;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask tidy                    check layers, unsafe modules, file heads, links; report long files
       cargo xtask initramfs INIT OUTPUT   pack the guest's init as an uncompressed newc archive";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["tidy"] => tidy::run(&root()),
        ["initramfs", init, output] => initramfs::pack(Path::new(init), Path::new(output)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository's root: the folder above this crate's.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}
