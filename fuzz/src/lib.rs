//! What several targets share.
#![forbid(unsafe_code)]

mod guest;
mod input;

pub use guest::{
    AVAILABLE, BUFFERS, BUFFERS_LEN, DESCRIPTORS, Guest, INDIRECT, NEXT, QUEUE_SIZE, QUEUES_MAX,
    TABLES, TABLES_LEN, USED, WRITE, queue_at,
};
pub use input::Input;
