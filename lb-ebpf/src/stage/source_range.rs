//! Stage 3: may this source use the frontend? Only load-balancer frontends with `loadBalancerSourceRanges` ask.

use lb_common::outcome::Outcome;

use crate::{
    family::Family,
    stage::{classify::Service, parse::Flow},
    verdict::{End, Stage},
};

/// Stops with a drop if the source is in none of the service's ranges.
#[inline(always)]
pub fn check<F: Family>(flow: &Flow<F::Addr>, service: &Service) -> Stage<()> {
    if service.source_ranges && !F::source_allowed(service.id, flow.saddr) {
        return Err(End::drop(Outcome::DropSourceRange));
    }
    Ok(())
}
