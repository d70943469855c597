//! Logging in: whether a registry takes a user and a password, by its own token service where it has one, as
//! `docker login` asks.
//!
//! Invariant: nothing is written down that the registry refused. A password goes to the registry and to the token
//! service that it names, and to the latter without TLS only where the registry itself is insecure.

use http_auth::ChallengeRef;
use image::Name;
use reqwest::header::WWW_AUTHENTICATE;
use reqwest::{Response, StatusCode, Url};

use crate::configuration::Place;
use crate::error::Error;
use crate::remote::{answer, reach, refused, unreachable};
use crate::{Credentials, Registries};

/// Other names of docker's registry.
const HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

impl Registries {
    /// Logs in to `registry`, a host with or without a port, and writes that down with the user's credentials.
    ///
    /// # Errors
    ///
    /// [`Error::Denied`]: the registry does not take them. [`Error::NotARegistry`], [`Error::Blocked`],
    /// [`Error::Unreachable`], [`Error::Answer`], [`Error::Credentials`], [`Error::Configuration`].
    pub fn login(&self, registry: &str, user: &str, password: &str) -> Result<(), Error> {
        let name = any_image_of(registry)?;
        // Mirrors come first: it is the registry itself that is logged in to.
        let place = self.configuration.places(&name)?.pop();
        let place = place.ok_or_else(|| Error::NotARegistry {
            given: registry.to_owned(),
        })?;
        let asked = self.ask(&place, user, password);
        self.runtime.block_on(asked)?;
        self.credentials.remember(name.registry(), user, password)
    }

    async fn ask(&self, place: &Place, user: &str, password: &str) -> Result<(), Error> {
        let lost = |error: reqwest::Error| unreachable(place, &error);
        let (http, scheme) = reach(place, self.patience).await?;
        let host = match place.host.as_str() {
            "docker.io" => "index.docker.io",
            host => host,
        };
        let url = format!("{scheme}://{host}/v2/");
        let request = http.get(url).basic_auth(user, Some(password));
        let said = request.send().await.map_err(lost)?;
        if said.status() != StatusCode::UNAUTHORIZED {
            return taken(place, &said);
        }
        let Some(service) = token_service(&said, place, user)? else {
            return taken(place, &said);
        };
        let request = http.get(service).basic_auth(user, Some(password));
        taken(place, &request.send().await.map_err(lost)?)
    }
}

impl Credentials {
    /// Removes what there is of `registry`, wherever it is; whether there was something.
    ///
    /// # Errors
    ///
    /// [`Error::NotARegistry`], [`Error::Credentials`], [`Error::Configuration`].
    pub fn logout(&self, registry: &str) -> Result<bool, Error> {
        self.forget(any_image_of(registry)?.registry())
    }
}

/// Some name in the registry that is written as `given`.
fn any_image_of(given: &str) -> Result<Name, Error> {
    let host = given
        .trim_start_matches("https://")
        .trim_start_matches("http://");
    let host = host.split('/').next().unwrap_or_default();
    let host = if HUB.contains(&host) {
        "docker.io"
    } else {
        host
    };
    let name = format!("{host}/any/image").parse::<Name>().ok();
    name.filter(|name| name.registry() == host)
        .ok_or_else(|| Error::NotARegistry {
            given: given.to_owned(),
        })
}

fn taken(place: &Place, said: &Response) -> Result<(), Error> {
    match said.status() {
        status if status.is_success() => Ok(()),
        status => Err(refused(place, "this user", status.as_u16(), "")),
    }
}

/// Where the registry has its tokens given out, if it does.
fn token_service(said: &Response, place: &Place, user: &str) -> Result<Option<Url>, Error> {
    let headers = said.headers().get_all(WWW_AUTHENTICATE);
    for header in headers.iter().filter_map(|header| header.to_str().ok()) {
        let Ok(challenges) = http_auth::parse_challenges(header) else {
            continue;
        };
        let bearer = |one: &&ChallengeRef<'_>| one.scheme.eq_ignore_ascii_case("bearer");
        let Some(challenge) = challenges.iter().find(bearer) else {
            continue;
        };
        let of = |wanted: &str| {
            let mut all = challenge.params.iter();
            let found = all.find(|(name, _)| name.eq_ignore_ascii_case(wanted));
            found.map(|(_, value)| value.to_unescaped())
        };
        let realm = of("realm").unwrap_or_default();
        let url = Url::parse(&realm)
            .ok()
            .filter(|url| url.scheme() == "https" || place.insecure && url.scheme() == "http");
        let Some(mut url) = url else {
            return Err(answer(place, "its token service has no https address"));
        };
        if let Some(service) = of("service") {
            url.query_pairs_mut().append_pair("service", &service);
        }
        url.query_pairs_mut()
            .append_pair("account", user)
            .append_pair("client_id", "kombi");
        return Ok(Some(url));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_hosts_however_they_are_written() {
        for (given, wanted) in [
            ("docker.io", "docker.io"),
            ("https://index.docker.io/v1/", "docker.io"),
            ("quay.io", "quay.io"),
            ("localhost:5000", "localhost:5000"),
            ("http://127.0.0.1:5000/", "127.0.0.1:5000"),
        ] {
            let name = any_image_of(given).expect("a registry");
            assert_eq!(name.registry(), wanted);
        }
        for given in ["", "quay", "a b", "https://", "\u{1b}[2J.io", "-.io:x"] {
            let error = any_image_of(given).expect_err("none");
            assert!(matches!(error, Error::NotARegistry { .. }), "{error}");
        }
    }
}
