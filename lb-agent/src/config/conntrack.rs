//! Sets conntrack up, as kube-proxy does (`cmd/kube-proxy/app/conntrack.go`).

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use tracing::{debug, info};

/// How many flows there may be. It counts for all network namespaces, and only the first can write it.
pub const MAX_CONNECTIONS: &str = "nf_conntrack_max";

/// kube-proxy's defaults (`pkg/proxy/apis/config/v1alpha1/defaults.go`): [`MAX_CONNECTIONS`] for each CPU…
pub const MAX_PER_CORE: u32 = 32 * 1024;
/// …and at least;
pub const MAX_AT_LEAST: u32 = 128 * 1024;
/// when connections are forgotten that say nothing…
pub const TCP_ESTABLISHED: Duration = Duration::from_secs(24 * 3600);
/// …and such that one side has closed.
pub const TCP_CLOSE_WAIT: Duration = Duration::from_secs(3600);

/// A sysctl below `net/netfilter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub value: u64,
    /// A larger value stays.
    pub at_least: bool,
}

impl Sysctl {
    /// One that is to have this value.
    pub fn exactly(name: &'static str, value: u64) -> Self {
        Self { name, value, at_least: false }
    }
}

/// Where the kernel has them.
struct Places {
    sysctls: PathBuf,
    /// Of conntrack's module.
    parameters: PathBuf,
}

/// Sets them in this network namespace. Returns whether all are there: without conntrack, which rules may load, there are
/// none, and this is to be called again then.
pub fn set(sysctls: &[Sysctl]) -> bool {
    let places = Places {
        sysctls: "/proc/sys/net/netfilter".into(),
        parameters: "/sys/module/nf_conntrack/parameters".into(),
    };
    let refused = places.set(sysctls);
    // A container that is not privileged sees them read-only; nothing here depends on them.
    if !refused.is_empty() {
        info!(sysctls = refused.join(", "), "left as they are");
    }
    sysctls.iter().all(|sysctl| places.sysctls.join(sysctl.name).exists())
}

impl Places {
    /// Sets them; returns what could not be.
    fn set(&self, sysctls: &[Sysctl]) -> Vec<String> {
        let mut refused = Vec::new();
        for sysctl in sysctls {
            let Sysctl { name, value, at_least } = *sysctl;
            refused.extend(write(
                &self.sysctls.join(name),
                value,
                at_least,
                &format!("net.netfilter.{name}"),
            ));
            if name == MAX_CONNECTIONS {
                // Four flows a bucket at most.
                let buckets = self.parameters.join("hashsize");
                refused.extend(write(&buckets, value / 4, true, "nf_conntrack's hashsize"));
            }
        }
        refused
    }
}

/// Writes a number if it is another; says why if that can't be.
fn write(path: &Path, value: u64, at_least: bool, named: &str) -> Option<String> {
    let Some(now) = read(path) else {
        debug!(named, "not there: conntrack is not loaded");
        return None;
    };
    if now == value || at_least && now > value {
        return None;
    }
    // The kernel rounds up.
    let written = fs::write(path, value.to_string());
    written.err().map(|error: io::Error| format!("{named}={value} ({error}, is {now})"))
}

fn read(path: &Path) -> Option<u64> {
    Some(fs::read_to_string(path).ok()?.trim().parse().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_set_and_what_was_made_larger_stays() {
        let root = std::env::temp_dir().join(format!("lb-conntrack-{}", std::process::id()));
        fs::create_dir_all(&root).expect("a folder");
        let places = Places { sysctls: root.clone(), parameters: root.clone() };
        let max = |value, at_least| Sysctl { name: MAX_CONNECTIONS, value, at_least };
        let all = |max| [max, Sysctl::exactly("nf_conntrack_udp_timeout", 30)];
        let shown = || {
            ["nf_conntrack_max", "hashsize", "nf_conntrack_udp_timeout"].map(|name| read(&root.join(name)))
        };

        assert!(places.set(&all(max(1000, true))).is_empty());
        assert_eq!(shown(), [None; 3], "conntrack is not loaded");
        for (name, value) in
            [("nf_conntrack_max", "800\n"), ("hashsize", "200\n"), ("nf_conntrack_udp_timeout", "60\n")]
        {
            fs::write(root.join(name), value).expect("a file");
        }
        for (max, expected) in [
            (max(1000, true), [1000, 250, 30]),
            (max(400, true), [1000, 250, 30]),
            (max(400, false), [400, 250, 30]),
            (max(2000, false), [2000, 500, 30]),
        ] {
            assert!(places.set(&all(max)).is_empty());
            assert_eq!(shown(), expected.map(Some), "{max:?}");
        }
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn what_can_not_be_written_is_named() {
        let places = Places { sysctls: "/proc/self".into(), parameters: "/proc/self".into() };
        // Written by nobody.
        let refused = places.set(&[Sysctl::exactly("sessionid", 1)]);
        assert_eq!(refused.len(), 1);
        assert!(refused[0].starts_with("net.netfilter.sessionid=1 ("), "{refused:?}");
    }
}
