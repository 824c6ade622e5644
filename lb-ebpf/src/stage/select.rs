//! Stage 5: which backend? The slot that the flow's hash falls on.

use lb_common::{
    abi::{BackendValue, backend_flags},
    hash,
    outcome::Outcome,
};

use crate::{
    family::Family,
    maps::SLOTS,
    stage::classify::Service,
    verdict::{End, Stage},
};

/// A backend and its id.
#[derive(Clone, Copy)]
pub struct Choice<'a, A> {
    /// Backend id.
    pub id: u32,
    /// The backend, in its map.
    pub backend: &'a BackendValue<A>,
}

/// The backend for a new flow with this hash.
///
/// Stops with a refusal or a drop when the scope has none.
#[inline(always)]
pub fn backend<F: Family>(service: &Service, flow_hash: u32) -> Stage<Choice<'static, F::Addr>> {
    if service.slots.count == 0 {
        return Err(match service.none_drops {
            true => End::drop(Outcome::DropNoLocalEndpoints),
            false => End::refuse(Outcome::RefuseNoEndpoints),
        });
    }
    let slot = service.slots.first + hash::scale(flow_hash, service.slots.count);
    SLOTS
        .get(slot)
        .and_then(|id| Some(Choice { id: *id, backend: F::backend(*id)? }))
        .filter(|choice| choice.backend.flags & backend_flags::ALIVE != 0)
        .ok_or(End::drop(Outcome::DropNoBackend))
}
