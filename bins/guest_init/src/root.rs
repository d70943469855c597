//! The machine around the process: the root made of layers, and the file systems that every container expects.
//!
//! ```text
//!   initramfs   /init, /dev
//!     /w        tmpfs, or ext4 where it is kept: what is written (/w/u) and overlayfs's workshop (/w/k)
//!     /l/0 …    layers, lowest first: /dev/vda … mounted read-only as EROFS
//!     /r        overlay of all that; becomes /
//! ```
//!
//! Invariant: nothing of the image is touched before we are inside of it, so that its links cannot lead out.

use std::{ffi::CString, fs, os::unix::fs::PermissionsExt, path::Path};

use guest_wire::{LAYERS_MAX, MachineSpec, layer_device_name};
use rustix::{
    fs::{Mode, chmod, mkdir, symlink},
    io::Errno,
    mount::{MountFlags, mount, mount_move},
    process::{Resource, Rlimit, chdir, chroot, setrlimit},
    system::sethostname,
};

use crate::{error::InitError, loopback};

/// Open files of a process: containerd's defaults.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(524_288),
};

const SAFE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// Mounts the devices in the initramfs: the terminals, /dev/null and the layers are there.
pub(crate) fn mount_devices() -> Result<(), InitError> {
    make_directory("/dev")?;
    match mount(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MountFlags::NOSUID,
        Some(c"mode=0755"),
    ) {
        // The kernel may have done it already.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(errno) => Err(InitError::system("mount", "/dev")(errno)),
    }
}

/// Makes everything that `spec` asks for and moves into it.
pub(crate) fn make(spec: &MachineSpec) -> Result<(), InitError> {
    mount_root(spec.layers, spec.keeps)?;
    enter_root()?;
    mount_devices()?;
    mount_system()?;
    link_devices();
    make_temporary("/tmp");
    make_temporary("/var/tmp");
    if !spec.hostname.is_empty() {
        sethostname(spec.hostname.as_bytes())
            .map_err(InitError::system("set host name", &spec.hostname))?;
    }
    name_hosts(&spec.hostname);
    setrlimit(Resource::Nofile, OPEN_FILES).map_err(InitError::system("limit", "open files"))?;
    loopback::bring_up().map_err(InitError::system("bring up", "network interface lo"))
}

fn mount_root(layers: u16, keeps: bool) -> Result<(), InitError> {
    if !(1..=LAYERS_MAX).contains(&layers) {
        return Err(InitError::LayerCount { count: layers });
    }
    for directory in ["/w", "/l", "/r"] {
        make_directory(directory)?;
    }
    if keeps {
        let device = format!("/dev/{}", layer_device_name(layers));
        mount(&device, "/w", "ext4", MountFlags::empty(), None)
            .map_err(InitError::system("mount what is kept, from", &device))?;
    } else {
        mount(
            "tmpfs",
            "/w",
            "tmpfs",
            MountFlags::empty(),
            Some(c"mode=0755"),
        )
        .map_err(InitError::system("mount", "/w"))?;
    }
    // On a disk that was written before, the image's say is an old one.
    let is_new = fs::symlink_metadata("/w/u").is_err();
    for directory in ["/w/u", "/w/k"] {
        make_directory(directory)?;
    }
    // Overlayfs wants the highest layer first.
    let mut stack = String::new();
    for index in 0..layers {
        let device = format!("/dev/{}", layer_device_name(index));
        let point = format!("/l/{index}");
        make_directory(&point)?;
        mount(&device, &point, "erofs", MountFlags::RDONLY, None)
            .map_err(InitError::system("mount layer", &device))?;
        stack.insert_str(0, &point);
        stack.insert(
            0,
            if index.saturating_add(1) == layers {
                '='
            } else {
                ':'
            },
        );
    }
    // The image's own root directory decides on the mode of ours.
    let top = format!("/l/{}", layers.saturating_sub(1));
    if is_new && let Ok(metadata) = fs::metadata(&top) {
        chmod(
            "/w/u",
            Mode::from_raw_mode(metadata.permissions().mode() & 0o7777),
        )
        .map_err(InitError::system("set mode of", "/w/u"))?;
    }
    let options =
        CString::new(format!("lowerdir{stack},upperdir=/w/u,workdir=/w/k")).map_err(|_nul| {
            InitError::Nul {
                what: "overlay option",
            }
        })?;
    mount(
        "overlay",
        "/r",
        "overlay",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
    .map_err(InitError::system("mount", "root overlay"))
}

fn enter_root() -> Result<(), InitError> {
    let failed = || InitError::system("enter", "root overlay");
    chdir("/r").map_err(failed())?;
    mount_move(".", "/").map_err(failed())?;
    chroot(".").map_err(failed())?;
    chdir("/").map_err(failed())
}

/// The file systems that a container expects (OCI runtime specification, "Default Filesystems"), and the cgroups.
fn mount_system() -> Result<(), InitError> {
    let mount_at =
        |kind: &'static str, at: &'static str, flags: MountFlags, data: Option<&std::ffi::CStr>| {
            make_directory(at)?;
            mount(kind, at, kind, flags, data).map_err(InitError::system("mount", at))
        };
    mount_at("proc", "/proc", SAFE, None)?;
    mount_at("sysfs", "/sys", SAFE, None)?;
    let terminals = MountFlags::NOSUID.union(MountFlags::NOEXEC);
    mount_at(
        "devpts",
        "/dev/pts",
        terminals,
        Some(c"mode=0620,gid=5,ptmxmode=0666"),
    )?;
    mount_at("tmpfs", "/dev/shm", SAFE, Some(c"mode=1777"))?;
    make_directory("/run")?;
    // What a kernel may have been built without.
    let optional = [("mqueue", "/dev/mqueue"), ("cgroup2", "/sys/fs/cgroup")];
    for (kind, at) in optional {
        match mount_at(kind, at, SAFE, None) {
            Ok(()) => {}
            Err(InitError::System { source, .. })
                if matches!(
                    source.raw_os_error(),
                    Some(libc::ENODEV | libc::ENOENT | libc::EPERM)
                ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// OCI runtime specification, "Dev symbolic links".
fn link_devices() {
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ];
    for (to, at) in links {
        // Only a name that is taken can refuse.
        let _taken = symlink(to, at);
    }
}

/// A directory for everybody, unless the image has one.
fn make_temporary(path: &str) {
    if mkdir(path, Mode::from_raw_mode(0o1777)).is_ok() {
        // Past the umask.
        let _refused = chmod(path, Mode::from_raw_mode(0o1777));
    }
}

fn make_directory(path: &str) -> Result<(), InitError> {
    match mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(InitError::system("make directory", path)(errno)),
    }
}

/// /etc/hostname and /etc/hosts, where the image has none: an image decides for itself otherwise.
fn name_hosts(hostname: &str) {
    if hostname.is_empty() || make_directory("/etc").is_err() {
        return;
    }
    if missing_or_empty("/etc/hostname") {
        let _refused = fs::write("/etc/hostname", format!("{hostname}\n"));
    }
    if missing_or_empty("/etc/hosts") {
        let _refused = fs::write(
            "/etc/hosts",
            format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
        );
    }
}

fn missing_or_empty(path: &str) -> bool {
    fs::symlink_metadata(Path::new(path))
        .map_or(true, |metadata| metadata.is_file() && metadata.len() == 0)
}
