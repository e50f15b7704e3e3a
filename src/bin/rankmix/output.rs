//! What the commands print. `println!` and `eprintln!` here take the place of the standard library's, which panic when nobody reads any more.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::process;

/// How a shell reports a program that was ended for writing to a pipe that nobody reads: 128 and the number of SIGPIPE.
const NOBODY_READS: i32 = 141;

macro_rules! println {
    () => { $crate::output::line(format_args!("")) };
    ($($arguments:tt)*) => { $crate::output::line(format_args!($($arguments)*)) };
}

macro_rules! eprintln {
    ($($arguments:tt)*) => { $crate::output::error_line(format_args!($($arguments)*)) };
}

/// Prints a line on standard output. The program ends without a word if its reader has gone (`rankmix devices | head -1`), and with an error if it
/// cannot be written for another reason.
pub(crate) fn line(line: Arguments<'_>) {
    let Err(error) = writeln!(io::stdout().lock(), "{line}") else {
        return;
    };
    if error.kind() == ErrorKind::BrokenPipe {
        process::exit(NOBODY_READS);
    }
    error_line(format_args!("rankmix: standard output: {error}"));
    process::exit(2);
}

/// Prints a line on standard error. The work goes on if nobody reads it.
pub(crate) fn error_line(line: Arguments<'_>) {
    _ = writeln!(io::stderr().lock(), "{line}");
}
