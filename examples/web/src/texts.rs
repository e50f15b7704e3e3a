//! The phrasebook of the examples, as part of the program: a page fetches nothing.

use std::path::Path;

use rankmix::Result;

use crate::text::Language;

/// The language that the base is trained on.
pub const BASE: &str = "en";

macro_rules! phrasebook {
    ($($name:literal),*) => {
        [$(($name, include_bytes!(concat!("../../data/", $name, ".txt")).as_slice())),*]
    };
}

/// All languages, in the order used everywhere.
pub fn languages() -> Result<Vec<Language>> {
    phrasebook!["de", "el", "en", "es", "fi", "fr", "pl", "tr"]
        .iter()
        .map(|(name, text)| Language::parse(Path::new(name), text))
        .collect()
}
