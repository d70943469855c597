//! What to say of a handful of noisy numbers.

/// The median; of an even count, the mean of the middle two.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// Two ways to do the same, measured in turn: pair by pair.
#[derive(Default)]
pub(crate) struct Pairs {
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

impl Pairs {
    /// Adds one pair.
    pub(crate) fn add(&mut self, ours: f64, theirs: f64) {
        self.ours.push(ours);
        self.theirs.push(theirs);
    }

    /// Median of ours.
    pub(crate) fn ours(&self) -> f64 {
        median(&self.ours)
    }

    /// Median of theirs.
    pub(crate) fn theirs(&self) -> f64 {
        median(&self.theirs)
    }

    /// Median of ours/theirs over the pairs.
    pub(crate) fn ratio(&self) -> f64 {
        median(&self.ratios())
    }

    /// Least and greatest ours/theirs.
    pub(crate) fn spread(&self) -> (f64, f64) {
        self.ratios()
            .iter()
            .fold((f64::INFINITY, 0.0), |(low, high), &ratio| {
                (ratio.min(low), ratio.max(high))
            })
    }

    fn ratios(&self) -> Vec<f64> {
        self.ours
            .iter()
            .zip(&self.theirs)
            .map(|(ours, theirs)| ours / theirs)
            .collect()
    }
}

/// Geometric mean.
pub(crate) fn geometric_mean(values: &[f64]) -> f64 {
    let count = u32::try_from(values.len()).unwrap_or(u32::MAX);
    (values.iter().map(|value| value.ln()).sum::<f64>() / f64::from(count)).exp()
}

/// Prints whether a target is reached, and passes that on.
pub(crate) fn verdict(what: &str, reached: bool) -> bool {
    println!("  {} {what}", if reached { "reached:" } else { "MISSED: " });
    reached
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios_are_of_pairs() {
        let mut pairs = Pairs::default();
        pairs.add(1.0, 4.0);
        pairs.add(2.0, 4.0);
        pairs.add(9.0, 9.0);
        assert!((pairs.ours() - 2.0).abs() < 1e-9);
        assert!((pairs.ratio() - 0.5).abs() < 1e-9);
        assert_eq!(pairs.spread(), (0.25, 1.0));
        assert!((median(&[1.0, 3.0]) - 2.0).abs() < 1e-9);
        assert!((geometric_mean(&[2.0, 8.0]) - 4.0).abs() < 1e-9);
    }
}
