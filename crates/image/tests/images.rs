//! Whole images: layouts, archives and directories, made by the tools people use.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use image::{Digest, Image, ImageError, Progress, Reference, Silent, Store};
use serde_json::json;
use support::erofs_walk::{Walked, walk};
use support::layout::{self, gzip};
use support::tars::Tar;
use support::{chain, run};
use tar::EntryType;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn prepare(dir: &Path, reference: &str) -> Result<Image, ImageError> {
    let reference: Reference = reference.parse()?;
    Store::open(dir.join("store"))?.prepare(&reference, &mut Silent)
}

fn prepared(dir: &Path, reference: &str) -> Image {
    prepare(dir, reference).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn tree(path: &Path) -> BTreeMap<Vec<u8>, Walked> {
    run("fsck.erofs", &[text(path)]);
    walk(&fs::read(path).expect("the layer"))
}

/// A layout with busybox, made by umoci; tagged `box`.
fn busybox_layout(dir: &Path) -> PathBuf {
    let oci = dir.join("oci");
    let image = format!("{}:box", text(&oci));
    run("umoci", &["init", "--layout", text(&oci)]);
    run("umoci", &["new", "--image", &image]);
    let root = dir.join("root");
    fs::create_dir_all(root.join("bin")).expect("a folder");
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).expect("a link");
    fs::hard_link(root.join("bin/busybox"), root.join("bin/true")).expect("a link");
    let from = root.join("bin");
    run(
        "umoci",
        &[
            "insert",
            "--rootless",
            "--image",
            &image,
            text(&from),
            "/bin",
        ],
    );
    run(
        "umoci",
        &[
            "config",
            "--image",
            &image,
            "--config.cmd",
            "/bin/sh",
            "--config.env",
            "A=b c",
            "--config.user",
            "7:8",
            "--config.workingdir",
            "/bin",
            "--architecture",
            "amd64",
            "--os",
            "linux",
        ],
    );
    oci
}

#[test]
fn umoci_image_of_busybox_is_prepared_once() {
    #[derive(Default)]
    struct Seen {
        built: usize,
        cached: usize,
        bytes: u64,
        total: u64,
    }
    impl Progress for Seen {
        fn layer_start(&mut self, _: usize, _: &str, bytes_total: u64) {
            self.total = bytes_total;
        }
        fn layer_bytes(&mut self, _: usize, bytes_done: u64) {
            self.bytes = bytes_done;
        }
        fn layer_done(&mut self, _: usize, cached: bool) {
            if cached {
                self.cached += 1
            } else {
                self.built += 1
            }
        }
    }
    let dir = tempfile::tempdir().expect("a folder");
    let oci = busybox_layout(dir.path());
    let reference = Reference::Oci {
        dir: oci,
        tag: Some("box".to_owned()),
    };
    let mut first = Seen::default();
    let store = Store::open(dir.path().join("store")).expect("a store");
    let image = store
        .prepare(&reference, &mut first)
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!((first.built, first.cached), (1, 0));
    assert_eq!(first.bytes, first.total);
    assert_eq!(image.config.cmd, ["/bin/sh"]);
    assert_eq!(image.config.env, ["A=b c"]);
    assert_eq!(image.config.user.as_deref(), Some("7:8"));
    assert_eq!(image.config.working_dir.as_deref(), Some("/bin"));
    let files = tree(&image.layers[0]);
    let busybox = fs::read("/bin/busybox").expect("busybox");
    assert!(
        files[&b"bin/busybox"[..]].data == busybox,
        "busybox differs"
    );
    assert!(
        files[&b"bin/true"[..]].data == busybox,
        "its other name differs"
    );
    assert_eq!(files[&b"bin/sh"[..]].data, b"busybox");

    let mut second = Seen::default();
    let start = Instant::now();
    let again = Store::open(dir.path().join("store"))
        .expect("a store")
        .prepare(&reference, &mut second);
    let took = start.elapsed();
    assert_eq!(again.expect("the same image"), image);
    assert_eq!((second.built, second.cached), (0, 1));
    // Milliseconds in truth; the bound allows for a busy machine.
    assert!(took < Duration::from_millis(100), "{took:?}");
}

