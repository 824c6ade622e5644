//! Folders of manifests and the tables they become on node1. `UPDATE_EXPECT=1 cargo test -p lb-agent --test golden`
//! writes the tables anew: read the difference before it is committed.

use std::{fmt::Write as _, path::Path};

use expect_test::expect_file;
use lb_agent::source::manifests::Manifests;
use lb_core::compile::{CompileConfig, Compiler, NodeView};

fn table(case: &str) -> String {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    // A folder of its own with the nodes beside the case's files.
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(case);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::copy(golden.join("nodes.yaml"), dir.join("nodes.yaml")).unwrap();
    for entry in std::fs::read_dir(golden.join(case)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    let (events, file_warnings) = Manifests::new(dir.clone()).scan().unwrap();
    let view = NodeView {
        name: "node1".into(),
        zone: None,
        addresses: ["192.0.2.11", "2001:db8::11"].map(|addr| addr.parse().unwrap()).to_vec(),
    };
    let mut compiler = Compiler::new(CompileConfig::default(), view);
    events.into_iter().for_each(|event| compiler.apply(event));
    compiler.compile();
    let mut text = compiler.table().to_string();
    let of_files = file_warnings.iter().flat_map(|(_, warnings)| warnings);
    for warning in of_files.chain(compiler.warnings()) {
        writeln!(text, "warning {}: {}: {}", warning.object, warning.field, warning.problem).unwrap();
    }
    text.replace(&format!("{}/", dir.display()), "")
}

#[test]
fn the_story() {
    expect_file!["golden/story/table.txt"].assert_eq(&table("story"));
}

#[test]
fn every_type() {
    expect_file!["golden/every-type/table.txt"].assert_eq(&table("every-type"));
}

#[test]
fn policies() {
    expect_file!["golden/policies/table.txt"].assert_eq(&table("policies"));
}

#[test]
fn odd_objects() {
    expect_file!["golden/odd-objects/table.txt"].assert_eq(&table("odd-objects"));
}
