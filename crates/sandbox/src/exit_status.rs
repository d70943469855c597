//! How a command ended, in the way shells and docker number it.
//!
//! Invariant: none. Left to others: ends that are not the command's own ([`crate::Error`]).

/// The end of a container's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself.
    Exited {
        /// Its exit code.
        code: u8,
    },
    /// By a signal.
    Signalled {
        /// Linux signal number.
        number: u8,
    },
}

impl Ended {
    /// What a program should exit with: the command's own code, or 128 + signal.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Exited { code } => code,
            Self::Signalled { number } => 128_u8.saturating_add(number),
        }
    }
}

/// A signal's name (signal(7), x86-64 numbers).
#[must_use]
pub fn signal_name(number: i32) -> &'static str {
    const NAMES: [&str; 32] = [
        "none",
        "SIGHUP",
        "SIGINT",
        "SIGQUIT",
        "SIGILL",
        "SIGTRAP",
        "SIGABRT",
        "SIGBUS",
        "SIGFPE",
        "SIGKILL",
        "SIGUSR1",
        "SIGSEGV",
        "SIGUSR2",
        "SIGPIPE",
        "SIGALRM",
        "SIGTERM",
        "SIGSTKFLT",
        "SIGCHLD",
        "SIGCONT",
        "SIGSTOP",
        "SIGTSTP",
        "SIGTTIN",
        "SIGTTOU",
        "SIGURG",
        "SIGXCPU",
        "SIGXFSZ",
        "SIGVTALRM",
        "SIGPROF",
        "SIGWINCH",
        "SIGIO",
        "SIGPWR",
        "SIGSYS",
    ];
    usize::try_from(number)
        .ok()
        .and_then(|index| NAMES.get(index).copied())
        .unwrap_or("real-time signal")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_shells() {
        assert_eq!(Ended::Exited { code: 3 }.exit_code(), 3);
        assert_eq!(Ended::Signalled { number: 9 }.exit_code(), 137);
        assert_eq!(Ended::Signalled { number: 255 }.exit_code(), 255);
    }

    #[test]
    fn signals_have_their_names() {
        assert_eq!(signal_name(9), "SIGKILL");
        assert_eq!(signal_name(15), "SIGTERM");
        assert_eq!(signal_name(31), "SIGSYS");
        assert_eq!(signal_name(40), "real-time signal");
        assert_eq!(signal_name(-1), "real-time signal");
    }
}
