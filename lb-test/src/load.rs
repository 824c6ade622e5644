//! Many clients that go on for as long as a test wants them to, however long it takes.

use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::{Cluster, finish};

/// Running clients; they end when it is dropped.
pub struct Load {
    from: String,
    target: String,
    child: Option<Child>,
}

impl Load {
    /// Starts clients; `more` says how many, as `netapp load` has it.
    pub fn start(
        cluster: &Cluster,
        (from, served): (&str, Option<u8>),
        target: &str,
        more: &[&str],
    ) -> Result<Self> {
        let child = cluster.spawn_told(from, served, &[&["load", target], more].concat(), Stdio::piped())?;
        Ok(Self { from: from.into(), target: target.into(), child: Some(child) })
    }

    /// Ends the clients, of whom nobody may have lost anything.
    ///
    /// # Panics
    ///
    /// If one did.
    pub fn stop_unharmed(self) {
        let way = format!("{} -> {}", self.from, self.target);
        let report = self.stop().unwrap_or_else(|error| panic!("{error:#}"));
        for failure in ["resets", "timeouts", "wrong", "udp_lost"] {
            assert_eq!(report[failure], 0, "{way}: {report}");
        }
        assert!(report["requests"].as_u64().is_some_and(|requests| requests > 100), "{way}: {report}");
    }

    /// Ends the clients and returns what they counted.
    fn stop(mut self) -> Result<Value> {
        let mut child = self.child.take().context("it runs until now")?;
        drop(child.stdin.take());
        let counted = finish(child).with_context(|| format!("{} -> {}", self.from, self.target))?;
        Ok(serde_json::from_str(&counted)?)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