#[test]
fn skopeo_docker_archive_gives_the_same_layers_as_the_layout() {
    let dir = tempfile::tempdir().expect("a folder");
    let oci = busybox_layout(dir.path());
    let archive = dir.path().join("box.tar");
    let from = format!("oci:{}:box", text(&oci));
    run(
        "skopeo",
        &[
            "copy",
            "--quiet",
            &from,
            &format!("docker-archive:{}:box:latest", text(&archive)),
        ],
    );
    let by_layout = prepared(dir.path(), &from);
    let by_archive = prepared(dir.path(), &format!("docker-archive:{}", text(&archive)));
    assert_eq!(by_layout.layers, by_archive.layers);
    assert_eq!(by_layout.config, by_archive.config);
    let zipped = dir.path().join("box.tar.gz");
    run(
        "sh",
        &[
            "-c",
            &format!("gzip -c '{}' > '{}'", text(&archive), text(&zipped)),
        ],
    );
    let by_zipped = prepared(dir.path(), &format!("docker-archive:{}", text(&zipped)));
    assert_eq!(by_zipped, by_archive);
    let as_zstd = dir.path().join("zstd");
    let to = format!("oci:{}:box", text(&as_zstd));
    run(
        "skopeo",
        &[
            "copy",
            "--quiet",
            "--dest-compress-format",
            "zstd",
            &from,
            &to,
        ],
    );
    assert_eq!(
        prepared(&dir.path().join("other"), &to).config,
        by_layout.config
    );
}

#[test]
fn old_and_new_docker_archives_are_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let layer = layout::plain(Tar::new().file("a", b"layer").end());
    let config = layout::config(
        &[layer.clone(), layer.clone()],
        json!({"Cmd": ["/a"], "Entrypoint": null}),
    );
    let config_hex = Digest::sha256_of(&config).hex().to_owned();
    let old = Tar::new()
        .file("one/layer.tar", &layer.stored)
        .symlink("two/layer.tar", "../one/layer.tar")
        .file(&format!("{config_hex}.json"), &config)
        .file(
            "manifest.json",
            json!([{"Config": format!("{config_hex}.json"), "RepoTags": null, "Layers": ["one/layer.tar", "two/layer.tar"]}])
                .to_string()
                .as_bytes(),
        );
    let layer_name = format!("blobs/sha256/{}", Digest::sha256_of(&layer.stored).hex());
    let config_name = format!("blobs/sha256/{config_hex}");
    let new = Tar::new()
        .file(&layer_name, &layer.stored)
        .file(&config_name, &config)
        .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
        .file(
            "manifest.json",
            json!([{"Config": config_name, "Layers": [layer_name, layer_name]}])
                .to_string()
                .as_bytes(),
        );
    for (name, tar) in [("old.tar", old), ("new.tar", new)] {
        let path = dir.path().join(name);
        fs::write(&path, tar.end()).expect("written");
        let image = prepared(dir.path(), &format!("docker-archive:{}", text(&path)));
        assert_eq!(image.layers.len(), 2);
        assert_eq!(image.digest.hex(), config_hex);
        assert_eq!(tree(&image.layers[0])[&b"a"[..]].data, b"layer");
    }
}

#[test]
fn damaged_docker_archives_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("x.tar");
    let refusal = |bytes: Vec<u8>| {
        fs::write(&path, bytes).expect("written");
        chain(
            &prepare(dir.path(), &format!("docker-archive:{}", text(&path)))
                .expect_err("a refusal"),
        )
    };
    let layer = layout::plain(Tar::new().file("a", b"layer").end());
    let config = layout::config(std::slice::from_ref(&layer), json!({}));
    let hex = "0".repeat(64);
    let manifest =
        |config: &str, layers: &[&str]| json!([{"Config": config, "Layers": layers}]).to_string();
    let wrong = Tar::new()
        .file(&format!("{hex}.json"), &config)
        .file("l.tar", &layer.stored)
        .file(
            "manifest.json",
            manifest(&format!("{hex}.json"), &["l.tar"]).as_bytes(),
        );
    assert!(refusal(wrong.end()).contains("is corrupt"));
    let gone = Tar::new()
        .file("c", &config)
        .file("manifest.json", manifest("c", &["l.tar"]).as_bytes());
    assert!(refusal(gone.end()).contains("no layer \"l.tar\""));
    let no_config = Tar::new().file(
        "manifest.json",
        manifest("../../etc/passwd", &[]).as_bytes(),
    );
    assert!(refusal(no_config.end()).contains("no configuration"));
    let lying = Tar::new().raw(b"big", EntryType::Regular, b"", b"", |h| {
        h.set_size(1 << 40)
    });
    assert!(refusal(lying.end()).contains("end of file"));
    assert!(refusal(b"not a tar".to_vec()).contains("docker archive"));
    assert!(refusal(Vec::new()).contains("no image layout"));
    let two = json!([{"Config": "a", "RepoTags": ["x:1"]}, {"Config": "b", "RepoTags": ["y:2"]}])
        .to_string();
    assert!(refusal(Tar::new().file("manifest.json", two.as_bytes()).end()).contains("x:1, y:2"));
}

