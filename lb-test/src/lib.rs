//! What packet tests, netns tests, the demo and the benchmarks share.

pub mod netns;
pub mod cluster;
