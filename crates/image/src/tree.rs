//! One layer as a tree in memory: names, metadata and links; file contents already lie in the EROFS file.
//!
//! Invariant: whatever paths are put in, the tree has one root, no cycles, and no name that is empty, `.`, `..`, holds a
//! slash or a NUL, or is longer than 255 bytes. Later entries win over earlier ones. Whiteouts speak of lower layers
//! only (OCI image layer specification, "Whiteouts"), whatever their place in the layer. Left to others: reading file
//! data, writing the tree out, asking lower layers for what this one implies.

use std::collections::{BTreeMap, BTreeSet};

use crate::erofs::FileData;
use crate::error::ImageError;
use crate::limits::Limits;

/// Bytes of one name (Linux `NAME_MAX`, `EROFS_NAME_LEN`).
pub(crate) const NAME_BYTES_MAX: usize = 255;
/// As in Linux (`MAXSYMLINKS`).
const SYMLINK_HOPS_MAX: usize = 40;
/// What the kernel's overlayfs reads as "hides the lower directory" (Documentation/filesystems/overlayfs.rst).
const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";

/// Index of a node; stays valid for the life of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

impl NodeId {
    pub(crate) const ROOT: NodeId = NodeId(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Extended attributes, full names with their prefix, in the order they go to disk.
pub(crate) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Owner, permission and time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// Permission bits with set-id and sticky, no type bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: Xattrs,
}

impl Metadata {
    /// For a directory that no entry describes.
    pub(crate) fn implied() -> Metadata {
        Metadata {
            mode: 0o755,
            ..Metadata::default()
        }
    }
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Directory(Directory),
    File(FileData),
    Symlink(Vec<u8>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Socket,
}

/// A directory's names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) children: BTreeMap<Box<[u8]>, NodeId>,
    /// Names of lower layers to hide; merged into `children` by [`Tree::seal`].
    whiteouts: BTreeSet<Box<[u8]>>,
    opaque: bool,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) metadata: Metadata,
    pub(crate) content: Content,
}

/// Asked for a directory that an entry implies and this layer does not have: what a lower layer says of it.
pub(crate) type ImpliedDirectory<'a> = dyn FnMut(&[&[u8]]) -> Result<Metadata, ImageError> + 'a;

/// A layer's tree.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    limits: Limits,
    metadata_bytes: u64,
}

/// A path taken apart and found harmless.
pub(crate) struct CleanPath<'a> {
    pub(crate) parts: Vec<&'a [u8]>,
    whole: &'a [u8],
}

impl<'a> CleanPath<'a> {
    /// Drops empty and `.` components (a leading slash means the image's root); refuses everything that is no path.
    pub(crate) fn new(path: &'a [u8], limits: &Limits) -> Result<CleanPath<'a>, ImageError> {
        if path.len() > limits.path_bytes_max {
            return Err(ImageError::entry(
                path,
                "has a path longer than Linux allows",
            ));
        }
        if path.contains(&0) {
            return Err(ImageError::entry(path, "has a NUL in its path"));
        }
        let mut parts = Vec::new();
        for part in path.split(|b| *b == b'/') {
            match part {
                b"" | b"." => {}
                b".." => {
                    return Err(ImageError::entry(
                        path,
                        "has \"..\" in its path and could leave the root",
                    ));
                }
                name if name.len() > NAME_BYTES_MAX => {
                    return Err(ImageError::entry(
                        path,
                        "has a name longer than Linux allows",
                    ));
                }
                name => parts.push(name),
            }
        }
        Ok(CleanPath { parts, whole: path })
    }

    fn refuse(&self, reason: &str) -> ImageError {
        ImageError::entry(self.whole, reason)
    }
}

impl Tree {
    pub(crate) fn new(limits: Limits) -> Tree {
        let root = Node {
            metadata: Metadata::implied(),
            content: Content::Directory(Directory::default()),
        };
        Tree {
            nodes: vec![root],
            limits,
            metadata_bytes: 0,
        }
    }

