//! Every map. Sizes are defaults; the agent sets the real ones at load. Layouts are `lb_common::abi`.
//!
//! Statistics never change a verdict.

use aya_ebpf::{
    bindings::bpf_fib_lookup,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage},
    macros::btf_map,
};
use lb_common::{
    abi::{
        Addr4, Addr6, AffinityKey, AffinityValue, BackendValue, DeviceValue, FlowKey, FlowValue, FrontendKey,
        FrontendValue, NodeConfig, PeerValue, SockFlowKey, SockFlowValue, SourceRangeData, VipKey, VipValue,
    },
    hash::VIP_FILTER_BITS,
    outcome::METRICS_LEN,
};

/// Words of the VIP filter.
pub const VIP_FILTER_WORDS: usize = VIP_FILTER_BITS as usize / 64;

/// Written by the agent and, for backends of UDP flows, by open; read first of all: one bit per hashed address.
#[btf_map]
pub static VIP_FILTER: Array<u64, VIP_FILTER_WORDS> = Array::new();

/// Written by the agent, read by classify. Key: what clients dial.
#[btf_map]
pub static LB4_FRONTENDS: HashMap<FrontendKey<Addr4>, FrontendValue, 65536> = HashMap::new();
/// As `LB4_FRONTENDS`, IPv6.
#[btf_map]
pub static LB6_FRONTENDS: HashMap<FrontendKey<Addr6>, FrontendValue, 65536> = HashMap::new();

/// Written by the agent, read by classify when no frontend matches. Key: an address with frontends.
#[btf_map]
pub static LB4_VIPS: HashMap<VipKey<Addr4>, VipValue, 65536> = HashMap::new();
/// As `LB4_VIPS`, IPv6.
#[btf_map]
pub static LB6_VIPS: HashMap<VipKey<Addr6>, VipValue, 65536> = HashMap::new();

/// Written by the agent, read by select. Value: backend id; frontends own ranges of it.
#[btf_map]
pub static SLOTS: Array<u32, 1048576> = Array::new();

/// Written by the agent, read by select and, for UDP, by every packet. Index: backend id.
#[btf_map]
pub static LB4_BACKENDS: Array<BackendValue<Addr4>, 262144> = Array::new();
/// As `LB4_BACKENDS`, IPv6.
#[btf_map]
pub static LB6_BACKENDS: Array<BackendValue<Addr6>, 262144> = Array::new();

/// Written by the programs, recycled by the kernel. Key: five-tuple and direction; value: the whole rewrite.
#[btf_map]
pub static LB4_FLOWS: LruHashMap<FlowKey<Addr4>, FlowValue<Addr4>, 262144> = LruHashMap::new();
/// As `LB4_FLOWS`, IPv6.
#[btf_map]
pub static LB6_FLOWS: LruHashMap<FlowKey<Addr6>, FlowValue<Addr6>, 262144> = LruHashMap::new();

/// Written by the agent, read by classify and flow. Key: packets of a connection that netfilter translates, as they come
/// in: a client's datagrams, or replies to an address and port that netfilter masqueraded to.
#[btf_map]
pub static LB4_FOREIGN: HashMap<FlowKey<Addr4>, u32, 65536> = HashMap::new();
/// As `LB4_FOREIGN`, IPv6.
#[btf_map]
pub static LB6_FOREIGN: HashMap<FlowKey<Addr6>, u32, 65536> = HashMap::new();

/// Written and read by affinity. Key: client and service port.
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, AffinityValue, 65536> = LruHashMap::new();

/// Written by the agent, read by source_range. Key: service port id and source network.
#[btf_map]
pub static LB4_SOURCE_RANGES: LpmTrie<SourceRangeData<Addr4>, u32, 16384> = LpmTrie::new();
/// As `LB4_SOURCE_RANGES`, IPv6.
#[btf_map]
pub static LB6_SOURCE_RANGES: LpmTrie<SourceRangeData<Addr6>, u32, 16384> = LpmTrie::new();

/// Written by the agent: facts about this node.
#[btf_map]
pub static NODE: Array<NodeConfig, 1> = Array::new();

/// Written by the agent: devices packets may leave by. Key: ifindex.
#[btf_map]
pub static DEVICES: HashMap<u32, DeviceValue, 1024> = HashMap::new();

/// Written by every program, read by the agent. Index: hook and outcome.
#[btf_map]
pub static METRICS: PerCpuArray<u64, { METRICS_LEN as usize }> = PerCpuArray::new();

/// What is too big for the BPF stack's 512 bytes while a flow is made or refreshed.
#[repr(C)]
pub struct Scratch<A> {
    /// The key of a new flow.
    pub key: FlowKey<A>,
    /// The other direction's key.
    pub twin_key: FlowKey<A>,
    /// The forward entry of a new flow.
    pub entry: FlowValue<A>,
    /// The other direction's entry.
    pub twin: FlowValue<A>,
    /// A question for the kernel's FIB.
    pub fib: bpf_fib_lookup,
}

/// One CPU's scratch space. Not pinned: nothing in it outlives a program run.
#[btf_map]
pub static LB4_SCRATCH: PerCpuArray<Scratch<Addr4>, 1> = PerCpuArray::new();
/// As `LB4_SCRATCH`, IPv6.
#[btf_map]
pub static LB6_SCRATCH: PerCpuArray<Scratch<Addr6>, 1> = PerCpuArray::new();

/// Written by connect, read by recvmsg and getpeername; dies with the socket.
#[btf_map]
pub static SOCK_PEERS: SkStorage<PeerValue> = SkStorage::new();

/// Written by connect if connections are to be reset, read by the agent: UDP sockets by their cookie. The kernel lists a
/// socket's storage with TCP sockets only (`net/ipv4/inet_diag.c: inet_sk_diag_fill`).
#[btf_map]
pub static SOCK_CONNECTED: LruHashMap<u64, PeerValue, 65536> = LruHashMap::new();

/// Written by sendmsg, read by sendmsg and recvmsg: unconnected UDP sockets.
#[btf_map]
pub static SOCK_FLOWS: LruHashMap<SockFlowKey, SockFlowValue, 65536> = LruHashMap::new();

/// Written by the agent, read by the tracing build only: which packets to log.
#[cfg(feature = "trace")]
#[btf_map]
pub static TRACE: Array<lb_common::abi::TraceFilter, 1> = Array::new();

/// This node's facts; all zero until the agent has written them.
#[inline(always)]
pub fn node() -> Option<&'static NodeConfig> {
    NODE.get(0)
}
