//! Style as a test: what ARCHITECTURE.md says of the house must be what the code
//! is. Its block "```house" is read here, line by line:
//!
//! ```text
//! FOLDER   what it is for   -> DEPENDENCY …|none   [U FILE …]
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A source file longer than this probably has a second topic.
const LONG_FILE_LINES: usize = 600;
const UNSAFE_MARKS: [&str; 6] = [
    "unsafe {",
    "unsafe fn",
    "unsafe impl",
    "unsafe extern",
    "unsafe(",
    "allow(unsafe_code)",
];
const FORBIDDEN_NAMES: [&str; 6] = ["util", "utils", "common", "helpers", "misc", "shared"];

/// One line of the house.
#[derive(Debug, Default, PartialEq, Eq)]
struct Room {
    depends_on: BTreeSet<String>,
    unsafe_files: BTreeSet<String>,
}

/// Runs every check, prints what is wrong, and fails if anything is.
pub(crate) fn run(root: &Path) -> Result<()> {
    let page = root.join("ARCHITECTURE.md");
    let text =
        fs::read_to_string(&page).with_context(|| format!("failed to read {}", page.display()))?;
    let house = parse_house(&text)?;
    let mut complaints = Vec::new();
    check_layers(root, &house, &mut complaints)?;
    for (folder, room) in &house {
        check_sources(root, folder, room, &mut complaints)?;
    }
    check_links(root, &mut complaints)?;
    check_fuzz_lock(root, &mut complaints)?;
    check_merges(root, &mut complaints)?;
    if complaints.is_empty() {
        println!("tidy: {} crates as ARCHITECTURE.md says", house.len());
        return Ok(());
    }
    for complaint in &complaints {
        eprintln!("tidy: {complaint}");
    }
    bail!("{} complaints", complaints.len())
}

