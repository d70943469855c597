//! `kombi inspect`: of images, and of containers.

use image::{Found, ImageError, Name, Store};
use serde_json::{Value, json};

use super::{EXIT_FAILED, failed, store};
use crate::complaint::Complaint;
use crate::format;

const AFTER_HELP: &str = "\
Examples:
  kombi inspect busybox
  kombi inspect --format '{{json .Config.Env}}' busybox";

/// Show all that is known of containers and images, as JSON.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct InspectArgs {
    /// Show each by a Go template; json shows objects.
    #[arg(short, long, value_name = "TEMPLATE")]
    format: Option<String>,

    /// Look among these only.
    #[arg(long = "type", value_name = "TYPE", value_parser = ["container", "image"])]
    kind: Option<String>,

    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "CONTAINER|IMAGE", required = true)]
    given: Vec<String>,
}

/// Shows them; goes on after one that is not there.
pub(crate) fn inspect(args: &InspectArgs) -> Result<u8, Complaint> {
    let store = store()?;
    let mut code = 0;
    let mut values = Vec::new();
    for given in &args.given {
        match one(&store, given, args.kind.as_deref()) {
            Ok(value) => values.push(value),
            Err(complaint) => {
                complaint.print();
                code = EXIT_FAILED;
            }
        }
    }
    let text = match args.format.as_deref() {
        None => format!("{:#}\n", Value::from(values)),
        Some("json") => format!("{}\n", Value::from(values)),
        Some(template) => {
            let lines = values.iter().map(|value| format::fill(template, value));
            let lines = lines.map(|line| Ok(line? + "\n"));
            let text: Result<String, Complaint> = lines.collect();
            text.map_err(|it| it.with_exit_code(EXIT_FAILED))?
        }
    };
    format::print(&text);
    Ok(code)
}

/// A container of that name comes before an image.
fn one(store: &Store, given: &str, kind: Option<&str>) -> Result<Value, Complaint> {
    if kind != Some("image") {
        match crate::containers::all()?.find(given) {
            Ok(container) => return Ok(crate::containers::inspected(&container)),
            Err(containers::Error::NotHere { .. }) if kind.is_none() => {}
            Err(error) => {
                let complaint = crate::containers::complaint(&error);
                return Err(complaint.with_exit_code(EXIT_FAILED));
            }
        }
    }
    let found = store.find(given);
    let value = found.and_then(|found| value(store, &found));
    value.map_err(|error| failed(&error))
}

fn value(store: &Store, found: &Found) -> Result<Value, ImageError> {
    let target = &found.entry.target;
    let details = store.details(target)?;
    // Not the typed fields alone: all that the image says.
    let said: Value = serde_json::from_slice(&details.config_text).unwrap_or_default();
    let mut digests: Vec<String> = found
        .names
        .iter()
        .map(|name: &Name| format!("{}@{target}", name.familiar_repository()))
        .collect();
    digests.dedup();
    let names: Vec<String> = found.names.iter().map(Name::familiar).collect();
    Ok(json!({
        "Id": details.id.to_string(),
        "RepoTags": names,
        "RepoDigests": digests,
        "Created": said["created"],
        "Author": said["author"].as_str().unwrap_or_default(),
        "Architecture": said["architecture"],
        "Variant": said["variant"].as_str().unwrap_or_default(),
        "Os": said["os"],
        "Size": details.stored_bytes,
        "UnpackedSize": details.unpacked_bytes,
        "Config": said["config"],
        "RootFS": {
            "Type": "layers",
            "Layers": said["rootfs"]["diff_ids"],
        },
        "Descriptor": {
            "mediaType": found.entry.media_type,
            "digest": target.to_string(),
            "size": found.entry.size,
        },
    }))
}
