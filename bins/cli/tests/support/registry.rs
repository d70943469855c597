//! A registry of the test's own on loopback: Debian's docker-registry, in memory, gone with the test.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use super::wait_for;

/// A registry that is running.
pub(crate) struct Registry {
    process: Child,
    /// Host and port.
    pub(crate) host: String,
    _folder: tempfile::TempDir,
}

impl Registry {
    pub(crate) fn start() -> Self {
        Self::with("")
    }

    /// One that takes the user `me` with the password `secret` only.
    #[allow(dead_code)] // not every test logs in
    pub(crate) fn private() -> Self {
        Self::with("auth: {htpasswd: {realm: test, path: FOLDER/users}}\n")
    }

    fn with(more: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let host = free.local_addr().expect("its address").to_string();
        drop(free);
        let configuration = folder.path().join("config.yml");
        let data = folder.path().join("data");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {data:?}}}}}\nhttp: {{addr: {host:?}}}\n"
        );
        let more = more.replace("FOLDER", folder.path().to_str().expect("utf-8"));
        std::fs::write(&configuration, text + &more).expect("written");
        // bcrypt of "secret".
        let users = "me:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
        std::fs::write(folder.path().join("users"), users).expect("written");
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        wait_for("the registry", || TcpStream::connect(&host).ok());
        Self {
            process,
            host,
            _folder: folder,
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
