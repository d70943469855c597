//! Changes of how an image is run, in the words of a Dockerfile: `CMD`, `ENTRYPOINT`, `ENV`, `EXPOSE`, `LABEL`,
//! `STOPSIGNAL`, `USER`, `VOLUME`, `WORKDIR`.
//!
//! Invariant: an instruction that is refused changed nothing. Left to others: whole Dockerfiles, and variables in them.

use serde_json::Value;

use crate::error::ImageError;
use crate::manifest::ImageConfig;

/// What runs a command that is not given as a list.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

impl ImageConfig {
    /// Does what one instruction says, such as `ENV LANG=C.UTF-8` or `CMD ["/bin/server", "-v"]`.
    ///
    /// # Errors
    ///
    /// [`ImageError::BadChange`].
    pub fn change(&mut self, instruction: &str) -> Result<(), ImageError> {
        let bad = |reason: String| ImageError::BadChange {
            given: instruction.to_owned(),
            reason,
        };
        let line = instruction.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        if rest.is_empty() {
            return Err(bad("there is nothing behind the instruction".to_owned()));
        }
        let mut next = self.clone();
        let changed = match word.to_ascii_uppercase().as_str() {
            "CMD" => command(rest).map(|cmd| next.cmd = cmd),
            "ENTRYPOINT" => command(rest).map(|entrypoint| next.entrypoint = entrypoint),
            "ENV" => assignments(rest).map(|all| next.set(all)),
            "LABEL" => assignments(rest).map(|all| next.labels.extend(all)),
            "EXPOSE" => ports(rest).map(|ports| add(&mut next.exposed_ports, ports)),
            "VOLUME" => list(rest).map(|paths| add(&mut next.volumes, paths)),
            "STOPSIGNAL" => one_word(rest).map(|signal| next.stop_signal = Some(signal)),
            "USER" => one_word(rest).map(|user| next.user = Some(user)),
            "WORKDIR" => {
                let before = next.working_dir.take().unwrap_or_else(|| "/".to_owned());
                next.working_dir = Some(match rest.starts_with('/') {
                    true => rest.to_owned(),
                    false => format!("{}/{rest}", before.trim_end_matches('/')),
                });
                Ok(())
            }
            _ => Err("it is none of CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR".to_owned()),
        };
        changed.map_err(bad)?;
        *self = next;
        Ok(())
    }

    /// Sets variables, each in its place if it is there already.
    fn set(&mut self, variables: Vec<(String, String)>) {
        for (name, value) in variables {
            let setting = format!("{name}={value}");
            let prefix = format!("{name}=");
            match self.env.iter_mut().find(|one| one.starts_with(&prefix)) {
                Some(there) => *there = setting,
                None => self.env.push(setting),
            }
        }
    }
}

fn add(to: &mut Vec<String>, more: Vec<String>) {
    for one in more {
        if !to.contains(&one) {
            to.push(one);
        }
    }
}

/// A list of strings as JSON, if it is one.
fn json_list(text: &str) -> Option<Vec<String>> {
    let Ok(Value::Array(all)) = serde_json::from_str(text) else {
        return None;
    };
    let strings = all.into_iter().map(|one| match one {
        Value::String(text) => Some(text),
        _ => None,
    });
    strings.collect()
}

/// A list, or what a shell is to run.
fn command(text: &str) -> Result<Vec<String>, String> {
    if let Some(list) = json_list(text) {
        return Ok(list);
    }
    Ok(SHELL
        .iter()
        .copied()
        .chain([text])
        .map(str::to_owned)
        .collect())
}

/// A list, or words.
fn list(text: &str) -> Result<Vec<String>, String> {
    match json_list(text) {
        Some(list) => Ok(list),
        None => words(text),
    }
}

fn one_word(text: &str) -> Result<String, String> {
    let [word] = <[String; 1]>::try_from(words(text)?).map_err(|_| "it takes one word")?;
    Ok(word)
}

/// `80`, `80/udp`, `8000-8010/tcp`, …
fn ports(text: &str) -> Result<Vec<String>, String> {
    let mut ports = Vec::new();
    for word in words(text)? {
        let (numbers, protocol) = word.split_once('/').unwrap_or((&word, "tcp"));
        let (first, last) = numbers.split_once('-').unwrap_or((numbers, numbers));
        let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
        let (Some(first), Some(last)) = (number(first), number(last)) else {
            return Err(format!("{word:?} is no port"));
        };
        let protocol = protocol.to_ascii_lowercase();
        if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) || first > last {
            return Err(format!("{word:?} is no port"));
        }
        ports.extend((first..=last).map(|port| format!("{port}/{protocol}")));
    }
    Ok(ports)
}

