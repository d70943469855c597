//! `kombi inspect`.

use image::{Found, ImageError, Name, Store};
use serde_json::{Value, json};

use super::{EXIT_FAILED, failed, store};
use crate::complaint::Complaint;
use crate::format;

const AFTER_HELP: &str = "\
Examples:
  kombi inspect busybox
  kombi inspect --format '{{json .Config.Env}}' busybox";

/// Show all that is known of images, as JSON.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct InspectArgs {
    /// Show each by a Go template; json shows objects.
    #[arg(short, long, value_name = "TEMPLATE")]
    format: Option<String>,

    /// Accepted where it is image: there is nothing else yet.
    #[arg(long = "type", value_name = "TYPE", value_parser = ["image"])]
    kind: Option<String>,

    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
}

/// Shows them; goes on after one that is not there.
pub(crate) fn inspect(args: &InspectArgs) -> Result<u8, Complaint> {
    let store = store()?;
    let mut code = 0;
    let mut values = Vec::new();
    for image in &args.images {
        match store.find(image).and_then(|found| value(&store, &found)) {
            Ok(value) => values.push(value),
            Err(error) => {
                failed(&error).print();
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
