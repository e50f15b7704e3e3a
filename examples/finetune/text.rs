//! Text: a language's lines, every tenth held out, and random windows of bytes for training.

use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use rankmix::{Error, Result, Tensor};

/// Bytes that the model sees.
pub const CONTEXT: usize = 16;
/// Lines that are never trained on: every so many.
const HELD_OUT_EVERY: usize = 10;

/// A language's text as bytes, lines ending with a line feed.
pub struct Language {
    pub name: String,
    train: Vec<u8>,
    held_out: Vec<u8>,
}

/// What a step or an evaluation is given: `[tokens, CONTEXT]` ids and `[tokens]` labels.
pub struct Batch {
    pub ids: Tensor,
    pub labels: Tensor,
}

fn window(text: &[u8], position: usize, ids: &mut Vec<i32>) {
    // Before its beginning a text is line feeds.
    ids.extend((0..CONTEXT).map(|back| {
        let at = (position + back).checked_sub(CONTEXT);
        i32::from(at.map_or(b'\n', |at| text[at]))
    }));
}

/// Random windows of the training text, as many of each language.
pub fn sample(languages: &[&Language], tokens: usize, generator: &mut ChaCha8Rng) -> Result<Batch> {
    let mut ids = Vec::with_capacity(tokens * CONTEXT);
    let mut labels = Vec::with_capacity(tokens);
    for token in 0..tokens {
        let text = &languages[token % languages.len()].train;
        let position = generator.next_u64() as usize % text.len();
        window(text, position, &mut ids);
        labels.push(i32::from(text[position]));
    }
    Ok(Batch {
        ids: Tensor::i32([tokens, CONTEXT], ids)?,
        labels: Tensor::i32([tokens], labels)?,
    })
}

impl Language {
    /// A language from its text; it is named as the file is, without the ending.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let mut language = Self {
            name: path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            train: Vec::new(),
            held_out: Vec::new(),
        };
        for (number, line) in text
            .split(|&byte| byte == b'\n')
            .filter(|line| !line.is_empty())
            .enumerate()
        {
            let part = if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 {
                &mut language.held_out
            } else {
                &mut language.train
            };
            part.extend(line);
            part.push(b'\n');
        }
        if language.held_out.is_empty() {
            return Err(Error::Format {
                path: path.to_owned(),
                reason: format!(
                    "a language needs at least {HELD_OUT_EVERY} lines, one of which is held out"
                ),
            });
        }
        Ok(language)
    }

    /// The held-out text in batches; the last is filled up with ignored labels.
    pub fn held_out(&self, tokens: usize) -> Result<Vec<(Batch, usize)>> {
        (0..self.held_out.len())
            .step_by(tokens)
            .map(|start| {
                let end = (start + tokens).min(self.held_out.len());
                let (mut ids, mut labels) = (Vec::new(), Vec::new());
                for position in start..start + tokens {
                    window(&self.held_out, position.min(end - 1), &mut ids);
                    labels.push(if position < end {
                        i32::from(self.held_out[position])
                    } else {
                        -100
                    });
                }
                let batch = Batch {
                    ids: Tensor::i32([tokens, CONTEXT], ids)?,
                    labels: Tensor::i32([tokens], labels)?,
                };
                Ok((batch, end - start))
            })
            .collect()
    }
}
