//! Where the lines of a kernel's text come from: its file in `shaders/`, the parts in front of it, or the rewriting for 16-bit storage.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::Kernel;

const REWRITING: &str = "src/device/half.rs";

fn read(folder: &str) -> HashMap<String, String> {
    let entries = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = fs::read_dir(entries).expect("the repository's folders are there");
    let mut texts = HashMap::new();
    for path in entries.map(|entry| entry.expect("a readable folder").path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".wgsl") {
            let text = fs::read_to_string(&path).expect("readable WGSL");
            texts.insert(format!("{folder}/{name}"), text);
        }
    }
    texts
}

/// The entry points of every file in `shaders/`: the file, and the entry point's name.
pub fn entry_points() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (path, text) in read("shaders") {
        let mut is_entry = false;
        for line in text
            .lines()
            .map(|line| line.split("//").next().unwrap_or(line))
        {
            is_entry |= line.contains("@compute");
            if let Some((_, rest)) = line.split_once("fn ").filter(|_| is_entry) {
                let name = rest.split('(').next().unwrap_or(rest);
                found.push((path.clone(), name.to_owned()));
                is_entry = false;
            }
        }
    }
    found.sort();
    found
}

/// The texts that shaders are assembled from.
pub struct Origins {
    parts: HashMap<String, String>,
    shaders: HashMap<String, String>,
}

/// The lines of a text as the rewriting leaves them where no float is read or written: without comments.
fn code(text: &str) -> Vec<&str> {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or(line))
        .collect()
}

impl Origins {
    pub fn read() -> Self {
        Self {
            parts: read("shaders/parts"),
            shaders: read("shaders"),
        }
    }

    /// Where each line of the kernel's text comes from: `shaders/NAME.wgsl:LINE`. What the rewriting adds stands in no file; of it only
    /// the file that makes it is said.
    pub fn lines(&self, kernel: &Kernel) -> Vec<String> {
        let source = kernel.launch.shader.source;
        let text = code(source);
        let Some(own) = self.shaders.get(&kernel.path) else {
            return (1..=text.len())
                .map(|line| format!("{}:{line}", kernel.path))
                .collect();
        };
        let own = own.lines().count();
        let mut origins = Vec::new();
        if kernel.form() == "native" {
            origins.push(REWRITING.to_owned());
        }
        let of_file = |path: &str, lines: usize| -> Vec<String> {
            (1..=lines).map(|line| format!("{path}:{line}")).collect()
        };
        while let Some((part, lines)) = self.next_part(&text[origins.len()..], own) {
            origins.extend(of_file(part, lines));
        }
        origins.extend(of_file(&kernel.path, own));
        origins.resize(text.len(), REWRITING.to_owned());
        let narrow = format!("shaders/parts/narrow_{}.wgsl", kernel.form());
        if let Some(part) = self
            .parts
            .get(&narrow)
            .filter(|part| source.ends_with(part.as_str()))
        {
            // What is written is rounded by a part, which stands at the end.
            let lines = of_file(&narrow, part.lines().count());
            origins.truncate(text.len() - lines.len());
            origins.extend(lines);
        }
        origins
    }

    /// The part that the text starts with, if it is longer than the shader's own file.
    fn next_part(&self, text: &[&str], own: usize) -> Option<(&str, usize)> {
        self.parts.iter().find_map(|(path, part)| {
            let part = code(part);
            // The rewriting changes lines that read or write an array, and no others.
            let same = |(line, of_part): (&&str, &&str)| line == of_part || of_part.contains('[');
            (text.len() >= part.len() + own && text.iter().zip(&part).all(same))
                .then_some((path.as_str(), part.len()))
        })
    }
}
