//! The two pictures: loss curves, and which expert serves which language.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

type Drawn = Result<(), Box<dyn Error>>;

const INK: RGBColor = RGBColor(40, 44, 52);
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 85, 0),
    RGBColor(120, 94, 180),
];

/// A curve: its name and a loss for every step.
pub struct Curve {
    pub name: String,
    pub losses: Vec<f64>,
}

/// The mean of the last `span` losses, at every step.
fn smoothed(losses: &[f64], span: usize) -> impl Iterator<Item = (f64, f64)> + '_ {
    (0..losses.len()).map(move |step| {
        let recent = &losses[step.saturating_sub(span - 1)..=step];
        (
            step as f64,
            recent.iter().sum::<f64>() / recent.len() as f64,
        )
    })
}

/// Training loss over the steps, one curve an adapter.
pub fn loss_curves(path: &Path, title: &str, curves: &[Curve]) -> Drawn {
    let steps = curves
        .iter()
        .map(|curve| curve.losses.len())
        .max()
        .unwrap_or(1)
        .max(2);
    let span = (steps / 40).max(1);
    let points: Vec<Vec<(f64, f64)>> = curves
        .iter()
        .map(|curve| smoothed(&curve.losses, span).skip(span).collect())
        .collect();
    let all = || {
        points
            .iter()
            .flatten()
            .map(|&(_, loss)| loss)
            .filter(|loss| loss.is_finite())
    };
    let (low, high) = (
        all().fold(f64::MAX, f64::min),
        all().fold(f64::MIN, f64::max),
    );
    let margin = (high - low).max(0.1) * 0.05;

    let area = SVGBackend::new(path, (900, 520)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 22).into_font().color(&INK))
        .margin(16)
        .margin_right(36)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..steps as f64, (low - margin)..(high + margin))?;
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_desc("training loss, bits per byte")
        .light_line_style(RGBColor(238, 238, 238))
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 16).into_font().color(&INK))
        .draw()?;
    for (index, (curve, points)) in curves.iter().zip(points).enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 15).into_font().color(&INK))
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    area.present()?;
    Ok(())
}

/// White over blue to dark, readable in grey too.
fn shade(share: f64) -> RGBColor {
    let share = share.clamp(0.0, 1.0);
    let between = |from: f64, to: f64| (from + (to - from) * share) as u8;
    RGBColor(
        between(247.0, 8.0),
        between(251.0, 48.0),
        between(255.0, 107.0),
    )
}

/// The part of each language's gates that each expert has: `shares[layer][expert][language]`.
pub fn expert_map(
    path: &Path,
    title: &str,
    languages: &[String],
    shares: &[Vec<Vec<f64>>],
) -> Drawn {
    const CELL: (i32, i32) = (84, 44);
    const LEFT: i32 = 150;
    const TOP: i32 = 92;
    const GAP: i32 = 22;
    let rows: i32 = shares.iter().map(|layer| layer.len() as i32).sum();
    let width = LEFT + CELL.0 * languages.len() as i32 + 30;
    let height = TOP + CELL.1 * rows + GAP * (shares.len() as i32 - 1).max(0) + 30;
    let area = SVGBackend::new(path, (width as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let font = |size: i32| ("sans-serif", size).into_font();
    area.draw(&Text::new(title.to_owned(), (20, 18), font(22).color(&INK)))?;
    let largest = shares
        .iter()
        .flatten()
        .flatten()
        .copied()
        .fold(1e-9, f64::max);
    let centred = |size: i32, colour: &RGBColor| {
        use plotters::style::text_anchor::{HPos, Pos, VPos};
        font(size)
            .color(colour)
            .pos(Pos::new(HPos::Center, VPos::Center))
    };
    for (column, language) in languages.iter().enumerate() {
        let x = LEFT + CELL.0 * column as i32 + CELL.0 / 2;
        area.draw(&Text::new(
            language.clone(),
            (x, TOP - 18),
            centred(17, &INK),
        ))?;
    }
    let mut y = TOP;
    for (layer, experts) in shares.iter().enumerate() {
        for (expert, row) in experts.iter().enumerate() {
            let label = format!("layer {}, expert {}", layer + 1, expert + 1);
            area.draw(&Text::new(
                label,
                (20, y + CELL.1 / 2 - 8),
                font(15).color(&INK),
            ))?;
            for (column, &share) in row.iter().enumerate() {
                let x = LEFT + CELL.0 * column as i32;
                let corners = [(x, y), (x + CELL.0 - 2, y + CELL.1 - 2)];
                area.draw(&Rectangle::new(corners, shade(share / largest).filled()))?;
                let ink = if share / largest > 0.55 { WHITE } else { INK };
                let middle = (x + CELL.0 / 2, y + CELL.1 / 2);
                area.draw(&Text::new(
                    format!("{:.0}%", share * 100.0),
                    middle,
                    centred(14, &ink),
                ))?;
            }
            y += CELL.1;
        }
        y += GAP;
    }
    area.present()?;
    Ok(())
}
