//! From what the host asked to a running process: its user, variables, working directory, program and streams.

use std::{ffi::CString, io, path::Path};

use guest_wire::ProcessSpec;
use rustix::process::Pid;

use crate::{
    environment,
    error::InitError,
    spawn::{self, Program, Stage},
    stdio::{Input, Output, Wiring},
    users::Identity,
};

/// The process and our side of its streams.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) pid: Pid,
    pub(crate) input: Input,
    pub(crate) output: Output,
    /// Absent on a terminal.
    pub(crate) error: Option<Output>,
}

/// Starts the process in the root that we are in.
pub(crate) fn launch(spec: ProcessSpec, hostname: &str) -> Result<Running, InitError> {
    let ProcessSpec {
        args,
        mut env,
        cwd,
        user,
        terminal,
        stdin,
    } = spec;
    let program = args
        .first()
        .filter(|program| !program.is_empty())
        .ok_or(InitError::NoCommand)?;
    let identity = Identity::find(&user)?;
    environment::complete(&mut env, hostname, &identity.home, terminal.is_some());
    let cwd = if cwd.is_empty() {
        String::from("/")
    } else {
        cwd
    };
    make_working_directory(&cwd)?;
    let paths = candidates(
        program,
        environment::value(&env, "PATH").unwrap_or_default(),
    )?;
    let wiring = match terminal {
        Some(size) => Wiring::terminal(size, stdin)?,
        None => Wiring::pipes(stdin)?,
    };
    wiring.child.give_to(identity.uid);
    let cwd_c = c_string("working directory", cwd.as_bytes())?;
    let args_c = c_strings("argument", &args)?;
    let env_c = c_strings("environment variable", &env)?;
    let started = spawn::start(&Program {
        paths: &paths,
        args: &args_c,
        env: &env_c,
        cwd: &cwd_c,
        uid: identity.uid,
        gid: identity.gid,
        groups: &identity.groups,
        stdio: wiring.child.stdio(),
        terminal: terminal.is_some(),
    });
    let pid = started
        .map_err(|(stage, errno)| explain(stage, io::Error::from(errno), program, &cwd, &user))?;
    let Wiring {
        input,
        output,
        error,
        child,
    } = wiring;
    // Else we would hold our own pipes open and never see their end.
    drop(child);
    Ok(Running {
        pid,
        input,
        output,
        error,
    })
}

/// Docker creates an image's WorkingDir when it is missing, for root, mode 0755.
fn make_working_directory(cwd: &str) -> Result<(), InitError> {
    let failed = |source| InitError::Cwd {
        path: String::from(cwd),
        source,
    };
    if !cwd.starts_with('/') {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidInput,
            "path is not absolute",
        )));
    }
    if cwd == "/" || Path::new(cwd).is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(cwd).map_err(failed)
}

/// Where the program may be, in the order to try: as it is when its name has a slash, else in PATH's directories.
fn candidates(program: &str, path: &str) -> Result<Vec<CString>, InitError> {
    if program.contains('/') {
        return Ok(vec![c_string("argument", program.as_bytes())?]);
    }
    path.split(':')
        .map(|directory| {
            // An empty entry means the working directory (execvp(3)).
            let directory = if directory.is_empty() { "." } else { directory };
            let mut candidate = Vec::with_capacity(
                directory
                    .len()
                    .saturating_add(program.len())
                    .saturating_add(2),
            );
            candidate.extend_from_slice(directory.as_bytes());
            candidate.push(b'/');
            candidate.extend_from_slice(program.as_bytes());
            c_string("argument", &candidate)
        })
        .collect()
}

fn explain(stage: Stage, source: io::Error, program: &str, cwd: &str, user: &str) -> InitError {
    match stage {
        Stage::Exec
            if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
                && !program.contains('/') =>
        {
            InitError::NotInPath {
                program: String::from(program),
            }
        }
        Stage::Exec => InitError::Exec {
            program: String::from(program),
            source,
        },
        Stage::Cwd => InitError::Cwd {
            path: String::from(cwd),
            source,
        },
        Stage::Identity => InitError::System {
            action: "become user",
            object: String::from(user),
            source,
        },
        Stage::Fork => InitError::System {
            action: "fork for",
            object: String::from(program),
            source,
        },
        Stage::Session => InitError::System {
            action: "make a session for",
            object: String::from(program),
            source,
        },
        Stage::Stdio => InitError::System {
            action: "connect the streams of",
            object: String::from(program),
            source,
        },
    }
}

fn c_strings(what: &'static str, strings: &[String]) -> Result<Vec<CString>, InitError> {
    strings
        .iter()
        .map(|string| c_string(what, string.as_bytes()))
        .collect()
}

fn c_string(what: &'static str, bytes: &[u8]) -> Result<CString, InitError> {
    CString::new(bytes).map_err(|_nul| InitError::Nul { what })
}
