//! The contract between the kernel side (`lb-ebpf`) and the user side (`lb-agent`), `no_std` and free of I/O.
//!
//! # Byte order, once
//!
//! Addresses are byte arrays in network order. Ports, ids, counters and everything else are native integers, so
//! that `bpftool map dump` shows `"port": 80`. Packets are converted on entry and on exit, nowhere else. A checksum
//! is never converted: one's-complement sums don't care as long as both operands have the packet's order (RFC 1071
//! §2.B).
//!
//! # Glossary
//!
//! *frontend*: (address, port, protocol) that clients dial. *scope*: external (packets from outside) or internal
//! (this node's pods and processes); each has its own list of backends. *slot*: one place in such a list. *backend*:
//! an endpoint with an id. *flow*: one direction of a connection as seen at one hook, with its whole rewrite.

#![no_std]

pub mod abi;
pub mod csum;
pub mod hash;
pub mod net;
pub mod outcome;
pub mod tcp;
