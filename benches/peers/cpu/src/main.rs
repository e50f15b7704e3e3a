//! Layers as a user of Candle writes them on the CPU, and LoRA by hand on ndarray, forward and backward, at the sizes that `rankmix time` has by
//! default.
//!
//! usage: rankmix-peer-cpu candle rotmole|comol|latent_moe | ndarray lora
//!
//! Prints `seconds 0 checksum`: the median of five steps after two, and the sum of all gradients.

mod by_candle;
mod by_ndarray;

use std::error::Error;
use std::time::Instant;

const TOKENS: usize = 512;
const WIDTH: usize = 1024;
const RANK: usize = 16;

const WARM_UP: usize = 2;
const STEPS: usize = 5;

/// A layer's forward and backward pass, which returns the sum of all gradients.
type Step = Box<dyn Fn() -> Result<f32, Box<dyn Error>>>;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let step = match words.as_slice() {
        ["candle", "rotmole"] => by_candle::rotmole()?,
        ["candle", "comol"] => by_candle::comol()?,
        ["candle", "latent_moe"] => by_candle::latent_moe()?,
        ["ndarray", "lora"] => by_ndarray::lora(),
        _ => {
            return Err(
                "usage: rankmix-peer-cpu candle rotmole|comol|latent_moe | ndarray lora".into(),
            );
        }
    };
    let mut checksum = 0.0;
    let mut seconds = Vec::new();
    for run in 0..WARM_UP + STEPS {
        let start = Instant::now();
        checksum = step()?;
        if run >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    println!("{:.6} 0 {checksum:.3}", seconds[STEPS / 2]);
    Ok(())
}
