//! The rows of `bench engine` and what is asked of each.

/// One workload of `bench/guest/engine.c`.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// QEMU's time over Kombi's, at least; `None` where QEMU is not asked.
    pub(crate) qemu_times: Option<f64>,
    /// Kombi's time over the host's, at most.
    pub(crate) native_times: f64,
    /// Runs in the interpreters' root.
    pub(crate) rooted: bool,
    /// The CPU model that it needs.
    pub(crate) model: Option<&'static str>,
}

const fn row(name: &'static str, qemu_times: f64, native_times: f64) -> Row {
    Row {
        name,
        qemu_times: Some(qemu_times),
        native_times,
        rooted: false,
        model: None,
    }
}

/// For x86-64-v3, which QEMU is not asked for.
const fn v3(name: &'static str, native_times: f64) -> Row {
    Row {
        name,
        qemu_times: None,
        native_times,
        rooted: false,
        model: Some("v3"),
    }
}

const fn rooted(name: &'static str, qemu_times: f64, native_times: f64) -> Row {
    let mut row = row(name, qemu_times, native_times);
    row.rooted = true;
    row
}

/// In the order of the table.
pub(crate) const ROWS: [Row; 29] = [
    row("sieve", 5.0, 1.4),
    row("sha256", 5.0, 1.4),
    row("matmul", 5.0, 1.4),
    row("qsort", 3.5, 2.0),
    row("tree", 3.5, 2.0),
    row("fib", 3.5, 2.0),
    row("memcpy", 6.0, 2.0),
    row("memset", 6.0, 2.0),
    row("strlen", 6.0, 2.0),
    row("syscall", 3.0, 1.3),
    row("page-fault", 3.0, 1.3),
    row("fork-exec", 3.0, 1.3),
    row("pipe", 3.0, 1.3),
    row("bb-gzip", 3.0, 2.0),
    row("bb-sha256sum", 3.0, 2.0),
    row("bb-sort", 3.0, 2.0),
    row("bb-find", 3.0, 2.0),
    row("bb-forks", 3.0, 2.0),
    row("sh", 4.0, 2.5),
    row("awk", 4.0, 2.5),
    rooted("python", 4.0, 2.5),
    rooted("perl", 4.0, 2.5),
    rooted("lua", 4.0, 2.5),
    rooted("node-loop", 3.0, 3.0),
    rooted("node-start", 3.0, 3.0),
    rooted("java-loop", 3.0, 3.0),
    rooted("java-start", 3.0, 3.0),
    v3("avx2", 1.5),
    v3("avx2-matmul", 1.5),
];
