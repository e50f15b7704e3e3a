//! Conversions of one kind of mixture into another.

mod core;
