//! Folders of manifests, and what becomes of them on node1.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use clap::Parser;
use lb_agent::{
    args::{Args, Command},
    render::text,
};
use lb_core::{
    compile::{CompileConfig, Compiler, NodeView},
    model::Warning,
};

/// Where the cases are.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// An empty folder of its own, but for the nodes.
pub fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name.replace('/', "-"));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    fs::copy(golden().join("nodes.yaml"), dir.join("nodes.yaml")).unwrap();
    dir
}

/// Of node1, with the options that are there if none are given.
pub fn compiler() -> Compiler {
    let view = NodeView {
        name: "node1".into(),
        addresses: ["192.0.2.11", "2001:db8::11"].map(|addr| addr.parse().unwrap()).to_vec(),
        ..NodeView::default()
    };
    Compiler::new(CompileConfig::default(), view)
}

/// The table and all warnings, in words.
pub fn table<'a>(compiler: &'a Compiler, of_files: impl IntoIterator<Item = &'a Warning>) -> String {
    let mut text = compiler.table().to_string();
    for warning in of_files.into_iter().chain(compiler.warnings()) {
        writeln!(text, "warning {}: {}: {}", warning.object, warning.field, warning.problem).unwrap();
    }
    text
}

/// What `lb-agent render` prints of a folder.
pub fn render(mode: &str, dir: &Path, options: &[&str]) -> String {
    let manifests = dir.display().to_string();
    let typed = ["lb-agent", "render", "--mode", mode, "--node-name", "node1", "--manifests", &manifests];
    match Args::parse_from(typed.iter().chain(options)).command {
        Command::Render(options) => text(&options).unwrap(),
        other => panic!("{other:?}"),
    }
}
