//! Where the files are that Kombi brings along: the guest's kernel, its initial RAM disk, and the monitor's program.
//!
//! Invariant: every place that was tried is named when nothing is found. Left to others: whether the files are any good.

use std::path::{Path, PathBuf};

use crate::Error;

const KERNEL: &str = "vmlinux";
const INITRAMFS: &str = "initramfs.cpio";
const VMM: &str = "kombi-vmm";

/// How to look; the environment read once, so that tests need not change it.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// A kernel that the user chose.
    pub kernel: Option<PathBuf>,
    /// `KOMBI_ASSETS`: a directory with kernel and initial RAM disk.
    pub assets: Option<PathBuf>,
    /// `KOMBI_VMM`: the monitor's program.
    pub vmm: Option<PathBuf>,
    /// The directory of the running program.
    pub exe_dir: Option<PathBuf>,
    /// `PATH`.
    pub path: Vec<PathBuf>,
}

impl Search {
    /// Takes what the environment says.
    #[must_use]
    pub fn from_env() -> Self {
        let var = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Self {
            kernel: None,
            assets: var("KOMBI_ASSETS").map(PathBuf::from),
            vmm: var("KOMBI_VMM").map(PathBuf::from),
            exe_dir: std::env::current_exe()
                .ok()
                .and_then(|exe| Some(exe.parent()?.to_path_buf())),
            path: var("PATH")
                .map(|path| std::env::split_paths(&path).collect())
                .unwrap_or_default(),
        }
    }

    /// The guest's kernel: the user's choice, else `vmlinux` among the assets.
    ///
    /// # Errors
    /// [`Error::AssetMissing`].
    pub fn kernel(&self) -> Result<PathBuf, Error> {
        match &self.kernel {
            Some(chosen) => first_file(
                "guest kernel",
                vec![chosen.clone()],
                "give the path of a kernel to --kernel",
            ),
            None => first_file(
                "guest kernel",
                self.asset_places(KERNEL),
                "build it with make build, or give --kernel PATH or KOMBI_ASSETS=DIR",
            ),
        }
    }

    /// The initial RAM disk with the guest's init: `initramfs.cpio` among the assets.
    ///
    /// # Errors
    /// [`Error::AssetMissing`].
    pub fn initramfs(&self) -> Result<PathBuf, Error> {
        first_file(
            "guest init",
            self.asset_places(INITRAMFS),
            "build it with make build, or set KOMBI_ASSETS=DIR",
        )
    }

    /// The monitor's program: `KOMBI_VMM`, else `kombi-vmm` next to the running program, else in `PATH`.
    ///
    /// # Errors
    /// [`Error::AssetMissing`].
    pub fn vmm(&self) -> Result<PathBuf, Error> {
        let places = match &self.vmm {
            Some(chosen) => vec![chosen.clone()],
            None => {
                let dirs = self.exe_dir.iter().chain(&self.path);
                let mut places: Vec<PathBuf> = dirs.map(|dir| dir.join(VMM)).collect();
                places.dedup();
                places
            }
        };
        first_file(
            "monitor (kombi-vmm)",
            places,
            "build it with make build, or set KOMBI_VMM=PATH",
        )
    }

    fn asset_places(&self, name: &str) -> Vec<PathBuf> {
        if let Some(dir) = &self.assets {
            return vec![dir.join(name)];
        }
        let mut dirs = Vec::new();
        if let Some(prefix) = self.exe_dir.as_deref().and_then(Path::parent) {
            dirs.push(prefix.join("guest"));
            dirs.push(prefix.join("lib/kombi"));
        }
        dirs.push(PathBuf::from("/usr/lib/kombi"));
        dirs.iter().map(|dir| dir.join(name)).collect()
    }
}

fn first_file(
    what: &'static str,
    places: Vec<PathBuf>,
    way_out: &'static str,
) -> Result<PathBuf, Error> {
    // PATH can be long; the reader needs the first few.
    const SHOWN_MAX: usize = 3;
    if let Some(found) = places.iter().find(|place| place.is_file()) {
        return Ok(found.clone());
    }
    let mut tried: Vec<String> = places
        .iter()
        .take(SHOWN_MAX)
        .map(|place| place.display().to_string())
        .collect();
    if places.len() > SHOWN_MAX {
        tried.push("…".to_owned());
    }
    Err(Error::AssetMissing {
        what,
        tried: tried.join(", "),
        way_out,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_built_tree_and_an_installed_one_are_both_found() {
        let temp = tempfile::tempdir().expect("temporary directory");
        for (exe_dir, assets) in [("target/release", "target/guest"), ("bin", "lib/kombi")] {
            let assets = temp.path().join(assets);
            let exe_dir = temp.path().join(exe_dir);
            fs::create_dir_all(&assets).expect("made");
            fs::create_dir_all(&exe_dir).expect("made");
            for file in [
                assets.join("vmlinux"),
                assets.join("initramfs.cpio"),
                exe_dir.join("kombi-vmm"),
            ] {
                fs::write(file, "").expect("written");
            }
            let search = Search {
                exe_dir: Some(exe_dir.clone()),
                ..Search::default()
            };
            assert_eq!(search.kernel().expect("found"), assets.join("vmlinux"));
            assert_eq!(
                search.initramfs().expect("found"),
                assets.join("initramfs.cpio")
            );
            assert_eq!(search.vmm().expect("found"), exe_dir.join("kombi-vmm"));
        }
    }

    #[test]
    fn what_the_user_chose_is_taken_or_missed_but_never_replaced() {
        let temp = tempfile::tempdir().expect("temporary directory");
        fs::create_dir_all(temp.path().join("guest")).expect("made");
        fs::write(temp.path().join("guest/vmlinux"), "").expect("written");
        let search = Search {
            kernel: Some("/nowhere/vmlinux".into()),
            vmm: Some("/nowhere/vmm".into()),
            exe_dir: Some(temp.path().join("bin")),
            ..Search::default()
        };
        for error in [search.kernel(), search.vmm()] {
            let error = error.expect_err("missing");
            assert!(error.to_string().contains("/nowhere/"), "{error}");
        }
    }

    #[test]
    fn the_places_that_were_tried_are_named() {
        let search = Search {
            assets: Some("/nowhere".into()),
            ..Search::default()
        };
        let error = search.initramfs().expect_err("missing");
        assert_eq!(
            error.to_string(),
            "no guest init found: looked for /nowhere/initramfs.cpio"
        );
        assert!(
            error
                .way_out()
                .is_some_and(|out| out.contains("KOMBI_ASSETS"))
        );
    }
}
