//! Registries that stall, truncate, lie and go in circles: an error that says so, or the image whole; nothing else.

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use image::{ImageError, Name, Store};
use registry::{Configuration, Credentials, Error, Pulled, Registries, Silent};
use support::{Answer, Fake, Request, Sample, chain, registries, store};

fn pull(fake: &Fake, store: &Store, what: &str) -> Result<Pulled, Error> {
    let name = format!("{}/{what}", fake.host).parse().expect("a name");
    registries().pull(store, &name, &Silent, &mut image::Silent)
}

/// No name, no blob but documents, and no layer.
fn has_no_image(store: &Store) -> bool {
    let layers = std::fs::read_dir(store.root().join("layers"))
        .expect("a folder")
        .count();
    store.entries().expect("a list").is_empty() && layers == 0
}

fn is_blob(request: &Request) -> bool {
    request.path.contains("/blobs/")
}

#[test]
fn an_honest_registry_s_image_is_here_whole_and_is_not_asked_for_twice() {
    let sample = Sample::new(5);
    let fake = Fake::start(&sample, |_| Answer::Honest);
    let (_dir, store) = store();
    let pulled = pull(&fake, &store, "app:many").expect("an image");
    assert_eq!(pulled.image.layers.len(), 5);
    assert!(pulled.image.layers.iter().all(|layer| layer.is_file()));
    assert_eq!(
        (pulled.entry.target, pulled.was_here),
        (sample.index.clone(), false)
    );
    assert_eq!(fake.count("/blobs/"), 6);
    // What it has in common with others is not downloaded again.
    let again = pull(&fake, &store, "app:1").expect("an image");
    assert_eq!(
        (again.image.digest, fake.count("/blobs/")),
        (sample.manifest.clone(), 6)
    );
    assert!(pull(&fake, &store, "app:many").expect("an image").was_here);
    // By its digest too, and no other one.
    let by_digest = pull(&fake, &store, &format!("app@{}", sample.manifest));
    assert_eq!(by_digest.expect("an image").entry.target, sample.manifest);
    assert_eq!(store.entries().expect("a list").len(), 3);
    assert_eq!(
        store.id(&sample.index).expect("an identifier"),
        sample.config
    );
}

#[test]
fn a_transfer_that_is_cut_or_stalls_goes_on_where_it_stopped() {
    for stalls in [false, true] {
        let sample = Sample::new(2);
        let (tries, large) = (AtomicUsize::new(0), sample.layers[0].to_string());
        let fake = Fake::start(&sample, move |request| {
            if !request.path.ends_with(&large) || tries.fetch_add(1, Ordering::SeqCst) >= 3 {
                return Answer::Honest;
            }
            match stalls {
                true => Answer::Stall(30_000),
                false => Answer::Cut(30_000),
            }
        });
        let (_dir, store) = store();
        let pulled = pull(&fake, &store, "app:1").expect("an image");
        assert_eq!(pulled.image.layers.len(), 2);
        let seen = fake.seen.lock().expect("not poisoned");
        let large = sample.layers[0].to_string();
        let asked: Vec<_> = seen
            .iter()
            .filter(|one| one.path.ends_with(&large))
            .map(|one| one.from)
            .collect();
        assert_eq!(asked, [None, Some(30_000), Some(60_000), Some(90_000)]);
    }
}

#[test]
fn a_registry_that_never_gives_a_byte_is_given_up() {
    for answer in [|| Answer::Cut(0), || Answer::Stall(0)] {
        let sample = Sample::new(1);
        let fake = Fake::start(&sample, move |request| match is_blob(request) {
            true => answer(),
            false => Answer::Honest,
        });
        let (_dir, store) = store();
        let error = pull(&fake, &store, "app:1").expect_err("an error");
        assert!(
            matches!(error, Error::BrokenOff { times: 5, .. }),
            "{}",
            chain(&error)
        );
        assert!(has_no_image(&store));
    }
}

#[test]
fn what_is_not_what_it_says_is_refused_and_does_not_stay() {
    let sample = Sample::new(2);
    let wrong = |len: usize| vec![7; len];
    let size = sample.blobs[&sample.layers[1].to_string()].len();
    for (body, what) in [
        (wrong(size), "digest"),
        (wrong(size + 1), "bytes"),
        (wrong(10 * size), "bytes"),
    ] {
        let layer = sample.layers[1].to_string();
        let fake = Fake::start(&sample, move |request| {
            match request.path.ends_with(&layer) {
                true => Answer::Body(body.clone()),
                false => Answer::Honest,
            }
        });
        let (_dir, store) = store();
        let error = pull(&fake, &store, "app:1").expect_err("an error");
        assert!(chain(&error).contains(what), "{}", chain(&error));
        assert!(store.entries().expect("a list").is_empty());
        assert!(!store.has_blob(&sample.layers[1], None));
        // Nothing wrong is gone on with.
        let honest = Fake::start(&sample, |_| Answer::Honest);
        assert_eq!(
            pull(&honest, &store, "app:1")
                .expect("an image")
                .image
                .layers
                .len(),
            2
        );
    }
}

