//! `test`: runs the rings and adds up what they say.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{
    build_ebpf,
    cargo::is_root,
    check::{UNPRIVILEGED, UNPRIVILEGED_OF_LB_TEST},
    tidy,
};

/// A ring of tests, least power first.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Ring {
    /// Beside the code, and golden folders: no root.
    Unit,
    /// Real programs under BPF_PROG_TEST_RUN: root.
    Packet,
    /// Real sockets in network namespaces: root.
    Netns,
}

#[derive(Default)]
struct Sum {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// Runs the named rings, or all, and closes with one line of counts.
pub fn run(rings: &[Ring]) -> Result<()> {
    let all = [Ring::Unit, Ring::Packet, Ring::Netns];
    let rings = if rings.is_empty() { &all } else { rings };
    if rings.iter().any(|ring| *ring != Ring::Unit) && !is_root() {
        bail!("packet and netns tests need root: run as root, or `cargo xtask test unit`");
    }
    build_ebpf::run()?;
    let mut sum = Sum::default();
    for ring in rings {
        match ring {
            Ring::Unit => {
                tidy::run()?;
                let mut args = vec!["test", "--no-fail-fast"];
                UNPRIVILEGED.iter().for_each(|name| args.extend(["-p", name]));
                cargo_test(&args, &mut sum)?;
                cargo_test(&UNPRIVILEGED_OF_LB_TEST, &mut sum)?;
            }
            Ring::Packet => {
                build_ebpf::verify()?;
                cargo_test(
                    &[
                        "test",
                        "--no-fail-fast",
                        "-p",
                        "lb-test",
                        "--lib",
                        "--test",
                        "packet_*",
                        "--",
                        "--test-threads=2",
                    ],
                    &mut sum,
                )?;
            }
            Ring::Netns => {
                cargo_test(&["build", "-p", "lb-agent", "-p", "lb-test", "--bins"], &mut Sum::default())?;
                cargo_test(
                    &[
                        "test",
                        "--no-fail-fast",
                        "-p",
                        "lb-test",
                        "--test",
                        "netns_*",
                        "--",
                        "--test-threads=1",
                    ],
                    &mut sum,
                )?;
            }
        }
    }
    println!("\n{} passed, {} failed, {} skipped", sum.passed, sum.failed, sum.skipped);
    if sum.failed > 0 {
        bail!("{} tests failed", sum.failed);
    }
    Ok(())
}

/// Runs `cargo test`, shows what it prints, and counts. A failing test is counted; a build that fails is an error.
fn cargo_test(args: &[&str], sum: &mut Sum) -> Result<()> {
    eprintln!("+ cargo {}", args.join(" "));
    let mut child = Command::new("cargo").args(args).stdout(Stdio::piped()).spawn().context("start cargo")?;
    let stdout = child.stdout.take().context("cargo's output")?;
    let failed_before = sum.failed;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        println!("{line}");
        if line.starts_with("SKIP ") {
            sum.skipped += 1;
        }
        if let Some(counts) = line.strip_prefix("test result: ") {
            sum.passed += count(counts, " passed");
            sum.failed += count(counts, " failed");
        }
    }
    let status = child.wait()?;
    if !status.success() && sum.failed == failed_before {
        bail!("cargo {}: {status}", args.join(" "));
    }
    Ok(())
}

/// The number before a word, as in `ok. 12 passed; 0 failed; …`.
fn count(line: &str, word: &str) -> u64 {
    let before = line.split(word).next().unwrap_or_default();
    before.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn counts_are_read_from_libtest() {
        let line = "FAILED. 12 passed; 3 failed; 0 ignored; 0 measured";
        assert_eq!((count(line, " passed"), count(line, " failed")), (12, 3));
    }
}
