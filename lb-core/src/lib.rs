//! What a node should serve, decided once, by pure code.
//!
//! No clock, no environment, no file system, no async: inputs come in as arguments, unusual input yields a
//! [`model::Warning`], never an error. The agent feeds [`model::Event`]s to a [`compile::Compiler`] and hands its
//! [`table::ServiceTable`] to a datapath.

#![forbid(unsafe_code)]

// So that random clusters (`tests/agreement`) serve unit tests too.
#[cfg(test)]
extern crate self as lb_core;

pub mod compile;
mod display;
pub mod evaluate;
pub mod flow;
pub mod ids;
pub mod model;
pub mod oracle;
mod pods;
pub mod reconcile;
pub mod rules;
pub mod snapshot;
pub mod synthetic;
pub mod table;
