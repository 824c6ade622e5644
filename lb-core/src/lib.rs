//! What a node should serve, decided once, by pure code.
//!
//! No clock, no environment, no file system, no async: inputs come in as arguments, unusual input yields a
//! [`model::Warning`], never an error. The agent feeds [`model::Event`]s in and hands [`table::ServiceTable`]s to a
//! datapath.

#![forbid(unsafe_code)]

pub mod model;
pub mod table;
