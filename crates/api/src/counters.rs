//! How often each request came, and how often it was refused; under Firecracker's names.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::routes::{Method, ROUTES};

/// Counts requests. Names are Firecracker's: group by method, `NAME_count` and
/// `NAME_fails`.
#[derive(Debug)]
pub struct Counters {
    routes: Vec<[AtomicU64; 2]>,
    deprecated: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            routes: ROUTES.iter().map(|_| Default::default()).collect(),
            deprecated: AtomicU64::new(0),
        }
    }
}

impl Counters {
    pub(crate) fn count(&self, route: usize, refused: bool) {
        if let Some([all, fails]) = self.routes.get(route) {
            all.fetch_add(1, Ordering::Relaxed);
            fails.fetch_add(refused.into(), Ordering::Relaxed);
        }
    }

    pub(crate) fn count_deprecated(&self) {
        self.deprecated.fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted since the start, by group and name.
    pub fn totals(&self) -> BTreeMap<&'static str, BTreeMap<String, u64>> {
        let mut groups: BTreeMap<_, BTreeMap<String, u64>> = BTreeMap::new();
        for (route, counts) in ROUTES.iter().zip(&self.routes) {
            let (group, fails) = match route.method {
                Method::Get => ("get_api_requests", false),
                Method::Put => ("put_api_requests", true),
                Method::Patch => ("patch_api_requests", true),
                Method::Delete => ("delete_api_requests", true),
            };
            let [all, refused] = counts.each_ref().map(|n| n.load(Ordering::Relaxed));
            let names = groups.entry(group).or_default();
            *names.entry(format!("{}_count", route.metric)).or_default() += all;
            if fails {
                *names.entry(format!("{}_fails", route.metric)).or_default() += refused;
            }
        }
        let deprecated = self.deprecated.load(Ordering::Relaxed);
        let name = "deprecated_http_api_calls".to_owned();
        groups.insert("deprecated_api", BTreeMap::from([(name, deprecated)]));
        groups
    }
}
