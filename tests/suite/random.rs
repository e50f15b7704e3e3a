//! Facts about layers of random shapes. A shape that fails shrinks, and its seed is added to a file of the repository, from which it is
//! tried first ever after.

use std::fmt::Debug;

use libtest_mimic::Failed;
use proptest::strategy::Strategy;
use proptest::test_runner::{
    Config, FileFailurePersistence, RngAlgorithm, TestCaseError, TestRng, TestRunner,
};

/// Whether a fact holds for so many random shapes, and for those that once failed, which are in `tests/suite/regressions/NAME.txt`.
pub fn holds<T: Debug>(
    name: &str,
    cases: u32,
    shapes: impl Strategy<Value = T>,
    fact: impl Fn(&T) -> Result<(), String>,
) -> Result<(), Failed> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/suite/regressions");
    // The runner wants the path for as long as the process lives.
    let file: &'static str = Box::leak(format!("{folder}/{name}.txt").into_boxed_str());
    let config = Config {
        cases,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        source_file: Some(file!()),
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(config, rng)
        .run(&shapes, |shape| fact(&shape).map_err(TestCaseError::fail))
        .map_err(|error| error.to_string().into())
}
