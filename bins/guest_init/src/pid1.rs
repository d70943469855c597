//! The life of a machine as its PID 1 sees it: devices, the host's stream, one session, power off.

use std::{
    os::fd::{AsRawFd, IntoRawFd, OwnedFd},
    path::Path,
};

use guest_wire::{CONTROL_PORT, HOST_CID};
use rustix::{
    fs::{Mode, OFlags, open},
    system::{RebootCommand, reboot},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{descendants, error::InitError, root, session, spawn};

/// Lives the machine's life; never returns.
pub(crate) fn run() -> ! {
    spawn::ignore_broken_pipes();
    if let Err(error) = live() {
        complain(&error);
    }
    descendants::kill_everything();
    power_off()
}

fn live() -> Result<(), InitError> {
    root::mount_devices()?;
    fill_standard_streams()?;
    session::serve(connect()?, root::make)
}

/// Without a console the kernel starts us without standard streams. Nothing else may get their numbers.
fn fill_standard_streams() -> Result<(), InitError> {
    loop {
        let fd = open("/dev/null", OFlags::RDWR, Mode::empty())
            .map_err(InitError::system("open", "/dev/null"))?;
        if fd.as_raw_fd() > 2 {
            return Ok(());
        }
        // Stays open for the machine's life.
        let _number = fd.into_raw_fd();
    }
}

/// Names a serial device to use instead of vsock, for machines that have none: `KOMBI_CONTROL=/dev/ttyS0` on the kernel's
/// command line, which hands words that it does not know to us as variables.
const CONTROL_DEVICE: &str = "KOMBI_CONTROL";

/// The control stream.
fn connect() -> Result<OwnedFd, InitError> {
    if let Ok(device) = std::env::var(CONTROL_DEVICE) {
        return open_serial(&device);
    }
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None).map_err(InitError::NoHost)?;
    socket
        .connect(&SockAddr::vsock(HOST_CID, CONTROL_PORT))
        .map_err(InitError::NoHost)?;
    Ok(socket.into())
}

fn open_serial(device: &str) -> Result<OwnedFd, InitError> {
    let failed = || InitError::system("open", device);
    let serial = open(
        device,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed())?;
    let mut settings = tcgetattr(&serial).map_err(failed())?;
    settings.make_raw();
    tcsetattr(&serial, OptionalActions::Now, &settings).map_err(failed())?;
    Ok(serial)
}

/// One line on the console. Through the kernel's log when there is one: standard error may be nowhere.
fn complain(error: &InitError) {
    let line = format!("kombi-init: {}\n", error.line());
    if std::fs::write("/dev/kmsg", format!("<2>{line}")).is_err() {
        // There is nowhere else to say it.
        let _refused = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
    }
}

fn power_off() -> ! {
    rustix::fs::sync();
    // Without ACPI the kernel has no way to switch off: it would halt, and nobody would notice. A reset ends it too.
    let command = if Path::new("/sys/firmware/acpi").exists() {
        RebootCommand::PowerOff
    } else {
        RebootCommand::Restart
    };
    for command in [command, RebootCommand::Restart] {
        // Refused only to those without the right.
        let _refused = reboot(command);
    }
    loop {
        std::thread::park();
    }
}
