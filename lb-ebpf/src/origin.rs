//! Where a packet comes from decides which scope of a frontend serves it and whose address the backend sees.

use lb_common::abi::{BackendValue, FrontendValue, role};

use crate::stage::{classify, classify::Service, nat, nat::Source, parse::Flow};

/// An origin, as a type that is never made.
pub trait Origin {
    /// The frontend's scope for packets from here.
    fn scope(frontend: &FrontendValue) -> Service;
    /// What becomes of the source.
    fn source<A: Copy + PartialEq>(flow: &Flow<A>, service: &Service, backend: &BackendValue<A>) -> Source;
    /// The role of the flow's forward entry.
    fn role(source: Source) -> u8;
}

/// An external device.
pub enum Outside {}
/// A pod of this node.
pub enum Pod {}

impl Origin for Outside {
    #[inline(always)]
    fn scope(frontend: &FrontendValue) -> Service {
        classify::external(frontend)
    }
    #[inline(always)]
    fn source<A: Copy + PartialEq>(_: &Flow<A>, service: &Service, backend: &BackendValue<A>) -> Source {
        nat::from_outside(service, backend)
    }
    #[inline(always)]
    fn role(source: Source) -> u8 {
        if source == Source::Keep { role::TO_LOCAL } else { role::TO_REMOTE }
    }
}

impl Origin for Pod {
    #[inline(always)]
    fn scope(frontend: &FrontendValue) -> Service {
        classify::internal(frontend)
    }
    #[inline(always)]
    fn source<A: Copy + PartialEq>(flow: &Flow<A>, service: &Service, backend: &BackendValue<A>) -> Source {
        nat::from_pod(flow, service, backend)
    }
    #[inline(always)]
    fn role(source: Source) -> u8 {
        match source {
            Source::Keep => role::FROM_POD,
            Source::Masquerade => role::TO_REMOTE,
            Source::Hairpin => role::HAIRPIN,
        }
    }
}
