//! Files in the formats of others: written, read back, and damaged.

/// Panics unless the result is [`rankmix::Error::Format`] and its message holds every one of these words.
macro_rules! assert_damaged {
    ($result:expr, $($word:expr),+) => {{
        let error = $result.expect_err("this must be refused");
        assert!(matches!(error, rankmix::Error::Format { .. }), "another kind of error: {error:?}");
        let message = error.to_string();
        $(assert!(message.contains($word), "`{message}` does not name {}", $word);)+
    }};
}

mod adapter_folder;
mod checkpoint;
mod gguf;
mod mixture;
mod mixture_damage;
mod mixture_property;
mod model_writer;
mod moe_peft;
mod peft;
