//! One place that has images: requests, and what answers mean.
//!
//! Invariant: a document is read up to a bound and no further. What may pass by itself (no connection, a stalled
//! transfer, 429, 5xx) is [`Error::Unreachable`]; everything else is final.

use std::time::Duration;

use image::Digest;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError as Failure;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use reqwest::StatusCode;
use reqwest::header::ACCEPT;

use crate::configuration::Place;
use crate::error::Error;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const AGENT: &str = concat!("kombi/", env!("CARGO_PKG_VERSION"));
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";
/// Bytes of an error's text that are shown.
const REASON_MAX: usize = 300;

/// A registry and a repository in it.
pub(crate) struct Remote {
    place: Place,
    pub(crate) client: Client,
    http: reqwest::Client,
    auth: RegistryAuth,
    operation: RegistryOperation,
    scheme: &'static str,
    token: Option<String>,
}

impl Remote {
    /// Finds out how to talk to the place, and gets a token for what is to be done there.
    pub(crate) async fn connect(
        place: &Place,
        auth: RegistryAuth,
        operation: RegistryOperation,
        patience: Duration,
    ) -> Result<Self, Error> {
        let (http, scheme) = reach(place, patience).await?;
        let config = ClientConfig {
            protocol: match scheme {
                "http" => ClientProtocol::Http,
                _ => ClientProtocol::Https,
            },
            accept_invalid_certificates: place.insecure,
            use_monolithic_push: true,
            connect_timeout: Some(CONNECT_TIMEOUT.min(patience)),
            read_timeout: Some(patience),
            user_agent: AGENT,
            ..ClientConfig::default()
        };
        let mut remote = Self {
            client: Client::try_from(config).map_err(|failure| failed(place, "it", failure))?,
            place: place.clone(),
            http,
            auth,
            operation,
            scheme,
            token: None,
        };
        let any = remote.tagged("latest");
        let token = remote.client.auth(&any, &remote.auth, operation).await;
        remote.token = token.map_err(|failure| remote.failed(&remote.place.repository, failure))?;
        Ok(remote)
    }

    /// Its address, for messages.
    pub(crate) fn host(&self) -> &str {
        &self.place.host
    }

    pub(crate) fn tagged(&self, tag: &str) -> Reference {
        let Place {
            host, repository, ..
        } = self.place.clone();
        Reference::with_tag(host, repository, tag.to_owned())
    }

    fn by_digest(&self, digest: &Digest) -> Reference {
        let Place {
            host, repository, ..
        } = self.place.clone();
        Reference::with_digest(host, repository, digest.to_string())
    }

    /// The manifest or index called `version`, a tag or a digest: at most `bytes_max` bytes.
    pub(crate) async fn manifest(&self, version: &str, bytes_max: u64) -> Result<Vec<u8>, Error> {
        let what = format!("{}:{version}", self.place.repository);
        let host = self.tagged("latest").resolve_registry().to_owned();
        let url = format!(
            "{}://{host}/v2/{}/manifests/{version}",
            self.scheme, self.place.repository
        );
        let mut request = self.http.get(url).header(ACCEPT, MANIFESTS);
        request = match (&self.token, &self.auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
            (None, _) => request,
        };
        let lost = |error: reqwest::Error| unreachable(&self.place, &error);
        let mut answer = request.send().await.map_err(lost)?;
        if !answer.status().is_success() {
            return Err(refused(&self.place, &what, answer.status().as_u16(), ""));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(lost)? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > bytes_max {
                return Err(Error::Answer {
                    registry: self.place.host.clone(),
                    reason: format!("its manifest {what} has more than {bytes_max} bytes"),
                });
            }
        }
        Ok(bytes)
    }

    /// The blob's bytes from `offset` on, or all of them where the registry does not know ranges.
    pub(crate) async fn blob(&self, digest: &Digest, offset: u64) -> Result<BlobResponse, Error> {
        let text = digest.to_string();
        let reference = self.by_digest(digest);
        let auth = &self.auth;
        let host = reference.resolve_registry();
        self.client.store_auth_if_needed(host, auth).await;
        let answer = match offset {
            0 => {
                let whole = self
                    .client
                    .pull_blob_stream(&reference, text.as_str())
                    .await;
                whole.map(BlobResponse::Full)
            }
            _ => {
                let text = text.as_str();
                self.client
                    .pull_blob_stream_partial(&reference, text, offset, None)
                    .await
            }
        };
        answer.map_err(|failure| self.failed(&text, failure))
    }

