//! Rules that no compiler checks.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

/// Longest source file, in lines; exceptions with their reason.
const MAX_LINES: usize = 800;
const LONG_FILES: [(&str, &str); 0] = [];

/// Checks all rules and lists every breach.
pub fn run() -> Result<()> {
    let mut breaches = Vec::new();
    let files = tracked_files()?;
    for path in files.iter().filter(|path| path.extension().is_some_and(|ext| ext == "rs" || ext == "md")) {
        let Ok(text) = fs::read_to_string(path) else { continue };
        let name = path.display();
        let long = text.lines().count() > MAX_LINES && path.extension().is_some_and(|ext| ext == "rs");
        if long && !LONG_FILES.iter().any(|(file, _)| Path::new(file) == path) {
            breaches.push(format!("{name}: more than {MAX_LINES} lines; which two concerns met here?"));
        }
        for (number, line) in text.lines().enumerate() {
            // Spelled in pieces, so that this file doesn't breach its own rules.
            for word in [
                concat!("to", "do!("),
                concat!("unimple", "mented!("),
                concat!("TO", "DO"),
                concat!("FIX", "ME"),
                // What follows, or what doesn't, was taken out by hand.
                concat!("if tr", "ue {"),
                concat!("if fal", "se {"),
            ] {
                if line.contains(word) {
                    breaches.push(format!("{name}:{}: {word}", number + 1));
                }
            }
        }
    }
    imports(&mut breaches)?;
    maps_are_documented(&mut breaches)?;
    e2e_tests_exist(&mut breaches)?;
    if !breaches.is_empty() {
        bail!("tidy:\n  {}", breaches.join("\n  "));
    }
    Ok(())
}

fn tracked_files() -> Result<Vec<PathBuf>> {
    let output = Command::new("git").args(["ls-files"]).output().context("run git ls-files")?;
    Ok(String::from_utf8(output.stdout)?.lines().map(PathBuf::from).collect())
}

/// lb-core is pure, lb-common depends on bytemuck alone.
fn imports(breaches: &mut Vec<String>) -> Result<()> {
    for (manifest, forbidden) in [
        ("lb-core/Cargo.toml", &["kube", "tokio", "aya", "k8s-openapi", "lb-agent", "libc"][..]),
        ("lb-common/Cargo.toml", &["kube", "tokio", "aya", "aya-ebpf", "lb-core", "serde"][..]),
    ] {
        let text = fs::read_to_string(manifest).with_context(|| format!("read {manifest}"))?;
        for name in forbidden {
            let depends =
                |line: &str| line.starts_with(&format!("{name} ")) || line.starts_with(&format!("{name}."));
            if text.lines().any(depends) {
                breaches.push(format!("{manifest}: must not depend on {name}"));
            }
        }
    }
    Ok(())
}

/// docs/e2e.md names tests that there are: `file::test`, `file::test/row`, the last of them perhaps cut short by `…`.
fn e2e_tests_exist(breaches: &mut Vec<String>) -> Result<()> {
    let text = fs::read_to_string("docs/e2e.md").context("read docs/e2e.md")?;
    for named in text.split('`').skip(1).step_by(2).filter(|named| named.starts_with("netns_")) {
        let (file, test) = named.split_once("::").unwrap_or((named, ""));
        let source = fs::read_to_string(format!("lb-test/tests/{file}.rs")).unwrap_or_default();
        let known = |part: &str| part.split('…').all(|piece| source.contains(piece));
        if source.is_empty() || !test.split('/').all(known) {
            breaches.push(format!("docs/e2e.md: there is no test {named}"));
        }
    }
    Ok(())
}

/// Every map is in docs/map-abi.md, every outcome in docs/packet-walk.md.
fn maps_are_documented(breaches: &mut Vec<String>) -> Result<()> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
    let abi = read("docs/map-abi.md")?;
    for line in read("lb-ebpf/src/maps.rs")?.lines() {
        if let Some(name) = line.strip_prefix("pub static ").and_then(|rest| rest.split(':').next())
            && !abi.contains(name)
        {
            breaches.push(format!("docs/map-abi.md: map {name} is missing"));
        }
    }
    let walk = read("docs/packet-walk.md")?;
    for line in read("lb-common/src/outcome.rs")?.lines() {
        let label = line.trim().strip_suffix("\";").and_then(|rest| rest.rsplit('"').next());
        if let Some(label) = label.filter(|label| label.contains('_') && line.contains(" = "))
            && !walk.contains(label)
        {
            breaches.push(format!("docs/packet-walk.md: outcome {label} is missing"));
        }
    }
    Ok(())
}
