//! `kombi load`, `kombi save`, `kombi import`: images as files.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use chrono::{SecondsFormat, Utc};
use image::{Digest, ImageConfig, Import, Name};

use super::pull::parsed;
use super::{EXIT_FAILED, failed, store};
use crate::complaint::Complaint;
use crate::preparation::Bar;

/// Load images from an archive that docker save, podman save or kombi save wrote.
#[derive(Debug, clap::Args)]
pub(crate) struct LoadArgs {
    /// The archive, compressed or not [default: standard input].
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,

    /// Show no progress.
    #[arg(short, long)]
    quiet: bool,
}

/// Loads them.
pub(crate) fn load(args: &LoadArgs) -> Result<u8, Complaint> {
    let store = store()?;
    let mut bar = Bar::new(args.quiet);
    let loaded = match &args.input {
        Some(file) => store.load(file, &mut bar),
        None => {
            let stdin = std::io::stdin();
            if stdin.is_terminal() {
                let complaint = Complaint::new(
                    "standard input is a terminal",
                    "give an archive with --input, or by a pipe",
                );
                return Err(complaint.with_exit_code(EXIT_FAILED));
            }
            store.load_stream(&mut stdin.lock(), &mut bar)
        }
    };
    drop(bar);
    for entry in loaded.map_err(|error| failed(&error))? {
        match &entry.name {
            Some(name) => println!("Loaded image: {}", name.familiar()),
            None => {
                let id = store.id(&entry.target).map_err(|error| failed(&error))?;
                println!("Loaded image ID: {id}");
            }
        }
    }
    Ok(0)
}

const SAVE_AFTER_HELP: &str = "\
The archive is an OCI image layout with docker's manifest.json: docker load, podman load, skopeo and
kombi load take it.

Examples:
  kombi save -o images.tar busybox debian
  kombi save busybox | gzip > busybox.tar.gz";

/// Save images to an archive.
#[derive(Debug, clap::Args)]
#[command(after_help = SAVE_AFTER_HELP)]
pub(crate) struct SaveArgs {
    /// The archive [default: standard output].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
}

/// Saves them. A file is there only when it is whole.
pub(crate) fn save(args: &SaveArgs) -> Result<u8, Complaint> {
    let store = store()?;
    let mut images: BTreeMap<Digest, Vec<Name>> = BTreeMap::new();
    for image in &args.images {
        let found = store.find(image).map_err(|error| failed(&error))?;
        let names = images.entry(found.entry.target).or_default();
        // What was given by its identifier is saved without names, as docker does it.
        if let Some(name) = found.entry.name.filter(|_| found.by_name)
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    match &args.output {
        Some(path) => save_to(path, |to| store.save(&images, to, path)),
        None => {
            let stdout = std::io::stdout();
            if stdout.is_terminal() {
                let complaint = Complaint::new(
                    "standard output is a terminal",
                    "name a file with --output, or send it into a pipe",
                );
                return Err(complaint.with_exit_code(EXIT_FAILED));
            }
            let path = Path::new("standard output");
            let saved = store.save(&images, &mut BufWriter::new(stdout.lock()), path);
            saved.map_err(|error| failed(&error))
        }
    }?;
    Ok(0)
}

fn save_to(
    path: &Path,
    save: impl FnOnce(&mut dyn Write) -> Result<(), image::ImageError>,
) -> Result<(), Complaint> {
    let io = |error: std::io::Error| {
        let complaint = Complaint::caused(&error, Some("check the path and its permissions"));
        complaint
            .about(format!("failed to write {path:?}"))
            .with_exit_code(EXIT_FAILED)
    };
    // A FIFO or a device is written in place.
    if path.exists() && !path.is_file() {
        let mut file = BufWriter::new(File::create(path).map_err(io)?);
        return save(&mut file).map_err(|error| failed(&error));
    }
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".kombi-save-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder)
        .map_err(io)?;
    save(&mut BufWriter::new(&mut file)).map_err(|error| failed(&error))?;
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|error| io(error.error))?;
    Ok(())
}

const IMPORT_AFTER_HELP: &str = "\
Changes are CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR, as a Dockerfile has them.

Examples:
  kombi import root.tar.zst debian:mine
  kombi import -c 'CMD [\"/bin/bash\"]' -c 'ENV LANG=C.UTF-8' root.tar debian:mine
  tar -C root -c . | kombi import - mine";

/// Make an image of a root file system, given as a tar file.
#[derive(Debug, clap::Args)]
#[command(after_help = IMPORT_AFTER_HELP)]
pub(crate) struct ImportArgs {
    /// Set how the image is run, by an instruction of a Dockerfile; may be given several times.
    #[arg(short, long, value_name = "INSTRUCTION")]
    change: Vec<String>,

    /// A message for the image's history.
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,

    /// Show no progress.
    #[arg(short, long)]
    quiet: bool,

    /// The tar file, compressed or not; - is standard input.
    #[arg(value_name = "FILE|-")]
    file: PathBuf,

    /// What the image is to be called.
    #[arg(value_name = "NAME[:TAG]")]
    name: Option<String>,
}

/// Imports it.
pub(crate) fn import(args: ImportArgs) -> Result<u8, Complaint> {
    let name = args.name.as_deref().map(parsed).transpose()?;
    let mut config = ImageConfig::default();
    for change in &args.change {
        config.change(change).map_err(|error| failed(&error))?;
    }
    let store = store()?;
    let import = Import {
        name,
        config,
        message: args.message,
        created: Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true),
    };
    let mut bar = Bar::new(args.quiet);
    let imported = match args.file.as_os_str() == "-" {
        true => store.import(&mut std::io::stdin().lock(), import, &mut bar),
        false => {
            let mut file = File::open(&args.file).map_err(|error| {
                let complaint =
                    Complaint::caused(&error, Some("check the path and its permissions"));
                complaint
                    .about(format!("failed to open {:?}", args.file))
                    .with_exit_code(EXIT_FAILED)
            })?;
            store.import(&mut file, import, &mut bar)
        }
    };
    drop(bar);
    let entry = imported.map_err(|error| failed(&error))?;
    let id = store.id(&entry.target).map_err(|error| failed(&error))?;
    println!("{id}");
    Ok(0)
}
