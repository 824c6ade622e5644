//! What `bench sync` measured, as a picture: time by number of Services, both on logarithmic scales.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Result, anyhow};
use plotters::{coord::Shift, prelude::*};
use serde_json::Value;

/// A mode's line: number of Services, milliseconds.
type Lines = BTreeMap<String, Vec<(f64, f64)>>;

/// Draws the rows of `bench sync` into an SVG file: all of a cluster, and one endpoint that changes.
///
/// # Errors
///
/// If the file can't be written.
pub fn sync(rows: &[Value], file: &Path) -> Result<()> {
    let area = SVGBackend::new(file, (960, 420)).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("draw {}: {error}", file.display());
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    for (half, (what, field, to_ms)) in area
        .split_evenly((1, 2))
        .iter()
        .zip([("all", "ms", 1.0), ("one endpoint changes", "median_us", 1e-3)])
    {
        draw(half, what, &lines(rows, what, field, to_ms)).map_err(|error| failed(&error))?;
    }
    area.present().map_err(|error| failed(&error))
}

/// `ebpf, 1000 services x 10 endpoints: all` with `"ms": 36`.
fn lines(rows: &[Value], what: &str, field: &str, to_ms: f64) -> Lines {
    let mut lines = Lines::new();
    for row in rows {
        let Some((cluster, of)) = row["case"].as_str().and_then(|case| case.split_once(": ")) else {
            continue;
        };
        let Some((mode, services)) = cluster.split_once(", ") else { continue };
        let services = services.split(' ').next().and_then(|number| number.parse().ok());
        if let (true, Some(services), Some(time)) = (of == what, services, row[field].as_f64()) {
            lines.entry(mode.to_owned()).or_default().push((services, (time * to_ms).max(1e-3)));
        }
    }
    lines
}

fn draw<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    what: &str,
    lines: &Lines,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let points = || lines.values().flatten();
    let (first, last) = points()
        .fold((f64::MAX, 1.0f64), |(first, last), (services, _)| (first.min(*services), last.max(*services)));
    let (low, high) =
        points().fold((f64::MAX, 1e-3f64), |(low, high), (_, ms)| (low.min(*ms), high.max(*ms)));
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{what}: ms by number of Services"), ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(32)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (first.min(last)..last * 1.1).log_scale(),
            (low.min(high) / 2.0..high * 2.0).log_scale(),
        )?;
    chart.configure_mesh().draw()?;
    for (number, (mode, line)) in lines.iter().enumerate() {
        let color = Palette99::pick(number).to_rgba();
        let series = chart.draw_series(LineSeries::new(line.iter().copied(), color).point_size(3))?;
        series.label(mode).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_mode_is_a_line() {
        let row = |mode: &str, services: u32, what: &str, field: &str, value: u32| json!({ "case": format!("{mode}, {services} services x 10 endpoints: {what}"), field: value });
        let rows = [
            row("ebpf", 100, "all", "ms", 4),
            row("ebpf", 20000, "all", "ms", 1900),
            row("ebpf", 100, "one endpoint changes", "median_us", 30),
            row("nftables", 100, "all", "ms", 90),
        ];
        let all = lines(&rows, "all", "ms", 1.0);
        assert_eq!(all["ebpf"], [(100.0, 4.0), (20000.0, 1900.0)]);
        assert_eq!(lines(&rows, "one endpoint changes", "median_us", 1e-3)["ebpf"], [(100.0, 0.03)]);
        let file = std::env::temp_dir().join(format!("lb-plot-{}.svg", std::process::id()));
        sync(&rows, &file).expect("a picture");
        let text = std::fs::read_to_string(&file).expect("the picture");
        std::fs::remove_file(&file).expect("removed");
        assert!(text.contains("nftables") && text.matches("<polyline").count() >= 2, "{text}");
    }
}
