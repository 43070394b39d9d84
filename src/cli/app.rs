//! The command line as a whole: what there is, and how a command's end becomes an exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use super::args::address;
use super::client::{Address, Client};
use super::error::{ENGINE, Error, Result, USAGE};
use super::{container, exec, image, layer, mount, output, run, snapshot, system, usage};

const EXIT_CODES: &str = "Exit codes:
  0    done
  1    failed; stderr says why
  2    the command line makes no sense
  run and exec exit as the process did, or with
  125  Plywood failed, or the command line makes no sense
  126  the command cannot be executed
  127  the command was not found
  128+n  signal n ended the process";

/// Runs containers on Plywood and looks after its images and snapshots.
#[derive(Debug, Parser)]
#[command(name = "snapctl", version, after_help = EXIT_CODES, subcommand_required = true, max_term_width = 100)]
struct Cli {
    /// Where plyd listens [env: PLYWOOD_ADDRESS] [default: unix:///run/plywood/plyd.sock]
    // The default and the variable are ours to look up: clap would show them in usage lines as if they
    // had been given, and take an empty variable for an address.
    #[arg(long, global = true, value_parser = address())]
    address: Option<Address>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Load, list, remove and inspect images
    #[command(subcommand)]
    Image(image::Command),
    /// Run a command in a new container
    #[command(
        override_usage = "snapctl run [OPTIONS] IMAGE [COMMAND]...",
        after_help = "Examples:
  snapctl run --rm busybox:latest echo hello
  snapctl run --rm -it busybox:latest sh
  snapctl run -d --network host -v ./site:/www:ro busybox httpd -fh /www
  tar c . | snapctl run --rm -i busybox:latest tar t"
    )]
    Run(run::RunArgs),
    /// Make a container without starting it
    #[command(
        override_usage = "snapctl create [OPTIONS] IMAGE [COMMAND]...",
        after_help = "Examples:
  snapctl start $(snapctl create --name job busybox:latest true)"
    )]
    Create(run::ContainerArgs),
    /// Start containers that were made
    #[command(after_help = "Examples:
  snapctl start job")]
    Start(container::Targets),
    /// Ask containers to end, and end them after a while
    #[command(after_help = "Examples:
  snapctl stop -t 30 web")]
    Stop(container::StopArgs),
    /// Send a signal to containers
    #[command(after_help = "Examples:
  snapctl kill -s HUP web")]
    Kill(container::KillArgs),
    /// Wait for containers to end and print their exit codes
    #[command(after_help = "Examples:
  snapctl wait job")]
    Wait(container::Targets),
    /// Remove containers
    #[command(after_help = "Examples:
  snapctl rm job
  snapctl rm -f $(snapctl ps -aq)")]
    Rm(container::RemoveArgs),
    /// List containers
    #[command(after_help = "Examples:
  snapctl ps -a
  snapctl ps --json | jq -r '.[] | [.name, .pid] | @tsv'")]
    Ps(container::PsArgs),
    /// Show containers with their OCI runtime spec, as JSON
    #[command(after_help = "Examples:
  snapctl inspect web | jq '.[0].spec.process'")]
    Inspect(container::Targets),
    /// Show what a container wrote
    #[command(after_help = "Examples:
  snapctl logs -f --tail 10 web")]
    Logs(container::LogsArgs),
    /// Run one more command in a running container
    #[command(
        override_usage = "snapctl exec [OPTIONS] CONTAINER COMMAND...",
        after_help = "Examples:
  snapctl exec web ps
  snapctl exec -it web sh"
    )]
    Exec(exec::ExecArgs),
    /// Look at snapshots, make and remove them
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Look at the packed layers that images and snapshots are made of, and take them out
    #[command(subcommand)]
    Layer(layer::Command),
    /// Mount a snapshot at a directory
    #[command(after_help = "Examples:
  snapctl snapshot prepare work busybox:latest
  snapctl mount work /mnt")]
    Mount(mount::MountArgs),
    /// Take away mounts that `snapctl mount` made
    #[command(after_help = "Examples:
  snapctl umount /mnt
  snapctl umount /mnt/*")]
    Umount(mount::UmountArgs),
    /// Show what plyd is and what is in use, and look after its store
    #[command(subcommand)]
    System(system::Command),
    /// Print a completion script for a shell
    #[command(after_help = "Examples:
  snapctl completions bash > /etc/bash_completion.d/snapctl")]
    Completions {
        /// The shell
        shell: Shell,
    },
}

impl Command {
    /// Whether its exit code is that of a process, with Docker's codes for what goes wrong before.
    fn is_engine(&self) -> bool {
        matches!(self, Self::Run(_) | Self::Exec(_))
    }
}

/// `snapctl`, from its arguments to its exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let engine = cli.command.is_engine();
    match block_on(cli) {
        Ok(code) => code,
        Err(error) => {
            output::report(&error);
            if let Error::Input(_) = error {
                let command = Cli::command();
                let path = usage::path(&command, std::env::args_os());
                for line in usage::advice(command, &path) {
                    output::note(&line);
                }
            }
            ExitCode::from(error.exit_code(engine))
        }
    }
}

fn refuse(error: &clap::Error) -> ExitCode {
    let command = Cli::command();
    let path = usage::path(&command, std::env::args_os());
    let code = match usage::is_engine(&path) {
        true => ENGINE,
        false => USAGE,
    };
    usage::refuse(error, command, &path, code)
}

fn block_on(cli: Cli) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| Error::Stdio {
            action: "start threads",
            source,
        })?;
    let result = runtime.block_on(dispatch(cli));
    // A thread may be blocked in a read of stdin; it ends with the process.
    runtime.shutdown_background();
    result
}

async fn dispatch(cli: Cli) -> Result<ExitCode> {
    if let Command::Completions { shell } = cli.command {
        return completions(shell).map(|()| ExitCode::SUCCESS);
    }
    let variable = std::env::var_os("PLYWOOD_ADDRESS");
    let address = Address::choose(cli.address, variable).map_err(Error::Input)?;
    let client = Client::connect(&address).await?;
    let client = &client;
    match cli.command {
        Command::Run(args) => return run::run(args, client).await,
        Command::Exec(args) => return exec::run(args, client).await,
        Command::Completions { .. } => Ok(()),
        Command::Image(command) => image::run(command, client).await,
        Command::Create(args) => run::create(args, client).await,
        Command::Start(targets) => container::start(targets, client).await,
        Command::Stop(args) => container::stop(args, client).await,
        Command::Kill(args) => container::kill(args, client).await,
        Command::Wait(targets) => container::wait(targets, client).await,
        Command::Rm(args) => container::remove(args, client).await,
        Command::Ps(args) => container::ps(args, client).await,
        Command::Inspect(targets) => container::inspect(targets, client).await,
        Command::Logs(args) => container::logs(args, client).await,
        Command::Snapshot(command) => snapshot::run(command, client).await,
        Command::Layer(command) => layer::run(command, client).await,
        Command::Mount(args) => mount::mount(args, client).await,
        Command::Umount(args) => mount::umount(args, client).await,
        Command::System(command) => system::run(command, client).await,
    }
    .map(|()| ExitCode::SUCCESS)
}

fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "snapctl", &mut script);
    let mut out = std::io::stdout().lock();
    out.write_all(&script).map_err(|source| Error::Stdio {
        action: "write the output",
        source,
    })
}

#[cfg(test)]
mod tests {
    /// A terminal has so many columns at the least.
    const NARROWEST: usize = 80;

    fn each_command(command: &clap::Command, look: &mut impl FnMut(&clap::Command)) {
        look(command);
        for command in command.get_subcommands() {
            each_command(command, look);
        }
    }

    /// clap breaks lines where the terminal ends; what was broken by hand before is broken twice then, and a table or
    /// an example that it breaks is none any more.
    #[test]
    fn the_help_is_broken_in_lines_by_clap_alone() {
        each_command(&Cli::command(), &mut |command| {
            let help = command.get_after_help().map(ToString::to_string);
            let help = help.unwrap_or_default();
            let is_prose = |line: &str| !line.is_empty() && !line.contains("  ");
            let mut before = "";
            for line in help.lines() {
                let name = command.get_name();
                assert!(
                    !(is_prose(line) && is_prose(before)),
                    "{name}: {before}\n{line}"
                );
                assert!(is_prose(line) || line.len() <= NARROWEST, "{name}: {line}");
                before = line;
            }
        });
    }

    use super::*;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn check(command: &clap::Command) {
            let mut leaf = true;
            for sub in command.get_subcommands() {
                leaf = false;
                check(sub);
            }
            let help = command.get_after_help().map(ToString::to_string);
            let has_example = help.is_some_and(|help| help.contains("Examples:"));
            assert!(!leaf || has_example, "{}", command.get_name());
        }
        check(&Cli::command());
    }

    #[test]
    fn the_default_address_is_in_the_help() {
        let help = Cli::command().render_help().to_string();
        let words: Vec<_> = help.split_whitespace().collect();
        let shown = format!("[default: {}]", super::super::client::DEFAULT_ADDRESS);
        assert!(words.join(" ").contains(&shown), "{help}");
    }

    #[test]
    fn options_after_the_image_belong_to_the_command() {
        let cli = parse("snapctl run --rm busybox --name ls -l --rm");
        let text = format!("{:?}", cli.command);
        let words = r#"words: ["busybox", "--name", "ls", "-l", "--rm"]"#;
        assert!(
            text.contains(words) && text.contains("name: None"),
            "{text}"
        );
    }

    #[test]
    fn the_commands_of_the_manual_parse() {
        for line in [
            "snapctl image load -i x.tar --name a:b",
            "snapctl image ls -q",
            "snapctl run -d -i -t --rm --name n -e A=b -w / -u 0:0 -v /a:/b:ro --entrypoint sh \
             --hostname h --read-only --network host img cmd",
            "snapctl create img",
            "snapctl stop -t 3 a b",
            "snapctl kill -s HUP a",
            "snapctl rm -f a",
            "snapctl ps -a --json",
            "snapctl logs -f --tail 3 a",
            "snapctl exec -i -t -e A=b -w / -u 0 a sh -c x",
            "snapctl snapshot ls --owner image --json",
            "snapctl snapshot prepare k parent --label a=b",
            "snapctl snapshot tree --json",
            "snapctl image ls --no-trunc",
            "snapctl ps --no-trunc",
            "snapctl snapshot ls --no-trunc",
            "snapctl snapshot tree --no-trunc",
            "snapctl mount k /mnt",
            "snapctl umount /mnt",
            "snapctl umount /mnt /srv",
            "snapctl snapshot tree -q",
            "snapctl system info --json",
            "snapctl system df --no-trunc",
            "snapctl system repair -i x.tar --json",
            "snapctl layer ls --no-trunc",
            "snapctl layer inspect --files 0123 --json",
            "snapctl layer export 0123 -o x.tar",
            "snapctl completions bash",
            "snapctl ps --address unix:///x",
        ] {
            let words: Vec<&str> = line.split_whitespace().collect();
            parse(&words.join(" "));
        }
        assert!(Cli::try_parse_from(["snapctl", "ps", "--json", "-q"]).is_err());
        assert!(Cli::try_parse_from(["snapctl", "exec", "a"]).is_err());
        assert!(Cli::try_parse_from(["snapctl"]).is_err());
    }

    #[test]
    fn the_subcommand_of_a_refused_line() {
        let is = |line: &str| {
            let path = usage::path(&Cli::command(), line.split(' ').map(Into::into));
            usage::is_engine(&path)
        };
        assert!(is("snapctl run --nope"));
        assert!(is("snapctl --address unix:///x exec"));
        assert!(!is("snapctl --address run ps"));
        assert!(!is("snapctl ps run"));
        assert!(!is("snapctl --help"));
    }

    #[test]
    fn what_is_refused_is_told_in_a_sentence_and_the_usage() {
        for (line, sentence) in [
            ("run --nope x", "`snapctl run` has no option --nope"),
            (
                "image ls --jsn",
                "`snapctl image ls` has no option --jsn; did you mean --json?",
            ),
            (
                "image load x.tar",
                "the archive is named with -i: `snapctl image load -i x.tar`, or read from stdin",
            ),
            (
                "image list x",
                "\"x\" is one argument too many for `snapctl image ls`",
            ),
            (
                "image lod",
                "`snapctl image` has no command \"lod\"; did you mean load?",
            ),
            ("nope", "`snapctl` has no command \"nope\""),
            (
                "image",
                "name a command of `snapctl image`: load, ls, rm, inspect, help",
            ),
            ("ps --json -q", "--json and --quiet exclude each other"),
            ("run --name a --name b x", "--name is given twice"),
            ("run --name", "--name needs a value"),
            ("image rm", "IMAGE is missing"),
            ("mount", "KEY and DIR are missing"),
            ("run", "IMAGE is missing"),
            ("exec", "CONTAINER and COMMAND are missing"),
            (
                "exec x",
                "CONTAINER and COMMAND are needed, and not all of them are given",
            ),
            ("ps --all=3", "--all takes no value; leave out \"3\""),
            (
                "create --network bridge x",
                "--network cannot be \"bridge\"; it is one of host, none",
            ),
            (
                "logs --tail x y",
                "--tail: \"x\" is not a number of lines: write one from 0 to 18446744073709551615",
            ),
            (
                "stop -t -1 x",
                "--timeout: \"-1\" is not a number of seconds: write one from 0 to 4294967295",
            ),
            (
                "snapshot prepare key parent --label a",
                "--label: \"a\" is not a label: write KEY=VALUE",
            ),
            (
                "ps --address x",
                "--address: \"x\" is not an address of plyd: write unix:///path/to/plyd.sock",
            ),
        ] {
            let words = || ["snapctl"].into_iter().chain(line.split(' '));
            let error = Cli::try_parse_from(words()).unwrap_err();
            let path = usage::path(&Cli::command(), words().map(Into::into));
            let lines = usage::explain(&error, Cli::command(), &path);
            assert_eq!(lines[0], format!("snapctl: {sentence}"), "{line}");
            let name = format!("Usage: snapctl {}", path.join(" "));
            let usage = lines.iter().find(|line| line.starts_with("Usage: "));
            assert!(
                usage.is_some_and(|usage| usage.starts_with(name.trim_end())),
                "{lines:?}"
            );
        }
    }
}
