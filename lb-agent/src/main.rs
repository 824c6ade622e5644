//! `lb-agent`: see [`lb_agent::args`] for the command line.

use std::process::ExitCode;

use clap::Parser;
use lb_agent::args::Args;

fn main() -> ExitCode {
    match lb_agent::commands::main(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lb-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
