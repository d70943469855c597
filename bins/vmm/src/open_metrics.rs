//! The metrics as OpenMetrics text, which Prometheus reads: `kombi_<group>_<name>`, one
//! sample for each interface and each drive.
//!
//! Left to others: counting (`metrics` has the sources).

use std::collections::BTreeMap;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use serde_json::Value;

use crate::metrics::{EXTREMES, LATENCIES};

/// <https://prometheus.io/docs/specs/om/open_metrics_spec/>
pub(crate) const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Groups of all devices of a kind together, how those of single ones begin, and what says
/// which one a sample is of.
const KINDS: [(&str, &str, &str); 4] = [
    ("net", "net_", "interface"),
    ("block", "block_", "drive"),
    ("pmem", "pmem_", "device"),
    ("vhost_user_block", "vhost_user_block_", "drive"),
];
/// What says how things are and not how often something happened.
const GAUGES: [&str; 3] = [
    "api_server_process_startup_time_us",
    "api_server_process_startup_time_cpu_us",
    "engine_kept_in_file",
];

/// `totals` are numbers by group and name, as in a line of metrics.
pub(crate) fn text(totals: BTreeMap<String, Value>) -> String {
    let mut registry = Registry::with_prefix("kombi");
    registry.register_collector(Box::new(Families::of(&totals)));
    let mut text = String::new();
    // Writing into a string does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

/// The device that a sample is of: its kind and its name.
type Device = (&'static str, String);

/// Numbers by name; each with the device that it is of, if it is of one.
#[derive(Debug, Default)]
struct Families(BTreeMap<String, Vec<(Option<Device>, u64)>>);

impl Families {
    fn of(totals: &BTreeMap<String, Value>) -> Self {
        let mut families = Self::default();
        for (group, values) in totals {
            let one = KINDS.iter().find_map(|(all, prefix, kind)| {
                let name = group.strip_prefix(prefix)?;
                Some((all, (*kind, name.to_owned())))
            });
            match one {
                Some((all, device)) => families.add(all, Some(&device), values),
                // The sum is for the reader to make.
                None if KINDS.iter().any(|(all, ..)| all == group) => {}
                None => families.add(group, None, values),
            }
        }
        families
    }

    fn add(&mut self, name: &str, device: Option<&Device>, value: &Value) {
        match value {
            Value::Object(members) => {
                for (member, value) in members {
                    self.add(&format!("{name}_{member}"), device, value);
                }
            }
            value => {
                if let Some(n) = value.as_u64() {
                    let samples = self.0.entry(name.to_owned()).or_default();
                    samples.push((device.cloned(), n));
                }
            }
        }
    }
}

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (name, samples) in &self.0 {
            let extreme = EXTREMES.iter().any(|end| name.ends_with(end));
            let gauge = extreme || name.starts_with(LATENCIES) || GAUGES.contains(&name.as_str());
            let kind = if gauge {
                MetricType::Gauge
            } else {
                MetricType::Counter
            };
            let mut family = encoder.encode_descriptor(name, "See docs/metrics.md", None, kind)?;
            for (device, n) in samples {
                let Some((kind, id)) = device else {
                    // The only one.
                    encode(*n, gauge, family)?;
                    break;
                };
                let labels = [(*kind, id.as_str())];
                encode(*n, gauge, family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

fn encode(n: u64, gauge: bool, sample: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
    if gauge {
        ConstGauge::new(i64::try_from(n).unwrap_or(i64::MAX)).encode(sample)
    } else {
        ConstCounter::new(n).encode(sample)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn groups_become_families_and_devices_labels() {
        let totals = json!({
            "engine": {"name": "soft", "exits": {"link": 5}, "kept": {"in_file": 7, "hit_rate": 0.5}},
            "net": {"tx_count": 3},
            "net_eth0": {"tx_count": 1},
            "net_eth1": {"tx_count": 2},
            "latencies_us": {"pause_vm": 70},
            "block": {"read_count": 4},
            "block_root": {"read_count": 4, "read_agg": {"max_us": 9}},
        });
        let totals = serde_json::from_value(totals).unwrap();
        let text = text(totals);
        let lines: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with("# HELP"))
            .collect();
        assert_eq!(
            lines,
            [
                "# TYPE kombi_block_read_agg_max_us gauge",
                "kombi_block_read_agg_max_us{drive=\"root\"} 9",
                "# TYPE kombi_block_read_count counter",
                "kombi_block_read_count_total{drive=\"root\"} 4",
                "# TYPE kombi_engine_exits_link counter",
                "kombi_engine_exits_link_total 5",
                "# TYPE kombi_engine_kept_in_file gauge",
                "kombi_engine_kept_in_file 7",
                "# TYPE kombi_latencies_us_pause_vm gauge",
                "kombi_latencies_us_pause_vm 70",
                "# TYPE kombi_net_tx_count counter",
                "kombi_net_tx_count_total{interface=\"eth0\"} 1",
                "kombi_net_tx_count_total{interface=\"eth1\"} 2",
                "# EOF",
            ]
        );
    }
}
