//! CoMoL layers of random and of extreme shapes against the f64 reference.

use libtest_mimic::{Failed, Trial};
use proptest::strategy::Strategy;
use rankmix::Device;
use rankmix::layers::CoreRouting;
use rankmix::ops::CoreMix;

use crate::comol::{Shape, all_close};
use crate::popularity::Popularity;
use crate::{devices, random};

fn matches_reference(device: &Device, shape: &Shape) -> Result<(), String> {
    let parameters = shape.parameters();
    let run = |device: &Device| {
        shape
            .run(device, &parameters)
            .map_err(|error| error.to_string())
    };
    let (want, got) = (run(&Device::reference())?, run(device)?);
    all_close(&format!("{shape:?}"), &got, &want, shape.tokens)
}

fn shapes() -> impl Strategy<Value = Shape> {
    let tokens = proptest::prop_oneof![proptest::strategy::Just(1_usize), 2..8_usize, 8..201_usize];
    let sizes = (
        1..90_usize,
        1..90_usize,
        1..34_usize,
        1..65_usize,
        0..9_usize,
    );
    let popularity = proptest::option::of(proptest::sample::select(&Popularity::ALL[..]));
    (tokens, sizes, proptest::bool::ANY, 0..3_usize, popularity).prop_map(
        |(tokens, (d_in, d_out, rank, experts, top_k), raw, mix, popularity)| {
            let popularity = popularity.filter(|_| top_k > 0);
            // A coordinate for each expert in all that the router looks at.
            let least = if popularity.is_some() { experts } else { 1 };
            let rank = if raw { rank } else { rank.max(least) };
            let passed_on = if popularity.is_some() && !raw {
                rank
            } else {
                least
            };
            Shape {
                tokens,
                d_in: d_in.max(passed_on),
                d_out,
                rank,
                experts,
                top_k: top_k.min(experts),
                routing: if raw {
                    CoreRouting::Raw
                } else {
                    CoreRouting::Core
                },
                mix: [CoreMix::Auto, CoreMix::Merge, CoreMix::Apply][mix],
                popularity,
            }
        },
    )
}

/// Shapes at the ends of what there is: tokens, d_in, d_out, rank, experts, top k.
const EXTREMES: [(usize, usize, usize, usize, usize, usize); 9] = [
    (1, 1, 1, 1, 1, 0),
    (1, 1, 1, 1, 1, 1),
    (1, 33, 7, 2, 64, 0),
    (3, 33, 7, 3, 64, 64),
    (9, 70, 66, 64, 3, 0),
    (5, 70, 140, 130, 2, 0),
    (133, 48, 40, 16, 64, 8),
    (70, 16, 12, 4, 300, 0),
    (600, 24, 24, 8, 4, 0),
];

fn extremes(device: &Device) -> Result<(), Failed> {
    for (tokens, d_in, d_out, rank, experts, top_k) in EXTREMES {
        let routing = CoreRouting::Core;
        let mix = CoreMix::Auto;
        let shape = Shape {
            tokens,
            d_in,
            d_out,
            rank,
            experts,
            top_k,
            routing,
            mix,
            popularity: None,
        };
        matches_reference(device, &shape)?;
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = devices::trials("comol::extreme_shapes", extremes);
    trials.extend(devices::trials("comol::random_shapes", |device| {
        // A new shape is a new set of pipelines: on a GPU half a second each.
        let cases = if device.adapter().is_some() { 16 } else { 200 };
        random::holds("comol", cases, shapes(), |shape| {
            matches_reference(device, shape)
        })
    }));
    trials
}
