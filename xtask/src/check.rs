//! `check`: what a commit has to pass, without root.

use anyhow::Result;

use crate::{build_ebpf, cargo, tidy};

/// Crates with tests that need no root.
pub const UNPRIVILEGED: [&str; 4] = ["xtask", "lb-common", "lb-core", "lb-agent"];

/// Tests that need no root in a crate whose other tests do.
pub const UNPRIVILEGED_OF_LB_TEST: [&str; 5] = ["test", "-p", "lb-test", "--test", "flow_table"];

/// Formats (checks), lints and tidies; `cargo xtask test` does the rest.
pub fn lint() -> Result<()> {
    cargo::run(&["fmt", "--all", "--check"])?;
    build_ebpf::run()?;
    cargo::run(&[
        "clippy",
        "--quiet",
        "--workspace",
        "--exclude",
        "lb-ebpf",
        "--all-targets",
        "--",
        "-Dwarnings",
    ])?;
    tidy::run()
}

/// Lints, then runs the tests that need no root.
pub fn run() -> Result<()> {
    lint()?;
    let mut args = vec!["test", "--quiet"];
    UNPRIVILEGED.iter().for_each(|name| args.extend(["-p", name]));
    cargo::run(&args)?;
    cargo::run(&UNPRIVILEGED_OF_LB_TEST)
}