#[test]
fn documents_that_lie_are_refused() {
    let sample = Sample::new(1);
    let other = Sample::new(2);
    let replaced = |digest: String, by: Vec<u8>| {
        Fake::start(&sample, move |request| {
            match request.path.ends_with(&digest) {
                true => Answer::Body(by.clone()),
                false => Answer::Honest,
            }
        })
    };
    let document =
        |sample: &Sample, digest: &image::Digest| sample.blobs[&digest.to_string()].clone();
    // The manifest that the index names, and one that was asked for by digest.
    let fake = replaced(
        sample.manifest.to_string(),
        document(&other, &other.manifest),
    );
    for what in ["app:many".to_owned(), format!("app@{}", sample.manifest)] {
        let (_dir, store) = store();
        let error = pull(&fake, &store, &what).expect_err("an error");
        assert!(
            matches!(error, Error::Image(ImageError::DigestMismatch { .. })),
            "{}",
            chain(&error)
        );
        assert!(has_no_image(&store));
    }
    for nonsense in [
        "",
        "[]",
        "{\"schemaVersion\": 2}",
        "not json",
        "{\"layers\": [], \"manifests\": []}",
    ] {
        let fake = Fake::start(&sample, move |request| {
            match request.path.contains("/manifests/") {
                true => Answer::Body(nonsense.into()),
                false => Answer::Honest,
            }
        });
        let (_dir, store) = store();
        let error = pull(&fake, &store, "app:1").expect_err(nonsense);
        assert!(matches!(error, Error::Image(_)), "{}", chain(&error));
        assert!(has_no_image(&store));
    }
}

#[test]
fn a_manifest_without_an_end_costs_no_more_than_the_longest_one() {
    let sample = Sample::new(1);
    let fake = Fake::start(&sample, |request| {
        match request.path.contains("/manifests/") {
            true => Answer::Endless,
            false => Answer::Honest,
        }
    });
    let (_dir, store) = store();
    let error = pull(&fake, &store, "app:1").expect_err("an error");
    assert!(
        chain(&error).contains("has more than 8388608 bytes"),
        "{}",
        chain(&error)
    );
}

#[test]
fn circles_of_redirects_end() {
    let sample = Sample::new(1);
    for part in ["/manifests/", "/blobs/"] {
        let fake = Fake::start(&sample, move |request| match request.path.contains(part) {
            true => Answer::Status(307, format!("Location: {}\r\n", request.path), Vec::new()),
            false => Answer::Honest,
        });
        let (_dir, store) = store();
        let error = pull(&fake, &store, "app:1").expect_err("an error");
        assert!(
            chain(&error).contains("redirects in a circle"),
            "{}",
            chain(&error)
        );
        assert!(fake.count(part) < 50);
    }
}

#[test]
fn errors_say_what_is_missing_or_refused() {
    let sample = Sample::new(1);
    let fake = Fake::start(&sample, |request| match request.path.as_str() {
        path if path.contains("/secret/") => Answer::Status(403, String::new(), Vec::new()),
        path if path.contains("/teapot/") => Answer::Status(418, String::new(), Vec::new()),
        _ => Answer::Honest,
    });
    let (_dir, store) = store();
    let text = |what: &str| chain(&pull(&fake, &store, what).expect_err("an error"));
    assert_eq!(text("app:2"), format!("{} has no app:2", fake.host));
    assert_eq!(
        text("secret:1"),
        format!("{} refuses access to secret:1", fake.host)
    );
    assert!(text("teapot:1").contains("418"));
    let gone: Name = "127.0.0.1:1/app".parse().expect("a name");
    let error = registries()
        .pull(&store, &gone, &Silent, &mut image::Silent)
        .expect_err("an error");
    assert!(
        matches!(error, Error::Unreachable { .. }),
        "{}",
        chain(&error)
    );
}

#[test]
fn a_registry_that_is_busy_is_asked_again() {
    let sample = Sample::new(1);
    let tries = AtomicUsize::new(0);
    let fake = Fake::start(&sample, move |request| match request.path.as_str() {
        "/v2/" => Answer::Honest,
        _ if tries.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) => {
            Answer::Status(503, String::new(), b"busy".to_vec())
        }
        _ => Answer::Honest,
    });
    let (_dir, store) = store();
    assert_eq!(
        pull(&fake, &store, "app:1")
            .expect("an image")
            .image
            .layers
            .len(),
        1
    );
}