fn parse_house(text: &str) -> Result<BTreeMap<String, Room>> {
    let block = text
        .split("```house\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .context("ARCHITECTURE.md has no ```house block")?;
    let mut house = BTreeMap::new();
    for line in block.lines().filter(|line| !line.trim().is_empty()) {
        let (left, right) = line
            .split_once("->")
            .with_context(|| format!("ARCHITECTURE.md: no -> in {line:?}"))?;
        let folder = left
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned();
        let (depends, files) = right.split_once(" U ").unwrap_or((right, ""));
        let depends_on = depends
            .split_whitespace()
            .filter(|word| *word != "none")
            .map(str::to_owned)
            .collect();
        let unsafe_files = files.split_whitespace().map(str::to_owned).collect();
        house.insert(
            folder,
            Room {
                depends_on,
                unsafe_files,
            },
        );
    }
    Ok(house)
}

/// The fuzz targets are a workspace of their own, whose lock file must know what our crates
/// depend on.
fn check_fuzz_lock(root: &Path, complaints: &mut Vec<String>) -> Result<()> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--locked", "--format-version", "1"])
        .current_dir(root.join("fuzz"))
        .output()
        .context("failed to run cargo metadata")?;
    if !output.status.success() && String::from_utf8_lossy(&output.stderr).contains("--locked") {
        complaints.push("fuzz/Cargo.lock is stale: run cargo metadata in fuzz/ once".to_owned());
    }
    Ok(())
}

/// Direct dependencies between crates of the house, from cargo's own words.
fn check_layers(
    root: &Path,
    house: &BTreeMap<String, Room>,
    complaints: &mut Vec<String>,
) -> Result<()> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root)
        .output()
        .context("failed to run cargo metadata")?;
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let empty = Vec::new();
    let mut seen = BTreeSet::new();
    for package in metadata["packages"].as_array().unwrap_or(&empty) {
        let manifest = PathBuf::from(package["manifest_path"].as_str().unwrap_or_default());
        let folder = manifest
            .parent()
            .and_then(|folder| folder.strip_prefix(root).ok())
            .map(|folder| folder.display().to_string())
            .unwrap_or_default();
        let depends_on: BTreeSet<String> = package["dependencies"]
            .as_array()
            .unwrap_or(&empty)
            .iter()
            .filter(|dependency| dependency["path"].is_string() && dependency["kind"].is_null())
            .filter_map(|dependency| dependency["name"].as_str().map(str::to_owned))
            .collect();
        match house.get(&folder) {
            None => complaints.push(format!("{folder} is not in ARCHITECTURE.md's house")),
            Some(room) if room.depends_on != depends_on => complaints.push(format!(
                "{folder} depends on {depends_on:?}, ARCHITECTURE.md says {:?}",
                room.depends_on
            )),
            Some(_) => {}
        }
        seen.insert(folder);
    }
    for folder in house.keys().filter(|folder| !seen.contains(*folder)) {
        complaints.push(format!(
            "ARCHITECTURE.md lists {folder}, which is no crate of the workspace"
        ));
    }
    Ok(())
}

fn check_sources(
    root: &Path,
    folder: &str,
    room: &Room,
    complaints: &mut Vec<String>,
) -> Result<()> {
    let crate_root = root.join(folder);
    let mut with_unsafe = BTreeSet::new();
    for path in rust_files(&crate_root)? {
        let text = fs::read_to_string(&path)
            .with_context(|| format!("failed to read {}", path.display()))?;
        let name = path
            .strip_prefix(root)
            .unwrap_or(&path)
            .display()
            .to_string();
        let inside = path
            .strip_prefix(&crate_root)
            .unwrap_or(&path)
            .display()
            .to_string();
        if !text.starts_with("//!") {
            complaints.push(format!("{name} does not open with //! what it is"));
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        if FORBIDDEN_NAMES.contains(&stem.as_ref()) {
            complaints.push(format!("{name}: call it by what it gives"));
        }
        if text
            .lines()
            .map(code_of)
            .any(|line| UNSAFE_MARKS.iter().any(|mark| line.contains(mark)))
        {
            with_unsafe.insert(inside);
        }
        if text
            .lines()
            .map(code_of)
            .any(|line| line.trim_start().starts_with("#[ignore"))
        {
            complaints.push(format!("{name} ignores a test"));
        }
        let lines = text.lines().count();
        if lines > LONG_FILE_LINES {
            println!("tidy: report: {name} has {lines} lines");
        }
    }
    for file in with_unsafe.difference(&room.unsafe_files) {
        complaints.push(format!(
            "{folder}/{file} has unsafe code, ARCHITECTURE.md does not list it"
        ));
    }
    for file in room.unsafe_files.difference(&with_unsafe) {
        complaints.push(format!(
            "ARCHITECTURE.md lists {folder}/{file} as unsafe, it is not"
        ));
    }
    let heads = ["src/lib.rs", "src/main.rs"].map(|head| crate_root.join(head));
    for head in heads
        .iter()
        .filter(|head| head.exists() && room.unsafe_files.is_empty())
    {
        if !fs::read_to_string(head)?.contains("#![forbid(unsafe_code)]") {
            complaints.push(format!("{} lacks #![forbid(unsafe_code)]", head.display()));
        }
    }
    Ok(())
}

/// A line without its comment and without string literals, roughly.
fn code_of(line: &str) -> &str {
    let code = line.split("//").next().unwrap_or(line);
    code.split('"').next().unwrap_or(code)
}

fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(&folder).with_context(|| format!("failed to list {}", folder.display()))?
        {
            let path = entry?.path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Relative links of the Markdown pages lead somewhere.
/// No file holds both sides of a merge that nobody finished.
fn check_merges(root: &Path, complaints: &mut Vec<String>) -> Result<()> {
    let output = Command::new("git")
        .args(["ls-files", "-co", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("failed to run git ls-files")?;
    for file in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(text) = fs::read_to_string(root.join(file)) else {
            continue;
        };
        if let Some(line) = unfinished_merge(&text) {
            complaints.push(format!("{file}:{line} is one side of an unfinished merge"));
        }
    }
    Ok(())
}

/// The line, from 1, at which git put two sides beside each other.
fn unfinished_merge(text: &str) -> Option<usize> {
    let begins = |line: &str| line.starts_with("<<<<<<<") || line.starts_with(">>>>>>>");
    text.lines().position(begins).map(|at| at + 1)
}

fn check_links(root: &Path, complaints: &mut Vec<String>) -> Result<()> {
    let output = Command::new("git")
        .args(["ls-files", "-co", "--exclude-standard", "*.md"])
        .current_dir(root)
        .output()
        .context("failed to run git ls-files")?;
    for page in String::from_utf8_lossy(&output.stdout).lines() {
        let path = root.join(page);
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let file = target.split('#').next().unwrap_or_default();
            let local = !file.is_empty() && !file.contains("://") && !file.starts_with("mailto:");
            if local && !path.parent().unwrap_or(root).join(file).exists() {
                complaints.push(format!("{page} links to {file}, which does not exist"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_house_line_gives_edges_and_unsafe_files() {
        let text = "x\n```house\ncrates/ram  memory -> none U src/map.rs src/b.rs\ncrates/hv the traits -> ram x86\n```\n";
        let house = parse_house(text).unwrap();
        assert_eq!(house["crates/ram"].depends_on, BTreeSet::new());
        assert_eq!(house["crates/ram"].unsafe_files.len(), 2);
        assert!(house["crates/hv"].depends_on.contains("x86"));
        assert!(house["crates/hv"].unsafe_files.is_empty());
    }

    #[test]
    fn both_sides_of_a_merge_are_found() {
        let sides = ["a\n", "<<<<<<", "< HEAD\nb\n", ">>>>>>", "> c\n"].concat();
        assert_eq!(unfinished_merge(&sides), Some(2));
        assert_eq!(unfinished_merge("1 << 2\n<<< x\n=======\n"), None);
    }

    #[test]
    fn marks_in_comments_and_strings_do_not_count() {
        assert!(!code_of("// unsafe { x }").contains("unsafe"));
        assert!(!code_of("let s = \"unsafe {\";").contains("unsafe"));
        assert!(code_of("let y = unsafe { x };").contains("unsafe {"));
    }
}
