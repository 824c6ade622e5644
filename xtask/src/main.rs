//! The build system: `cargo xtask <command>`. This file only dispatches; each command has a file of its own.

mod bench;
mod build_ebpf;
mod cargo;
mod check;
mod setup;
mod test;
mod tidy;
mod vm;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Build, test and measure. Every command first installs what it needs (`setup`).
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or install what building and testing need.
    Setup {
        /// Only report what is missing; exit 1 if anything is.
        #[arg(long)]
        check: bool,
    },
    /// Build the BPF objects into target/bpf and load each once as a check.
    BuildEbpf {
        /// Don't load the objects into this kernel.
        #[arg(long)]
        no_verify: bool,
    },
    /// Format, clippy, tidy rules, unit and golden tests. Needs no root.
    Check,
    /// Of check all but the tests: what goes before `test`.
    Lint,
    /// Run tests: unit, packet (BPF_PROG_TEST_RUN), netns (real sockets) and vm (other kernels); all by default.
    Test {
        /// Which rings; all if none is named.
        rings: Vec<test::Ring>,
        /// Leave out the ring vm.
        #[arg(long)]
        no_vm: bool,
    },
    /// Verified instructions of each program against lb-ebpf/verifier.toml.
    Verifier {
        /// Write the measured numbers, plus a fifth, as the new budgets.
        #[arg(long)]
        write: bool,
    },
    /// Measure: `packet` is ns per packet, `sync` is programming time, `api` is an agent at an API server, `wire` is reading
    /// a watch event.
    Bench {
        /// packet, sync, api or wire.
        what: String,
        /// Machine-readable output.
        #[arg(long)]
        json: bool,
        /// In the test VM, on a kernel that has IPVS: `bench sync --vm -- --modes ebpf,ipvs`.
        #[arg(long)]
        vm: bool,
        /// For the benchmark, as in `bench sync -- --services 1000 --modes ebpf,nftables`.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// The story of the README, live: a client, two nodes and pods as network namespaces.
    Demo {
        /// Leave everything up to look around.
        #[arg(long)]
        keep: bool,
        /// Remove what an earlier `--keep` left.
        #[arg(long)]
        remove: bool,
    },
}

fn main() -> Result<()> {
    std::env::set_current_dir(cargo::root())?;
    match Args::parse().command {
        Command::Setup { check } => setup::run(check),
        Command::BuildEbpf { no_verify } => {
            setup::ensure()?;
            build_ebpf::run()?;
            if no_verify { Ok(()) } else { build_ebpf::verify() }
        }
        Command::Check => {
            setup::ensure()?;
            check::run()
        }
        Command::Lint => {
            setup::ensure()?;
            check::lint()
        }
        Command::Test { rings, no_vm } => {
            setup::ensure()?;
            test::run(&rings, !no_vm)
        }
        Command::Verifier { write } => {
            setup::ensure()?;
            build_ebpf::run()?;
            let mode = if write { "--write" } else { "--budget" };
            cargo::run(&[
                "run",
                "--quiet",
                "-p",
                "lb-test",
                "--bin",
                "verify",
                "--",
                mode,
                "lb-ebpf/verifier.toml",
            ])
        }
        Command::Bench { what, json, vm, args: more } => {
            setup::ensure()?;
            let mut args = vec![&*what];
            args.extend(json.then_some("--json"));
            args.extend(more.iter().map(String::as_str));
            bench::run(&args, vm)
        }
        Command::Demo { keep, remove } => {
            setup::ensure()?;
            build_ebpf::run()?;
            cargo::run(&["build", "--release", "-p", "lb-agent", "-p", "lb-test", "--bins"])?;
            let mut args = vec!["run", "--quiet", "--release", "-p", "lb-test", "--bin", "demo", "--"];
            args.extend(keep.then_some("--keep"));
            args.extend(remove.then_some("--remove"));
            cargo::run(&args)
        }
    }
}
