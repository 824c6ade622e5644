//! The eBPF datapath: loads the programs, fills their maps, attaches them, and can leave and come back without a gap.
//!
//! Everything that must outlive the agent is pinned under `--bpf-root`, in a directory of its layout version.

pub mod apply;
pub mod attach;
pub mod drain;
pub mod foreign;
pub mod gone;
pub mod grow;
pub mod inspect;
pub mod load;
pub mod maps;
pub mod objects;
pub mod plan;
pub mod sizes;
pub mod sys;