#[test]
fn tags_and_platforms_are_chosen() {
    let dir = tempfile::tempdir().expect("a folder");
    let oci = dir.path().join("oci");
    let layers = |text: &str| vec![gzip(&Tar::new().file("which", text.as_bytes()).end())];
    let mut one = layout::manifest(&oci, &layers("one"), json!({}));
    let mut two = layout::manifest(&oci, &layers("two"), json!({}));
    let mut arm = layout::manifest(&oci, &layers("arm"), json!({}));
    one["annotations"] = json!({"org.opencontainers.image.ref.name": "1"});
    two["platform"] = json!({"os": "linux", "architecture": "amd64"});
    arm["platform"] = json!({"os": "linux", "architecture": "arm64"});
    let nested = json!({"schemaVersion": 2, "manifests": [arm, two]}).to_string();
    let nested_digest = layout::blob(&oci, nested.as_bytes());
    let mut multi = layout::descriptor(
        "application/vnd.oci.image.index.v1+json",
        &nested_digest,
        nested.len(),
    );
    multi["annotations"] = json!({"org.opencontainers.image.ref.name": "multi"});
    arm["annotations"] = json!({"org.opencontainers.image.ref.name": "arm"});
    layout::index(&oci, &[one, multi, arm]);
    let which = |tag: &str| {
        let image = prepared(dir.path(), &format!("oci:{}:{tag}", text(&oci)));
        tree(&image.layers[0])[&b"which"[..]].data.clone()
    };
    assert_eq!(which("1"), b"one");
    assert_eq!(which("multi"), b"two");
    let refusal =
        |reference: String| chain(&prepare(dir.path(), &reference).expect_err("a refusal"));
    let none = refusal(format!("oci:{}:3", text(&oci)));
    assert!(
        none.contains("\"3\"") && none.contains("1, arm, multi"),
        "{none}"
    );
    let arm = refusal(format!("oci:{}:arm", text(&oci)));
    assert!(arm.contains("linux/arm64"), "{arm}");
    let several = refusal(format!("oci:{}", text(&oci)));
    assert!(
        several.contains("holds 2 images") && several.contains("multi"),
        "{several}"
    );
}

