//! The stages, in the order a packet meets them. A stage never calls another one.

pub mod affinity;
pub mod classify;
pub mod flow;
pub mod forward;
pub mod nat;
pub mod parse;
pub mod refuse;
pub mod select;
pub mod source_range;
