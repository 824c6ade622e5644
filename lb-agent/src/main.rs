//! `lb-agent`: see [`lb_agent::args`] for the command line.

use std::process::ExitCode;

use clap::Parser;
use lb_agent::args::{Args, command_line};

fn main() -> ExitCode {
    match lb_agent::commands::main(Args::parse_from(command_line(std::env::args_os()))) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lb-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
