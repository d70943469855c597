//! `kombi`: containers in micro-VMs from the command line. One file per verb.
//!
//! Invariant: whatever fails ends in one line on standard error, `kombi: OBJECT: CAUSE; WAY OUT`, and one of the exit
//! codes of `docs/cli.md`. Left to others: everything a verb does (`image`, `sandbox`).

mod complaint;
mod containers;
mod doctor;
mod env_file;
mod format;
mod human;
mod images;
mod jail_probe;
mod preparation;
mod quantity;
mod run;
mod shell;
mod signals;
mod terminal;
mod version;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use complaint::Complaint;

const AFTER_HELP: &str = "\
Examples:
  kombi run busybox echo hello                  run a command in an image
  kombi run -it docker-archive:debian.tar bash  an interactive shell
  kombi run rootfs:/srv/root /bin/true          a directory as the root
  kombi run -d --name web nginx                 a container in the background
  kombi ps                                      those that run
  kombi images                                  the images that are here
  kombi doctor                                  what this host offers, and what Kombi will use

Environment:
  KOMBI_HOME       where images and containers are kept
  KOMBI_ASSETS     directory with the guest's vmlinux and initramfs.cpio
  KOMBI_VMM        the monitor's program, kombi-vmm
  XDG_RUNTIME_DIR  where sockets live while a machine runs
  KOMBI_TRANSLATION_CACHE
                   where translations of guest code are kept, or off
  NO_COLOR         no colours";

/// Containers in micro-VMs: each with a kernel of its own, with or without KVM.
#[derive(Debug, Parser)]
#[command(name = "kombi", version, after_help = AFTER_HELP, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(Box<run::RunArgs>),
    Ps(containers::ListArgs),
    Logs(containers::LogsArgs),
    /// Make a container as kombi run -d does, without starting it.
    #[command(override_usage = "kombi create [OPTIONS] IMAGE [COMMAND [ARG...]]")]
    Create(Box<run::RunArgs>),
    Start(containers::StartArgs),
    Restart(containers::RestartArgs),
    Stop(containers::StopArgs),
    Kill(containers::KillArgs),
    Wait(containers::WaitArgs),
    Rm(containers::RemoveArgs),
    Rename(containers::RenameArgs),
    /// The verbs about containers, as docker groups them.
    #[command(subcommand)]
    Container(containers::ContainerVerb),
    #[command(hide = true)]
    Supervise(containers::SuperviseArgs),
    Pull(images::PullArgs),
    Push(images::PushArgs),
    Images(images::ListArgs),
    Rmi(images::RemoveArgs),
    Tag(images::TagArgs),
    Inspect(images::InspectArgs),
    History(images::HistoryArgs),
    Load(images::LoadArgs),
    Save(images::SaveArgs),
    Import(images::ImportArgs),
    Login(images::LoginArgs),
    Logout(images::LogoutArgs),
    Prune(images::PruneArgs),
    /// The verbs about images, as docker groups them.
    #[command(subcommand)]
    Image(images::ImageVerb),
    Doctor(doctor::DoctorArgs),
    Completion(shell::CompletionArgs),
    Man(shell::ManArgs),
    Version(version::VersionArgs),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match cli.verb {
        Verb::Run(args) => run::run(*args),
        Verb::Ps(args) => containers::list(&args),
        Verb::Logs(args) => containers::logs(&args),
        Verb::Create(args) => run::create(*args),
        Verb::Start(args) => containers::start(&args),
        Verb::Restart(args) => containers::restart(&args),
        Verb::Stop(args) => containers::stop(&args),
        Verb::Kill(args) => containers::kill(&args),
        Verb::Wait(args) => containers::wait(&args),
        Verb::Rm(args) => containers::remove(&args),
        Verb::Rename(args) => containers::rename(&args),
        Verb::Container(verb) => containers::container(verb),
        Verb::Supervise(args) => containers::supervise(&args),
        Verb::Pull(args) => images::pull(args),
        Verb::Push(args) => images::push(&args),
        Verb::Images(args) => images::list(&args),
        Verb::Rmi(args) => images::remove(&args),
        Verb::Tag(args) => images::tag(&args),
        Verb::Inspect(args) => images::inspect(&args),
        Verb::History(args) => images::history(&args),
        Verb::Load(args) => images::load(&args),
        Verb::Save(args) => images::save(&args),
        Verb::Import(args) => images::import(args),
        Verb::Login(args) => images::login(args),
        Verb::Logout(args) => images::logout(args),
        Verb::Prune(args) => images::prune(&args),
        Verb::Image(verb) => images::image(verb),
        Verb::Doctor(args) => doctor::doctor(&args),
        Verb::Completion(args) => shell::completion(&args),
        Verb::Man(args) => shell::man(&args),
        Verb::Version(args) => version::version(&args),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(complaint) => {
            complaint.print();
            ExitCode::from(complaint.exit_code())
        }
    }
}

/// Help and version are what was asked for; anything else is a mistake, and Kombi's own (docker: 125).
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(sandbox::EXIT_KOMBI)
        }
        _ => {
            let complaint = Complaint::usage(error);
            complaint.print();
            ExitCode::from(complaint.exit_code())
        }
    }
}