    /// What a failure of the library's means.
    pub(crate) fn failed(&self, what: &str, failure: Failure) -> Error {
        failed(&self.place, what, failure)
    }

    /// Something else went wrong on the way.
    pub(crate) fn unreachable(&self, reason: impl Into<String>) -> Error {
        Error::Unreachable {
            registry: self.place.host.clone(),
            reason: reason.into(),
        }
    }

    /// For what the token is.
    pub(crate) fn operation(&self) -> RegistryOperation {
        self.operation
    }
}

/// What asks the place, and by which scheme.
pub(crate) async fn reach(
    place: &Place,
    patience: Duration,
) -> Result<(reqwest::Client, &'static str), Error> {
    let http = reqwest::Client::builder()
        .user_agent(AGENT)
        .connect_timeout(CONNECT_TIMEOUT.min(patience))
        .read_timeout(patience)
        .tls_danger_accept_invalid_certs(place.insecure)
        .build()
        .map_err(|error| unreachable(place, &error))?;
    if place.insecure {
        let probe = http.get(format!("https://{}/v2/", place.host)).send().await;
        if probe.is_err_and(|error| error.is_connect()) {
            return Ok((http, "http"));
        }
    }
    Ok((http, "https"))
}

fn failed(place: &Place, what: &str, failure: Failure) -> Error {
    let denied = || Error::Denied {
        registry: place.host.clone(),
        what: what.to_owned(),
    };
    match failure {
        Failure::RequestError(error) => match error.status() {
            Some(status) => refused(place, what, status.as_u16(), ""),
            None => unreachable(place, &error),
        },
        Failure::ServerError { code, message, .. } => refused(place, what, code, &message),
        Failure::UnauthorizedError { .. } | Failure::AuthenticationFailure(_) => denied(),
        Failure::RegistryError { envelope, .. } => {
            use oci_client::errors::OciErrorCode as Code;
            let codes: Vec<&Code> = envelope.errors.iter().map(|error| &error.code).collect();
            let has = |wanted: &[Code]| codes.iter().any(|code| wanted.contains(code));
            if has(&[Code::Unauthorized, Code::Denied]) {
                return denied();
            }
            if has(&[
                Code::BlobUnknown,
                Code::ManifestUnknown,
                Code::NameUnknown,
                Code::NotFound,
            ]) {
                return refused(place, what, 404, "");
            }
            if has(&[Code::Toomanyrequests]) {
                return refused(place, what, 429, "");
            }
            answer(place, &envelope.to_string())
        }
        Failure::IoError(error) => Error::Unreachable {
            registry: place.host.clone(),
            reason: error.to_string(),
        },
        other => answer(place, &other.to_string()),
    }
}

pub(crate) fn answer(place: &Place, reason: &str) -> Error {
    Error::Answer {
        registry: place.host.clone(),
        reason: reason.chars().take(REASON_MAX).collect(),
    }
}

pub(crate) fn refused(place: &Place, what: &str, code: u16, message: &str) -> Error {
    let registry = place.host.clone();
    let what = what.to_owned();
    let status = StatusCode::from_u16(code);
    let words = status
        .ok()
        .and_then(|status| status.canonical_reason())
        .unwrap_or_default();
    let reason = format!("{code} {words} {message}");
    match code {
        401 | 403 => Error::Denied { registry, what },
        404 => Error::NotFound { registry, what },
        429 | 500.. => Error::Unreachable {
            registry,
            reason: reason.trim().chars().take(REASON_MAX).collect(),
        },
        _ => answer(place, reason.trim()),
    }
}

/// The last cause says most; addresses in between may hold secrets.
pub(crate) fn unreachable(place: &Place, error: &reqwest::Error) -> Error {
    let registry = place.host.clone();
    if error.is_redirect() {
        return answer(place, "it redirects in a circle");
    }
    if error.is_timeout() {
        return Error::Unreachable {
            registry,
            reason: "it stalls".to_owned(),
        };
    }
    let mut reason = "the connection failed".to_owned();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        reason = cause.to_string();
        next = cause.source();
    }
    Error::Unreachable { registry, reason }
}
