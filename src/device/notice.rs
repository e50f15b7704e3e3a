//! What a device tells a person who did not ask: one line on stderr, and on with the work.

use std::fmt::Arguments;
use std::io::{self, Write};

/// Prints `rankmix: LINE` on stderr. `eprintln!` would panic where nobody reads it, in a `Drop` too.
pub(super) fn notice(line: Arguments<'_>) {
    _ = writeln!(io::stderr().lock(), "rankmix: {line}");
}
