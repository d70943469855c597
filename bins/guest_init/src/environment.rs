//! The process's variables: what the host gave, and Docker's defaults for what it did not.

/// Docker's default (`moby/oci/defaults`), where programs are also looked up when the image sets no PATH.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The value of `name` in `variables`; the last one counts, as for Docker.
pub(crate) fn value<'a>(variables: &'a [String], name: &str) -> Option<&'a str> {
    variables
        .iter()
        .rev()
        .find_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
}

/// Adds PATH, HOSTNAME, HOME and, on a terminal, TERM where missing.
pub(crate) fn complete(variables: &mut Vec<String>, hostname: &str, home: &str, terminal: bool) {
    let mut default = |name: &str, text: &str| {
        if value(variables, name).is_none() {
            let mut variable =
                String::with_capacity(name.len().saturating_add(1).saturating_add(text.len()));
            variable.push_str(name);
            variable.push('=');
            variable.push_str(text);
            variables.push(variable);
        }
    };
    default("PATH", PATH);
    if !hostname.is_empty() {
        default("HOSTNAME", hostname);
    }
    if terminal {
        default("TERM", "xterm");
    }
    default("HOME", home);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_fill_only_what_is_missing() {
        let mut variables = vec![
            String::from("HOME=/mine"),
            String::from("PATHS=no"),
            String::from("TERM="),
        ];
        complete(&mut variables, "box", "/root", true);
        assert_eq!(
            variables,
            [
                "HOME=/mine",
                "PATHS=no",
                "TERM=",
                &format!("PATH={PATH}"),
                "HOSTNAME=box"
            ]
        );
    }

    #[test]
    fn last_value_counts() {
        let variables = [
            String::from("A=1"),
            String::from("A=2"),
            String::from("AB=3"),
        ];
        assert_eq!(value(&variables, "A"), Some("2"));
        assert_eq!(value(&variables, "B"), None);
    }
}
