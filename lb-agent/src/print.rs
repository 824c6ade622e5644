//! Tables and JSON for people and scripts.

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use crate::args::Output;

/// Prints rows, either way.
pub fn rows<T: Serialize>(rows: &[T], output: Output) -> Result<()> {
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(rows)?),
        Output::Table => print!("{}", table(rows)?),
    }
    Ok(())
}

/// Aligned columns under the fields' names.
pub fn table<T: Serialize>(rows: &[T]) -> Result<String> {
    let mut lines: Vec<Vec<String>> = Vec::new();
    for row in rows {
        let Value::Object(fields) = serde_json::to_value(row)? else { continue };
        if lines.is_empty() {
            lines.push(fields.keys().map(|key| key.to_uppercase().replace('_', " ")).collect());
        }
        lines.push(fields.values().map(cell).collect());
    }
    let columns = lines.first().map_or(0, Vec::len);
    let widths: Vec<usize> =
        (0..columns).map(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    Ok(text)
}

fn cell(value: &Value) -> String {
    match value {
        Value::String(text) if text.is_empty() => "-".into(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".into(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        #[derive(Serialize)]
        struct Row {
            name: &'static str,
            backends: Vec<u8>,
        }
        let rows = [Row { name: "a", backends: vec![1, 2] }, Row { name: "longer", backends: vec![] }];
        expect_test::expect![[r"
            NAME    BACKENDS
            a       1,2
            longer  -
        "]]
        .assert_eq(&table(&rows).unwrap());
    }
}
