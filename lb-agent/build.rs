//! Finds the BPF objects to embed. Without them the agent still builds, and says at run time what is missing.

use std::{env, fs, path::PathBuf};

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let default = manifest.parent().expect("lies in the workspace").join("target/bpf");
    let dir = env::var_os("LB_BPF_DIR").map_or(default, PathBuf::from);
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo::rerun-if-env-changed=LB_BPF_DIR");
    for name in ["xdp.o", "tc.o", "sock.o", "trace/xdp.o", "trace/tc.o"] {
        let from = dir.join(name);
        println!("cargo::rerun-if-changed={}", from.display());
        let object = fs::read(&from).unwrap_or_default();
        fs::write(out.join(name.replace('/', "-")), object).expect("OUT_DIR is writable");
    }
}
