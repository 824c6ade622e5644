//! The node agent's parts, as a library so that tests can drive them.

pub mod datapath;
pub mod netlink;
