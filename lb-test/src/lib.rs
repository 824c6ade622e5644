//! What packet tests, netns tests, the demo and the benchmarks share.

use std::{io::Write, time::Duration};

pub mod cluster;
pub mod flows;
pub mod netns;
pub mod object;
pub mod packet;
pub mod talk;

/// A time limit as this machine needs it: the usual one, times `LB_TEST_SLOW`, which is set where all is slower (the
/// test VM). Not for what the kernel times itself, such as a retransmission.
pub fn patience(limit: Duration) -> Duration {
    let factor = std::env::var("LB_TEST_SLOW").ok().and_then(|text| text.parse().ok());
    limit * factor.unwrap_or(1)
}

/// Are we in the test VM? If not, says that this test needs it.
pub fn in_vm(test: &str) -> bool {
    let inside = std::env::var_os("IN_VM").is_some();
    if !inside {
        // Not by print!, which libtest captures.
        let _ = writeln!(std::io::stdout(), "\nSKIP {test}: runs in the test VM only (cargo xtask test vm)");
    }
    inside
}