    /// All nodes, those replaced by later entries too.
    pub(crate) fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// The id of the node at `index`, below [`Tree::node_count`].
    pub(crate) fn id_at(&self, index: usize) -> NodeId {
        NodeId(u32::try_from(index).unwrap_or(u32::MAX))
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        // Ids are made by `add` only, and nodes are never removed.
        &self.nodes[id.index()]
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// The names in a directory, none for other nodes.
    pub(crate) fn children(&self, id: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        let children = match &self.node(id).content {
            Content::Directory(directory) => Some(&directory.children),
            Content::File(_)
            | Content::Symlink(_)
            | Content::CharDevice { .. }
            | Content::BlockDevice { .. }
            | Content::Fifo
            | Content::Socket => None,
        };
        children
            .into_iter()
            .flatten()
            .map(|(name, id)| (&**name, *id))
    }

    fn directory_mut(&mut self, id: NodeId) -> Option<&mut Directory> {
        match &mut self.node_mut(id).content {
            Content::Directory(directory) => Some(directory),
            Content::File(_)
            | Content::Symlink(_)
            | Content::CharDevice { .. }
            | Content::BlockDevice { .. }
            | Content::Fifo
            | Content::Socket => None,
        }
    }

    fn child(&self, id: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(id).content {
            Content::Directory(directory) => directory.children.get(name).copied(),
            Content::File(_)
            | Content::Symlink(_)
            | Content::CharDevice { .. }
            | Content::BlockDevice { .. }
            | Content::Fifo
            | Content::Socket => None,
        }
    }

    /// Puts an entry at `path`. A directory over a directory changes its metadata only; anything else replaces.
    pub(crate) fn insert(
        &mut self,
        path: &CleanPath<'_>,
        metadata: Metadata,
        content: Content,
        implied: &mut ImpliedDirectory<'_>,
    ) -> Result<NodeId, ImageError> {
        let is_directory = matches!(content, Content::Directory(_));
        let Some((name, parents)) = path.parts.split_last() else {
            if !is_directory {
                return Err(path.refuse("would replace the root by something that is no directory"));
            }
            self.charge(&metadata, &content, 0)?;
            self.node_mut(NodeId::ROOT).metadata = metadata;
            return Ok(NodeId::ROOT);
        };
        let parent = self.parent(path, parents, implied)?;
        if let Some(old) = self.child(parent, name)
            && is_directory
            && matches!(self.node(old).content, Content::Directory(_))
        {
            self.charge(&metadata, &content, 0)?;
            self.node_mut(old).metadata = metadata;
            return Ok(old);
        }
        let id = self.add(metadata, content, name.len())?;
        self.put(parent, name, id);
        Ok(id)
    }

    /// Gives the node at `target` another name; false when this layer has no such node.
    pub(crate) fn link(
        &mut self,
        path: &CleanPath<'_>,
        target: &CleanPath<'_>,
        implied: &mut ImpliedDirectory<'_>,
    ) -> Result<bool, ImageError> {
        let Some((target_name, target_parents)) = target.parts.split_last() else {
            return Err(path.refuse("is a hard link to the root"));
        };
        let Some(target_parent) = self.find_directory(target, target_parents)? else {
            return Ok(false);
        };
        let Some(id) = self.child(target_parent, target_name) else {
            return Ok(false);
        };
        if matches!(self.node(id).content, Content::Directory(_)) {
            return Err(path.refuse("is a hard link to a directory"));
        }
        let Some((name, parents)) = path.parts.split_last() else {
            return Err(path.refuse("would replace the root by a hard link"));
        };
        let parent = self.parent(path, parents, implied)?;
        self.charge_bytes(name.len())?;
        self.put(parent, name, id);
        Ok(true)
    }

    /// Hides `name` of the directory at `parents` in lower layers.
    pub(crate) fn whiteout(
        &mut self,
        path: &CleanPath<'_>,
        name: &[u8],
        implied: &mut ImpliedDirectory<'_>,
    ) -> Result<(), ImageError> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(path.refuse("is a whiteout of no name"));
        }
        let parents = path
            .parts
            .split_last()
            .map_or(&[][..], |(_, parents)| parents);
        let parent = self.parent(path, parents, implied)?;
        self.charge_entry(name.len())?;
        if let Some(directory) = self.directory_mut(parent) {
            directory.whiteouts.insert(name.into());
        }
        Ok(())
    }

