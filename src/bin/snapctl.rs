//! `snapctl`: the client of plyd for people and scripts.

use std::process::ExitCode;

fn main() -> ExitCode {
    plywood::cli::app::main()
}
