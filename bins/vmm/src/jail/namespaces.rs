//! Namespaces of this process's own, and in them a root that has only what it needs.
//!
//! Invariant: nothing of the host changes; what is not named is not there.
#![allow(unsafe_code)] // unshare(2)

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{fchdir, getegid, geteuid, pivot_root};
use rustix::thread::UnshareFlags;

/// Why there are none.
#[derive(Debug)]
pub(super) enum Error {
    /// The host forbids it; all is as before, as far as files are concerned.
    Forbidden {
        doing: &'static str,
        source: io::Error,
    },
    /// Half of it was done.
    Lost {
        doing: &'static str,
        source: io::Error,
    },
}

fn forbidden<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Forbidden {
        doing,
        source: source.into(),
    }
}

fn lost<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Lost {
        doing,
        source: source.into(),
    }
}

/// Makes them, with `visible` at its paths in a root that is empty otherwise. What does
/// not exist is left out: whoever opens it will say so.
pub(super) fn enter(visible: &[&Path]) -> Result<(), Error> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    // Where relative paths begin stays the same path.
    let folder = std::env::current_dir().map_err(forbidden("find the working directory"))?;
    let own = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: no descriptor table is unshared, which is what can upset code elsewhere.
    unsafe { rustix::thread::unshare_unsafe(own) }.map_err(forbidden("make namespaces"))?;
    // user_namespaces(7): who may not set groups may map its own.
    let write = |file: &str, text: &str| fs::write(format!("/proc/self/{file}"), text);
    write("setgroups", "deny")
        .and_then(|()| write("uid_map", &format!("{user} {user} 1")))
        .and_then(|()| write("gid_map", &format!("{group} {group} 1")))
        .map_err(forbidden("keep its user in the user namespace"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(forbidden("keep its mounts to itself"))?;

    let trees = visible
        .iter()
        .filter_map(|path| Tree::of(path, &folder).transpose());
    let trees: Vec<Tree> = trees.collect::<Result<_, _>>()?;
    let root = empty_root().map_err(forbidden("make an empty file system"))?;
    for tree in &trees {
        tree.attach(&root)
            .map_err(forbidden("show a file to the machine"))?;
    }
    make_folders(&root, &folder).map_err(forbidden("make the working directory"))?;

    // It must be mounted somewhere to become the root; then it is everywhere.
    let empty_path = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(root.as_fd(), "", CWD, "/tmp", empty_path)
        .or_else(|_| move_mount(root.as_fd(), "", CWD, "/", empty_path))
        .map_err(forbidden("mount the empty file system"))?;
    fchdir(&root).map_err(lost("enter the new root"))?;
    let sealed = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    mount_remount(".", sealed, "").map_err(lost("seal the new root"))?;
    pivot_root(".", ".").map_err(lost("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(lost("leave the old root"))?;
    std::env::set_current_dir(&folder).map_err(lost("enter the working directory"))
}

/// A file or folder of the host, taken along.
struct Tree {
    /// Where it is, from / on.
    path: PathBuf,
    mount: OwnedFd,
    is_folder: bool,
}

impl Tree {
    /// `None` if there is nothing.
    fn of(path: &Path, folder: &Path) -> Result<Option<Self>, Error> {
        let path = folder.join(path);
        let Ok(found) = fs::metadata(&path) else {
            return Ok(None);
        };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let mount = open_tree(CWD, &path, flags).map_err(forbidden("take along a file"))?;
        let is_folder = found.is_dir();
        Ok(Some(Self {
            path: plain(&path),
            mount,
            is_folder,
        }))
    }

    fn attach(&self, root: &OwnedFd) -> io::Result<()> {
        if self.is_folder {
            make_folders(root, &self.path)?;
        } else {
            make_folders(root, self.path.parent().unwrap_or(&self.path))?;
            let flags = OFlags::CREATE | OFlags::CLOEXEC;
            let _: File = openat(root, within(&self.path), flags, Mode::RUSR | Mode::WUSR)?.into();
        }
        let empty_path = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(
            self.mount.as_fd(),
            "",
            root.as_fd(),
            within(&self.path),
            empty_path,
        )?)
    }
}

/// Without . and .., by its text: in the new root there are no links.
fn plain(path: &Path) -> PathBuf {
    use std::path::Component;
    path.components()
        .fold(PathBuf::from("/"), |mut plain, part| {
            match part {
                Component::Normal(name) => plain.push(name),
                Component::ParentDir => drop(plain.pop()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
            plain
        })
}

/// As seen from the root's descriptor.
fn within(path: &Path) -> &Path {
    match path.strip_prefix("/") {
        Ok(rest) if !rest.as_os_str().is_empty() => rest,
        Ok(_) | Err(_) => Path::new("."),
    }
}

fn make_folders(root: &OwnedFd, path: &Path) -> io::Result<()> {
    let mut made = PathBuf::new();
    for part in within(path) {
        made.push(part);
        match mkdirat(root, &made, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A file system in memory, for nothing but places to mount on.
fn empty_root() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "size", "1M")?;
    fsconfig_set_string(context.as_fd(), "mode", "0700")?;
    fsconfig_create(context.as_fd())?;
    let none = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        none,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_the_root_have_no_detours() {
        for (path, wanted) in [("/a/./b/../c", "/a/c"), ("/../..", "/"), ("/a//b/", "/a/b")] {
            assert_eq!(plain(Path::new(path)), Path::new(wanted), "{path}");
        }
        assert_eq!(within(Path::new("/a/b")), Path::new("a/b"));
        assert_eq!(within(Path::new("/")), Path::new("."));
    }
}
