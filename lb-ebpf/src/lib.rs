//! The packet path. Read it in this order:
//!
//! 1. [`pipeline`]: what happens to a packet, as a list of stages, one function per place it can enter.
//! 2. [`stage`]: the stages. Each decides one thing from plain values and returns [`verdict::Stage`].
//! 3. [`sock`]: the same decisions for socket calls, which have no packet.
//! 4. [`family`], [`ctx`]: what differs between IPv4 and IPv6, and between XDP and tc.
//! 5. [`packet`], [`maps`]: the only pointer arithmetic, the only map definitions.
//!
//! `bin/*.rs` are entry points: they build a context, run a pipeline and turn its verdict into the hook's action.

#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg(target_arch = "bpf")]
#![feature(asm_experimental_arch)]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "helpers and map values are unsafe by signature; packet.rs and maps.rs argue the ones that matter"
)]

pub mod count;
pub mod ctx;
pub mod family;
pub mod maps;
pub mod origin;
pub mod packet;
pub mod pipeline;
pub mod sock;
pub mod stage;
pub mod trace;
pub mod verdict;
