//! `setup`: finds what building and testing need; as root on Debian or Ubuntu installs what is missing, elsewhere says
//! exactly what to run.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::cargo::{is_root, show};

/// The version that reads the bitcode of the compilers named here (LLVM 22).
const BPF_LINKER: &str = "bpf-linker@0.10.3";

/// Debian packages of a rustc with its library's sources: the rustup toolchain `rust-src` needs may not be there.
const RUSTC_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

/// Programs the tests run, and the Debian packages that have them.
const TOOLS: [(&str, &str); 12] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("ethtool", "ethtool"),
    ("conntrack", "conntrack"),
    ("bpftool", "bpftool"),
    ("tcpdump", "tcpdump"),
    ("curl", "curl"),
    ("ipset", "ipset"),
    ("ipvsadm", "ipvsadm"),
    ("modprobe", "kmod"),
    ("xz", "xz-utils"),
];

/// A compiler that can build `core` for the BPF target.
pub struct BpfRustc {
    /// The compiler.
    pub path: PathBuf,
    /// Its shared libraries; libLLVM among them.
    pub lib: PathBuf,
}

/// Reports (`--check`) or installs what is missing, and says what is used.
pub fn run(check: bool) -> Result<()> {
    if check {
        let missing = missing();
        missing.iter().for_each(|item| println!("missing: {item}"));
        if !missing.is_empty() {
            std::process::exit(1);
        }
    } else {
        ensure()?;
    }
    let rustc = bpf_rustc().context("no rustc that can build for BPF")?;
    println!("BPF compiler: {}", rustc.path.display());
    println!("BPF linker:   bpf-linker");
    println!("tools:        {}", TOOLS.map(|(tool, _)| tool).join(", "));
    Ok(())
}

/// Installs what is missing; quiet if nothing is.
pub fn ensure() -> Result<()> {
    let packages: Vec<&str> = TOOLS
        .iter()
        .filter(|(tool, _)| !on_path(tool))
        .map(|(_, package)| *package)
        .chain(if bpf_rustc().is_none() { RUSTC_PACKAGES.to_vec() } else { Vec::new() })
        .collect();
    if !packages.is_empty() {
        if !is_root() || !Path::new("/etc/debian_version").exists() {
            let missing = missing().join(", ");
            bail!(
                "missing: {missing}\nrun as root (Debian, Ubuntu):\n  apt-get update && apt-get install -y --no-install-recommends {}\n  cargo install {BPF_LINKER} --locked\nor, for the compiler: rustup toolchain install nightly --component rust-src",
                packages.join(" ")
            );
        }
        eprintln!("installing {}", packages.join(" "));
        show(Command::new("apt-get").args(["update", "-qq"]))?;
        show(
            Command::new("apt-get")
                .args(["install", "-y", "-qq", "--no-install-recommends"])
                .args(&packages)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )?;
    }
    if !on_path("bpf-linker") {
        eprintln!("installing {BPF_LINKER} (about two minutes)");
        show(Command::new("cargo").args(["install", "--locked", "--quiet", BPF_LINKER]))?;
    }
    mount_bpffs()
}

fn missing() -> Vec<String> {
    let mut missing: Vec<String> = TOOLS
        .iter()
        .filter(|(tool, _)| !on_path(tool))
        .map(|(tool, package)| format!("{tool} (package {package})"))
        .collect();
    if bpf_rustc().is_none() {
        missing.push(format!("a rustc with sources (packages {})", RUSTC_PACKAGES.join(", ")));
    }
    if !on_path("bpf-linker") {
        missing.push(format!("bpf-linker (cargo install {BPF_LINKER} --locked)"));
    }
    missing
}

/// rustup's nightly if it has its sources, else Debian's own compiler.
pub fn bpf_rustc() -> Option<BpfRustc> {
    let nightly = Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]).output().ok();
    let nightly = nightly
        .filter(|output| output.status.success())
        .map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim().to_owned()));
    nightly.into_iter().chain([PathBuf::from("/usr/bin/rustc")]).find_map(with_sources)
}

fn with_sources(path: PathBuf) -> Option<BpfRustc> {
    let output = Command::new(&path).args(["--print", "sysroot"]).stderr(Stdio::null()).output().ok()?;
    let sysroot = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    let sources = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
    sources.exists().then(|| BpfRustc { path, lib: sysroot.join("lib") })
}

fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(tool).is_file())
}

/// Maps and links are pinned there.
fn mount_bpffs() -> Result<()> {
    let dir = Path::new("/sys/fs/bpf");
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    if !is_root() || !dir.is_dir() || mounts.lines().any(|line| line.contains(" /sys/fs/bpf bpf ")) {
        return Ok(());
    }
    eprintln!("mounting bpffs at /sys/fs/bpf");
    show(Command::new("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))
}