/// `NAME=VALUE NAME="VALUE …" …`, or the old `NAME VALUE …`.
fn assignments(text: &str) -> Result<Vec<(String, String)>, String> {
    let first = text.split(char::is_whitespace).next().unwrap_or_default();
    if !first.contains('=') {
        let (name, value) = text
            .split_once(char::is_whitespace)
            .ok_or_else(|| format!("{text:?} has no value"))?;
        return Ok(vec![(name.to_owned(), value.trim().to_owned())]);
    }
    let assignment = |word: String| match word.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{word:?} is not NAME=VALUE")),
    };
    words(text)?.into_iter().map(assignment).collect()
}

/// Words between white space, with quotes and backslashes as a Dockerfile has them.
fn words(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\\', None | Some('"')) => {
                let escaped = chars.next().ok_or("it ends with a backslash")?;
                let word = word.get_or_insert_default();
                // Within quotes only these are special.
                if quote.is_some() && !matches!(escaped, '"' | '\\' | '$') {
                    word.push('\\');
                }
                word.push(escaped);
            }
            ('"' | '\'', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (_, Some(open)) if c == open => quote = None,
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err("a quote is not closed".to_owned());
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn changed(instructions: &[&str]) -> ImageConfig {
        let mut config = ImageConfig::default();
        for instruction in instructions {
            config.change(instruction).expect(instruction);
        }
        config
    }

    #[test]
    fn instructions_do_what_a_dockerfiles_do() {
        let config = changed(&[
            "CMD gone",
            r#"ENTRYPOINT ["/bin/server", "-v"]"#,
            "cmd --port 80 | cat",
            r#"ENV A=1 B="two words" C=three\ words D='$x "y"' E="""#,
            "ENV A=2",
            "ENV OLD  style  = yes",
            "EXPOSE 80 53/UDP 8000-8002/tcp 80/tcp",
            r#"LABEL maintainer="me <me@example>" x=y"#,
            "STOPSIGNAL SIGINT",
            "USER 1000:1000",
            r#"VOLUME ["/a b", "/data"]"#,
            "VOLUME /data /more",
            "WORKDIR /srv",
            "WORKDIR www",
        ]);
        assert_eq!(config.entrypoint, ["/bin/server", "-v"]);
        assert_eq!(config.cmd, ["/bin/sh", "-c", "--port 80 | cat"]);
        let env = [
            "A=2",
            "B=two words",
            "C=three words",
            "D=$x \"y\"",
            "E=",
            "OLD=style  = yes",
        ];
        assert_eq!(config.env, env);
        let ports = ["80/tcp", "53/udp", "8000/tcp", "8001/tcp", "8002/tcp"];
        assert_eq!(config.exposed_ports, ports);
        assert_eq!(config.labels["maintainer"], "me <me@example>");
        assert_eq!(config.labels["x"], "y");
        assert_eq!(config.stop_signal.as_deref(), Some("SIGINT"));
        assert_eq!(config.user.as_deref(), Some("1000:1000"));
        assert_eq!(config.volumes, ["/a b", "/data", "/more"]);
        assert_eq!(config.working_dir.as_deref(), Some("/srv/www"));
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        for (instruction, reason) in [
            ("", "nothing behind"),
            ("CMD", "nothing behind"),
            ("RUN make", "none of CMD"),
            ("ENV A", "has no value"),
            ("ENV A=1 =2", "not NAME=VALUE"),
            ("ENV A=\"1", "not closed"),
            ("LABEL a=b\\", "ends with a backslash"),
            ("EXPOSE 0", "is no port"),
            ("EXPOSE 70000", "is no port"),
            ("EXPOSE 9-8", "is no port"),
            ("EXPOSE 80/icmp", "is no port"),
            ("USER a b", "one word"),
        ] {
            let mut config = changed(&["ENV A=0"]);
            let error = config.change(instruction).expect_err(instruction);
            let said = error.to_string();
            assert!(said.contains(reason), "{instruction}: {said}");
            assert_eq!(config, changed(&["ENV A=0"]));
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_written_upsets_it(word in "(CMD|ENV|LABEL|EXPOSE|VOLUME|USER)", rest in ".{0,60}") {
            let _ = ImageConfig::default().change(&format!("{word} {rest}"));
        }

        #[test]
        fn a_quoted_value_comes_back(value in "[^\"\\\\$]{0,40}") {
            let mut config = ImageConfig::default();
            config.change(&format!("ENV A=\"{value}\"")).expect("one assignment");
            prop_assert_eq!(&config.env, &[format!("A={value}")]);
        }
    }
}
