//! Getting an image from a registry on loopback, ready to run: `kombi pull` beside `skopeo copy` to a folder and tar.
//!
//! Each starts without anything of the image, and ends with its root readable: as EROFS files here, as a folder there.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::figures::{Pairs, verdict};
use crate::guests::{Guests, call};

const ROUNDS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(10);

/// Ten layers, 300 MB.
pub(crate) fn pull(guests: &Guests) -> Result<bool> {
    println!(
        "\npull: an image of 10 layers, 300 MB, from a registry on loopback until its root can be used"
    );
    let layout = guests.work.join("pull-image");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/pull-image.sh");
    call(Command::new(script).arg(&layout))?;
    let registry = Registry::start(&guests.work.join("registry"))?;
    let name = format!("{}/ten:1", registry.host);
    let there = format!("docker://{name}");
    let mut publish = Command::new("skopeo");
    publish.args(["copy", "-q", "--dest-tls-verify=false"]);
    call(
        publish
            .arg(format!("oci:{}:latest", layout.display()))
            .arg(&there),
    )?;

    let room = guests.work.join("pulled");
    let mut pairs = Pairs::default();
    for _ in 0..ROUNDS {
        let ours = timed(&room, |room| {
            let mut pull = Command::new(&guests.kombi);
            pull.env("KOMBI_HOME", room).args(["pull", "-q", &name]);
            pull
        })?;
        let theirs = timed(&room, |room| {
            let mut pull = Command::new("sh");
            // Layers in order, as whiteouts need it.
            let script = "skopeo copy -q --src-tls-verify=false \"$1\" \"dir:$2/image\" && mkdir \"$2/root\" && \
                 for layer in $(python3 -c 'import json,sys; \
                 [print(l[\"digest\"][7:]) for l in json.load(open(sys.argv[1]))[\"layers\"]]' \"$2/image/manifest.json\"); \
                 do tar -C \"$2/root\" -xzf \"$2/image/$layer\" || exit 1; done; sync -f \"$2\"";
            pull.args(["-c", script, "sh", &there]).arg(room);
            pull
        })?;
        pairs.add(ours, theirs);
    }
    let _ = std::fs::remove_dir_all(&room);
    let (low, high) = pairs.spread();
    println!(
        "  Kombi {:.1} s, skopeo and tar {:.1} s (medians of {ROUNDS}); ratio {:.2} ({low:.2} to {high:.2})",
        pairs.ours(),
        pairs.theirs(),
        pairs.ratio(),
    );
    Ok(verdict(
        "at least as fast as skopeo copy and unpacking",
        pairs.ratio() <= 1.0,
    ))
}

/// Seconds of a command in an empty room.
fn timed(room: &Path, command: impl FnOnce(&Path) -> Command) -> Result<f64> {
    let _ = std::fs::remove_dir_all(room);
    std::fs::create_dir_all(room)?;
    call(&mut Command::new("sync"))?;
    let started = Instant::now();
    call(&mut command(room))?;
    Ok(started.elapsed().as_secs_f64())
}

struct Registry {
    process: Child,
    host: String,
}

impl Registry {
    fn start(folder: &Path) -> Result<Self> {
        let _ = std::fs::remove_dir_all(folder);
        std::fs::create_dir_all(folder)?;
        let host = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let configuration = folder.join("config.yml");
        let data = folder.join("data");
        std::fs::write(
            &configuration,
            format!(
                "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
                 storage: {{filesystem: {{rootdirectory: {data:?}}}}}\nhttp: {{addr: {host:?}}}\n"
            ),
        )?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("docker-registry is missing")?;
        let registry = Self { process, host };
        let started = Instant::now();
        while TcpStream::connect(&registry.host).is_err() {
            ensure!(
                started.elapsed() < PATIENCE,
                "docker-registry does not answer"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
