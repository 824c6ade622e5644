//! `build-ebpf`: compiles lb-ebpf for the BPF target into `target/bpf`.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    cargo::{self, is_root, show},
    setup,
};

const OBJECTS: [&str; 4] = ["xdp", "tc", "sock", "bench"];

/// What the compiler is told. `v3` has 32-bit jumps; copies are expanded by LLVM's general code, because the in-order
/// expansion that bpf-linker asks for turns every larger `memset` into a call to a loop.
const RUSTFLAGS: [&str; 5] = [
    "-Clinker=bpf-linker",
    "-Clink-arg=--btf",
    "-Clink-arg=--disable-expand-memcpy-in-order",
    "-Cdebuginfo=2",
    "-Ctarget-cpu=v3",
];

/// Builds the objects, and those that log (`run --trace-packets`).
pub fn run() -> Result<()> {
    build(Path::new("target/bpf"), &[])?;
    build(Path::new("target/bpf/trace"), &["--features", "trace"])
}

fn build(out: &Path, extra: &[&str]) -> Result<()> {
    let rustc = setup::bpf_rustc().context("no rustc that can build for BPF: run `cargo xtask setup`")?;
    let target_dir = "target/bpf-build";
    show(
        Command::new("cargo")
            .args(["build", "--quiet", "-p", "lb-ebpf", "--target", "bpfel-unknown-none", "-Zbuild-std=core"])
            .args(["--profile", "bpf", "--target-dir", target_dir])
            .args(extra)
            .env("RUSTC", &rustc.path)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("LD_LIBRARY_PATH", &rustc.lib)
            .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
            .env_remove("RUSTUP_TOOLCHAIN"),
    )?;
    fs::create_dir_all(out)?;
    for object in OBJECTS {
        let built = Path::new(target_dir).join("bpfel-unknown-none/bpf").join(object);
        let bytes = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
        if !contains(&bytes, b".BTF\0") {
            bail!("{}: no BTF section; was it linked with --btf?", built.display());
        }
        let to = out.join(format!("{object}.o"));
        // Untouched if unchanged: whatever embeds it is not built again.
        if fs::read(&to).ok().as_deref() != Some(&bytes) {
            fs::write(&to, bytes).with_context(|| format!("write {}", to.display()))?;
        }
    }
    Ok(())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// Loads every program once: what the verifier refuses is found here, not on a node.
pub fn verify() -> Result<()> {
    if !is_root() {
        eprintln!("SKIP verify: loading programs needs root");
        return Ok(());
    }
    cargo::run(&["run", "--quiet", "-p", "lb-test", "--bin", "verify"])
}
