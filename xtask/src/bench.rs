//! `bench`: measures, here or in the test VM.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{build_ebpf, cargo, vm};

/// The kernel that has what this machine's may lack: IPVS.
const KERNEL: &str = "linux-image-cloud-amd64";

/// For all of a benchmark in the VM, where everything takes some ten times as long.
const LIMIT: Duration = Duration::from_secs(60 * 60);

/// Builds and runs the benchmark with these arguments.
pub fn run(args: &[&str], in_vm: bool) -> Result<()> {
    build_ebpf::run()?;
    if args.first() == Some(&"api") {
        // It starts a real agent.
        cargo::run(&["build", "--quiet", "--release", "-p", "lb-agent"])?;
    }
    if !in_vm {
        let run = ["run", "--quiet", "--release", "-p", "lb-test", "--bin", "bench", "--"];
        return cargo::run(&[&run, args].concat());
    }
    if let Some(reason) = vm::obstacle() {
        bail!("no test VM here: {reason}");
    }
    cargo::run(&["build", "--quiet", "--release", "-p", "lb-test", "--bin", "bench"])?;
    let kernel = vm::fetch(KERNEL)?.with_context(|| format!("this Debian release has no {KERNEL}"))?;
    let script = format!(
        "export PATH='{}:/usr/sbin:/sbin' HOME=/root\ncd '{}'\nexec target/release/bench {}\n",
        std::env::var("PATH")?,
        cargo::root().display(),
        args.iter().map(|arg| format!("'{arg}'")).collect::<Vec<_>>().join(" ")
    );
    eprintln!("+ boot {}; its times compare with each other only", kernel.release);
    match vm::boot(&kernel, &script, LIMIT, |line| println!("{line}"))? {
        0 => Ok(()),
        code => bail!("the benchmark ended with {code}"),
    }
}
