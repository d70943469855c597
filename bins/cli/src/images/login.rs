//! `kombi login` and `kombi logout`.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;

use registry::{Configuration, Credentials, Registries};

use super::{EXIT_FAILED, registry_complaint};
use crate::complaint::Complaint;
use crate::terminal::Unseen;

/// Docker's registry, where none is named.
const HUB: &str = "docker.io";
/// Bytes of a user's name or a password.
const SECRET_BYTES_MAX: u64 = 64 << 10;

const AFTER_HELP: &str = "\
What is written down, docker and podman find as well: in the first of their files that knows the
registry, otherwise in $REGISTRY_AUTH_FILE or ~/.config/containers/auth.json, or with the
credential helper that the file names. Without a helper, who may read the file has the password.

Examples:
  kombi login registry.example
  kombi login -u me --password-stdin registry.example < token";

/// Log in to a registry.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct LoginArgs {
    /// Who you are there [default: asks].
    #[arg(short, long, value_name = "USER")]
    username: Option<String>,

    /// The password; others on this host may see it here.
    #[arg(
        short,
        long,
        value_name = "PASSWORD",
        conflicts_with = "password_stdin"
    )]
    password: Option<String>,

    /// Take the password from standard input.
    #[arg(long, requires = "username")]
    password_stdin: bool,

    /// Write it into this file only.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,

    /// Host and port [default: docker.io].
    #[arg(value_name = "REGISTRY")]
    registry: Option<String>,
}

/// Remove what a login wrote down.
#[derive(Debug, clap::Args)]
pub(crate) struct LogoutArgs {
    /// Remove it from this file only.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,

    /// Host and port [default: docker.io].
    #[arg(value_name = "REGISTRY")]
    registry: Option<String>,
}

/// Asks the registry, and writes down what it took.
pub(crate) fn login(args: LoginArgs) -> Result<u8, Complaint> {
    let registry = args.registry.as_deref().unwrap_or(HUB);
    let terminal = std::io::stdin().is_terminal();
    let (user, password) = match (args.username, args.password, args.password_stdin) {
        (Some(user), Some(password), _) => {
            eprintln!("kombi: others on this host may see the password; use --password-stdin");
            (user, password)
        }
        (Some(user), None, true) => (user, from_stdin()?),
        _ if !terminal => {
            let what = "standard input is not a terminal: nobody can be asked";
            let way_out = "give --username and --password-stdin";
            return Err(Complaint::new(what, way_out).with_exit_code(EXIT_FAILED));
        }
        (user, password, _) => {
            let user = user.map_or_else(|| asked("Username: ", false), Ok)?;
            (
                user,
                password.map_or_else(|| asked("Password: ", true), Ok)?,
            )
        }
    };
    if user.is_empty() || password.is_empty() || user.contains(':') {
        let what = "user and password are not empty, and a user has no colon";
        return Err(Complaint::new(what, "try again").with_exit_code(EXIT_FAILED));
    }
    let told = |error: registry::Error| {
        let complaint = match &error {
            registry::Error::Denied { .. } => {
                Complaint::caused(&error, Some("check user and password"))
            }
            error => registry_complaint(error),
        };
        let complaint = complaint.about(format!("failed to log in to {registry}"));
        complaint.with_exit_code(EXIT_FAILED)
    };
    let configuration = Configuration::of_user().map_err(told)?;
    let registries = Registries::new(configuration, credentials(args.authfile)).map_err(told)?;
    registries.login(registry, &user, &password).map_err(told)?;
    println!("Login Succeeded");
    Ok(0)
}

/// Removes it.
pub(crate) fn logout(args: LogoutArgs) -> Result<u8, Complaint> {
    let registry = args.registry.as_deref().unwrap_or(HUB);
    let found = credentials(args.authfile).logout(registry);
    let found = found.map_err(|error| {
        let complaint =
            registry_complaint(&error).about(format!("failed to log out of {registry}"));
        complaint.with_exit_code(EXIT_FAILED)
    })?;
    if found {
        println!("Removing login credentials for {registry}");
    } else {
        println!("Not logged in to {registry}");
    }
    Ok(0)
}

fn credentials(file: Option<PathBuf>) -> Credentials {
    file.map_or_else(Credentials::of_user, |file| {
        Credentials::in_files(vec![file])
    })
}

fn from_stdin() -> Result<String, Complaint> {
    let mut text = String::new();
    let read = std::io::stdin()
        .take(SECRET_BYTES_MAX)
        .read_to_string(&mut text);
    read.map_err(|error| unread(&error))?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// What the user types behind `prompt`, shown or not.
fn asked(prompt: &str, secret: bool) -> Result<String, Complaint> {
    let stdin = std::io::stdin();
    let unseen = secret.then(|| Unseen::enter(stdin.as_fd())).transpose();
    let unseen = unseen.map_err(|error| unread(&error))?;
    // Not on standard output, which is for scripts.
    eprint!("{prompt}");
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    let read = stdin.lock().take(SECRET_BYTES_MAX).read_line(&mut line);
    drop(unseen);
    if secret {
        eprintln!();
    }
    read.map_err(|error| unread(&error))?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn unread(error: &std::io::Error) -> Complaint {
    let complaint = Complaint::caused(error, Some("give --username and --password-stdin"));
    complaint
        .about("failed to read standard input")
        .with_exit_code(EXIT_FAILED)
}
