//! What packet tests, netns tests, the demo and the benchmarks share.

pub mod cluster;
pub mod flows;
pub mod netns;
pub mod object;
pub mod packet;
