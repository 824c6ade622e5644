//! Stage 4: did this client have a backend before? ClientIP affinity with a timeout counted from its last new flow.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use lb_common::abi::{AffinityKey, AffinityValue};

use crate::{
    family::Family,
    maps::AFFINITY,
    stage::{classify::Service, select::Choice},
};

/// The client's backend, if it is still in the scope's list and was used within the timeout.
#[inline(always)]
pub fn lookup<F: Family>(key: &AffinityKey, service: &Service) -> Option<Choice<'static, F::Addr>> {
    // SAFETY: copied out at once.
    let last = unsafe { AFFINITY.get(key) }?;
    let (id, generation) = (last.backend_id, last.backend_generation);
    if now_secs().wrapping_sub(last.last_used_secs) >= service.affinity_secs {
        return None;
    }
    let backend = F::backend(id)?;
    (backend.flags & service.list_flag != 0 && backend.generation == generation)
        .then_some(Choice { id, backend })
}

/// Remembers the client's backend. A full table only loses affinity, never the flow.
#[inline(always)]
pub fn remember<A: Copy>(key: &AffinityKey, choice: &Choice<'_, A>) {
    let value = AffinityValue {
        backend_id: choice.id,
        backend_generation: choice.backend.generation,
        last_used_secs: now_secs(),
    };
    let _ = AFFINITY.insert(key, value, 0);
}

/// Seconds of the monotonic clock.
#[inline(always)]
fn now_secs() -> u32 {
    (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
}
