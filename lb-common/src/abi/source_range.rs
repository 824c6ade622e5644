//! `loadBalancerSourceRanges` (`LB4_SOURCE_RANGES`, `LB6_SOURCE_RANGES`): LPM tries over (service port, source).

use super::pod_for_both;

/// The data of an LPM key; its prefix length is 32 (the whole service id) plus the range's own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceRangeData<A> {
    /// Service port id. Always matched whole, so its byte order doesn't matter.
    pub service_id: u32,
    /// Address or network.
    pub addr: A,
}

pod_for_both! {
    SourceRangeData: 8, 20;
}
