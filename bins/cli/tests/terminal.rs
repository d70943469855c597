//! `kombi run -it` on a pseudo-terminal: raw while it runs, as before afterwards, and its size follows.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use support::{Home, pid_of, signal};

/// A terminal with a person before it.
struct Person {
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
    terminal: File,
}

impl Person {
    fn sit_down() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master: OwnedFd = rustix::pty::openpt(flags).expect("a pseudo-terminal");
        rustix::pty::grantpt(&master).expect("granted");
        rustix::pty::unlockpt(&master).expect("unlocked");
        let name = rustix::pty::ptsname(&master, Vec::new()).expect("named");
        let terminal = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().expect("utf-8"))
            .expect("opened");
        let keyboard = File::from(master);
        let mut reader = keyboard.try_clone().expect("cloned");
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = reader.read(&mut buffer) {
                if count == 0 || sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let person = Self {
            keyboard,
            screen,
            seen: String::new(),
            terminal,
        };
        person.resize(40, 100);
        person
    }

    fn resize(&self, rows: u16, cols: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.keyboard, size).expect("set");
    }

    /// Starts `kombi run -it IMAGE sh` with this as its controlling terminal.
    fn start(&self, home: &Home) -> Child {
        let image = home.busybox();
        let kombi = home.kombi(&["run", "-it", &image, "sh"]);
        let mut command = Command::new("setsid");
        command
            .arg("--ctty")
            .arg(kombi.get_program())
            .args(kombi.get_args());
        for (name, value) in kombi.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let stream = || Stdio::from(self.terminal.try_clone().expect("cloned"));
        command
            .stdin(stream())
            .stdout(stream())
            .stderr(stream())
            .spawn()
            .expect("started")
    }

    fn types(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("typed");
    }

    /// Waits until `words` are on the screen, and forgets everything up to them.
    #[track_caller]
    fn sees(&mut self, words: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(at) = self.seen.find(words) {
                self.seen.drain(..at + words.len());
                return;
            }
            let patience = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(patience) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("{words:?} did not come, but {:?}", self.seen),
            }
        }
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.terminal).expect("a terminal").local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }
}

#[test]
fn a_shell_has_a_terminal_of_the_right_size_and_leaves_it_as_it_was() {
    let home = Home::new();
    let mut person = Person::sit_down();
    assert!(!person.is_raw());
    let mut child = person.start(&home);
    person.sees("# ");
    assert!(person.is_raw());
    person.types("tty; stty size\r");
    person.sees("/dev/pts/");
    person.sees("40 100");
    person.resize(50, 132);
    person.types("while test \"$(stty size)\" != '50 132'; do :; done; echo resi''zed\r");
    person.sees("resized");
    person.types("echo rea''dy; sleep 1000\r");
    person.sees("ready");
    person.types("\x03");
    person.sees("# ");
    person.types("echo code=$?\r");
    person.sees("code=130");
    person.types("exit 4\r");
    assert_eq!(child.wait().expect("ended").code(), Some(4));
    assert!(!person.is_raw());
    home.is_swept();
}

#[test]
fn signals_that_end_kombi_leave_the_terminal_as_it_was() {
    let home = Home::new();
    let mut person = Person::sit_down();
    let mut child = person.start(&home);
    person.sees("# ");
    assert!(person.is_raw());
    // From outside: the keys go to the guest.
    signal(pid_of(&child), Signal::INT);
    person.sees("# ");
    signal(pid_of(&child), Signal::INT);
    assert_eq!(child.wait().expect("ended").code(), Some(130));
    assert!(!person.is_raw());
    home.is_swept();
}

#[test]
fn a_killed_monitor_leaves_the_terminal_as_it_was() {
    let home = Home::new();
    let mut person = Person::sit_down();
    let mut child = person.start(&home);
    person.sees("# ");
    signal(home.monitor(), Signal::KILL);
    person.sees("kombi: kombi-vmm was killed by signal 9 (SIGKILL)");
    assert_eq!(child.wait().expect("ended").code(), Some(125));
    assert!(!person.is_raw());
    home.is_swept();
}
