//! Writes every kernel out for the compilers that judge it (`scripts/check_shaders.sh`, `scripts/kernel_cost.sh`): its WGSL, and the text that each
//! backend of wgpu would hand to its driver. Identical texts are written once.
//!
//! `kernels.tsv` has a line for each kernel: the WGSL file, the entry point, the constants (`NAME=VALUE ...`), the form, the file of the repository
//! and the line of the entry point in it, the name, and the file of each text (`-` where there is none, in the order of [`COLUMNS`]).
//! `WGSL.lines` says where each line of a WGSL file comes from. `findings.tsv` has what naga and the comparison with the launch find wrong:
//! `PATH:LINE`, the message.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use super::lines::Origins;
use super::translate::{Finding, Language, Parsed, line_of, texts};
use super::{Kernel, limits};

/// The texts of a kernel: the language, and whether it is the one with runtime checks.
const COLUMNS: [(Language, bool); 8] = [
    (Language::SpirV, false),
    (Language::SpirV, true),
    (Language::OldSpirV, true),
    (Language::Hlsl, false),
    (Language::Hlsl, true),
    (Language::Metal, false),
    (Language::Metal, true),
    (Language::GlslEs, false),
];

/// A folder whose files are named by what is in them.
struct Store<'a> {
    folder: &'a Path,
    written: HashMap<u64, String>,
}

impl Store<'_> {
    /// The name of the file with this content, written if it is new.
    fn file(&mut self, content: &[u8], stem: &str, extension: &str) -> io::Result<String> {
        let mut hasher = DefaultHasher::new();
        (content, extension).hash(&mut hasher);
        let hash = hasher.finish();
        if let Some(name) = self.written.get(&hash) {
            return Ok(name.clone());
        }
        let name = format!("{stem}.{hash:016x}.{extension}");
        fs::write(self.folder.join(&name), content)?;
        self.written.insert(hash, name.clone());
        Ok(name)
    }
}

/// Writes the kernels into a folder that exists, and returns how many findings there are.
pub fn write(kernels: &[Kernel], folder: &Path) -> io::Result<usize> {
    let origins = Origins::read();
    let mut store = Store {
        folder,
        written: HashMap::new(),
    };
    let (mut rows, mut findings) = (String::new(), Vec::new());
    for kernel in kernels {
        let launch = &kernel.launch;
        let stem = Path::new(&kernel.path)
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy();
        let lines = origins.lines(kernel);
        let wgsl = store.file(launch.shader.source.as_bytes(), &stem, "wgsl")?;
        fs::write(folder.join(format!("{wgsl}.lines")), lines.join("\n"))?;
        let mut files = vec!["-".to_owned(); COLUMNS.len()];
        let mut entry = kernel.path.clone();
        let mut translate = || {
            let parsed = Parsed::new(kernel)?;
            entry.clone_from(&lines[parsed.entry_line - 1]);
            limits::check(&parsed, kernel)?;
            texts(&parsed, kernel)
        };
        // What brings naga down would bring down the application that builds the pipeline.
        let parsed = catch_unwind(AssertUnwindSafe(&mut translate)).unwrap_or_else(|_| {
            let line = line_of(launch.shader.source, &format!("fn {}(", launch.entry));
            Err(Finding::new(
                line,
                format!("naga panics on `{}`", launch.entry),
            ))
        });
        match parsed {
            Ok(texts) => {
                for text in texts {
                    let column = COLUMNS
                        .iter()
                        .position(|&column| column == (text.language, text.checked));
                    let stem = format!(
                        "{stem}.{}.{}",
                        launch.entry,
                        if text.checked { "checked" } else { "trusted" }
                    );
                    files[column.unwrap_or_default()] =
                        store.file(&text.content, &stem, text.language.extension())?;
                }
            }
            Err(finding) => {
                let line = lines.get(finding.line - 1).unwrap_or(&kernel.path);
                let message = finding.message.replace(['\n', '\t'], " ");
                findings.push(format!("{line}\t{message}"));
            }
        }
        let row = [
            &wgsl,
            launch.entry,
            &kernel.constants(),
            kernel.form(),
            &entry,
            &kernel.name,
        ];
        rows += &format!("{}\t{}\n", row.join("\t"), files.join("\t"));
    }
    findings.sort();
    findings.dedup();
    fs::write(folder.join("kernels.tsv"), rows)?;
    let lines: String = findings
        .iter()
        .map(|finding| format!("{finding}\n"))
        .collect();
    fs::write(folder.join("findings.tsv"), lines)?;
    Ok(findings.len())
}
