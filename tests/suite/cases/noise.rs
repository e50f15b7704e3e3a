//! Dropout and jitter, at the seed and step that the harness sets.

use crate::case::{Case, floats};

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for elements in [1, 2, 3, 7, 41] {
        let inputs = vec![floats(&[elements], 110)];
        cases.push(Case::new(
            format!("dropout_{elements}"),
            inputs.clone(),
            |g, v| {
                // Two, so that the second has another stream.
                let first = g.dropout(v[0], 0.3)?;
                Ok(vec![first, g.dropout(v[0], 0.5)?])
            },
        ));
        cases.push(Case::new(format!("jitter_{elements}"), inputs, |g, v| {
            Ok(vec![g.jitter(v[0], 0.25)?])
        }));
    }
    let inputs = vec![floats(&[133, 77], 111), floats(&[133, 77], 112)];
    let both_ways = |g: &mut rankmix::Graph, v: &[rankmix::Value]| {
        let (dropped, jittered) = (g.dropout(v[0], 0.1)?, g.jitter(v[0], 0.9)?);
        let mut results = g.gradients_from(&[(dropped, v[1]), (jittered, v[1])], &v[..1])?;
        results.extend([dropped, jittered]);
        Ok(results)
    };
    cases.push(Case::new("dropout_and_jitter_133_77", inputs, both_ways).forward_only());
    cases
}
