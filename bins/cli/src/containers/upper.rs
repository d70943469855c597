//! The file in which a container keeps what it writes: sparse, with an ext4 file system.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::complaint::Complaint;

/// Its name in the container's directory.
pub(crate) const FILE: &str = "upper.ext4";
/// Least bytes: a smaller file system has no room for its journal.
const BYTES_LEAST: u64 = 16 << 20;
/// Where it is when PATH does not have it, as for users of Debian.
const PLACES: [&str; 3] = ["mke2fs", "/usr/sbin/mke2fs", "/sbin/mke2fs"];
const WAY_OUT: &str =
    "install e2fsprogs, or give --rm: what the container writes is in memory then";

/// A size of it.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let bytes = crate::quantity::bytes(text)?;
    if bytes < BYTES_LEAST {
        return Err(format!(
            "{text:?} is too little for a disk; give 16M at least"
        ));
    }
    Ok(bytes / 4096 * 4096)
}

/// Makes it.
pub(crate) fn make(dir: &Path, bytes: u64) -> Result<(), Complaint> {
    let path = dir.join(FILE);
    let made = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .and_then(|file| file.set_len(bytes));
    made.map_err(|error| {
        let way_out = "free some space, or give a smaller --disk";
        Complaint::caused(&error, Some(way_out)).about(format!("failed to make {path:?}"))
    })?;
    for program in PLACES {
        let output = Command::new(program)
            // Tables are zeroed when they are used: a file of 10 GiB takes 4 MiB.
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-E"])
            .arg("lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0")
            .arg(&path)
            .stdin(Stdio::null())
            .output();
        match output {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                let _ = fs::remove_file(&path);
                return Err(Complaint::caused(&error, Some(WAY_OUT)).about("failed to run mke2fs"));
            }
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let _ = fs::remove_file(&path);
                let told = String::from_utf8_lossy(&output.stderr);
                let last = told.trim().lines().last().unwrap_or_default();
                return Err(Complaint::new(format!("mke2fs failed: {last}"), WAY_OUT));
            }
        }
    }
    let _ = fs::remove_file(&path);
    Err(Complaint::new(
        "there is no mke2fs to make a container's disk",
        WAY_OUT,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_room_for_a_file_system() {
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("16777217"), Ok(16 << 20));
        for bad in ["", "1", "15M", "-1", "x"] {
            size(bad).expect_err(bad);
        }
    }
}