    /// Hides everything of the directory at `parents` in lower layers.
    pub(crate) fn opaque(
        &mut self,
        path: &CleanPath<'_>,
        implied: &mut ImpliedDirectory<'_>,
    ) -> Result<(), ImageError> {
        let parents = path
            .parts
            .split_last()
            .map_or(&[][..], |(_, parents)| parents);
        let parent = self.parent(path, parents, implied)?;
        if let Some(directory) = self.directory_mut(parent) {
            directory.opaque = true;
        }
        Ok(())
    }

    /// Turns whiteouts into the form overlayfs reads: character devices 0/0 and opaque directories.
    pub(crate) fn seal(&mut self) -> Result<(), ImageError> {
        for index in 0..self.nodes.len() {
            let id = self.id_at(index);
            let Some(directory) = self.directory_mut(id) else {
                continue;
            };
            let opaque = directory.opaque;
            let whiteouts = std::mem::take(&mut directory.whiteouts);
            if opaque {
                self.make_opaque(id);
            }
            for name in whiteouts {
                match self.child(id, &name) {
                    // This layer brings its own: a directory must not show the lower one through.
                    Some(child) => {
                        if let Some(directory) = self.directory_mut(child) {
                            directory.opaque = true;
                            self.make_opaque(child);
                        }
                    }
                    None if opaque => {}
                    None => {
                        let metadata = Metadata::default();
                        let whiteout =
                            self.add(metadata, Content::CharDevice { major: 0, minor: 0 }, 0)?;
                        self.put(id, &name, whiteout);
                    }
                }
            }
        }
        Ok(())
    }

    fn make_opaque(&mut self, id: NodeId) {
        let xattrs = &mut self.node_mut(id).metadata.xattrs;
        if !xattrs.iter().any(|(name, _)| name == OPAQUE_XATTR) {
            xattrs.push((OPAQUE_XATTR.to_vec(), b"y".to_vec()));
        }
    }

    fn put(&mut self, parent: NodeId, name: &[u8], id: NodeId) {
        if let Some(directory) = self.directory_mut(parent) {
            directory.children.insert(name.into(), id);
        }
    }

    fn add(
        &mut self,
        metadata: Metadata,
        content: Content,
        name_bytes: usize,
    ) -> Result<NodeId, ImageError> {
        self.charge(&metadata, &content, name_bytes)?;
        self.charge_entry(0)?;
        let id = self.id_at(self.nodes.len());
        self.nodes.push(Node { metadata, content });
        Ok(id)
    }

    fn charge_entry(&mut self, name_bytes: usize) -> Result<(), ImageError> {
        // The id must fit 32 bits, whatever the limit says.
        if self.nodes.len() >= self.limits.layer_entries_max.min(u32::MAX as usize) {
            return Err(ImageError::Limit {
                what: "the number of its entries".to_owned(),
                limit: "layer_entries_max",
                max: self.limits.layer_entries_max as u64,
            });
        }
        self.charge_bytes(name_bytes)
    }

    fn charge(
        &mut self,
        metadata: &Metadata,
        content: &Content,
        name_bytes: usize,
    ) -> Result<(), ImageError> {
        let target = if let Content::Symlink(target) = content {
            target.len()
        } else {
            0
        };
        let xattrs = metadata
            .xattrs
            .iter()
            .map(|(name, value)| name.len().saturating_add(value.len()));
        self.charge_bytes(xattrs.fold(target.saturating_add(name_bytes), usize::saturating_add))
    }

