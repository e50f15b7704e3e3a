//! The kernels of an operation that has several: which of them are given out, and which is taken.

use crate::device::Capabilities;

/// The kernels that suit, the operation's own first.
pub(crate) fn own_first<K: Copy + PartialEq>(
    own: K,
    all: impl IntoIterator<Item = K>,
    suits: impl Fn(K) -> bool,
) -> impl Iterator<Item = K> {
    let others = all.into_iter().filter(move |&kernel| kernel != own);
    [own]
        .into_iter()
        .chain(others.filter(move |&kernel| suits(kernel)))
}

/// The candidate that the capabilities name for the key, or else the operation's own. The key is asked for only where something is named.
pub(crate) fn named_or_own<K: Copy>(
    own: K,
    mut candidates: impl Iterator<Item = K>,
    name: impl Fn(K) -> &'static str,
    key: impl FnOnce() -> String,
    capabilities: &Capabilities,
) -> K {
    if capabilities.kernels.is_empty() {
        return own;
    }
    let named = capabilities.kernels.get(&key());
    named
        .and_then(|named| candidates.find(|&kernel| name(kernel) == named))
        .unwrap_or(own)
}
