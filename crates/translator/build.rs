//! Puts a hash of everything that shapes the translator's output into the
//! environment of its compilation: its sources, those of `x86`, and the versions
//! of all libraries. Two builds with the same hash translate alike.

use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

fn main() {
    let mut files = Vec::new();
    for root in ["src", "../x86/src"] {
        collect(Path::new(root), &mut files);
    }
    files.extend(["Cargo.toml", "build.rs", "../../Cargo.lock"].map(PathBuf::from));
    files.sort();
    // SipHash with fixed keys: the same for the same bytes in every build.
    let mut hash = DefaultHasher::new();
    for file in &files {
        println!("cargo::rerun-if-changed={}", file.display());
        let bytes = std::fs::read(file).unwrap_or_default();
        hash.write(file.as_os_str().as_encoded_bytes());
        hash.write_usize(bytes.len());
        hash.write(&bytes);
    }
    for folder in ["src", "../x86/src"] {
        println!("cargo::rerun-if-changed={folder}");
    }
    println!("cargo::rustc-env=TRANSLATOR_SOURCES={:016x}", hash.finish());
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
