//! Keeping descriptors that we were given from a process that outlives us: a pipe that a shell reads to its end, or a
//! lock, would stay open for as long as a container runs.
#![allow(unsafe_code)] // close_range

/// Programs that are started from now on get the standard descriptors only, and what their starter gives them.
///
/// Kernels before 5.11 cannot; there all is as the starter made it.
pub(crate) fn keep_to_ourselves() {
    // SAFETY: with CLOSE_RANGE_CLOEXEC nothing is closed in this process (close_range(2)): descriptors that others own
    // stay theirs, and are not handed on.
    unsafe {
        libc::close_range(
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC as libc::c_int,
        )
    };
}
