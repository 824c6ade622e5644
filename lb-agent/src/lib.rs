//! The node agent's parts, as a library so that tests can drive them. In reading order: [`run`] wires a [`source`]
//! of objects, by way of [`convert`] and `lb_core::compile`, to a [`datapath`]; [`netlink`] says what the node is.

pub mod args;
pub mod commands;
pub mod config;
pub mod conntrack;
pub mod convert;
pub mod datapath;
pub mod drift;
pub mod kube_proxy;
pub mod log;
pub mod netlink;
pub mod nfacct;
pub mod nfnetlink;
pub mod nlmsg;
pub mod print;
pub mod probe;
pub mod reconcile;
pub mod render;
pub mod reset;
pub mod retire;
pub mod room;
pub mod run;
pub mod scratch;
pub mod serve;
pub mod sock_diag;
pub mod source;
pub mod told;
pub mod trace;
