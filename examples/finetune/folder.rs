//! The texts of a folder.

use std::path::Path;

use rankmix::{Error, Result};

use crate::text::Language;

/// Reads every `.txt` file of a folder, in the order of their names.
pub fn read(folder: &Path) -> Result<Vec<Language>> {
    let broken = |source| Error::File {
        path: folder.to_owned(),
        source,
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(broken)? {
        let path = entry.map_err(broken)?.path();
        if path.extension().is_some_and(|ending| ending == "txt") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut languages = Vec::new();
    for path in paths {
        let text = std::fs::read(&path).map_err(|source| Error::File {
            path: path.clone(),
            source,
        })?;
        languages.push(Language::parse(&path, &text)?);
    }
    if languages.is_empty() {
        return Err(Error::Format {
            path: folder.to_owned(),
            reason: "there is no .txt file".to_owned(),
        });
    }
    Ok(languages)
}