#[test]
fn lower_layers_give_link_targets_and_directory_modes() {
    let dir = tempfile::tempdir().expect("a folder");
    let oci = dir.path().join("oci");
    let lower = Tar::new()
        .entry(b"tmp", EntryType::Directory, b"", b"", |h| {
            h.set_mode(0o1777);
            h.set_uid(5);
        })
        .dir("hidden")
        .file("hidden/x", b"old")
        .entry(b"bin/tool", EntryType::Regular, b"", &[9; 10_000], |h| {
            h.set_mode(0o4755)
        })
        .file("bin/small", b"small");
    let middle = Tar::new()
        .file(".wh.hidden", b"")
        .file("bin/small", b"newer");
    let upper = Tar::new()
        .file("tmp/new", b"n")
        .hard_link("bin/alias", "bin/tool")
        .hard_link("bin/alias2", "bin/small")
        .file("hidden/y", b"y");
    let layers = [gzip(&lower.end()), gzip(&middle.end()), gzip(&upper.end())];
    layout::layout(&oci, &layers);
    let reference = format!("oci:{}", text(&oci));
    let image = prepared(dir.path(), &reference);
    let top = tree(&image.layers[2]);
    assert_eq!((top[&b"tmp"[..]].mode, top[&b"tmp"[..]].uid), (0o041777, 5));
    assert_eq!(top[&b"bin/alias"[..]].data, [9; 10_000]);
    assert_eq!(top[&b"bin/alias"[..]].mode, 0o104755);
    assert_eq!(top[&b"bin/alias"[..]].nid, top[&b"bin/tool"[..]].nid);
    assert_eq!(top[&b"bin/alias2"[..]].data, b"newer");
    assert_eq!(
        top[&b"hidden"[..]].mode,
        0o040755,
        "the lower one is hidden"
    );
    let name = image.layers[2]
        .file_name()
        .expect("a name")
        .to_str()
        .expect("UTF-8");
    assert!(
        name.contains("-on-"),
        "a layer that depends on others says so: {name}"
    );
    assert_eq!(
        prepared(dir.path(), &reference),
        image,
        "and is found again"
    );

    // A directory of many blocks is searched by halves.
    let many = dir.path().join("many");
    let mut crowd = Tar::new();
    for n in 0..3000 {
        crowd = crowd.file(&format!("crowd/{n}"), n.to_string().as_bytes());
    }
    let mut links = Tar::new();
    for n in (0..3000).step_by(37) {
        links = links.hard_link(&format!("to-{n}"), &format!("crowd/{n}"));
    }
    layout::layout(&many, &[gzip(&crowd.end()), gzip(&links.end())]);
    let image = prepared(dir.path(), &format!("oci:{}", text(&many)));
    let linked = tree(&image.layers[1]);
    for n in (0..3000).step_by(37) {
        assert_eq!(
            linked[format!("to-{n}").as_bytes()].data,
            n.to_string().as_bytes()
        );
    }

    let other = dir.path().join("other");
    let forbidden = Tar::new().hard_link("x", "hidden/x").end();
    layout::layout(
        &other,
        &[layers[0].clone(), layers[1].clone(), gzip(&forbidden)],
    );
    let error = prepare(dir.path(), &format!("oci:{}", text(&other))).expect_err("hidden below");
    assert!(chain(&error).contains("neither in this layer nor in a lower one"));
}

#[test]
fn directory_becomes_a_layer_and_is_cached_until_it_changes() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("etc/deep")).expect("folders");
    fs::write(root.join("etc/big"), vec![3; 100_000]).expect("written");
    fs::write(root.join("etc/.wh.literal"), b"a name like any other").expect("written");
    fs::hard_link(root.join("etc/big"), root.join("etc/deep/same")).expect("a link");
    std::os::unix::fs::symlink("/nowhere", root.join("link")).expect("a link");
    fs::set_permissions(root.join("etc/big"), fs::Permissions::from_mode(0o4711)).expect("mode");
    let reference = format!("rootfs:{}", text(&root));
    let image = prepared(dir.path(), &reference);
    let files = tree(&image.layers[0]);
    assert_eq!(files[&b"etc/big"[..]].data, vec![3; 100_000]);
    assert_eq!(files[&b"etc/big"[..]].mode, 0o104711);
    assert_eq!(files[&b"etc/big"[..]].nid, files[&b"etc/deep/same"[..]].nid);
    assert_eq!(files[&b"link"[..]].data, b"/nowhere");
    assert_eq!(
        files[&b"etc/.wh.literal"[..]].data,
        b"a name like any other"
    );
    let uid = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&root).expect("metadata"));
    assert_eq!(files[&b""[..]].uid, uid);
    assert_eq!(prepared(dir.path(), &reference), image);
    fs::write(root.join("etc/big"), vec![4; 100_000]).expect("written");
    let changed = prepared(dir.path(), &reference);
    assert_ne!(changed.layers, image.layers);
    assert_eq!(tree(&changed.layers[0])[&b"etc/big"[..]].data[0], 4);
}

#[test]
fn directory_that_is_missing_or_none_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let missing = dir.path().join("missing");
    let error = prepare(dir.path(), &format!("rootfs:{}", text(&missing))).expect_err("missing");
    assert!(
        chain(&error).contains("missing") && chain(&error).contains("No such file"),
        "{}",
        chain(&error)
    );
    let file = dir.path().join("file");
    fs::write(&file, b"x").expect("written");
    let error = prepare(dir.path(), &format!("rootfs:{}", text(&file))).expect_err("a file");
    assert!(
        chain(&error).contains("ot a directory"),
        "{}",
        chain(&error)
    );
}
