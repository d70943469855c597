//! One epoll set for everything that happens outside of the guest: devices with
//! work from the host, console input, unfinished console lines, the end.
//!
//! Invariant: nothing in here waits but `epoll_wait`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use chipset::Serial;
use rustix::event::epoll;
use rustix::io::Errno;
use virtio::EventSource;

use crate::Error;
use crate::console::Console;
use crate::control::Control;
use crate::devices::Devices;
use crate::io_space::lock;

const CONTROL: u64 = 0;
const CONSOLE: u64 = 1;
const INPUT: u64 = 2;
const FIRST_SOURCE: u64 = 3;

/// Bytes of console input read at once.
const INPUT_BYTES: usize = 1024;

/// The event loop of one machine.
pub(crate) struct EventLoop {
    epoll: OwnedFd,
    control: Arc<Control>,
    console: Arc<Console>,
    serial: Arc<Mutex<Serial>>,
    sources: Vec<Arc<Mutex<dyn EventSource>>>,
    input: Option<OwnedFd>,
}

impl EventLoop {
    /// A loop over the descriptors of `devices`, with `input` for the console.
    pub(crate) fn new(
        control: &Arc<Control>,
        devices: &Devices,
        input: Option<OwnedFd>,
    ) -> Result<Self, Error> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host("make an epoll set"))?;
        watch(&epoll, control.fd(), CONTROL)?;
        watch(&epoll, devices.console.fd(), CONSOLE)?;
        for (token, source) in (FIRST_SOURCE..).zip(&devices.sources) {
            watch(&epoll, lock(source).fd(), token)?;
        }
        // A regular file cannot be polled: nobody types into one.
        let input = input.filter(|input| watch(&epoll, input.as_fd(), INPUT).is_ok());
        Ok(Self {
            epoll,
            control: control.clone(),
            console: devices.console.clone(),
            serial: devices.serial.clone(),
            sources: devices.sources.clone(),
            input,
        })
    }

    /// Serves until the machine is ending.
    pub(crate) fn run(&mut self) -> Result<(), Error> {
        let mut events = Vec::with_capacity(16);
        while !self.control.is_ending() {
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                None,
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(host("wait for events")(errno)),
            }
            // Not while a snapshot is taken.
            let control = self.control.clone();
            let _serving = control.serve();
            for event in &events {
                self.serve(event.data.u64());
            }
        }
        Ok(())
    }

    /// Writes the rest of the console's output and returns its tail.
    pub(crate) fn finish(&self) -> Vec<u8> {
        self.console.finish()
    }

    fn serve(&mut self, token: u64) {
        match token {
            CONTROL => {}
            CONSOLE => self.console.on_idle(),
            INPUT => self.read_input(),
            token => {
                let index = token.checked_sub(FIRST_SOURCE).map(|n| n as usize);
                if let Some(source) = index.and_then(|index| self.sources.get(index)) {
                    lock(source).on_event();
                }
            }
        }
    }

    fn read_input(&mut self) {
        let Some(input) = &self.input else {
            return;
        };
        let mut bytes = [0; INPUT_BYTES];
        match rustix::io::read(input, &mut bytes) {
            // What a guest with 64 KiB of unread input is sent is lost, as on a
            // wire without flow control.
            Ok(n) if n > 0 => {
                lock(&self.serial).enqueue_input(bytes.get(..n).unwrap_or_default());
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(_) | Err(_) => {
                let _ = epoll::delete(&self.epoll, input);
                self.input = None;
            }
        }
    }
}

fn watch(epoll: &OwnedFd, fd: BorrowedFd<'_>, token: u64) -> Result<(), Error> {
    let data = epoll::EventData::new_u64(token);
    epoll::add(epoll, fd, data, epoll::EventFlags::IN).map_err(host("watch a descriptor"))
}

fn host(doing: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Host {
        doing,
        source: errno.into(),
    }
}
