//! The stages, in the order a packet meets them. A stage never calls another one.

pub mod parse;
pub mod classify;
pub mod source_range;
pub mod affinity;
pub mod select;
pub mod nat;
pub mod flow;
pub mod forward;
pub mod refuse;
