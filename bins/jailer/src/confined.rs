//! The jail's folder: the monitor in it, the folder as root of the file system,
//! folders and device nodes within.
//!
//! Invariant: links that an earlier inmate left in the folder are not followed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown,
};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, open};
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, unmount,
};
use rustix::process::pivot_root;

use crate::error::{Error, at, host};
use crate::plan::Plan;
use crate::processes::unshare_mounts;

/// Folders of the jail, outer ones first, and their mode.
const FOLDERS: [&str; 4] = ["/", "/dev", "/dev/net", "/run"];
const FOLDER_MODE: u32 = 0o700;

/// Character devices (Documentation/admin-guide/devices.txt): path, major, minor.
const TUN: (&str, u32, u32) = ("/dev/net/tun", 10, 200);
const KVM: (&str, u32, u32) = ("/dev/kvm", 10, 232);
const URANDOM: (&str, u32, u32) = ("/dev/urandom", 1, 9);
const USERFAULTFD: &str = "/dev/userfaultfd";
const MISC_MAJOR: u32 = 10;

/// Copies the monitor into the jail's folder, which must exist: a copy shares no memory
/// with other machines' monitors, as links would through the page cache.
///
/// # Errors
/// The host's; an existing file with several names, or that is none.
pub(crate) fn copy_monitor(plan: &Plan) -> Result<(), Error> {
    let (from, to) = (&plan.exec_file, plan.root.join(&plan.exec_name));
    let mut source = File::open(from).map_err(at("open", from))?;
    let mode = source.metadata().map_err(at("examine", from))?.mode();
    match fs::symlink_metadata(&to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(at("examine", to)(error)),
        Ok(found) if !found.is_file() => {
            let wanted = "file";
            return Err(Error::OtherKind { path: to, wanted });
        }
        Ok(found) if found.nlink() > 1 => return Err(Error::HardLink { path: to }),
        // Who opened the old one may write to it, but not to its successor.
        Ok(_) => fs::remove_file(&to).map_err(at("replace", &to))?,
    }
    let mut copy = File::options()
        .write(true)
        .create_new(true)
        .mode(mode & 0o777)
        .open(&to)
        .map_err(at("make", &to))?;
    io::copy(&mut source, &mut copy).map_err(at("copy the monitor to", &to))?;
    fchown(&copy, Some(plan.uid), Some(plan.gid)).map_err(at("change the owner of", &to))
}

/// Makes the jail's folder the root of all that this process sees.
///
/// # Errors
/// The host's, step by step.
pub(crate) fn enter(root: &Path) -> Result<(), Error> {
    unshare_mounts().map_err(host("get mounts of its own"))?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).map_err(host("keep its mounts to itself"))?;
    // pivot_root(2) wants a mount, and not the one that holds the old root.
    mount_bind_recursive(root, root).map_err(|error| at("bind", root)(error.into()))?;
    std::env::set_current_dir(root).map_err(at("enter", root))?;
    // With the same path twice the old root is mounted over the new one, and needs no
    // folder in the jail (pivot_root(2), "pivot_root(".", ".")").
    pivot_root(".", ".").map_err(host("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(host("leave the old root"))?;
    std::env::set_current_dir("/").map_err(at("enter", "/"))
}

/// Within the jail: folders for devices and the API's socket, owned by the inmate.
///
/// # Errors
/// The host's; something else of the same name.
pub(crate) fn make_folders(uid: u32, gid: u32) -> Result<(), Error> {
    for path in FOLDERS {
        match DirBuilder::new().mode(FOLDER_MODE).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(at("make", path)(error));
            }
            Ok(()) | Err(_) => {}
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder: File = open(path, flags, Mode::empty())
            .map_err(|error| at("open folder", path)(error.into()))?
            .into();
        let mode = fs::Permissions::from_mode(FOLDER_MODE);
        folder
            .set_permissions(mode)
            .map_err(at("change the mode of", path))?;
        fchown(&folder, Some(uid), Some(gid)).map_err(at("change the owner of", path))?;
    }
    Ok(())
}

/// Within the jail: device nodes. Returns what is to be warned of.
///
/// # Errors
/// The host's, for those that a monitor cannot do without.
pub(crate) fn make_devices(plan: &Plan) -> Result<Option<Error>, Error> {
    let make = |(path, major, minor): (&'static str, u32, u32)| {
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(
            CWD,
            path,
            FileType::CharacterDevice,
            mode,
            makedev(major, minor),
        )
        .map_err(|error| at("make device", path)(error.into()))?;
        lchown(path, Some(plan.uid), Some(plan.gid)).map_err(at("change the owner of", path))
    };
    make(TUN)?;
    make(KVM)?;
    let without = make(URANDOM).err();
    if let Some(minor) = plan.userfaultfd_minor {
        make((USERFAULTFD, MISC_MAJOR, minor))?;
    }
    Ok(without)
}
