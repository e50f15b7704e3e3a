//! The folder that a conversion into CoMoL makes.

use std::path::Path;

use serde_json::json;

use crate::convert::core::CoreReport;
use crate::convert::stage::{self, Fingerprint, REPORT, Stage, json_of, names, refused};
use crate::error::Result;
use crate::formats::MixtureAdapter;

/// What may be in a folder that is replaced: a user who names another one by mistake loses nothing.
const OURS: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", REPORT];

/// Checks that [`write_comol`] could make this folder, and makes nothing.
///
/// # Errors
/// [`Error::File`](crate::Error::File) if the path is taken and may not be replaced, or lies in one of the inputs or one of them in it, or an input is not there.
pub fn check_comol_folder(out: &Path, inputs: &[&Path], overwrite: bool) -> Result<()> {
    stage::check(out, inputs, overwrite)?;
    if out.exists() {
        for name in names(out)? {
            if !OURS.iter().any(|ours| name == *ours) {
                return Err(refused(
                    &out.join(name),
                    "was not made by such a conversion: its folder is not replaced",
                ));
            }
        }
    }
    Ok(())
}

/// Writes an adapter and the report of its conversion into a folder of their own. It is made as `OUT.partial` and takes its name when it is
/// whole; over an old one with `overwrite`, so that at any moment the old one or the whole new one is there.
///
/// # Errors
/// As [`check_comol_folder`]; [`Error::File`](crate::Error::File) if it cannot be written or another process is at it, or as [`MixtureAdapter::write`].
pub fn write_comol(
    out: &Path,
    inputs: &[&Path],
    overwrite: bool,
    adapter: &MixtureAdapter,
    report: &CoreReport,
) -> Result<()> {
    check_comol_folder(out, inputs, overwrite)?;
    // An unfinished one is made anew, as it takes a moment; that of a model, which is of other options, is left alone.
    let fingerprint = Fingerprint {
        options: json!({ "kind": "comol" }),
        source: json!({}),
    };
    let mut stage = Stage::open_without_restart(out, inputs, &fingerprint, overwrite)?;
    stage.empty()?;
    adapter.write(stage.folder())?;
    stage.publish(&json_of(out.join(REPORT), report)?)
}
