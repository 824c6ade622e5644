//! What packet tests, netns tests, the demo and the benchmarks share.

use std::{
    io::Write,
    thread,
    time::{Duration, Instant},
};

pub mod apiserver;
pub mod cluster;
pub mod e2e;
pub mod flows;
pub mod load;
pub mod netns;
pub mod object;
pub mod packet;
pub mod plot;
pub mod talk;
pub mod world;

/// A time limit as this machine needs it: the usual one, times `LB_TEST_SLOW`, which is set where all is slower (the
/// test VM). Not for what the kernel times itself, such as a retransmission.
pub fn patience(limit: Duration) -> Duration {
    let factor = std::env::var("LB_TEST_SLOW").ok().and_then(|text| text.parse().ok());
    limit * factor.unwrap_or(1)
}

/// Waits for something to hold.
///
/// # Panics
///
/// If it doesn't within `limit`, as this machine needs it.
pub fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience(limit);
    while !holds() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Are we in the test VM? Its kernel alone has IPVS.
pub fn is_vm() -> bool {
    std::env::var_os("IN_VM").is_some()
}

/// Are we in the test VM? If not, says that this test needs it.
pub fn in_vm(test: &str) -> bool {
    let inside = is_vm();
    if !inside {
        // Not by print!, which libtest captures.
        let _ = writeln!(std::io::stdout(), "\nSKIP {test}: runs in the test VM only (cargo xtask test vm)");
    }
    inside
}
