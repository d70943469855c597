//! What runs in a container: the image's defaults and the user's wishes, joined as docker joins them.
//!
//! Invariant: the result has at least one argument and an absolute working directory. Left to others: looking up the
//! program and the user (the guest's init).

use guest_wire::{ProcessSpec, TerminalSize};

use crate::Error;

/// What an image's configuration says about its process (OCI image specification, config.md).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, each `NAME=value`.
    pub env: Vec<String>,
    /// `User`.
    pub user: String,
    /// `WorkingDir`.
    pub working_dir: String,
}

/// What the user wants otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Replaces the image's entrypoint and drops its command; empty: no entrypoint.
    pub entrypoint: Option<String>,
    /// Replaces the image's command, unless empty.
    pub command: Vec<String>,
    /// `NAME=value` sets, `NAME` removes; later ones win.
    pub env: Vec<String>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// Replaces the image's working directory.
    pub cwd: Option<String>,
    /// A terminal of this size.
    pub terminal: Option<TerminalSize>,
    /// Whether there will be standard input.
    pub stdin: bool,
}

/// Joins the two.
///
/// # Errors
/// [`Error::NoCommand`], [`Error::RelativeCwd`].
pub fn process_spec(image: ImageDefaults, user: Overrides) -> Result<ProcessSpec, Error> {
    let mut args = match &user.entrypoint {
        Some(program) if program.is_empty() => Vec::new(),
        Some(program) => vec![program.clone()],
        None => image.entrypoint,
    };
    if !user.command.is_empty() {
        args.extend(user.command);
    } else if user.entrypoint.is_none() {
        args.extend(image.cmd);
    }
    if args.is_empty() {
        return Err(Error::NoCommand);
    }

    let mut env = Vec::new();
    for setting in image.env.iter().chain(&user.env) {
        apply(&mut env, setting);
    }

    let cwd = match user.cwd {
        Some(path) if !path.starts_with('/') => return Err(Error::RelativeCwd { path }),
        Some(path) => path,
        None if image.working_dir.is_empty() => "/".to_owned(),
        // An image may say `app`; docker takes it from the root.
        None if !image.working_dir.starts_with('/') => format!("/{}", image.working_dir),
        None => image.working_dir,
    };
    Ok(ProcessSpec {
        args,
        env,
        cwd,
        user: user.user.unwrap_or(image.user),
        terminal: user.terminal,
        stdin: user.stdin,
    })
}

/// Replaces in place, so that the order is that of first mention.
fn apply(env: &mut Vec<String>, setting: &str) {
    let name = name_of(setting);
    let at = env.iter().position(|known| name_of(known) == name);
    match (setting.contains('='), at.and_then(|at| env.get_mut(at))) {
        (true, Some(slot)) => setting.clone_into(slot),
        (true, None) => env.push(setting.to_owned()),
        (false, _) => env.retain(|known| name_of(known) != name),
    }
}

fn name_of(setting: &str) -> &str {
    setting.split_once('=').map_or(setting, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn args(
        entrypoint: &str,
        cmd: &str,
        asked_entrypoint: Option<&str>,
        asked: &str,
    ) -> Vec<String> {
        let image = ImageDefaults {
            entrypoint: words(entrypoint),
            cmd: words(cmd),
            ..ImageDefaults::default()
        };
        let user = Overrides {
            entrypoint: asked_entrypoint.map(str::to_owned),
            command: words(asked),
            ..Overrides::default()
        };
        process_spec(image, user).expect("has a command").args
    }

    #[test]
    fn entrypoint_and_command_join_as_docker_joins_them() {
        assert_eq!(args("e f", "c d", None, ""), words("e f c d"));
        assert_eq!(args("e", "c", None, "x y"), words("e x y"));
        assert_eq!(args("", "c", None, ""), words("c"));
        assert_eq!(args("", "c", None, "x"), words("x"));
        assert_eq!(args("e", "c", Some("o"), ""), words("o"));
        assert_eq!(args("e", "c", Some("o"), "x"), words("o x"));
        assert_eq!(args("e", "c", Some(""), "x"), words("x"));
    }

    #[test]
    fn nothing_to_run_is_an_error_with_the_way_out() {
        let error =
            process_spec(ImageDefaults::default(), Overrides::default()).expect_err("nothing");
        assert!(matches!(error, Error::NoCommand));
        assert_eq!(error.way_out(), Some("give one after the image"));
        let image = ImageDefaults {
            cmd: words("c"),
            ..ImageDefaults::default()
        };
        let user = Overrides {
            entrypoint: Some(String::new()),
            ..Overrides::default()
        };
        process_spec(image, user).expect_err("an entrypoint reset drops the image's command too");
    }

    #[test]
    fn variables_are_replaced_in_place_and_removed_by_name() {
        let image = ImageDefaults {
            cmd: words("c"),
            env: words("PATH=/bin A=1 B=2"),
            ..ImageDefaults::default()
        };
        let user = Overrides {
            env: words("A=3 B C=x=y C=z D"),
            ..Overrides::default()
        };
        let spec = process_spec(image, user).expect("has a command");
        assert_eq!(spec.env, words("PATH=/bin A=3 C=z"));
    }

    #[test]
    fn the_working_directory_is_absolute() {
        let with = |image_dir: &str, asked: Option<&str>| {
            process_spec(
                ImageDefaults {
                    cmd: words("c"),
                    working_dir: image_dir.to_owned(),
                    ..ImageDefaults::default()
                },
                Overrides {
                    cwd: asked.map(str::to_owned),
                    ..Overrides::default()
                },
            )
            .map(|spec| spec.cwd)
        };
        assert_eq!(with("", None).expect("fine"), "/");
        assert_eq!(with("app", None).expect("fine"), "/app");
        assert_eq!(with("/app", Some("/srv")).expect("fine"), "/srv");
        assert!(matches!(
            with("/app", Some("srv")),
            Err(Error::RelativeCwd { .. })
        ));
    }

    #[test]
    fn the_users_user_comes_before_the_images() {
        let image = ImageDefaults {
            cmd: words("c"),
            user: "www".to_owned(),
            ..ImageDefaults::default()
        };
        let spec = process_spec(image.clone(), Overrides::default()).expect("fine");
        assert_eq!(spec.user, "www");
        let user = Overrides {
            user: Some("0:0".to_owned()),
            ..Overrides::default()
        };
        assert_eq!(process_spec(image, user).expect("fine").user, "0:0");
    }
}
