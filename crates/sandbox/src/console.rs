//! The last of what a machine said on its serial console, and what it means.
//!
//! Invariant: at most [`TAIL_BYTES_MAX`] are kept, whatever the guest prints. Left to others: reading it.

/// Bytes of the console that are kept.
const TAIL_BYTES_MAX: usize = 64 << 10;
/// Characters of one line that are shown in an error.
const SHOWN_CHARS_MAX: usize = 300;

/// A bounded tail of lines.
#[derive(Debug, Default)]
pub struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    /// Appends what came, and forgets the oldest.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        // Twice the room, so that not every push moves everything.
        if self.bytes.len() > TAIL_BYTES_MAX.saturating_mul(2) {
            let surplus = self.bytes.len().saturating_sub(TAIL_BYTES_MAX);
            self.bytes.drain(..surplus);
        }
    }

    /// Why the kernel panicked, when it says so.
    #[must_use]
    pub fn panic_line(&self) -> Option<String> {
        const MARK: &str = "Kernel panic - not syncing: ";
        self.lines()
            .filter_map(|line| Some(line.split_once(MARK)?.1.to_owned()))
            .next_back()
            .map(|line| printable(&line))
    }

    /// The last line that says anything.
    #[must_use]
    pub fn last_line(&self) -> Option<String> {
        self.lines()
            .rfind(|line| !line.trim().is_empty())
            .map(|line| printable(line.trim()))
    }

    fn lines(&self) -> impl DoubleEndedIterator<Item = String> {
        self.bytes
            .split(|&byte| byte == b'\n')
            .map(|line| String::from_utf8_lossy(line).into_owned())
    }
}

/// `text` as one line without anything that a terminal would obey: it comes from a guest.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut shown = String::new();
    for c in text.trim_end().chars().take(SHOWN_CHARS_MAX) {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    if text.chars().nth(SHOWN_CHARS_MAX).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found_among_other_lines() {
        let mut tail = Tail::default();
        tail.push(b"[    0.1] Run /init as init process\r\n[    0.2] Kernel pa");
        tail.push(
            b"nic - not syncing: VFS: Unable to mount root fs\r\n[    0.3] Rebooting\r\n\r\n",
        );
        assert_eq!(
            tail.panic_line().as_deref(),
            Some("VFS: Unable to mount root fs")
        );
        assert_eq!(tail.last_line().as_deref(), Some("[    0.3] Rebooting"));
    }

    #[test]
    fn a_silent_console_says_nothing() {
        assert_eq!(Tail::default().panic_line(), None);
        assert_eq!(Tail::default().last_line(), None);
    }

    #[test]
    fn an_endless_console_takes_bounded_memory_and_keeps_its_end() {
        let mut tail = Tail::default();
        for _ in 0..10_000 {
            tail.push(&[b'x'; 100]);
        }
        tail.push(b"\nthe end\n");
        assert!(tail.bytes.len() <= TAIL_BYTES_MAX * 2 + 100);
        assert_eq!(tail.last_line().as_deref(), Some("the end"));
    }

    #[test]
    fn control_characters_of_the_guest_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\tc\n"), "a\\u{1b}[2Jb\\tc");
        assert!(printable(&"y".repeat(1000)).chars().count() <= SHOWN_CHARS_MAX + 1);
    }
}
