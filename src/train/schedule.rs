//! Learning rates by step.

/// How the learning rate moves over a training: a linear warm-up, then one of these.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    /// The peak rate all the way.
    Constant {
        /// Steps of the warm-up; the first has rate 0.
        warmup: u64,
    },
    /// Half a cosine down to 0 at `steps`.
    Cosine {
        /// Steps of the warm-up; the first has rate 0.
        warmup: u64,
        /// Steps of the whole training.
        steps: u64,
    },
    /// A straight line down to 0 at `steps`.
    Linear {
        /// Steps of the warm-up; the first has rate 0.
        warmup: u64,
        /// Steps of the whole training.
        steps: u64,
    },
}

impl Schedule {
    /// The part of the peak rate that step `step` (from 0) takes, in 0..=1.
    #[must_use]
    pub fn factor(self, step: u64) -> f64 {
        let (warmup, steps) = match self {
            Self::Constant { warmup } => (warmup, u64::MAX),
            Self::Cosine { warmup, steps } | Self::Linear { warmup, steps } => (warmup, steps),
        };
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let progress =
            ((step - warmup) as f64 / (steps.saturating_sub(warmup)).max(1) as f64).min(1.0);
        match self {
            Self::Constant { .. } => 1.0,
            Self::Cosine { .. } => ((1.0 + (std::f64::consts::PI * progress).cos()) / 2.0).max(0.0),
            Self::Linear { .. } => 1.0 - progress,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    #[test]
    fn schedules_warm_up_from_zero_and_end_at_zero() {
        let cosine = Schedule::Cosine {
            warmup: 10,
            steps: 110,
        };
        let got: Vec<f64> = [0, 5, 10, 60, 110, 200]
            .map(|step| cosine.factor(step))
            .to_vec();
        let want = [0.0, 0.5, 1.0, 0.5, 0.0, 0.0];
        assert!(
            got.iter()
                .zip(want)
                .all(|(got, want)| (got - want).abs() < 1e-12),
            "{got:?}"
        );
        let linear = Schedule::Linear {
            warmup: 0,
            steps: 4,
        };
        assert_eq!(
            [0, 1, 2, 3, 4].map(|step| linear.factor(step)),
            [1.0, 0.75, 0.5, 0.25, 0.0]
        );
        assert_eq!(Schedule::Constant { warmup: 4 }.factor(1), 0.25);
        assert_eq!(Schedule::Constant { warmup: 4 }.factor(4000), 1.0);
    }
}
