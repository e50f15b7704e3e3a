//! How many turns a kernel's loops may take. llvmpipe leaves the loops of an invocation after 65,536 turns in all, without a word, and the
//! result is of what it has seen until then: what would take more is an error, or goes another way.

use crate::device::{AdapterClass, Capabilities};
use crate::error::{Error, Result};

/// The turns that software drivers are trusted with.
pub(crate) const MOST_TURNS_SOFTWARE: usize = 65_000;

/// Whether the device takes so many turns.
pub(crate) fn are_taken(turns: usize, capabilities: &Capabilities) -> bool {
    capabilities.class != AdapterClass::Software || turns <= MOST_TURNS_SOFTWARE
}

/// That the device takes the turns of an operation of which an invocation handles `per_turn` of `count` `unit` in each, should it handle all.
///
/// # Errors
/// [`Error::Limit`].
pub(crate) fn expect_turns(
    op: &str,
    [count, per_turn]: [usize; 2],
    unit: &'static str,
    capabilities: &Capabilities,
) -> Result<()> {
    if are_taken(count.div_ceil(per_turn), capabilities) {
        return Ok(());
    }
    Err(Error::Limit {
        thing: format!("{op} on a software driver, whose loops end early,"),
        needed: count as u64,
        limit: (MOST_TURNS_SOFTWARE * per_turn) as u64,
        unit,
    })
}
