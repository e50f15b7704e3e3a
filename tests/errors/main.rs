//! A user's mistakes come back as typed errors that name the thing, its size and the limit.

/// Panics unless the error is of the kind expected and its message holds every one of these words.
macro_rules! assert_error {
    ($result:expr, $kind:pat, $($word:literal),+) => {{
        let error = $result.expect_err("this must be refused");
        assert!(matches!(error, $kind), "another kind of error: {error:?}");
        let message = error.to_string();
        $(assert!(message.contains($word), "`{message}` does not name {}", $word);)+
    }};
}

mod kernels;
mod layers;
mod runtime;
mod training;

use rankmix::layers::Linear;

fn base() -> Linear {
    Linear::new("layer", 6, 4)
}
