//! The metadata of `/mmds`, which host and guest share.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use api::{Answer, Refusal};
use blueprint::{MmdsConfigDraft, MmdsVersion};
use mmds::{Metadata, StoreError, Version};
use serde_json::{Value, json};

use crate::args::Args;
use crate::failure::Failure;
use crate::frontend::lock;

/// Makes the store, with what `--metadata` names in it.
pub(crate) fn make(args: &Args) -> Result<Arc<Mutex<Metadata>>, Failure> {
    let bytes_max = args
        .mmds_size_limit
        .unwrap_or(args.http_api_max_payload_size);
    let mut metadata =
        Metadata::new(&args.id, bytes_max, Instant::now()).map_err(|source| Failure::Host {
            doing: "get random bytes",
            source,
        })?;
    if let Some(path) = &args.metadata {
        read(&mut metadata, path).map_err(|why| Failure::Metadata {
            path: path.clone(),
            why,
        })?;
    }
    Ok(Arc::new(Mutex::new(metadata)))
}

fn read(metadata: &mut Metadata, path: &Path) -> Result<(), String> {
    let text = std::fs::read(path).map_err(|error| error.to_string())?;
    let value = blueprint::from_json(&text).map_err(|error| error.to_string())?;
    metadata.store.put(value).map_err(|error| error.to_string())
}

/// Takes over how guests are to ask.
pub(crate) fn configure(metadata: &Mutex<Metadata>, asked: &MmdsConfigDraft) {
    let mut metadata = lock(metadata);
    metadata.version = match asked.version {
        MmdsVersion::V1 => Version::V1,
        MmdsVersion::V2 => Version::V2,
    };
    metadata.imds_compat = asked.imds_compat;
}

pub(super) fn get(metadata: &Mutex<Metadata>) -> Answer {
    Answer::Body(match lock(metadata).store.value() {
        Value::Null => json!({}),
        value => value.clone(),
    })
}

pub(super) fn put(metadata: &Mutex<Metadata>, value: Value) -> Result<Answer, Refusal> {
    done(lock(metadata).store.put(value))
}

pub(super) fn patch(metadata: &Mutex<Metadata>, value: Value) -> Result<Answer, Refusal> {
    done(lock(metadata).store.patch(value))
}

fn done(result: Result<(), StoreError>) -> Result<Answer, Refusal> {
    match result {
        Ok(()) => Ok(Answer::Done),
        Err(error @ StoreError::TooLarge { .. }) => Err(Refusal::TooLarge(error.to_string())),
        Err(error) => Err(Refusal::BadRequest(error.to_string())),
    }
}
