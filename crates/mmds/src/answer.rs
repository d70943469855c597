//! From a guest's request to the response: which status in which case.

use std::time::Instant;

use crate::counters::{Counters, count};
use crate::http::{Bad, Request, Response, Status};
use crate::metadata::{Metadata, Version};
use crate::store::{Form, StoreError};

const TOKEN_PATH: [&str; 3] = ["latest", "api", "token"];
const TOKEN: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const TTL: [&str; 2] = [
    "x-metadata-token-ttl-seconds",
    "x-aws-ec2-metadata-token-ttl-seconds",
];
const FORWARDED: &str = "x-forwarded-for";

/// The response to a request.
pub(crate) fn answer(
    metadata: &Metadata,
    request: &Request<'_>,
    now: Instant,
    counters: &Counters,
) -> Response {
    if request.path().is_empty() {
        return Response::text(Status::BadRequest, "the request names no path");
    }
    match request.method {
        "GET" => get(metadata, request, now, counters),
        "PUT" => put_token(metadata, request, now),
        "PATCH" | "DELETE" => {
            let words = "metadata can be fetched (GET) and tokens be made (PUT) from here, no more";
            let mut response = Response::text(Status::MethodNotAllowed, words);
            response
                .headers
                .push(("Allow".to_owned(), "GET, PUT".to_owned()));
            response
        }
        _ => Response::text(Status::NotImplemented, "there is no such method here"),
    }
}

/// The response to what is no request.
pub(crate) fn refuse(bad: Bad) -> Response {
    let (status, words) = match bad {
        Bad::Syntax => (Status::BadRequest, "this is not HTTP"),
        Bad::Version => (
            Status::NotImplemented,
            "only HTTP/1.0 and HTTP/1.1 are spoken here",
        ),
        Bad::Long => (
            Status::PayloadTooLarge,
            "the request is longer than 2500 bytes or has more than 32 headers",
        ),
        Bad::Body => (
            Status::BadRequest,
            "the length of the request's body cannot be known",
        ),
    };
    Response::text(status, words)
}

fn get(metadata: &Metadata, request: &Request<'_>, now: Instant, counters: &Counters) -> Response {
    let token = request.header(&TOKEN).map(|(_, token)| token);
    let known = token.is_some_and(|token| metadata.tokens.knows(token, now));
    match token {
        None => count(&counters.rx_no_token),
        Some(_) if !known => count(&counters.rx_invalid_token),
        Some(_) => {}
    }
    if metadata.version == Version::V2 && !known {
        let words = match token {
            None => format!("no token: give one in {} or {}", TOKEN[0], TOKEN[1]),
            Some(_) => "the token is wrong or has expired: make a new one".to_owned(),
        };
        return Response::text(Status::Unauthorized, words);
    }
    let asked = accepted(request);
    let form = if metadata.imds_compat {
        Form::Text
    } else {
        asked
    };
    match metadata.store.at(request.path(), form) {
        Ok(body) => Response {
            status: Status::Ok,
            content_type: match asked {
                Form::Json => "application/json",
                Form::Text => "text/plain",
            },
            headers: Vec::new(),
            body,
        },
        Err(StoreError::NotText) => {
            Response::text(Status::NotImplemented, StoreError::NotText.to_string())
        }
        Err(StoreError::NotFound | StoreError::NothingToPatch | StoreError::TooLarge { .. }) => {
            Response::text(
                Status::NotFound,
                format!("there is nothing at {}", request.path()),
            )
        }
    }
}

/// The first of the forms that a client takes; text if it does not say.
fn accepted(request: &Request<'_>) -> Form {
    let types = request.header(&["accept"]).map_or("", |(_, types)| types);
    let known = types.split(',').find_map(|one| {
        let name = one.split(';').next().unwrap_or_default().trim();
        match name.to_ascii_lowercase().as_str() {
            "application/json" => Some(Form::Json),
            "text/plain" | "*/*" => Some(Form::Text),
            _ => None,
        }
    });
    known.unwrap_or(Form::Text)
}

fn put_token(metadata: &Metadata, request: &Request<'_>, now: Instant) -> Response {
    let bad = |words: String| Response::text(Status::BadRequest, words);
    // Who forwards requests for others must not make tokens for them.
    if let Some((name, _)) = request.header(&[FORWARDED]) {
        return bad(format!("tokens are not made for requests with {name}"));
    }
    let path = request.path();
    if !path.split('/').filter(|key| !key.is_empty()).eq(TOKEN_PATH) || path.ends_with('/') {
        return Response::text(
            Status::NotFound,
            format!("tokens are made at /latest/api/token, not at {path}"),
        );
    }
    let Some((name, value)) = request.header(&TTL) else {
        return bad(format!(
            "no time to live: give seconds in {} or {}",
            TTL[0], TTL[1]
        ));
    };
    let Ok(seconds) = value.parse() else {
        return bad(format!("{name} is not a number of seconds"));
    };
    match metadata.tokens.issue(seconds, now) {
        Ok(token) => {
            let mut response = Response::text(Status::Ok, token);
            response
                .headers
                .push((name.to_owned(), seconds.to_string()));
            response
        }
        Err(error) => bad(error.to_string()),
    }
}
