//! What several targets share.
#![forbid(unsafe_code)]

mod guest;
mod input;

use std::path::{Path, PathBuf};

pub use guest::{
    AVAILABLE, BUFFERS, BUFFERS_LEN, DESCRIPTORS, Guest, INDIRECT, NEXT, QUEUE_SIZE, QUEUES_MAX,
    TABLES, TABLES_LEN, USED, WRITE, queue_at,
};
pub use input::Input;

/// Where files are made that no disk should see, as there are thousands a second.
pub fn scratch() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        memory.into()
    } else {
        std::env::temp_dir()
    }
}
