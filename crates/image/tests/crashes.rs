//! Builders that are killed or that meet: the store never shows half a layer, and keeps no litter.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use image::{Progress, Reference, Silent, Store};
use support::erofs_walk::walk;
use support::layout::{self, Layer};
use support::tars::Tar;
use support::{cases, chain};

const ROOM: &str = "KOMBI_TEST_CRASH_ROOM";

fn noise(seed: u32, size: usize) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let step = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..size).map(step).collect()
}

fn layers(count: u32, bytes: usize) -> Vec<Layer> {
    let tar = |seed| {
        Tar::new()
            .file("data", &noise(seed, bytes))
            .file("small", b"s")
            .end()
    };
    (1..=count).map(|seed| layout::plain(tar(seed))).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let list = fs::read_dir(folder).into_iter().flatten();
    list.map(|entry| {
        entry
            .expect("an entry")
            .file_name()
            .to_string_lossy()
            .into_owned()
    })
    .collect()
}

fn reference(room: &Path) -> Reference {
    Reference::Oci {
        dir: room.join("layout"),
        tag: None,
    }
}

#[test]
fn killed_builder_leaves_whole_layers_and_litter_the_next_one_removes() {
    if let Some(room) = std::env::var_os(ROOM) {
        // The child: builds until it is killed.
        let room = Path::new(&room);
        let store = Store::open(room.join("store")).expect("a store");
        store
            .prepare(&reference(room), &mut Silent)
            .expect("an image");
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    layout::layout(&dir.path().join("layout"), &layers(4, 3 << 20));
    let tmp = dir.path().join("store/tmp");
    let built = dir.path().join("store/layers");
    let test = "killed_builder_leaves_whole_layers_and_litter_the_next_one_removes";
    let mut killed_in_the_middle = 0;
    for round in 0..cases(5) {
        let _ = fs::remove_dir_all(dir.path().join("store"));
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", test])
            .env(ROOM, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("a child");
        let start = Instant::now();
        while names(&tmp).is_empty() && start.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(u64::from(round) * 7 % 30));
        child.kill().expect("killed");
        child.wait().expect("gone");
        killed_in_the_middle += usize::from(!names(&tmp).is_empty());
        for name in names(&built) {
            let tree = walk(&fs::read(built.join(&name)).expect("a layer"));
            assert_eq!(tree[&b"data"[..]].data.len(), 3 << 20, "{name} is whole");
        }
        let store = Store::open(dir.path().join("store")).expect("a store");
        assert_eq!(names(&tmp), Vec::<String>::new(), "litter is removed");
        let image = store.prepare(&reference(dir.path()), &mut Silent);
        let image = image.unwrap_or_else(|error| panic!("{}", chain(&error)));
        for (seed, path) in (1..).zip(&image.layers) {
            let tree = walk(&fs::read(path).expect("a layer"));
            assert!(
                tree[&b"data"[..]].data == noise(seed, 3 << 20),
                "layer {seed} differs"
            );
        }
        assert_eq!(names(&tmp), Vec::<String>::new());
    }
    assert!(
        killed_in_the_middle > 0,
        "no builder was killed while it built"
    );
}

#[test]
fn builders_that_meet_build_each_layer_once() {
    struct Count<'a>(&'a AtomicUsize);
    impl Progress for Count<'_> {
        fn layer_done(&mut self, _: usize, cached: bool) {
            self.0.fetch_add(usize::from(!cached), Ordering::Relaxed);
        }
    }
    let dir = tempfile::tempdir().expect("a folder");
    layout::layout(&dir.path().join("layout"), &layers(3, 1 << 20));
    let built = AtomicUsize::new(0);
    let images: Vec<_> = std::thread::scope(|scope| {
        let build = || {
            let store = Store::open(dir.path().join("store")).expect("a store");
            store
                .prepare(&reference(dir.path()), &mut Count(&built))
                .expect("an image")
        };
        let builders: Vec<_> = (0..6).map(|_| scope.spawn(build)).collect();
        builders
            .into_iter()
            .map(|builder| builder.join().expect("no panic"))
            .collect()
    });
    assert_eq!(built.load(Ordering::Relaxed), 3);
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(names(&dir.path().join("store/tmp")), Vec::<String>::new());
    assert_eq!(names(&dir.path().join("store/layers")).len(), 3);
}