#[test]
fn mirrors_are_asked_first_and_passed_over_when_they_fail() {
    let sample = Sample::new(1);
    let broken = Fake::start(&sample, |_| Answer::Status(500, String::new(), Vec::new()));
    let (good, own) = (
        Fake::start(&sample, |_| Answer::Honest),
        Fake::start(&sample, |_| Answer::Honest),
    );
    let (dir, store) = store();
    let text = format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\n\
         [[registry.mirror]]\nlocation = \"{}/sub\"\n",
        own.host, broken.host, good.host
    );
    let file = dir.path().join("registries.conf");
    std::fs::write(&file, text).expect("written");
    let configuration = Configuration::in_files(&[file]).expect("a configuration");
    let registries = Registries::new(configuration, Credentials::default()).expect("registries");
    let name: Name = format!("{}/app:1", own.host).parse().expect("a name");
    let pulled = registries
        .pull(&store, &name, &Silent, &mut image::Silent)
        .expect("an image");
    // It has the name that it was asked for, whoever gave it.
    assert_eq!(pulled.entry.name, Some(name));
    assert_eq!(own.seen.lock().expect("not poisoned").len(), 0);
    assert!(good.count("/v2/sub/app/") > 0 && broken.count("/manifests/") > 0);
}

#[test]
fn tokens_are_fetched_with_the_user_s_password_and_shown_to_nobody_else() {
    let sample = Sample::new(1);
    let other = Fake::start(&sample, |_| Answer::Honest);
    let elsewhere = other.host.clone();
    let fake = Fake::start(&sample, move |request| {
        let challenge = "WWW-Authenticate: Bearer realm=\"http://HOST/token\",service=\"it\"\r\n";
        match (
            request.path.split('?').next().unwrap_or_default(),
            request.authorization.as_deref(),
        ) {
            // Wrong on purpose where it is not replaced: the realm is filled in below.
            ("/v2/", _) => {
                Answer::Status(401, challenge.replace("HOST", "127.0.0.1:1"), Vec::new())
            }
            (path, Some("Bearer good")) if path.contains("/blobs/") => {
                let location = format!("Location: http://{elsewhere}{path}\r\n");
                Answer::Status(307, location, Vec::new())
            }
            (_, Some("Bearer good")) => Answer::Honest,
            _ => Answer::Status(401, String::new(), Vec::new()),
        }
    });
    // The realm's server cannot be reached: that is an error of its own.
    let (_dir, store) = store();
    let error = pull(&fake, &store, "app:1").expect_err("an error");
    assert!(
        matches!(error, Error::Unreachable { .. }),
        "{}",
        chain(&error)
    );

    let tokens = Fake::start(&sample, |request| match request.authorization.as_deref() {
        Some("Basic aG9zdDpzZWNyZXQ=") => {
            Answer::Status(200, String::new(), br#"{"token": "good"}"#.to_vec())
        }
        _ => Answer::Status(401, String::new(), Vec::new()),
    });
    let (realm, elsewhere) = (tokens.host.clone(), other.host.clone());
    let fake = Fake::start(&sample, move |request| {
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://{realm}/token\",service=\"it\"\r\n");
        match (request.path.as_str(), request.authorization.as_deref()) {
            ("/v2/", _) => Answer::Status(401, challenge, Vec::new()),
            (path, Some("Bearer good")) if path.contains("/blobs/") => {
                let location = format!("Location: http://{elsewhere}{path}\r\n");
                Answer::Status(307, location, Vec::new())
            }
            (_, Some("Bearer good")) => Answer::Honest,
            _ => Answer::Status(401, String::new(), Vec::new()),
        }
    });
    let denied = pull(&fake, &store, "app:1").expect_err("an error");
    assert!(matches!(denied, Error::Denied { .. }), "{}", chain(&denied));
    let dir = tempfile::tempdir().expect("a folder");
    let registries = with_password(dir.path(), &fake.host);
    let name: Name = format!("{}/app:1", fake.host).parse().expect("a name");
    registries
        .pull(&store, &name, &Silent, &mut image::Silent)
        .expect("an image");
    let seen = other.seen.lock().expect("not poisoned");
    assert!(
        seen.len() >= 2 && seen.iter().all(|one| one.authorization.is_none()),
        "{seen:?}"
    );
}

fn with_password(dir: &Path, host: &str) -> Registries {
    let file = dir.join("auth.json");
    let text = format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"aG9zdDpzZWNyZXQ=\"}}}}}}");
    std::fs::write(&file, text).expect("written");
    let credentials = Credentials::in_files(vec![file]);
    Registries::new(Configuration::default(), credentials).expect("registries")
}