    fn charge_bytes(&mut self, bytes: usize) -> Result<(), ImageError> {
        self.metadata_bytes = self.metadata_bytes.saturating_add(bytes as u64);
        if self.metadata_bytes <= self.limits.layer_metadata_bytes_max {
            return Ok(());
        }
        Err(ImageError::Limit {
            what: "the size of its names and attributes".to_owned(),
            limit: "layer_metadata_bytes_max",
            max: self.limits.layer_metadata_bytes_max,
        })
    }

    /// The directory an entry lies in, made when missing.
    fn parent(
        &mut self,
        path: &CleanPath<'_>,
        parents: &[&[u8]],
        implied: &mut ImpliedDirectory<'_>,
    ) -> Result<NodeId, ImageError> {
        self.walk(path, parents, Some(implied))?
            .ok_or_else(|| path.refuse("has no parent directory"))
    }

    fn find_directory(
        &mut self,
        path: &CleanPath<'_>,
        parents: &[&[u8]],
    ) -> Result<Option<NodeId>, ImageError> {
        self.walk(path, parents, None)
    }

    /// Walks down `parents` from the root. A symbolic link on the way is followed only when it is relative and stays
    /// below the root, as usr-merged images need (`lib -> usr/lib`, then `lib/x`); any other is refused.
    fn walk(
        &mut self,
        path: &CleanPath<'_>,
        parents: &[&[u8]],
        mut implied: Option<&mut ImpliedDirectory<'_>>,
    ) -> Result<Option<NodeId>, ImageError> {
        let mut todo: Vec<Box<[u8]>> = parents.iter().rev().map(|part| Box::from(*part)).collect();
        let mut done: Vec<(NodeId, Box<[u8]>)> = Vec::new();
        let mut hops = 0;
        while let Some(part) = todo.pop() {
            let at = done.last().map_or(NodeId::ROOT, |(id, _)| *id);
            if &*part == b".." {
                if done.pop().is_none() {
                    return Err(path.refuse("passes through a symbolic link that leaves the root"));
                }
                continue;
            }
            let child = match self.child(at, &part) {
                Some(child) => child,
                None => {
                    let Some(implied) = implied.as_mut() else {
                        return Ok(None);
                    };
                    let mut names: Vec<&[u8]> = done.iter().map(|(_, name)| &**name).collect();
                    names.push(&part);
                    let metadata = implied(&names)?;
                    let id = self.add(
                        metadata,
                        Content::Directory(Directory::default()),
                        part.len(),
                    )?;
                    self.put(at, &part, id);
                    id
                }
            };
            match &self.node(child).content {
                Content::Directory(_) => done.push((child, part)),
                Content::Symlink(target) => {
                    hops += 1;
                    if hops > SYMLINK_HOPS_MAX {
                        return Err(path.refuse("passes through too many symbolic links"));
                    }
                    if target.first() == Some(&b'/') {
                        return Err(
                            path.refuse("passes through a symbolic link with an absolute target")
                        );
                    }
                    let parts = target.split(|b| *b == b'/').rev();
                    todo.extend(
                        parts
                            .filter(|part| !matches!(*part, b"" | b"."))
                            .map(Box::from),
                    );
                }
                Content::File(_)
                | Content::CharDevice { .. }
                | Content::BlockDevice { .. }
                | Content::Fifo
                | Content::Socket => {
                    return Err(path.refuse("passes through something that is no directory"));
                }
            }
        }
        Ok(Some(done.last().map_or(NodeId::ROOT, |(id, _)| *id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        Tree::new(Limits::default())
    }

    fn put(tree: &mut Tree, path: &str, content: Content) -> Result<NodeId, ImageError> {
        let limits = Limits::default();
        let path = CleanPath::new(path.as_bytes(), &limits)?;
        tree.insert(&path, Metadata::implied(), content, &mut |_| {
            Ok(Metadata::implied())
        })
    }

    fn directory() -> Content {
        Content::Directory(Directory::default())
    }

    fn find(tree: &mut Tree, path: &str) -> Option<NodeId> {
        let limits = Limits::default();
        let path = CleanPath::new(path.as_bytes(), &limits).expect("clean");
        tree.find_directory(&path, &path.parts)
            .expect("a walk that ends")
    }

    #[test]
    fn dots_above_are_refused_wherever_they_stand() {
        for path in ["../x", "a/../x", "a/..", "/../x", ".."] {
            let error = put(&mut tree(), path, Content::Fifo).expect_err(path);
            assert!(error.to_string().contains("leave the root"), "{error}");
        }
    }

    #[test]
    fn absolute_names_mean_the_images_root() {
        let mut tree = tree();
        let id = put(&mut tree, "//etc/./x", directory()).expect("an absolute name");
        assert_eq!(find(&mut tree, "etc/x"), Some(id));
    }

    #[test]
    fn paths_through_links_stay_below_the_root() {
        let mut tree = tree();
        put(&mut tree, "lib", Content::Symlink(b"usr/lib".to_vec())).expect("a link");
        let id = put(&mut tree, "lib/x", directory()).expect("through a relative link");
        assert_eq!(find(&mut tree, "usr/lib/x"), Some(id));
        put(&mut tree, "out", Content::Symlink(b"../../etc".to_vec()))
            .expect("a link is only data");
        put(&mut tree, "abs", Content::Symlink(b"/etc".to_vec())).expect("a link is only data");
        put(&mut tree, "loop", Content::Symlink(b"loop".to_vec())).expect("a link is only data");
        for path in ["out/passwd", "abs/passwd", "loop/x"] {
            let error = put(&mut tree, path, Content::Fifo).expect_err(path);
            assert!(error.to_string().contains("symbolic link"), "{error}");
        }
    }

    #[test]
    fn last_entry_wins_and_directories_keep_their_children() {
        let mut tree = tree();
        put(&mut tree, "a/b", Content::Fifo).expect("fifo");
        let a = put(&mut tree, "a", directory()).expect("directory over directory");
        assert_eq!(tree.children(a).count(), 1);
        put(&mut tree, "a", Content::Socket).expect("replaces the directory");
        assert_eq!(tree.children(NodeId::ROOT).count(), 1);
        let a = put(&mut tree, "a", directory()).expect("replaces the socket");
        assert_eq!(tree.children(a).count(), 0);
    }

    #[test]
    fn whiteout_of_what_the_layer_brings_hides_only_the_lower_one() {
        let mut tree = tree();
        let limits = Limits::default();
        let own = put(&mut tree, "own", directory()).expect("directory");
        for name in ["own", "gone"] {
            let full = format!(".wh.{name}");
            let path = CleanPath::new(full.as_bytes(), &limits).expect("clean");
            tree.whiteout(&path, name.as_bytes(), &mut |_| Ok(Metadata::implied()))
                .expect("a whiteout");
        }
        tree.seal().expect("sealed");
        assert_eq!(
            tree.node(own).metadata.xattrs,
            [(OPAQUE_XATTR.to_vec(), b"y".to_vec())]
        );
        let gone = tree.child(NodeId::ROOT, b"gone").expect("a whiteout node");
        assert_eq!(
            tree.node(gone).content,
            Content::CharDevice { major: 0, minor: 0 }
        );
    }

    #[test]
    fn entries_are_counted_implied_ones_too() {
        let limits = Limits {
            layer_entries_max: 10,
            ..Limits::default()
        };
        let mut tree = Tree::new(limits);
        let path = CleanPath::new(b"1/2/3/4/5/6/7/8/9/10/11", &limits).expect("clean");
        let error = tree.insert(&path, Metadata::implied(), Content::Fifo, &mut |_| {
            Ok(Metadata::implied())
        });
        assert!(matches!(
            error,
            Err(ImageError::Limit {
                limit: "layer_entries_max",
                ..
            })
        ));
    }
}
