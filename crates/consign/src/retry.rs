//! How long to wait before the next try.

use std::time::Duration;

use rand::RngExt;
use serde::{Deserialize, Serialize};

/// When a failed event is tried again, and when it is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetryPolicy {
    /// After so many failures an event becomes a dead letter.
    pub limit: u32,
    /// No retry comes sooner than this.
    #[serde(with = "humantime_serde")]
    pub base: Duration,
    /// No retry comes later than this.
    #[serde(with = "humantime_serde")]
    pub cap: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { limit: 5, base: Duration::from_millis(500), cap: Duration::from_secs(60) }
    }
}

impl RetryPolicy {
    /// The wait after the `failures`-th failure.
    pub fn delay(&self, failures: u32) -> Duration {
        delay(self.base, self.cap, failures.saturating_sub(1))
    }
}

/// Exponential backoff with equal jitter: a random time between `base · 2^n` and `base · 2^(n+1)`, at most `cap`.
///
/// The random half keeps retries of many clients apart; the other half makes sure of the time that a limited number of attempts lasts
/// (<https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>): what comes late, such as the event that this one waits for,
/// gets it whatever the dice say.
pub(crate) fn delay(base: Duration, cap: Duration, n: u32) -> Duration {
    let ceiling = base.saturating_mul(2u32.saturating_pow(n.min(20) + 1)).min(cap).max(base);
    let floor = (ceiling / 2).max(base);
    floor + ceiling.saturating_sub(floor).mul_f64(rand::rng().random::<f64>())
}

/// Waits of a loop that tries again until it works.
#[derive(Debug)]
pub(crate) struct Backoff {
    base: Duration,
    cap: Duration,
    n: u32,
}

impl Backoff {
    pub(crate) fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, n: 0 }
    }

    pub(crate) fn next(&mut self) -> Duration {
        let d = delay(self.base, self.cap, self.n);
        self.n += 1;
        d
    }

    pub(crate) fn reset(&mut self) {
        self.n = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_between_base_and_cap_and_spread() {
        let policy = RetryPolicy::default();
        let delays: Vec<Duration> = (0..200).map(|i| policy.delay(i % 12)).collect();
        assert!(delays.iter().all(|d| (policy.base..=policy.cap).contains(d)));
        let distinct: std::collections::HashSet<_> = delays.iter().collect();
        assert!(distinct.len() > 100, "jitter must spread retries");
    }

    #[test]
    fn what_comes_in_the_wrong_order_has_seven_seconds_whatever_the_dice_say() {
        let policy = RetryPolicy::default();
        for _ in 0..1000 {
            let patience: Duration = (1..policy.limit).map(|failures| policy.delay(failures)).sum();
            assert!(
                (Duration::from_millis(7_500)..=Duration::from_secs(15)).contains(&patience),
                "{patience:?}"
            );
        }
    }
}
