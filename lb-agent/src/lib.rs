//! The node agent's parts, as a library so that tests can drive them. In reading order: [`run`] wires a [`source`]
//! of objects, by way of [`convert`] and `lb_core::compile`, to a [`datapath`]; [`netlink`] says what the node is.

pub mod run;
pub mod source;
pub mod convert;
pub mod datapath;
pub mod netlink;
pub mod args;
pub mod commands;
pub mod print;
pub mod serve;
pub mod trace;
