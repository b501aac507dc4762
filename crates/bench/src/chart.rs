//! Results as a picture: for each benchmark a panel, for each contender a bar with its spread.

use crate::catalogue::Target;
use crate::results::{BenchmarkResult, ContenderResult, Report, Value};
use crate::spec::Metric;
use crate::table;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

const WIDTH: u32 = 960;
const BAR: u32 = 26;
const TOP: u32 = 56;
const BOTTOM: u32 = 44;
const OURS: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const TARGET: RGBColor = RGBColor(0xd6, 0x8f, 0x2a);
const OTHERS: RGBColor = RGBColor(0xb0, 0xb0, 0xb0);

/// A bar: whose it is, and how long.
struct Bar<'a> {
    name: &'a str,
    color: RGBColor,
    median: f64,
    ends: [f64; 2],
}

/// What a panel shows: the metrics of a benchmark differ too much for one axis, so each has a panel.
struct Panel<'a> {
    title: String,
    bars: Vec<Bar<'a>>,
}

impl Panel<'_> {
    fn height(&self) -> u32 {
        TOP + BOTTOM + self.bars.len() as u32 * BAR
    }
}

/// Draws `report` into `path`.
///
/// # Errors
/// What the file system said.
pub(crate) fn draw(report: &Report, path: &Path) -> Result<(), String> {
    let panels: Vec<Panel<'_>> = report.benchmarks.iter().flat_map(panels).collect();
    let height = panels.iter().map(Panel::height).sum::<u32>().max(BAR);
    let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE).map_err(|e| e.to_string())?;
    let mut at = 0;
    for panel in &panels {
        let area = root.clone().shrink((0, at), (WIDTH, panel.height()));
        at += panel.height();
        draw_panel(panel, &area).map_err(|e| e.to_string())?;
    }
    root.present().map_err(|e| e.to_string())
}

/// The panels of a benchmark: one for each metric that says how good somebody is.
fn panels(b: &BenchmarkResult) -> Vec<Panel<'_>> {
    let mut metrics: Vec<Metric> = b.contenders.iter().flat_map(|c| c.metrics.iter().map(|m| m.metric)).collect();
    metrics.sort_unstable();
    metrics.dedup();
    metrics.retain(|m| !matches!(m, Metric::Cores | Metric::StoredAgain | Metric::Late));
    let panel = |metric: Metric| {
        let bar = |c: &'_ ContenderResult| {
            let ours = c.id.starts_with("ours") || matches!(c.id, "footprint" | "start");
            let s = &c.metrics.iter().find(|m| m.metric == metric)?.spread;
            let color = if ours { OURS } else { OTHERS };
            Some(Bar { name: c.id, color, median: s.median, ends: [s.min, s.max] })
        };
        // What is aimed at in numbers of its own is a bar as well; what is aimed at in ratios is not.
        let aim = |v: &Value| {
            let (Target::AtMost(x) | Target::AtLeast(x)) = v.target.target;
            (v.metric == metric).then_some(Bar { name: "target", color: TARGET, median: x, ends: [x, x] })
        };
        let bars = b.contenders.iter().filter_map(bar).chain(b.values.iter().filter_map(aim));
        let better = if metric.more_is_better() { "more is better" } else { "less is better" };
        Panel { title: format!("{}: {} ({better})", b.name, metric.label()), bars: bars.collect() }
    };
    metrics.into_iter().map(panel).collect()
}

fn draw_panel<DB: DrawingBackend>(
    panel: &Panel<'_>,
    area: &DrawingArea<DB, Shift>,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let n = panel.bars.len();
    let most = panel.bars.iter().map(|b| b.ends[1]).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 19))
        .margin(10)
        .x_label_area_size(24)
        .y_label_area_size(170)
        .build_cartesian_2d(0.0..most * 1.15, 0.0..n as f64)?;
    let mut mesh = chart.configure_mesh();
    mesh.disable_y_mesh().disable_y_axis().x_labels(8).max_light_lines(0).x_label_style(("sans-serif", 15)).draw()?;
    for (i, bar) in panel.bars.iter().enumerate() {
        // The first one on top.
        let middle = (n - i) as f64 - 0.5;
        let [min, max] = bar.ends;
        let corners = [(0.0, middle - 0.35), (bar.median, middle + 0.35)];
        chart.draw_series([Rectangle::new(corners, bar.color.filled())])?;
        let whiskers = [
            [(min, middle), (max, middle)],
            [(min, middle - 0.2), (min, middle + 0.2)],
            [(max, middle - 0.2), (max, middle + 0.2)],
        ];
        chart.draw_series(whiskers.into_iter().map(|line| PathElement::new(line, BLACK.stroke_width(1))))?;
        let value = table::number(bar.median);
        chart.draw_series([Text::new(value, (max + most * 0.01, middle + 0.2), ("sans-serif", 16))])?;
        let (x, y) = chart.backend_coord(&(0.0, middle));
        let base = area.get_base_pixel();
        area.draw(&Text::new(bar.name.to_owned(), (x - base.0 - 165, y - base.1 - 6), ("sans-serif", 16)))?;
    }
    Ok(())
}
